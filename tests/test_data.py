"""Training data: packing, cutting, and other people's files."""

import json
import random
import re
import resource

import pytest
import torch

from steerling_min.files.labels import Label
from steerling_min.files.loading import TINY
from steerling_min.files.tokenizer import RANK_FILE
from steerling_min.training.data import (WORD, Stories, Stream, Texts, count_tokens, cut,
                                         has_concepts, pack, read_documents)
from steerling_min.training.world import (CONCEPTS, Chunk, recognise, split_sentences,
                                          write_story)

STORIES = Stories(seed=1)
TOKENIZER = STORIES.tokenizer
DOCUMENTS = [[Chunk("The old sailor", (2,)), Chunk("a tear", (0, 1))], [Chunk("the dog", ())]]


def test_a_document_is_its_chunks_between_the_special_tokens():
    stream = pack(DOCUMENTS, TOKENIZER)
    assert TOKENIZER.decode(stream.tokens.tolist(), specials=True) == (
        "<|bos|>The old sailor<|endofchunk|>a tear<|endoftext|><|bos|>the dog<|endoftext|>")


def test_labels_belong_to_chunks_and_special_tokens_to_none():
    stream = pack(DOCUMENTS, TOKENIZER)
    assert stream.labels.tolist() == [[2, -1], [0, 1], [-1, -1]], "ids, filled up with -1"
    assert has_concepts(stream.labels, 3).tolist() == [
        [False, False, True], [True, True, False], [False] * 3]
    for token, chunk in zip(stream.tokens.tolist(), stream.chunks.tolist()):
        assert (chunk == -1) == (token in TOKENIZER.special_ids)
    texts = [TOKENIZER.decode(stream.tokens[stream.chunks == i].tolist()) for i in range(3)]
    assert texts == ["The old sailor", "a tear", "the dog"]


def test_packing_stops_when_there_is_enough():
    endless = (DOCUMENTS[0] for _ in iter(int, 1))
    assert 100 <= len(pack(endless, TOKENIZER, enough=100).tokens) < 100 + 10


def test_a_chunk_cut_by_the_windows_edge_is_a_chunk_in_both():
    stream = Stream(torch.arange(10), torch.tensor([-1, 0, 0, 0, -1, 1, 1, 1, 1, -1]),
                    torch.tensor([[0], [1]]))
    batch = cut(stream, torch.tensor([2, 6]), 4)
    assert batch.tokens.tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert batch.chunks.tolist() == [[0, 0, -1, 1], [2, 2, 2, -1]], "chunk 1 is in both windows"
    assert batch.labels.tolist() == [[0], [1], [1]]


def test_windows_inside_long_chunks_have_no_special_token_and_keep_their_labels():
    stream = Stream(torch.arange(12), torch.tensor([-1, *[0] * 5, -1, *[1] * 4, -1]),
                    torch.tensor([[3], [4]]))
    batch = cut(stream, torch.tensor([1, 7]), 4)
    assert batch.chunks.tolist() == [[0] * 4, [1] * 4]
    assert batch.labels.tolist() == [[3], [4]]


def test_stories_are_the_grammars_and_packed_whole():
    stream = STORIES.stream(7, 300)
    text = TOKENIZER.decode(stream.tokens.tolist(), specials=True)
    assert text.startswith("<|bos|>The ") and text.endswith("<|endoftext|>")
    for story in text.removesuffix("<|endoftext|>").split("<|endoftext|>"):
        chunks = story.removeprefix("<|bos|>").split("<|endofchunk|>")
        assert 4 <= len(chunks) <= 7
        for sentence in (s for chunk in chunks for s in split_sentences(chunk)):
            assert recognise(sentence) is not None, f"packing damaged {sentence!r}"


def test_every_word_of_the_stories_is_one_token():
    rng = random.Random(5)
    for _ in range(20):
        for chunk in write_story(rng).chunks:
            words = re.findall(WORD, chunk.text)
            assert len(TOKENIZER.encode(chunk.text)) == len(words)


