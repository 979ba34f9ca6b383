"""The tiny world keeps its promises: known concepts, exact probabilities, one reading per sentence.

Everything measured on the tiny model rests on this file: if a label or a probability of the world
were wrong, every score against it would be wrong without any sign.
"""

import math
import random
import re
from collections import Counter, defaultdict
from statistics import mean, stdev

import pytest

from steerling_min.training import grammar, world
from steerling_min.training.world import (CONCEPTS, WORDS, fillers, hero_of, recognise,
                                          split_sentences, write_story)


@pytest.fixture(scope="module")
def stories():
    rng = random.Random(0)
    return [write_story(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def chunks(stories):
    return [chunk for story in stories for chunk in story.chunks]


def close_to_mean(samples, expected):
    """Whether a sample mean lies within 4 standard errors of the value expected."""
    return abs(mean(samples) - expected) < 4 * stdev(samples) / math.sqrt(len(samples))


# ---- concepts and labels -------------------------------------------------------------------------

WHOLE_IDS = [c.id for c in CONCEPTS if c.id not in WORDS]  # topics, moods and forms
TEMPLATES = [grammar.INTRO, *(t for _, ts in grammar.TOPICS.values() for t in ts),
             *(t for ts in [*grammar.MOODS.values(), *grammar.FORMS.values()] for t in ts)]


def test_concepts_are_numbered_in_order_and_topics_come_first():
    assert [c.id for c in CONCEPTS] == list(range(len(CONCEPTS))), "an id is a place in CONCEPTS"
    assert [c.name for c in CONCEPTS[:8]] == list(grammar.TOPICS)
    assert Counter(c.group for c in CONCEPTS[:24]) == {"topic": 8, "mood": 8, "form": 8}
    assert set(WORDS) == set(range(24, len(CONCEPTS))) and len(CONCEPTS) >= 200


def test_no_two_concepts_share_a_name_in_any_case():
    names = Counter(c.name.casefold() for c in CONCEPTS)
    assert not [name for name, n in names.items() if n > 1], "who types it would mean which?"
    groups = {c.group for c in CONCEPTS}
    assert not groups & set(names), "a group's name is typed, too"


def test_concepts_are_of_the_four_types_of_fineweb_atlas():
    types = {}
    for concept in CONCEPTS:
        types.setdefault(concept.type, set()).add(concept.group)
    assert types.pop("entity") == {"hero", "friend", "place"}
    assert types.pop("tone") == {"mood"} and types.pop("document") == {"form"}
    assert types.keys() == {"content"} and {"topic", "noun", "verb", "food"} <= types["content"]


def test_a_chunk_has_the_concept_of_a_word_exactly_when_it_mentions_the_word(chunks):
    for chunk in chunks[:3000]:
        padded = f" {' '.join(re.findall('[a-z]+', chunk.text.lower()))} "
        mentioned = [i for i, word in WORDS.items() if f" {word.lower()} " in padded]
        assert mentioned == [i for i in chunk.concepts if i in WORDS], (
            f"labels say all that is there and nothing else: {chunk.text}")


def test_a_chunk_has_eight_to_fifteen_labels(chunks):
    assert 8 <= mean(len(chunk.concepts) for chunk in chunks) <= 15


def test_no_other_word_stands_in_the_same_sentences_as_a_concepts_word():
    where = defaultdict(set)
    for template in TEMPLATES:
        for word in re.findall(r"\w+", re.sub(r"\{\w+\}", "", template)):
            where[word].add(template)
    for word in (word for words in grammar.SAID.values() for word in words):
        same = [x for x in where if where[x] == where[word] and x not in world.CONCEPT_IDS]
        assert word in where and not same, f"labels cannot tell {word!r} and {same} apart"


def test_articles_fit(chunks):
    for chunk in chunks:
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", chunk.text), chunk.text


def test_a_chunk_is_labelled_with_what_its_sentences_show(chunks):
    for chunk in chunks[:2000]:
        shown = [recognise(sentence) for sentence in split_sentences(chunk.text)]
        assert None not in shown, f"the grammar must read what it wrote: {chunk.text}"
        assert tuple(sorted(set().union(*shown))) == chunk.concepts, (
            f"labels are the union over the sentences, sorted: {chunk.text}")


def test_the_story_in_the_docstring_is_in_the_grammar():
    example = re.search(r"\n\n((?:    .+\n)+)\n", world.__doc__)[1]
    lines = re.split(r"\n    (?=\S)", example.strip().replace("\n      ", " "))
    assert len(lines) == 2, "a line each for two chunks"
    for line in lines:
        for sentence in split_sentences(line):
            assert recognise(sentence) is not None, f"the lesson's own example: {sentence}"


def test_a_chunk_has_one_topic_at_most_one_mood_and_at_most_one_form(chunks):
    for chunk in chunks:
        kinds = Counter(CONCEPTS[i].group for i in chunk.concepts)
        assert kinds["topic"] == 1 and kinds["mood"] <= 1 and kinds["form"] <= 1, chunk


def test_no_concept_is_too_rare_to_learn(chunks):
    carried = Counter(i for chunk in chunks for i in chunk.concepts)
    for concept in CONCEPTS:
        share, least = carried[concept.id] / len(chunks), 0.008 if concept.id in WORDS else 0.02
        assert share > least, f"too rare to learn: {concept.name} is in {share:.1%} of the chunks"


def test_no_single_word_gives_a_topic_mood_or_form_away(chunks):
    words = [(set(re.findall(r"[a-z]+", chunk.text.lower())), chunk.concepts) for chunk in chunks]
    for concept in (CONCEPTS[i] for i in WHOLE_IDS):
        with_it = [w for w, ids in words if concept.id in ids]
        without = set().union(*(w for w, ids in words if concept.id not in ids))
        inside = Counter(w for ws in with_it for w in ws)
        telling = max(n for word, n in inside.items() if word not in without) / len(with_it)
        assert telling < 0.6, f"one word alone marks {telling:.0%} of the {concept.name} chunks"


# ---- sentences -----------------------------------------------------------------------------------

def test_splitting_a_chunk_gives_back_its_one_to_three_sentences(chunks):
    for chunk in chunks:
        sentences = split_sentences(chunk.text)
        assert 1 <= len(sentences) <= 3 and " ".join(sentences) == chunk.text
        for sentence in sentences:
            assert re.fullmatch(r"[^.!?]+[.?]", sentence) and sentence.isascii(), (
                f"one sentence has one end mark: {sentence}")


def test_a_question_and_speech_are_sentences_wherever_they_stand():
    text = 'Who sat? "Sit," said Mara. Mara sat.'
    assert split_sentences(text) == ["Who sat?", '"Sit," said Mara.', "Mara sat."], (
        "in a story a question comes last; what a model writes may go on")


def test_every_sentence_has_exactly_one_reading(chunks):
    for sentence in {s for chunk in chunks[:3000] for s in split_sentences(chunk.text)}:
        readings = [ids for pattern, ids in world.RULES if pattern.fullmatch(sentence)]
        assert len(readings) == 1, f"two readings, two probabilities, two labels: {sentence}"


def test_a_slot_stands_once_in_a_template_and_has_distinct_fillers():
    for template in TEMPLATES:
        slots = world.slots_of(template)
        assert len(set(slots)) == len(slots), f"log_prob supposes one draw per slot: {template}"
        for slot in slots:
            options = fillers(slot, world.ALL_NOUNS)
            assert len(set(options)) == len(options), f"a filler of {slot} stands twice"


@pytest.mark.parametrize("broken", [
    "Mara watered bright the rose at noon.",         # order
    "Mara watered the bright zebra at noon.",        # unknown word
    "Mara watered the bright anchor at noon.",       # a noun of another topic
    "Mara sailed past the bright rose before noon.",  # crossed templates
    "Mara watered the bright rose at noon",          # no end
    "Pepper watered the bright rose at noon.",       # a friend in the hero's slot
    "Mara watered the bright rose at noon. Who",     # more than a sentence
    "",
])
def test_a_broken_sentence_is_not_in_the_grammar(broken):
    whole = "Mara watered the bright rose at noon."
    assert [CONCEPTS[i].name for i in recognise(whole)] == [
        "garden", "Mara", "rose", "noon", "bright", "watered"], "the whole sentence is fine"
    assert recognise(broken) is None, f"not in the grammar: {broken!r}"


# ---- stories -------------------------------------------------------------------------------------

def test_hero_friend_place_and_thing_stay_the_same_and_come_back(stories):
    often = {"hero": 0.95, "friend": 0.8, "place": 0.4, "thing": 0.6}
    for slot in often:
        names, again = grammar.STORY_SLOTS[slot], []
        for story in stories[:500]:
            texts = [{n for n in names if re.search(rf"\b{n}\b", c.text)} for c in story.chunks]
            assert set().union(*texts) == texts[0] and len(texts[0]) == 1, f"one {slot}: {story}"
            again.append(any(texts[1:]))
        assert mean(again) > often[slot], f"the {slot} should recur, so that earlier text matters"


def test_the_hero_is_the_one_the_introduction_names(stories):
    for story in stories[:500]:
        assert hero_of(split_sentences(story.chunks[0].text)[0]) == story.hero


def test_a_story_has_four_to_seven_chunks(stories):
    assert {len(story.chunks) for story in stories} == {4, 5, 6, 7}


def test_the_old_sailor_begins_some_story(stories):
    assert any(story.chunks[0].text.startswith("The old sailor ") for story in stories), (
        "'The old sailor' is the README's prompt, so the world must contain it")


def test_the_same_seed_writes_the_same_story():
    assert write_story(random.Random(7)) == write_story(random.Random(7))
    assert write_story(random.Random(7)) != write_story(random.Random(8))


def test_topics_are_uniform_and_kept_half_of_the_time(stories, chunks):
    for topic in range(8):
        share = mean(topic in chunk.concepts for chunk in chunks)
        assert abs(share - 1 / 8) < 0.02, f"{CONCEPTS[topic].name} has share {share}, not 1/8"
    pairs = [(a, b) for story in stories for a, b in zip(story.chunks, story.chunks[1:])]
    kept = [float(a.concepts[0] == b.concepts[0]) for a, b in pairs]
    assert close_to_mean(kept, 1 / 2), "a chunk keeps the topic of the one before, or not"


def test_two_of_three_chunks_have_a_mood_and_half_of_the_later_ones_a_form(stories):
    for kind, expected, of in (("mood", 2 / 3, 0), ("form", 1 / 2, 1)):
        has = [float(any(CONCEPTS[i].group == kind for i in chunk.concepts))
               for story in stories for chunk in story.chunks[of:]]
        assert close_to_mean(has, expected), f"{mean(has):.1%} of the chunks have a {kind}"


# ---- probabilities -------------------------------------------------------------------------------

def log_prob_of_text(story):
    """The story's log-probability, worked out again from nothing but its text."""
    tables = {**{name: ts for name, (_, ts) in grammar.TOPICS.items()},
              **grammar.MOODS, **grammar.FORMS}
    nats = math.log(len(world.CHUNKS))
    nats += sum(math.log(len(grammar.STORY_SLOTS[s])) for s in world.slots_of(grammar.INTRO))
    before = None
    for i, chunk in enumerate(story.chunks):
        topic, kinds = CONCEPTS[chunk.concepts[0]].name, {CONCEPTS[c].group for c in chunk.concepts}
        if before is not None:
            stay = world.KEEP_TOPIC
            nats -= math.log(stay if topic == before else (1 - stay) / 7)
            nats -= math.log(world.FORM / 8 if "form" in kinds else 1 - world.FORM)
        else:
            nats += math.log(8)
        nats -= math.log(world.MOOD / 8 if "mood" in kinds else 1 - world.MOOD)
        for sentence in split_sentences(chunk.text)[i == 0:]:
            [name] = [CONCEPTS[c].name for c in recognise(sentence) if c in WHOLE_IDS]
            [template] = [t for t in tables[name]
                          if world.pattern_of(t, world.ALL_NOUNS).fullmatch(sentence)]
            nats += math.log(len(tables[name]))
            nats += sum(math.log(len(fillers(slot, grammar.TOPICS[topic][0])))
                        for slot in world.slots_of(template) if slot not in grammar.STORY_SLOTS)
        before = topic
    return -nats


def test_log_prob_can_be_worked_out_from_the_text_alone(stories):
    for story in stories[:100]:
        assert story.log_prob == pytest.approx(log_prob_of_text(story)), (
            f"log_prob must be the probability of the text itself: {story}")


def test_entropy_is_the_mean_surprise(stories):
    assert close_to_mean([-story.log_prob for story in stories], world.entropy()), (
        "entropy() is exact, so a sample of -log_prob must average to it")
