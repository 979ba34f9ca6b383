"""The table: each row is what its name says, on texts and models whose answer is known."""

import dataclasses
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG

from steerling_min import Config, Steerling, Steering, load
from steerling_min.attribution import Attribution
from steerling_min.files.tokenizer import RANK_FILE, Tokenizer
from steerling_min.training import evaluate, world
from steerling_min.training.data import Batch, Stories, Stream, endless_stories, pack
from steerling_min.training.evaluate import (HELD_OUT, MEASURES, heroes_kept, held_out_loss,
                                             in_units, measure_text, new_chunks,
                                             per_character, print_table, shows, steered, tokens_of,
                                             topic_prompts, word_prompts)
from steerling_min.training.measures import Seen
from steerling_min.training.world import (CONCEPT_IDS, CONCEPTS, TOPICS, WORDS, recognise,
                                          split_sentences, write_story)

STORIES = Stories(0)
TOKENIZER = STORIES.tokenizer


def held_out_stories(n):
    rng = random.Random(HELD_OUT)
    return [write_story(rng) for _ in range(n)]


def decode(tokens):
    return TOKENIZER.decode(tokens, specials=True)


def answer(monkeypatch, text):
    """Have every prompt continued by text(prompt's text, n, steering); returns the calls so far:
    (prompt's text, n, seed, steering)."""
    calls = []

    def write(model, tokenizer, prompt, n, seed, steering=None):
        assert tokenizer.decode([300]) == TOKENIZER.decode([300]), "a tokenizer, not the model"
        calls.append((decode(prompt), n, seed, steering))
        return decode(prompt), text(decode(prompt), n, steering)
    monkeypatch.setattr(evaluate, "write", write)
    return calls


# ---- held-out text -------------------------------------------------------------------------------


def test_training_never_reads_what_is_measured():
    measured = {story.chunks[0].text for story in held_out_stories(50)}
    for step in (*range(8), "counted", "held out"):
        text = decode(STORIES.stream(step, 2000).tokens.tolist())
        assert not any(first in text for first in measured), f"training reads it at step {step}"


def test_the_held_out_loss_is_that_of_hidden_tokens():
    """A model that is sure, by 20 nats, that each token is what it reads there: a mask is wrong."""
    E = 20 * torch.eye(CONFIG.vocab_size)

    class Copies:
        lm_head = staticmethod(lambda hidden: hidden)

        def __call__(self, tokens):
            return E[tokens]
    model = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), transformer=Copies())
    batch = Batch(torch.randint(0, 15, (4, 64)), torch.zeros(4, 64).long(), torch.tensor([[0]]))
    assert held_out_loss(model, batch) == pytest.approx(20, abs=1e-4), "at masks, and only there"
    read_only = batch._replace(learnt=torch.zeros(4, 64, dtype=torch.bool))
    assert held_out_loss(model, read_only) == 0, "what is only read is never masked"
    torch.manual_seed(0)
    model = Steerling(CONFIG)
    assert held_out_loss(model, batch) == held_out_loss(model, batch), "the same noise every time"


# ---- language ------------------------------------------------------------------------------------


def test_texts_are_written_as_the_table_says(monkeypatch):
    """Aligned windows, one token per step, and no repetition penalty: stories repeat names."""
    asked = []
    monkeypatch.setattr(evaluate, "generate", lambda model, prompts, n, **options: (
        asked.append((prompts, n, options)), torch.tensor([prompts[0] + TOKENIZER.encode(" rope")])
        )[1])
    prompt = [TOKENIZER.bos_token_id, *TOKENIZER.encode("A")]
    found = evaluate.write("model", TOKENIZER, prompt, 7, 5, Steering.amplify(2))
    assert found == ("<|bos|>A", " rope"), "the prompt's text and the new text, apart"
    assert asked == [([prompt], 7, dict(align=True, repetition_penalty=1.0, seed=5,
                                        steering=Steering.amplify(2)))], (
        "all else is generate's default")


def test_new_chunks_are_whole_sentences_written_after_the_prompt():
    before = "<|bos|>The end. One sentence. Half of"
    after = " a sentence.<|endofchunk|>Another one. Cut off in the mid"
    assert new_chunks(before, after) == [["Half of a sentence."], ["Another one."]]
    assert new_chunks("<|bos|>A b.", " C d.<|endofchunk|>") == [["C d."]]
    assert new_chunks("<|bos|>A b.<|endofchunk|>", "C d") == [], "the last is cut off"
    assert new_chunks("A. A.", " A. A. B") == [["A.", "A."]], "equal sentences are told apart"


INTRO = "<|bos|>The old sailor Mara lived near the mill with a dog named Juno and a tin box."