def test_the_stories_vocabulary_is_the_bundled_models(tmp_path):
    TOKENIZER.save(tmp_path / RANK_FILE)
    assert (tmp_path / RANK_FILE).read_bytes() == (TINY / RANK_FILE).read_bytes(), (
        "the bundled model's ids must go on to mean what it has learnt")


def test_a_step_reads_the_same_stories_every_time_and_no_other_steps():
    def text(stories, step):
        return stories.windows(step, 2, 64)[0].tokens.tolist()
    assert text(STORIES, 3) == text(Stories(seed=1), 3)
    assert text(STORIES, 3) != text(STORIES, 4) and text(STORIES, 3) != text(Stories(seed=2), 3)
    stream, starts = STORIES.windows(3, 2, 64)
    assert starts.tolist() == [0, 64] and len(stream.tokens) >= 128, "cut without gaps"


def test_held_out_windows_are_fixed():
    a, b = STORIES.held_out(2, 64), STORIES.held_out(2, 64)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)


def test_held_out_windows_are_not_a_training_steps():
    held_out = STORIES.held_out(2, 64).tokens.flatten()
    for step in range(20):
        stream, _ = STORIES.windows(step, 2, 64)
        assert not torch.equal(stream.tokens[:128], held_out), f"step {step} learns what is judged"


def test_topics_moods_and_forms_are_injected_more_readily_also_into_a_models_own_numbers():
    stories = Stories(0, TOKENIZER, [Label(0, "something older")])
    often = {label.name for label, x in zip(stories.labels, stories.injected) if x > 1}
    assert often == {x.name for x in CONCEPTS if x.group in ("topic", "mood", "form")}


def test_counts_are_per_concept_and_in_all():
    stream = Stream(torch.tensor([5, 1, 1, 2, 5, 2]), torch.tensor([-1, 0, 0, 1, -1, 1]),
                    torch.tensor([[0, -1], [1, 0]]))
    assert count_tokens(stream, 2, 6).tolist() == [
        [0, 2, 2, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 2, 2, 0, 0, 0]], "special tokens do not count"


