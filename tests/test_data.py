"""Training data: packing, cutting, and other people's files."""

import json
import random
import re
import resource

import pytest
import torch

from steerling_min.files.loading import TINY
from steerling_min.files.tokenizer import RANK_FILE
from steerling_min.training.data import (WORD, Stories, Stream, Texts, count_tokens, cut,
                                         has_concepts, pack, read_jsonl, read_text)
from steerling_min.training.world import Chunk, recognise, split_sentences, write_story

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


def test_paragraphs_of_a_text_file_are_chunks(tmp_path):
    file = a_file(tmp_path, "One.\r\nStill one.\r\n\r\n\r\nTwo: \u00e9\u4e16.\n")
    assert read_text(file) == [("One.\nStill one.", []), ("Two: \u00e9\u4e16.", [])]


def test_lines_of_a_jsonl_file_are_chunks_with_labels(tmp_path):
    lines = [{"text": "a", "concepts": ["x", "y"]}, {"text": "b"}]
    file = a_file(tmp_path, "\n".join(map(json.dumps, lines)) + "\n\n", "a.jsonl")
    assert read_jsonl(file) == [("a", ["x", "y"]), ("b", [])]


@pytest.mark.parametrize("line", [
    "not json", "[1]", "{}", '{"text": 3}', '{"text": ""}', '{"text": "a", "concepts": "x"}',
    '{"text": "a", "concepts": [1]}', '{"text": "a", "concepts": null}', b'{"text": "\xff"}',
    "[" * 10**5])
def test_a_malformed_line_is_named_by_its_number(tmp_path, line):
    line = line if isinstance(line, bytes) else line.encode()
    file = a_file(tmp_path, b'{"text": "fine"}\n' + line + b"\n", "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl, line 2: expected"):
        read_jsonl(file)


@pytest.mark.parametrize("content, message", [
    (b"", "has no text"), (b" \n\n\t\n", "has no text"),
    (b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9")])
def test_a_file_without_readable_text_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"a.txt.*{message}"):
        read_text(a_file(tmp_path, content))


def test_texts_hold_out_their_last_tenth(tmp_path):
    file = a_file(tmp_path, " ".join(f"word{i}" for i in range(3000)))
    texts = Texts([file], seed=0, T=32)
    n = len(texts.training.tokens) + len(texts.rest.tokens)
    assert len(texts.training.tokens) == n * 9 // 10
    stream, starts = texts.windows(1, 30_000, 32)
    assert stream is texts.training
    assert starts.min() == 0 and starts.max() == len(stream.tokens) - 32, "all of it is read"
    held_out = texts.held_out(3, 32)
    assert held_out.tokens[0, 0] == texts.rest.tokens[0], "the first held-out window starts there"
    assert held_out.tokens[-1, -1] == texts.rest.tokens[-1], "the last one ends with the text"


def test_labels_of_several_files_share_their_names(tmp_path):
    lines = '{"text": "one two three four five", "concepts": ["b"]}\n' * 200
    files = [a_file(tmp_path, lines, "a.jsonl"),
             a_file(tmp_path, lines.replace('"b"', '"b", "a"'), "b.jsonl")]
    texts = Texts(files, seed=0, T=32)
    assert [(x.id, x.name) for x in texts.labels] == [(0, "a"), (1, "b")]
    assert texts.training.labels[0].tolist() == [1, -1]
    assert sorted(texts.training.labels[-1].tolist()) == [0, 1]


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.txt: .* tokens are too few.* window of 256"):
        Texts([a_file(tmp_path, "a few words " * 20)], seed=0, T=256)
