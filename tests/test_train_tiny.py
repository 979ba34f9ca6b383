"""The trainer: its data, its schedule, and that it learns, repeatably."""

import dataclasses
import random
import sys

import pytest
import torch

import train_tiny
from steerling_min import Config, Steerling, Tokenizer
from steerling_min.checkpoint import TINY
from steerling_min.tokenizer import RANK_FILE
from steerling_min.world import recognise, split_sentences

TOKENIZER = Tokenizer.from_file(TINY / RANK_FILE)
SMALL = dataclasses.replace(Config.tiny(), n_layers=1, n_embd=32, block_size=64)


def test_a_document_is_its_chunks_between_the_special_tokens():
    tokens = train_tiny.story_tokens(TOKENIZER, random.Random(0))
    text = TOKENIZER.decode(tokens, specials=True)
    assert text.startswith("<|bos|>The ") and text.endswith(".<|endoftext|>")
    chunks = text.removeprefix("<|bos|>").removesuffix("<|endoftext|>").split("<|endofchunk|>")
    assert 4 <= len(chunks) <= 7
    for sentence in (s for chunk in chunks for s in split_sentences(chunk)):
        assert recognise(sentence) is not None, "the trainer must not damage what it packs"


def test_windows_are_cut_from_one_stream_without_padding():
    data = train_tiny.batches(TOKENIZER, 2, 50, seed=1)
    stream = torch.cat([next(data).flatten() for _ in range(8)]).tolist()
    rng, expected = random.Random(1), []
    while len(expected) < len(stream):
        expected += train_tiny.story_tokens(TOKENIZER, rng)
    assert stream == expected[: len(stream)], "every token of every story once, in order"


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train_tiny.learning_rate(step, 1000, 0.01) for step in range(1001)]
    top = rates.index(max(rates))
    assert abs(top - train_tiny.WARMUP) <= 1 and max(rates) == pytest.approx(0.01)
    assert rates[0] == pytest.approx(0.01 / train_tiny.WARMUP)
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1:])) and rates[-1] < 1e-9


def test_norms_are_not_decayed():
    groups = train_tiny.make_optimizer(Steerling(SMALL)).param_groups
    decay = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def train(seed, steps, monkeypatch):
    monkeypatch.setattr(train_tiny, "BATCH", 4)
    monkeypatch.setattr(train_tiny, "WARMUP", 5)
    monkeypatch.setattr(train_tiny, "LOG_EVERY", 10)
    torch.manual_seed(seed)
    model = Steerling(SMALL)
    train_tiny.train(model, TOKENIZER, steps, 6e-3, seed)
    return model


def test_training_learns(monkeypatch, capsys):
    train(0, 60, monkeypatch)
    losses = [float(line.split("loss ")[1].split()[0])
              for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6 and losses[0] > 5.8, "it starts near ln 512 = 6.2"
    assert losses[-1] < 5.3, "60 steps teach at least how often each token occurs"


def test_the_same_seed_gives_the_same_weights(monkeypatch):
    a, b, c = (train(seed, 3, monkeypatch).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--device", "abacus"], ["--steps", "x"]])
def test_wrong_arguments_end_with_one_line_and_status_2(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        train_tiny.main()
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1, "one clear line"


def test_the_bundled_model_writes_sentences_of_the_grammar():
    model = Steerling.from_pretrained(TINY)
    share = train_tiny.share_in_grammar(model, TOKENIZER, stories=4, seed=0)
    assert share >= 0.8, f"{share:.0%} of the sentences of 4 texts are in the grammar"