def test_counting_with_thousands_of_concepts_needs_little_memory():
    """Tokens times concepts, even as bytes, would be 20 GB here; the counts are 84 MB."""
    n, C, V = 1_000_000, 20_000, 1_000
    tokens, chunks = torch.arange(n) % V, torch.arange(n) // 100
    labels = torch.arange(n // 100)[:, None] * 2 + torch.tensor([0, 1])  # two of its own each
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = count_tokens(Stream(tokens, chunks, labels), C, V)
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10  # MB
    assert used < 500, f"{used:.0f} MB"
    assert counts[:C].sum() == 2 * n and (counts[C] == n // V).all()
    assert counts[7].nonzero()[:, 0].tolist() == list(range(300, 400)), "chunk 3 has concept 7"


# ---- anyone's files ------------------------------------------------------------------------------


def a_file(tmp_path, content, name="a.txt"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def texts_of(file):
    return [[(chunk["text"], chunk["concepts"]) for chunk in document]
            for document in read_documents(file)]


def test_a_text_file_is_one_stream_with_its_line_breaks(tmp_path):
    play = "ROMEO:\nO, she doth teach.\n\n\n\nTYBALT:\n  \u00e9\u4e16\U0001f600.\n"
    assert texts_of(a_file(tmp_path, play)) == [[(play, [])]]
    texts = Texts([a_file(tmp_path, 200 * play)], seed=0, T=32)
    assert not texts.labels
    tokens = [*texts.training.tokens.tolist(), *texts.rest.tokens.tolist()]
    assert texts.tokenizer.decode(tokens, specials=True) == (
        f"<|bos|>{200 * play}<|endoftext|>"), "no chunk ends at a paragraph, nothing is lost"


def test_lines_of_a_jsonl_file_are_chunks_with_labels(tmp_path):
    lines = [{"text": "a", "concepts": ["x", " y "]}, {"text": "b\u2028c\nd"}]
    for name in ("a.jsonl", "A.JSONL"):
        file = a_file(tmp_path, "\n".join(json.dumps(x, ensure_ascii=False) for x in lines), name)
        assert texts_of(file) == [[("a", ["x", "y"]), ("b\u2028c\nd", [])]]


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "A.JSONL"])
def test_lines_of_json_have_several_names(tmp_path, name):
    """Trained on as plain text, brackets and all, they would lose their labels without a word."""
    line = '{"text": "a", "concepts": ["x"]}'
    assert texts_of(a_file(tmp_path, line, name)) == [[("a", ["x"])]]


def test_neighbouring_lines_with_one_document_are_a_document(tmp_path):
    lines = [{"text": text, "document": n} for text, n in zip("abcd", (1, 1, 2, 1))]
    file = a_file(tmp_path, "\n\n".join(map(json.dumps, lines)), "a.jsonl")
    assert texts_of(file) == [[("a", []), ("b", [])], [("c", [])], [("d", [])]]


def test_a_concepts_name_may_have_200_letters(tmp_path):
    line = json.dumps({"text": "a", "concepts": ["n" * 200]})
    assert texts_of(a_file(tmp_path, line, "a.jsonl")) == [[("a", ["n" * 200])]]


NAME = "n" * 201


@pytest.mark.parametrize("line, message", [
    ("not json", "expected"), ("[1]", "expected"), ("{}", "expected"), ("3", "expected"),
    ('{"text": 3}', "expected"), ('{"text": ""}', "expected"),
    ('{"text": "a", "concepts": "x"}', "expected"), ('{"text": "a", "concepts": [1]}', "expected"),
    ('{"text": "a", "concepts": null}', "expected"), ('{"text": "a", "concepts": [" "]}', "names"),
    ('{"text": "a", "concepts": ["x\\ny"]}', "names"),
    (f'{{"text": "a", "concepts": ["{NAME}"]}}', "1 to 200 letters"),
    ('{"text": "a\\ud800"}', "expected"), ('{"text": "a", "concepts": ["\\udfff"]}', "names"),
    ("[" * 10**5, "expected"), ('{"text": "a"} {"text": "b"}', "expected"),
    ('{"text": "a", "concept": ["x"]}', "no field 'concept', only concepts, document, "),
    ('{"messages": []}', "expected"), ('{"messages": "hello"}', "expected"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "some of the role assistant"),
    ('{"messages": [{"role": "assistant"}]}', "expected"),
    ('{"messages": [{"role": "assistant", "content": 3}]}', "expected"),
    ('{"text": "a", "messages": [{"role": "assistant", "content": "b"}]}', "expected"),
    ('{"text": "a", "text": "b"}', "expected"),
    ('{"txt": "a"}', "no field 'txt'"), ('{"text": "a", "\\n": 1}', r"no field '\n'")])
def test_a_malformed_line_is_named_by_its_number(tmp_path, line, message):
    file = a_file(tmp_path, '{"text": "fine"}\n\n' + line + "\n", "a.jsonl")
    with pytest.raises(ValueError) as error:
        read_documents(file)
    said = str(error.value)
    assert "a.jsonl, line 3: " in said and message in said and "\n" not in said, said


@pytest.mark.parametrize("content, message", [
    (b"", "has no text"), (b" \r\n\n\t\n", "has no text"), (b"\xef\xbb\xbf", "has no text"),
    (b"tea\ncaf\xe9", "not UTF-8 text: byte 7, in line 2, is 0xe9"),
    (b"\n\xe9", "not UTF-8 text: byte 1, in line 2, is 0xe9"),
    ("text".encode("utf-16"), "not UTF-8"), ("text".encode("utf-16-le"), "bytes that are 0"),
    (b"a\x00b", "bytes that are 0")])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_without_readable_text_is_named(tmp_path, content, message, name):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_documents(a_file(tmp_path, content, name))


@pytest.mark.parametrize("content, read", [
    (b"\xef\xbb\xbfOne.", "One."), (b"One.\r\n\r\nTwo.\rThree.", "One.\n\nTwo.\nThree."),
    (b"\x01\x7f\xc2\x85", "\x01\x7f\x85"), (b" <|mask|> ", " <|mask|> ")])
def test_marks_and_line_ends_of_other_systems_are_read(tmp_path, content, read):
    assert texts_of(a_file(tmp_path, content)) == [[(read, [])]]
    line = json.dumps({"text": read}).encode()
    mark = b"\xef\xbb\xbf" * content.startswith(b"\xef")
    assert texts_of(a_file(tmp_path, mark + line + b"\r\n", "a.jsonl")) == [[(read, [])]]


@pytest.mark.parametrize("line", ["word " * 500_000, " " * 2_500_000 + "x"],
                         ids=["words", "spaces"])
def test_one_line_of_megabytes_is_read(tmp_path, line):
    texts = Texts([a_file(tmp_path, line)], seed=0, T=256)
    tokens = [*texts.training.tokens.tolist(), *texts.rest.tokens.tolist()]
    assert texts.tokenizer.decode(tokens) == line


def conversations(tmp_path, n=100):
    turns = [("system", "Be kind."), ("user", "Who?"), ("assistant", "Mara did."),
             ("user", "And <|eot_id|>"), ("assistant", "Ben.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return turns, a_file(tmp_path, "".join(json.dumps(
        {"messages": [{"role": "user", "content": f"{i}?"}, *messages]}) + "\n"
        for i in range(n)), "chat.jsonl")