@pytest.mark.parametrize("before, after, kept", [
    (INTRO, " Hugo smiled.<|endofchunk|>Mara sang. Ines wept.<|endofchunk|>Mara", [True, False]),
    (INTRO + "<|endofchunk|>Mara sang.<|endofchunk|>", "Hugo sang. A", [False]),
    (INTRO + "<|endofchunk|>Ma", "ra sang. Nobody sang. Mara", [True]),
    (INTRO + "<|endofchunk|>", "Ines. A", [False]),
    (INTRO + "<|endofchunk|>", "Mara sang.<|endoftext|><|bos|>The old sailor Hugo lived near the "
     "mill.<|endofchunk|>Ines sang. A", [True]),  # the next story has a hero of its own
    ("<|bos|>The", INTRO[11:] + "<|endofchunk|>Mara sang. Hugo sang. A", [True, False]),
    ("<|bos|>", "Nobody lived.<|endofchunk|>Mara sang. A", [False]),
    ("<|bos|>", "<|endofchunk|>Mara sang. A", [False]),
])
def test_a_kept_name_is_the_storys_in_new_sentences_of_later_chunks(before, after, kept):
    assert heroes_kept(before, after) == kept, (
        "not the prompt's sentences, which are right by themselves, nor the first chunk's")


def test_language_counts_new_sentences_and_the_names_in_them(monkeypatch):
    monkeypatch.setattr(evaluate, "write", lambda *args: (INTRO + "<|endofchunk|>", (
        "Hugo sat. Nobody sat. Nobody ran. Mara smiled all the way home. The heart of Mara beat "
        "fast. A")))
    found = evaluate.language(None, TOKENIZER, 3)
    assert found["sentences in the grammar"] == 2 / 5, "not the prompt's, nor the cut-off one"
    assert found["hero's name kept"] == 2 / 3, "Hugo, Mara, Mara"


def test_texts_continue_the_beginnings_of_held_out_stories(monkeypatch):
    calls = answer(monkeypatch, lambda prompt, n, steering: "")
    for _ in range(2):
        evaluate.language(None, TOKENIZER, 1)
    prompt, n, seed, steering = calls[0]
    assert decode(tokens_of(held_out_stories(1)[0], TOKENIZER)).startswith(prompt)
    assert (n, steering) == (128, None) and calls[0] == calls[1], "the same prompts every time"


def test_prompts_are_cut_at_1_to_100_tokens(monkeypatch):
    calls = answer(monkeypatch, lambda prompt, n, steering: "")
    evaluate.language(None, TOKENIZER, 60)
    lengths = [len(tokens) for tokens in (
        TOKENIZER.encoding.encode(prompt, allowed_special="all") for prompt, *_ in calls)]
    assert 1 <= min(lengths) < 10 and 90 < max(lengths) <= 100
    assert len({seed for _, _, seed, _ in calls}) == 60, "each text has its own draws"


# ---- likelihood ----------------------------------------------------------------------------------


def test_the_bound_is_that_of_all_tokens_but_the_first(monkeypatch):
    """A model that pays 100 nats for <|bos|> and 1 or 2 for any other token."""
    def costs(tokens):
        return torch.where(tokens == TOKENIZER.bos_token_id, 100.0, 1.0 + tokens % 2)

    def bound(model, tokens, asked, samples, generator):
        return costs(tokens)[asked].mean()[None]
    monkeypatch.setattr(evaluate, "likelihood_bound", bound)
    found = evaluate.likelihood(SimpleNamespace(device="cpu"), TOKENIZER, 3)
    stories = held_out_stories(3)
    paid = [costs(torch.tensor(tokens_of(story, TOKENIZER)[1:])) for story in stories]
    assert found["bound, nats per token"] == pytest.approx(torch.cat(paid).mean().item()), (
        "of all stories' tokens together; <|bos|> is given, and no token")
    lost = [x.sum().item() + story.log_prob for x, story in zip(paid, stories)]
    assert found["likelihood bound / entropy"] == pytest.approx(
        (world.entropy() + sum(lost) / 3) / world.entropy()), (
        "what the model loses to the grammar on the same stories, on top of the entropy")


def test_a_model_as_good_as_the_grammar_has_a_ratio_of_1(monkeypatch):
    stories = iter(held_out_stories(3))
    monkeypatch.setattr(evaluate, "likelihood_bound", lambda model, tokens, *rest: torch.tensor(
        [-next(stories).log_prob / (tokens.shape[1] - 1)], dtype=torch.float64))
    found = evaluate.likelihood(SimpleNamespace(device="cpu"), TOKENIZER, 3)
    assert found["likelihood bound / entropy"] == pytest.approx(1)


