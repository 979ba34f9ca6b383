"""Resemblance: a written chunk beside the training chunks that it is most like."""

from itertools import islice

import pytest

from steerling_min import load
from steerling_min.attribution import present
from steerling_min.files.labels import Labels
from steerling_min.training.data import endless_stories
from steerling_min.views.resemblance import (print_resemblances, resemblances, texts_of_file,
                                             texts_of_world)

CORPUS = ["The old sailor", "A dog named Biscuit", "The old sailor and a dog"]


@pytest.fixture(scope="module")
def found():
    model, tokenizer = load(device="cpu")
    text = [tokenizer.bos_token_id, *tokenizer.encode(CORPUS[1]), tokenizer.endofchunk_token_id,
            *tokenizer.encode(CORPUS[0]), tokenizer.eos_token_id,
            *tokenizer.encode(CORPUS[2]), tokenizer.mask_token_id]
    labels = Labels([], model.config.n_concepts, model.config.n_unknown_concepts)
    return resemblances(model, tokenizer, labels, text, CORPUS, n=2)


def test_each_chunk_stands_by_itself_without_special_tokens(found):
    assert [chunk["text"] for chunk in found] == [CORPUS[1], CORPUS[0], CORPUS[2]], (
        "<|endofchunk|> and <|endoftext|> end a chunk; no special token is in one")


def test_a_chunk_of_the_training_data_is_found_again(found):
    for chunk in found:
        assert len(chunk["like"]) == 2
        assert chunk["like"][0]["text"] == chunk["text"], "it is most like itself"
        assert chunk["like"][0]["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_of_a_chunk_longer_than_the_context_the_beginning_is_compared():
    model, tokenizer = load(device="cpu")
    labels = Labels([], model.config.n_concepts, model.config.n_unknown_concepts)
    long = " ".join([CORPUS[0]] * 200)
    [chunk] = resemblances(model, tokenizer, labels, tokenizer.encode(CORPUS[0]), [long], n=1)
    assert chunk["like"][0]["text"] == long and chunk["like"][0]["cosine"] > 0.5


def test_the_corpus_is_what_the_bundled_model_was_trained_on_first():
    model, _ = load(device="cpu")
    texts = texts_of_world(model, steps=2)
    stories = [story for step in (0, 1) for story in islice(endless_stories(f"0 {step}"), 8)]
    assert texts == [chunk.text for story in stories for chunk in story], (
        "eight stories of each step of train_tiny.py with seed 0")


def test_a_plain_texts_chunks_are_its_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n\n\nTwo,\nstill two.\n\n \n\nThree.\n\n")
    assert texts_of_file(tmp_path / "a.txt") == ["One.", "Two,\nstill two.", "Three."], (
        "none of them is empty: nothing resembles nothing")


def test_each_line_of_a_labelled_file_is_a_chunk_and_five_likes_are_shown(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "One.\\n\\nTwo."}\n{"text": "Three."}\n')
    assert texts_of_file(tmp_path / "a.jsonl") == ["One.\n\nTwo.", "Three."]
    model, tokenizer = load(device="cpu")
    labels = Labels([], model.config.n_concepts, model.config.n_unknown_concepts)
    [chunk] = resemblances(model, tokenizer, labels, tokenizer.encode("The cat"), CORPUS * 2)
    assert len(chunk["like"]) == 5


def test_shared_concepts_are_named(found, capsys):
    model, tokenizer = load(device="cpu")
    has = {text: {f"concept {i}" for i in present(model, tokenizer.encode(text))}
           for text in CORPUS}
    for chunk in found:
        for other in chunk["like"]:
            assert set(other["shared"]) == has[chunk["text"]] & has[other["text"]], (
                f"the concepts that both {chunk['text']!r} and {other['text']!r} have")
    first = found[0]["like"][0]["shared"]
    assert first and all(name.startswith("concept ") for name in first), "without labels: numbers"
    print_resemblances(found)
    printed = capsys.readouterr().out
    assert "resemblance is not cause" in printed and f"both: {', '.join(first)}" in printed