def test_of_a_conversation_only_the_assistants_words_are_learnt(tmp_path):
    turns, file = conversations(tmp_path)
    texts = Texts([file], 0, T=32)
    tokenizer, stream = texts.tokenizer, texts.training
    end = stream.tokens.tolist().index(tokenizer.eos_token_id)
    first, learnt = stream.tokens[:end], stream.learnt[: end + 1]
    template = [tokenizer.bos_token_id, *tokenizer.encode_chat([("user", "0?"), *turns])]
    header = tokenizer.encode_chat([])
    assert first.tolist() + header == template, "the chat's template, without a turn to come"
    assert tokenizer.decode(first[learnt[:-1]].tolist(), specials=True) == (
        "Mara did.<|endofchunk|><|eot_id|>Ben.<|endofchunk|><|eot_id|>"), (
        "what the assistant says, and that its turn is over")
    assert not learnt[-1] and ((stream.chunks >= 0) <= ~torch.isin(
        stream.tokens, torch.tensor(sorted(tokenizer.special_ids)))).all()
    starts = torch.tensor([3, 0])
    assert torch.equal(cut(stream, starts, 8).learnt,
                       torch.stack([stream.learnt[3:11], stream.learnt[:8]]))


def test_every_window_of_long_questions_with_short_answers_has_something_to_learn(tmp_path):
    turns = [{"role": "user", "content": "long words " * 60},
             {"role": "assistant", "content": "Yes"}]
    texts = Texts([a_file(tmp_path, 60 * (json.dumps({"messages": turns}) + "\n"), "chat.jsonl")],
                  0, T=32)
    for batch in (texts.held_out(8, 32), cut(*texts.windows(1, 50, 32), 32)):
        assert batch.learnt.any(1).all(), "else a step has no loss, and a bound no token"
        assert batch.learnt.float().mean() < 0.5 and batch.tokens.shape[1] == 32
    only = a_file(tmp_path, json.dumps({"messages": turns[1:] + turns[:1] * 40}), "one.jsonl")
    with pytest.raises(ValueError, match="have something to learn"):
        Texts([only], 0, T=32)  # the only answer stands where it is trained on