def test_a_models_likelihood_is_below_that_of_guessing(monkeypatch):
    """With all embeddings 0 every token costs ln V: the sampler of the bound, for real."""
    model = Steerling(Config.tiny(TOKENIZER.vocab_size))
    torch.nn.init.zeros_(model.transformer.tok_emb.weight)
    found = evaluate.likelihood(model, TOKENIZER, 1)
    assert found["bound, nats per token"] == pytest.approx(math.log(TOKENIZER.vocab_size))


class EveryWay:
    """In place of a random generator: it takes every way through a program, one after the other.

    A way is a list of choices [taken, of how many].
    """

    def __init__(self):
        self.way, self.at = [], 0

    def take(self, n):
        if self.at == len(self.way):
            self.way.append([0, n])
        self.at += 1
        return self.way[self.at - 1][0]

    def choice(self, options):
        return options[self.take(len(options))]

    def random(self):
        return (0.0, 1.0 - 1e-9)[self.take(2)]  # below any probability, and above

    def again(self):
        """Begin the next way; False after the last."""
        self.at = 0
        while self.way and self.way[-1][0] == self.way[-1][1] - 1:
            self.way.pop()
        if self.way:
            self.way[-1][0] += 1
        return bool(self.way)


@pytest.fixture
def small_world(monkeypatch):
    """All stories of a world whose tables are so short that they can be counted."""
    def first(table, *lengths):
        return {name: words[:n] for (name, words), n in zip(table.items(), lengths)}
    topics = {name: (nouns[:n], templates[:m])
              for (name, (nouns, templates)), n, m in zip(TOPICS.items(), (2, 1, 1), (1, 2, 1))}
    small = {"TOPICS": topics, "CHUNKS": (1, 2), "KEEP_TOPIC": 0.3,
             "MOODS": first(world.MOODS, 1, 2), "FORMS": first(world.FORMS, 1),
             "STORY_SLOTS": {slot: words[:1] for slot, words in world.STORY_SLOTS.items()},
             "SENTENCE_SLOTS": {slot: words[:1] for slot, words in world.SENTENCE_SLOTS.items()}}
    small["STORY_SLOTS"]["hero"] = ["Mara", "Hugo"]
    small["SENTENCE_SLOTS"]["adj"] = ["pale", "rusty"]
    for name, table in small.items():
        monkeypatch.setattr(world, name, table)
    rng, stories = EveryWay(), []
    while True:
        stories.append(write_story(rng))
        if not rng.again():
            return stories


def test_entropy_is_the_surprise_of_all_stories_there_are(small_world):
    texts = {"<|endofchunk|>".join(chunk.text for chunk in story.chunks) for story in small_world}
    assert len(texts) == len(small_world) > 1000, "no story can be drawn in two ways"
    p = [math.exp(story.log_prob) for story in small_world]
    assert sum(p) == pytest.approx(1), "log_prob is a probability's"
    assert world.entropy() == pytest.approx(-sum(q * math.log(q) for q in p)), (
        "exact: the measure's denominator may not be off by a single choice")


# ---- concepts ------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The rows of `concepts` for what a model made of four levels of noise, made up by hand."""
    labels = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]]).bool()
    sure = labels.float()
    parts = torch.tensor([[3., 0, 1], [1, 1, 2], [-6, 1, -1], [0, 2, 2]])
    A, B = torch.tensor([1., 1, -1, -1]), torch.tensor([1., -1, 1, -1])
    level = {  # what is found, of four tokens: right with epsilon, and without
        0: (sure, [], []),
        0.15: (-sure, [1, 1, 1, 1], [1, 1, 0, 1]),
        0.5: (0 * sure, [1, 1, 1, 0], [0, 1, 0, 0]),
        None: (-sure, [1, 1, 1, 1], [0, 0, 1, 0])}
    calls = []

    def look(model, stream, named, t, n):
        calls.append((decode(stream.tokens[:100].tolist()), t, n))
        present, right, without = level[t]
        at, wrong = t is None, torch.full((4, 3), 9.0)
        return Seen(present, labels, torch.tensor(right).bool(), torch.tensor(without).bool(),
                    parts if at else wrong, torch.tensor([True, False, True, False]),
                    torch.stack([A, 0 * A], 1) if at else wrong,
                    torch.stack([A + B, 0 * A], 1) if at else wrong)
    monkeypatch.setattr(evaluate, "look", look)
    found = evaluate.concepts(Steerling(Config.tiny(TOKENIZER.vocab_size)), TOKENIZER, 5, 3000)
    return found, calls


def test_all_that_is_measured_is_held_out(measured):
    text = decode(tokens_of(held_out_stories(1)[0], TOKENIZER))
    for start, t, n in measured[1]:
        assert text.startswith(start[:100]) and n == 5, f"at t = {t}"
    assert {t for _, t, _ in measured[1]} == {0, 0.15, 0.5, None}


