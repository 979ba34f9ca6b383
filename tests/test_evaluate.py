"""The measures: each does measure what it says, on cases whose answer is known."""

import dataclasses
import random

import pytest
import torch

from steerling_min import Config, Steerling, evaluate, load, world
from steerling_min.data import Stories
from steerling_min.evaluate import (MEASURES, auc, covariance, held_out_loss, new_chunks,
                                    print_table, topic_share)
from steerling_min.tokenizer import RANK_FILE

STORIES = Stories(0)


def test_auc_is_the_chance_that_a_positive_outranks_a_negative():
    scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]).bool()
    pairs = [(p > n).item() for p in scores[labels] for n in scores[~labels]]
    assert auc(scores, labels) == sum(pairs) / len(pairs) == 0.75
    assert auc(scores, scores > 0.3) == 1.0 and auc(-scores, scores > 0.3) == 0.0
    assert auc(torch.zeros(4), labels) == 0.5, "ties count half"


def test_covariance_is_that_of_statistics():
    x = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(covariance(x, x), torch.cov(x.T))


def test_new_chunks_are_whole_sentences_written_after_the_prompt():
    before = "<|bos|>The end. One sentence. Half of"
    after = " a sentence.<|endofchunk|>Another one. Cut off in the mid"
    assert new_chunks(before, after) == [["Half of a sentence."], ["Another one."]]
    assert new_chunks("<|bos|>A b.", " C d.<|endofchunk|>") == [["C d."]]
    assert new_chunks("<|bos|>A b.<|endofchunk|>", "C d") == [], "the last is cut off"
    assert new_chunks("A. A.", " A. A. B") == [["A.", "A."]], "equal sentences are told apart"


def test_the_held_out_loss_is_the_same_every_time():
    torch.manual_seed(0)
    model = Steerling(Config.tiny())
    batch = STORIES.held_out(2, 64)
    assert held_out_loss(model, batch) == held_out_loss(model, batch)


def test_topics_are_counted_in_new_chunks_only(monkeypatch):
    """A writer that answers with a given chunk: the verdict is the recogniser's."""
    rng = random.Random(0)
    chunk = next(chunk for _ in iter(int, 1) for chunk in world.write_story(rng).chunks[1:]
                 if 0 in chunk.concepts)
    monkeypatch.setattr(evaluate, "write", lambda model, tokenizer, prompt, n, seed, steering: (
        tokenizer.decode(prompt, specials=True), chunk.text + "<|endofchunk|>"))
    carried, right = topic_share(None, STORIES.tokenizer, lambda topic: None, False, 2)
    assert carried == 1 / 8 and right == 1.0, "it is about topic 0, one of eight"


def test_the_bundled_model_is_the_trained_one():
    """The whole table takes minutes (train_tiny.py --evaluate); this would notice a wrong model."""
    model, tokenizer = load()
    found = evaluate.language(model, tokenizer, 4)
    assert found["sentences in the grammar"] >= 0.9
    found = evaluate.likelihood(model, tokenizer, 4)
    assert found["likelihood bound / entropy"] < 1.3
    stream = evaluate.pack(evaluate.endless_stories("1"), tokenizer, 24, 16 * 256)
    found = evaluate.concepts(model, stream, 16)  # enough to meet every concept
    assert found["AUC of known concepts"] > 0.95 and found["share through concepts"] > 0.7


def test_every_measure_has_a_row(capsys):
    print_table({"a": dict.fromkeys(MEASURES, 0.5), "b": dict.fromkeys(MEASURES, 0.25)})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(MEASURES) and all(line.count("|") == 5 for line in lines)
    assert "| sentences in the grammar | ≥ 97 % | 50.0 % | 25.0 % |" in lines


def test_another_worlds_model_is_refused(tmp_path):
    model = Steerling(dataclasses.replace(Config.tiny(), n_concepts=30))
    model.save_pretrained(tmp_path)
    STORIES.tokenizer.save(tmp_path / RANK_FILE)
    with pytest.raises(ValueError, match="not trained on the tiny world's stories; its 30 conc"):
        evaluate.evaluate(str(tmp_path), "cpu")