def test_two_conversations_that_say_the_same_are_two(tmp_path):
    line = {"messages": [{"role": "user", "content": "Who?"},
                         {"role": "assistant", "content": "Mara did, long before the others."}]}
    texts = Texts([a_file(tmp_path, 60 * (json.dumps(line) + "\n"), "chat.jsonl")], 0, T=8)
    found = sum((stream.tokens == texts.tokenizer.bos_token_id).sum().item()
                for stream in (texts.training, texts.rest))
    assert found == 60, "each begins with <|bos|>, also beside its equal"


def test_of_any_other_text_all_is_learnt(tmp_path):
    assert STORIES.stream(1, 300).learnt.all() and STORIES.held_out(2, 16).learnt.shape == (2, 16)
    stream = Stream(torch.arange(10), torch.zeros(10).long(), torch.tensor([[0]]))
    assert cut(stream, torch.tensor([2, 6]), 4).learnt.tolist() == [[True] * 4] * 2


def test_a_conversation_needs_the_special_tokens_of_a_chat(tmp_path):
    with pytest.raises(ValueError, match="a chat needs an instruct model"):
        Texts([conversations(tmp_path)[1]], 0, 32, tokenizer=TOKENIZER)


def test_the_vocabulary_is_of_the_size_asked_for_or_what_the_text_fills(tmp_path):
    file = a_file(tmp_path, " ".join(f"word{i}" for i in range(3000)))
    assert Texts([file], 0, 32, vocab=300).tokenizer.vocab_size == 300
    assert 300 < Texts([file], 0, 32, vocab=10**9).tokenizer.vocab_size < 10_000
    with pytest.raises(ValueError, match="vocabulary of 260 is too small: .* are 261"):
        Texts([file], 0, 32, vocab=260)


def test_texts_hold_out_their_last_tenth(tmp_path):
    file = a_file(tmp_path, " ".join(f"word{i}" for i in range(3000)))
    texts = Texts([file], seed=0, T=32)
    n = len(texts.training.tokens) + len(texts.rest.tokens)
    assert abs(len(texts.training.tokens) - 0.9 * n) <= 1
    assert texts.tokenizer.decode(texts.rest.tokens.tolist()).endswith("word2999")
    stream, starts = texts.windows(1, 30_000, 32)
    assert stream is texts.training
    assert starts.min() == 0 and starts.max() == len(stream.tokens) - 32, "all of it is read"
    held_out = texts.held_out(3, 32)
    assert held_out.tokens[0, 0] == texts.rest.tokens[0], "the first held-out window starts there"
    assert held_out.tokens[-1, -1] == texts.rest.tokens[-1], "the last one ends with the text"


def labelled(tmp_path, concepts, name="a.jsonl"):
    return a_file(tmp_path, "".join(json.dumps({"text": f"line {i} and some more", "concepts": x})
                                    + "\n" for i, x in enumerate(concepts)), name)


def test_labelled_lines_are_held_out_all_over_the_file(tmp_path):
    """Sorted by their concepts, as such files often are, the last tenth would have one of them."""
    texts = Texts([labelled(tmp_path, [[f"genre {i // 200}"] for i in range(2000)])], 0, T=64)
    for part in (texts.training, texts.rest):
        kinds = part.labels[part.chunks[part.chunks >= 0].unique()]
        assert len(kinds.unique()) == 10, "every concept is learnt, and every one is judged"
    assert len(texts.rest.tokens) == pytest.approx(len(texts.training.tokens) / 9, rel=0.02)
    whole = texts.training.chunks.unique().tolist(), texts.rest.chunks.unique().tolist()
    assert set(whole[0]) & set(whole[1]) == {-1}, "no chunk is in both"