@pytest.mark.parametrize("row, expected", {
    "detection: macro AUC": 1.0,                             # of clean chunks
    "... half of the tokens masked": 0.5,
    "... concepts left out: in no chunk, or in all": 1,
    "separation: cross-covariance": 1 / math.sqrt(2),        # as in test_measures.py
    # known: 3/4, 1/4, 6/8, 0; discovered: 0, 1/4, 1/8, 1/2; epsilon: 1/4, 1/2, 1/8, 1/2
    "contribution: known + discovered (Eq. 22)": (6 + 4 + 7 + 4) / 32,
    "... known": (6 + 2 + 6 + 0) / 32,
    "... known, at content words": (6 + 6) / 16,             # tokens 0 and 2
    "... known, at all other tokens": (2 + 0) / 16,
    "... discovered": (0 + 2 + 1 + 4) / 32,
    "... epsilon": (2 + 4 + 1 + 4) / 32,
    "accuracy lost without epsilon, t = 0.15": 25,           # points: 4 of 4, 3 of 4
    "... t = 0.5": 50,
    "... t uniform": 75,
}.items())
def test_each_row_is_measured_at_its_own_noise(measured, row, expected):
    assert measured[0][row] == pytest.approx(expected), row


def test_of_what_the_model_writes_each_token_counts_with_the_step_that_wrote_it(monkeypatch):
    """Two texts by hand: " Mara" and " the" with shares 1/2, 1/4, 1/4 and 1, 0, 0; then " Juno"."""
    asked = []
    mara, the, juno = (TOKENIZER.encode(word)[0] for word in (" Mara", " the", " Juno"))
    texts = [([mara, the], [[2., -1, 1], [3, 0, 0]]), ([juno], [[0., 3, -1]])]

    def unmask(model, prompts, n, *, align, repetition_penalty, seed):
        asked.append((prompts, n, align, repetition_penalty, seed))
        return iter([seed])

    def attribute_text(model, steps):
        ids, parts = texts[steps[0]]
        known, unknown, epsilon = torch.tensor(parts).T[..., None]
        none = torch.zeros(len(ids), 1, dtype=torch.int64)
        return None, Attribution(torch.tensor(ids), none, known, none, unknown, epsilon[:, 0])
    monkeypatch.setattr(evaluate, "unmask", unmask)
    monkeypatch.setattr(evaluate, "attribute_text", attribute_text)
    found = evaluate.written(None, TOKENIZER, 2)
    assert asked == [([[TOKENIZER.bos_token_id]], 128, True, 1.0, seed) for seed in (0, 1)], (
        "written as the samples are: windows aligned, no repetition penalty")
    assert found == pytest.approx({
        "contribution to what the model writes: known": (1 / 2 + 1 + 0) / 3,
        "... known, at content words that it writes": (1 / 2 + 0) / 2,  # not at " the"
        "... discovered, to what it writes": (1 / 4 + 0 + 3 / 4) / 3,
        "... epsilon, to what it writes": (1 / 4 + 0 + 1 / 4) / 3})


def test_alignment_counts_tokens_that_are_twice_as_likely_in_held_out_chunks(monkeypatch, measured):
    """"space" has words that no other topic has; that they are lifted was counted in stories."""
    asked = []
    monkeypatch.setattr(evaluate, "alignment", lambda model, tokenizer, lifted: (
        asked.append(lifted) or (0.25, 0.75)))
    found = evaluate.concepts(Steerling(Config.tiny(TOKENIZER.vocab_size)), TOKENIZER, 5, 20000)
    assert found["alignment: words' concepts that promote their word most"] == 0.25
    assert found["... topics, moods, forms: promoted tokens that fit"] == 0.75
    [lifted] = asked
    [comet], [the], [rope] = (TOKENIZER.encode(word) for word in (" comet", " the", " rope"))
    space, sea = CONCEPT_IDS["space"], CONCEPT_IDS["sea"]
    assert lifted.shape == (len(CONCEPTS), TOKENIZER.vocab_size)
    assert lifted[space, comet] and not lifted[sea, comet], "a comet is in space's chunks only"
    assert not lifted[space, the], "'the' is everywhere"
    assert lifted[CONCEPT_IDS["rope"], rope] and not lifted[space, rope]


# ---- steering ------------------------------------------------------------------------------------

NEUTRAL = r"<\|bos\|>The \w+ \w+ \w+ lived near the \w+ with a \w+ named \w+ and a \w+ \w+\."


def test_a_neutral_prompt_is_an_introduction_alone():
    prompts = list(topic_prompts(TOKENIZER, 3, "neutral"))
    assert [topic for topic, _ in prompts] == [t for t in range(len(TOPICS)) for _ in range(3)]
    texts = [decode(prompt) for _, prompt in prompts]
    assert all(re.fullmatch(NEUTRAL, text) for text in texts), "it says nothing of a topic"
    firsts = ["<|bos|>" + split_sentences(s.chunks[0].text)[0] for s in held_out_stories(24)]
    assert texts == firsts, "of held-out stories, another one each time"


@pytest.mark.parametrize("before", ["same", "other"])
def test_a_topic_before_is_a_whole_chunk_about_it_or_about_another_one(before):
    prompts = list(topic_prompts(TOKENIZER, 3, before))
    assert [topic for topic, _ in prompts] == [t for t in range(len(TOPICS)) for _ in range(3)]
    firsts = {"<|bos|>" + s.chunks[0].text + "<|endofchunk|>" for s in held_out_stories(1000)}
    for topic, prompt in prompts:
        assert decode(prompt) in firsts, "the first chunk of a held-out story, and its end"
        shown = [recognise(s) for s in split_sentences(re.sub(r"<.*?>", "", decode(prompt)))]
        about = any(topic in concepts for concepts in shown)
        assert about == (before == "same"), f"asked for the {before} topic before: {shown}"


def test_words_to_amplify_are_a_fixed_sample_of_nouns_animals_and_places():
    prompts = list(word_prompts(TOKENIZER, 2))
    assert prompts == list(word_prompts(TOKENIZER, 2)), "the same for every model"
    concepts = [concept for concept, _ in prompts]
    assert concepts[::2] == concepts[1::2] and len(set(concepts)) == 24, "two prompts a word"
    kinds = [CONCEPTS[concept].group for concept in concepts[::2]]
    assert kinds == ["noun"] * 16 + ["animal"] * 4 + ["place"] * 4


def test_a_words_prompt_ends_where_the_word_could_come_next():
    ends = {"noun": NEUTRAL, "animal": r".* lived near the \w+ with a", "place": r".* near the"}
    for concept, prompt in word_prompts(TOKENIZER, 3):
        text, kind = decode(prompt), CONCEPTS[concept].group
        assert re.fullmatch(ends[kind], text), f"{kind}: {text}"
        assert not re.search(rf"\b{WORDS[concept]}\b", text), "it must not say the word itself"


def test_a_chunk_says_a_word_but_shows_a_topic():
    sea, oak = CONCEPT_IDS["sea"], CONCEPT_IDS["oak"]
    about = ["Mara smiled all the way home.", "Mara sailed past the pale gull before noon."]
    assert shows(about, sea), "one sentence is enough"
    assert not shows(about[:1], sea) and not shows(["Oh the sea."], sea), "the grammar says so"
    assert shows(["Mara sat.", "Oh the oak."], oak), "a word is said in any sentence"
    assert not shows(["Oh the oaks."], oak) and not shows(about, oak), "'oaks' is another word"
    assert shows(["Oh the tin box."], CONCEPT_IDS["tin box"])
    assert not shows(["Oh the tin."], CONCEPT_IDS["tin box"]), "both words of a pair"


def test_steered_counts_new_chunks_and_their_sentences(monkeypatch):
    sea, oak = CONCEPT_IDS["sea"], CONCEPT_IDS["oak"]
    calls = answer(monkeypatch, lambda prompt, n, steering: (
        " Mara sailed past the pale gull before noon. Oh the oak. Mara sang.<|endofchunk|>"
        "Mara smiled all the way home. Mara sailed past the pale"))
    start = [TOKENIZER.bos_token_id, *TOKENIZER.encode("The oak sailed past the sea.")]
    prompts = [(sea, start), (oak, start), (CONCEPT_IDS["space"], start)]
    shown, right = steered(None, TOKENIZER, prompts, Steering.amplify)
    assert shown == 2 / 6, "of two new chunks each: the first about sea; it says oak; none"
    assert right == 2 / 4, "of four whole new sentences: neither the prompt's nor the cut-off one"
    assert [(n, steering) for _, n, _, steering in calls] == [
        (32, Steering.amplify(concept)) for concept, _ in prompts]
    assert len({seed for _, _, seed, _ in calls}) == 3, "each text has its own draws"