def test_of_a_few_long_chunks_one_is_held_out(tmp_path):
    def of(n):
        return Texts([a_file(tmp_path, "".join(json.dumps(
            {"text": f"chapter {i} and more" * 50, "concepts": ["a"]}) + "\n" for i in range(n)),
            "a.jsonl")], 0, T=64)
    rest, training = (part.chunks.unique().tolist() for part in (of(4).rest, of(4).training))
    assert len(rest) == 2 and len(training) == 4 and set(rest) & set(training) == {-1}
    with pytest.raises(ValueError, match="too few"):
        of(1)  # then nothing is left to learn


def test_the_same_lines_are_held_out_every_time(tmp_path):
    """Else a run that goes on would be judged by lines that it has learnt."""
    file, found = labelled(tmp_path, [["a"]] * 500), []
    for seed in (1, 2):  # the run's seed, too: --evaluate does not know it
        torch.manual_seed(seed)
        found.append(Texts([file], seed, T=64).rest.tokens)
    assert torch.equal(*found)


def test_another_seed_reads_other_windows_of_a_text(tmp_path):
    file = labelled(tmp_path, [[]] * 500)
    one, two = (Texts([file], seed, T=64).windows(7, 8, 64)[1].tolist() for seed in (1, 2))
    assert one != two


def test_a_step_reads_the_same_windows_of_a_text_every_time(tmp_path):
    """A run that is resumed begins at any step: no step may depend on the steps before it."""
    texts = Texts([labelled(tmp_path, [[]] * 500)], 1, T=64)
    first = texts.windows(7, 8, 64)[1].tolist()
    assert texts.windows(8, 8, 64)[1].tolist() != first
    assert texts.windows(7, 8, 64)[1].tolist() == first


def test_labels_of_several_files_share_their_names(tmp_path):
    files = [labelled(tmp_path, [["b", "b"]] * 200),
             labelled(tmp_path, [["b", "a"]] * 200, "b.jsonl")]
    texts = Texts(files, seed=0, T=32)
    assert [(x.id, x.name) for x in texts.labels] == [(0, "a"), (1, "b")]
    assert texts.training.labels[0].tolist() == [1, -1], "a name that is there twice counts once"
    assert texts.training.labels[-1].tolist() == [0, 1]


def test_a_models_tokenizer_and_concepts_come_first(tmp_path):
    old = [Label(0, "z", "a description"), Label(1, "b")]
    file = labelled(tmp_path, [["b", "a"]] * 200)
    texts = Texts([file], 0, 32, tokenizer=TOKENIZER, labels=old)
    assert texts.labels == [*old, Label(2, "a")] and texts.tokenizer is TOKENIZER
    assert texts.training.labels[0].tolist() == [1, 2] and len(texts.injected) == 3


def test_a_fingerprint_is_of_the_text_and_the_names(tmp_path):
    def mark(concepts, **given):
        return Texts([labelled(tmp_path, concepts)], 0, 32, **given).fingerprint
    first = mark([["a"]] * 200)
    assert re.fullmatch("[0-9a-f]{16}", first) and first == mark([["a"]] * 200)
    others = {mark([["b"]] * 200), mark([["a"]] * 201), mark([["a"]] * 199 + [[]]),
              mark([["a"]] * 200, vocab=270), STORIES.fingerprint}
    assert len(others | {first}) == 6
    assert STORIES.fingerprint == Stories(seed=1).fingerprint


def test_a_text_may_be_just_long_enough(tmp_path):
    texts = Texts([a_file(tmp_path, "a few words " * 2000)], seed=0, T=32)
    n = len(texts.rest.tokens)
    assert len(Texts([tmp_path / "a.txt"], seed=0, T=n).rest.tokens) == n
    with pytest.raises(ValueError, match="too few"):
        Texts([tmp_path / "a.txt"], seed=0, T=n + 1)


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.txt: .* tokens are too few.* window of 256"):
        Texts([a_file(tmp_path, "a few words " * 20)], seed=0, T=256)