def test_each_steering_row_has_its_own_prompts_and_its_own_steering(monkeypatch):
    """A writer that shows what is amplified, and not what is unlearned; grammar suffers. Without
    steering it keeps to the topic of the chunk before; where there is none, it is of the sea."""
    sentences, asked = {}, {}
    for name, (nouns, templates) in TOPICS.items():
        words = {slot: world.fillers(slot, nouns)[0] for slot in world.slots_of(templates[0])}
        sentences[CONCEPT_IDS[name]] = templates[0].format(**words)

    def writes(prompt, n, steering):
        def called(what, concept=None):
            if not prompt.endswith("<|endofchunk|>"):
                kind = "introduction" if re.fullmatch(NEUTRAL, prompt) else "cut"
            elif concept is None:
                kind = "chunk"
            else:
                chunk = re.sub(r"<.*?>", "", prompt)
                kind = "same" if shows(split_sentences(chunk), concept) else "other"
            asked.setdefault(what, set()).add(kind)
            return "" if kind in ("chunk", "same", "other") else " "  # before a sentence
        if steering is None:
            before = split_sentences(re.sub(r"<.*?>", "", prompt))
            kept = (sentences[topic] for topic in sentences if shows(before, topic))
            return called("plain") + next(kept, sentences[CONCEPT_IDS["sea"]]) + " A"
        [concept] = steering.injections[0].ids
        if steering == Steering.unlearn(concept):
            return called("unlearned", concept) + "Mara smiled all the way home. Oh. A"
        assert steering == Steering.amplify(concept), "the presets' defaults"
        if concept in WORDS:
            return called("word") + f"Oh the {WORDS[concept]}. Mara smiled all the way home. A"
        if called("topic", concept):
            return f" {sentences[concept]} Oh. Oh. Mara sang."
        return f"{sentences[concept]}<|endofchunk|>Mara smiled all the way home. A"
    answer(monkeypatch, writes)
    found = evaluate.steering(None, TOKENIZER, 2)
    expected = {
        "topic amplified, neutral prompt": 1, "... sentences in the grammar": 1 / 3,
        "topic amplified, other topic before": 1 / 2,
        "... sentences in the grammar, after the other topic": 1,
        "topic not amplified, either prompt": (1 / len(TOPICS) + 0) / 2,
        "topic unlearned, same topic before": 0, "... not unlearned": 1,
        "... sentences in the grammar, topic unlearned": 1 / 2,
        "word amplified: chunks that say it": 1,
        "... not amplified": 1 / sum(evaluate.WORD_SAMPLE.values()),  # the sea's sentence says one
        "... sentences in the grammar, word amplified": 1 / 2}
    for row, value in expected.items():
        assert found[row] == pytest.approx(value), row
    assert asked == {"topic": {"introduction", "other"}, "word": {"introduction", "cut"},
                     "unlearned": {"same"}, "plain": {"introduction", "chunk", "cut"}}, (
        "what is there is unlearned, what is not there amplified; without steering, the same")


# ---- resemblance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seen, share", [
    (lambda text: {"sea": 1.0}.get(topic_in(text), 0.0), None),
    (lambda text: float(list(TOPICS).index(topic_in(text))), 1.0)])
def test_resemblance_is_the_share_of_neighbours_with_the_chunks_topic(monkeypatch, seen, share):
    """An embedding that knows every topic finds only its like; one that knows one does not."""
    def embedded(model, chunks):
        kinds = torch.tensor([seen(TOKENIZER.decode(chunk)) for chunk in chunks]).long()
        return torch.nn.functional.one_hot(kinds, len(TOPICS)).float()
    monkeypatch.setattr(evaluate, "embed_chunks", embedded)
    found = evaluate.resemblance(None, TOKENIZER, 10)
    [value] = found.values()
    assert found.keys() <= evaluate.MEASURES.keys()
    assert value == share if share else value < 0.6


def test_resemblance_looks_at_the_five_nearest_of_a_runs_first_thirty_steps(monkeypatch):
    asked, found = [], []
    monkeypatch.setattr(evaluate, "embed_chunks", lambda model, chunks: (
        asked.append([TOKENIZER.decode(chunk) for chunk in chunks]),
        torch.zeros(len(chunks), 1))[1])
    monkeypatch.setattr(evaluate, "resembling", lambda chunk, corpus, n: (
        found.append((len(corpus), n)), (torch.arange(n), None))[1])
    evaluate.resemblance(None, TOKENIZER, 2)
    corpus, judged = asked
    for step in (0, 29):  # of train_tiny.py --seed 0: what the bundled model was trained on
        story = next(endless_stories(f"0 {step}"))
        assert all(chunk.text in corpus for chunk in story), f"a story of step {step}"
    assert judged == [chunk.text for story in held_out_stories(2) for chunk in story.chunks]
    assert 240 * 4 <= len(corpus) <= 240 * 7 and set(found) == {(len(corpus), 5)}, (
        "eight stories of each step, of four to seven chunks")


def topic_in(text):
    """The topic of a chunk, by the grammar."""
    ids = {c for sentence in split_sentences(text) for c in recognise(sentence) or ()}
    return CONCEPTS[min(ids)].name


# ---- the table -----------------------------------------------------------------------------------


def test_every_measure_has_a_row(capsys):
    print_table({"a": dict.fromkeys(MEASURES, 0.5), "b": dict.fromkeys(MEASURES, 0.25)})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| measure | target | 8B | a | b |"
    assert len(lines) == 2 + len(MEASURES) and all(line.count("|") == 6 for line in lines)
    assert "| sentences in the grammar | ≥ 97% |  | 50.0% | 25.0% |" in lines
    assert "| detection: macro AUC | ≥ 0.98 | 0.962 | 0.5000 | 0.2500 |" in lines
    assert "| ... epsilon, to what it writes | ≤ 16% | 12.4% (one text) | 50.0% | 25.0% |" in lines
    assert "| ... t = 0.5 | ≤ 2 points |  | 0.50 points | 0.25 points |" in lines


def test_an_evaluation_fills_the_table_and_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    Steerling(Config.tiny(TOKENIZER.vocab_size)).save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path / RANK_FILE)
    answer(monkeypatch, lambda prompt, n, steering: " Mara smiled all the way home. A")
    monkeypatch.setattr(evaluate, "likelihood_bound", lambda *args: torch.tensor([1.0]))
    whole, read, unmask = evaluate.look, evaluate.load, evaluate.unmask
    monkeypatch.setattr(evaluate, "unmask", lambda model, prompts, n, **options: unmask(
        model, prompts, 2, **options))
    monkeypatch.setattr(evaluate, "load", lambda folder, device, dtype: (
        dtypes.append(dtype), read(folder, device, dtype))[1])
    dtypes = []
    monkeypatch.setattr(evaluate, "embed_chunks", lambda model, chunks: torch.ones(len(chunks), 1))
    monkeypatch.setattr(evaluate, "pack", lambda stories, tokenizer, enough=math.inf: pack(
        stories, tokenizer, enough=min(enough, 5000)))
    monkeypatch.setattr(evaluate, "look", lambda model, stream, named, t, n: whole(
        model, stream, named, t, 8))
    found = evaluate.evaluate(str(tmp_path), "cpu")
    assert found.keys() == MEASURES.keys(), "each row once, and nothing without a row"
    assert dtypes == [torch.float32], "measured in full precision, whatever the device prefers"
    groups = re.findall(rf"{tmp_path}: (\w+) ... \d+ s\n", capsys.readouterr().err)
    assert groups == ["language", "likelihood", "concepts", "attribution", "steering",
                      "resemblance"], "a line for each group"


def test_the_bundled_model_is_the_trained_one():
    """The whole table takes minutes (train_tiny.py --evaluate); this would notice a wrong model."""
    model, tokenizer = load(device="cpu")
    found = evaluate.language(model, tokenizer, 2)
    assert found["sentences in the grammar"] >= 0.9
    found = evaluate.likelihood(model, tokenizer, 2)
    assert found["likelihood bound / entropy"] < 1.4
    found = evaluate.concepts(model, tokenizer, 16, 20_000)
    assert found["detection: macro AUC"] > 0.95
    assert found["contribution: known + discovered (Eq. 22)"] > 0.7
    assert found["alignment: words' concepts that promote their word most"] > 0.7


def test_another_worlds_model_is_refused(tmp_path, monkeypatch):
    model = Steerling(dataclasses.replace(Config.tiny(), n_concepts=29))
    model.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path / RANK_FILE)
    with pytest.raises(ValueError, match="not trained on the tiny world's stories; its 29 con"):
        evaluate.evaluate(str(tmp_path), "cpu")
    monkeypatch.setattr(evaluate, "load", lambda *args: (model, TOKENIZER))
    with pytest.raises(ValueError, match="the bundled model was not trained"):
        evaluate.evaluate(None, "cpu")


# ---- anyone's text -------------------------------------------------------------------------------

BYTES = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
OF_BYTES = Config.tiny(vocab_size=261)
OF_BYTES = dataclasses.replace(OF_BYTES, n_layers=1, block_size=32, n_concepts=2, topk_known=2,
                               topk_known_features=2)


def test_units_are_of_the_text_and_special_tokens_have_none():
    tokens = torch.tensor([BYTES.bos_token_id, *BYTES.encode("a\u00e9\u4e16")])  # 6 bytes
    found = in_units(2.0, tokens, BYTES)
    assert found == {"bound, nats per token": 2.0,
                     "bound, nats per character": pytest.approx(2 * 7 / 3),
                     "bound, bits per byte": pytest.approx(2 * 7 / 6 / math.log(2))}


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary():
    torch.manual_seed(0)
    model = Steerling(OF_BYTES)
    torch.nn.init.zeros_(model.transformer.tok_emb.weight)  # all logits 0
    tokens = torch.tensor(BYTES.encode("twenty-four letters, so " * 8))
    n = len(tokens)
    rest = Stream(tokens, torch.zeros(n).long(), torch.full((1, 0), -1))
    found = measure_text(model, BYTES, rest)
    assert found["bound, nats per token"] == pytest.approx(math.log(261))
    assert found["bound, bits per byte"] == pytest.approx(math.log2(261)), "a byte is a token"
    assert len(found) == 3, "no labels, no measures of concepts"
    batch = Batch(tokens[:64].view(2, 32), torch.zeros(2, 32).long(), rest.labels)
    assert per_character(model, BYTES, batch) == pytest.approx(math.log(261))


def test_what_is_not_learnt_costs_nothing_and_is_no_token(monkeypatch):
    """A user's turn is only read. A model that pays 1 nat for an a and 100 for anything else."""
    def bound(model, tokens, asked, *rest):
        costs = torch.where(tokens == 97, 1.0, 100.0)
        return (costs * asked).sum(1) / asked.sum(1)
    monkeypatch.setattr(evaluate, "likelihood_bound", bound)
    tokens = torch.tensor(BYTES.encode("bbbaa" * 64))  # 10 windows of 32
    learnt = tokens == 97
    learnt[:32] = False  # a window in which nothing is learnt
    rest = Stream(tokens, torch.zeros(320).long(), torch.full((1, 0), -1), learnt)
    torch.manual_seed(0)
    found = measure_text(Steerling(OF_BYTES), BYTES, rest)
    assert found["bound, nats per token"] == found["bound, nats per character"] == 1.0
    model = SimpleNamespace(device="cpu")
    batch = Batch(tokens[32:].view(9, 32), torch.zeros(9, 32).long(), rest.labels,
                  learnt[32:].view(9, 32))
    assert per_character(model, BYTES, batch) == 1.0


def test_a_window_counts_by_its_tokens_that_are_learnt(monkeypatch):
    monkeypatch.setattr(evaluate, "likelihood_bound",
                        lambda model, tokens, asked, *rest: tokens[:, 0].float())
    tokens = torch.tensor([[4, 97, 97, 97], [2, 97, 97, 97]])
    learnt = torch.tensor([[True, False, False, False], [True, True, True, False]])
    found = evaluate.bound_in_units(SimpleNamespace(device="cpu"), BYTES, tokens, learnt, 1)
    assert found["bound, nats per token"] == 2.5, "(1 x 4 + 3 x 2) / 4, not (4 + 2) / 2"


def test_only_what_is_learnt_is_masked_and_measured():
    torch.manual_seed(0)
    tokens, learnt = torch.arange(64) % 256, torch.arange(64) % 4 == 0
    stream = Stream(tokens, torch.zeros(64).long(), torch.zeros(1, 1).long(), learnt)
    seen = evaluate.look(Steerling(OF_BYTES), stream, learnt, 1.0, 2)
    assert seen.named.all() and len(seen.named) == 16, "a user's turns are read clean"


def test_concepts_of_a_text_are_detected_where_they_are():
    """Concept 0 reads the token a, which the chunks labelled with it have; concept 1 is nowhere."""
    torch.manual_seed(0)
    model = Steerling(OF_BYTES)
    torch.nn.init.normal_(model.transformer.tok_emb.weight)
    model.transformer.blocks[0].ln_1.weight.data.zero_()  # hidden is a token's own embedding
    model.transformer.blocks[0].ln_2.weight.data.zero_()
    weight = model.known_head.concept_predictor.weight.data.zero_()
    weight[0] = model.transformer.tok_emb.weight[97]
    tokens, chunks = torch.tensor(BYTES.encode("bbacbbbc" * 24)), torch.arange(192) // 4
    labels = torch.tensor([[0], [-1]]).repeat(24, 1)
    found = measure_text(model, BYTES, Stream(tokens, chunks, labels))
    assert found["detection: macro AUC"] == 1.0
    assert found["... concepts left out: in no chunk, or in all"] == 1
    assert 0.01 < found["contribution: known + discovered (Eq. 22)"] < 0.99, "epsilon is left out"
    beyond = labels.where(labels < 0, OF_BYTES.n_concepts)
    others = measure_text(model, BYTES, Stream(tokens, chunks, beyond))
    assert len(others) == 3, "a concept that the model lacks cannot be detected"


def test_windows_are_spread_over_all_that_is_held_out(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "likelihood_bound", lambda model, tokens, *rest: (
        seen.append(tokens), torch.ones(len(tokens)))[1])
    rest = Stream(torch.arange(1000) % 256, torch.zeros(1000).long(), torch.full((1, 0), -1))
    measure_text(Steerling(OF_BYTES), BYTES, rest, n=3)
    windows = torch.cat(seen)
    assert windows.shape == (3, 32)
    assert windows[:, 0].tolist() == [0, 484 % 256, 968 % 256], "first, middle and last"
