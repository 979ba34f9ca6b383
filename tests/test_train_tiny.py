"""The trainer: its schedules, that it learns, repeatably, and in parallel."""

import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIG, SHARED, SMALL, close, history_of, same_files

import train_tiny
from steerling_min import Steerling, load
from steerling_min.files import checkpoint
from steerling_min.iguide import rows
from steerling_min.training.data import Stories, Texts
from steerling_min.files.labels import LABELS, Labels

ROOT = Path(__file__).parent.parent
STORIES = Stories(0)


# ---- schedules -----------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    rates = [train_tiny.learning_rate(step, step / 10000, 0.01) for step in range(10001)]
    assert rates[0] == pytest.approx(0.01 / train_tiny.WARMUP) and rates[-1] < 1e-9
    top = rates.index(max(rates))
    assert top == train_tiny.WARMUP - 1 and max(rates) == pytest.approx(0.01, rel=1e-3)
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1:]))
    assert rates[5000] == pytest.approx(0.005), "half a cosine is half-way down in the middle"


def fresh():
    torch.manual_seed(0)
    return train_tiny.fill(train_tiny.make_model("tiny", STORIES), "cpu", train_tiny.first_weight)


@pytest.mark.parametrize("size, millions", [("tiny", 1.43), ("small", 8.26),
                                            ("medium", 105.33), ("large", 823.89)])
def test_a_size_is_so_many_millions_of_parameters(size, millions):
    model = train_tiny.make_model(size, STORIES)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_norms_are_not_decayed():
    model = fresh()
    groups = train_tiny.make_optimizer(model).param_groups
    decay = {(p.dim(), group["weight_decay"]) for group in groups for p in group["params"]}
    assert decay == {(2, 0.1), (1, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("small", [True, False])
def test_matrices_of_blocks_and_unknown_head_take_orthogonal_steps_if_small(monkeypatch, small):
    model = fresh()
    monkeypatch.setattr(train_tiny, "SMALL", 10_000_000 if small else 1_000_000)
    optimizer = train_tiny.make_optimizer(model)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p] for group in optimizer.param_groups for p in group["params"]
             if group["orthogonal"]}
    inside = {name for p, name in names.items() if p.dim() == 2 and (
        ".blocks." in name or name.startswith("unknown_head."))}
    assert len(inside) == 20 and found == (inside if small else set()), (
        "embeddings and the known head are lists of rows, each learnt when its token or concept "
        "occurs; in a large model the steps would cost too much")
    for p, state in optimizer.state.items():
        assert all(x.count_nonzero() == 0 for x in state.values())
        assert ("exp_avg_sq" in state) == (names[p] not in found), "Muon keeps one moment"


def draws(progress, without=(), step=1, corpus=STORIES):
    args = train_tiny.Namespace(seed=0, batch=64, without=without)
    config = train_tiny.Config.tiny()
    return train_tiny.draw_step(corpus, config, step, progress, args)


def test_residual_dropout_leaves_epsilon_out_of_a_share_of_the_windows():
    def rate(progress, without=()):
        drawn = [draws(progress, without, step).dropped for step in range(12)]
        return torch.cat(drawn).float().mean().item()  # of 768
    assert rate(0.5, ["dropout"]) == 0
    for progress in (0.0, 1.0):
        assert rate(progress) == pytest.approx(train_tiny.DROPOUT, abs=0.07)


def test_fewer_windows_of_ones_own_text_are_without_epsilon(tmp_path):
    (tmp_path / "a.txt").write_text("Some words, again and again. " * 400)
    corpus = train_tiny.Texts([tmp_path / "a.txt"], 0, 256, 300)
    dropped = torch.cat([draws(0.5, step=step, corpus=corpus).dropped for step in range(12)])
    assert dropped.float().mean().item() == pytest.approx(train_tiny.TEXT_DROPOUT, abs=0.04), (
        "language takes longer to learn there, and windows without epsilon teach little of it")
    assert not draws(0.5, corpus=corpus).alone.any(), "its labels do not name its words"


def test_known_concepts_stand_alone_at_a_share_of_the_tokens():
    alone = draws(0.5).alone
    assert alone.float().mean().item() == pytest.approx(train_tiny.ALONE, abs=0.01)
    rows = alone.float().mean(1)
    assert rows.min() > 0.1 and rows.max() < 0.3, "token by token, not window by window"
    assert torch.equal(alone, draws(0.9).alone) and not torch.equal(alone, draws(0.5, step=2).alone)


def test_the_trainer_says_when_a_run_was_too_short_to_mean_anything(run, tmp_path, monkeypatch):
    out = run("--steps", 10, "--batch", 1)
    held_out = float(re.findall(r"held out ([0-9.]+)", out)[1])
    said = re.search(r"too short a run .* held out ([0-9.]+); a model .* has ([0-9.]+)", out)
    assert float(said[1]) == pytest.approx(held_out, abs=0.006)
    assert 0.9 * float(said[2]) < held_out
    monkeypatch.setattr(train_tiny, "token_entropy", lambda *args: 1.2 * held_out)
    assert "too short" not in run("--steps", 5, "--batch", 1, out=tmp_path / "long")


def test_what_the_frequencies_of_tokens_alone_give_is_their_entropy():
    tokens = torch.tensor([3, 3, 3, 3, 5, 5, 0, 7])  # 1/2, 1/4, 1/8, 1/8: 1.75 bits
    assert train_tiny.token_entropy(tokens) == pytest.approx(1.75 * math.log(2))


def test_labels_of_a_text_pull_at_the_backbone_less_than_those_of_the_tiny_world(tmp_path):
    (tmp_path / "a.txt").write_text("Some words, again and again. " * 400)
    args = train_tiny.Namespace(without=[], init=None, resume=True, recompute=False, compile=False,
                                seed=0, dtype="float32")
    run = SimpleNamespace(say=print, labels=Labels([], 0, 0),
                          stored_weight=train_tiny.first_weight)
    for corpus, pull in ((STORIES, train_tiny.PULL),
                         (train_tiny.Texts([tmp_path / "a.txt"], 0, 256, 300),
                          train_tiny.TEXT_PULL)):
        model = train_tiny.make_model("tiny", corpus)
        counted, _ = corpus.windows("counted", 200, 256)
        assert train_tiny.prepare(model, corpus, counted, args, run, "cpu").pull == pull, (
            "with more, labels cost a text its language")


def test_a_checkpoint_learns_every_concept_that_the_corpus_names():
    """Also one that is missing in the part where tokens are counted: it comes later."""
    args = train_tiny.Namespace(without=[], init="model", resume=True, recompute=False, seed=0,
                                compile=False, dtype="float32")
    run = SimpleNamespace(say=print, labels=Labels([], 0, 0),
                          stored_weight=train_tiny.first_weight)
    corpus = train_tiny.Stories(0, STORIES.tokenizer, [train_tiny.Label(0, "the model's own"),
                                                       train_tiny.Label(1, "another")])
    model = train_tiny.make_model("tiny", corpus)
    counted = corpus.stream("counted", 100)  # a story
    objective = train_tiny.prepare(model, corpus, counted, args, run, torch.device("cpu"))
    assert objective.spoken.tolist() == list(range(2, 296)), "the stories' 294, and no other"
    assert len(objective.lift) == 294 and (objective.lift.sum(1) == 0).sum() > 200


def test_concepts_are_injected_in_the_last_part_only_and_at_masked_positions():
    assert draws(train_tiny.STEER_FROM - 0.01).injected is None
    drawn = draws(train_tiny.STEER_FROM)
    where = drawn.injected >= 0
    assert where.any() and not (where & ~drawn.masked).any()
    assert draws(1.0, ["steering"]).injected is None


def test_a_concept_begins_at_what_it_lifts_or_where_it_was():
    model = fresh()
    embedding, lift = model.known_head.concept_embedding.weight, torch.zeros(294, 795)
    lift[3, 7] = 1.0
    before = embedding[4].clone()
    train_tiny.start_concepts(model, lift, torch.arange(len(lift)))
    token = model.transformer.tok_emb.weight[7]
    torch.testing.assert_close(embedding[3], train_tiny.CONCEPT_NORM * token / token.norm())
    assert torch.equal(embedding[4], before), "a direction of length 0 would be none at all"


@pytest.mark.parametrize("more", [1, 40], ids=["in the padding", "beyond it"])
def test_a_new_concept_begins_as_the_mean_of_those_that_the_model_knows(tiny_folder, tmp_path,
                                                                        more):
    old = load(tiny_folder)[0]
    n = old.config.n_concepts
    with train_tiny.Run(train_tiny.Namespace(out=tmp_path / "out", resume=False)) as run:
        model = run.start_from(str(tiny_folder))[0]
        train_tiny.add_concepts(model, n)
        assert model.config == old.config, "it knows as many already"
        train_tiny.add_concepts(model, n + more)
        train_tiny.fill(model, "cpu", run.stored_weight)
    head = model.known_head
    assert model.config.n_concepts == head.n_concepts == n + more
    for before, module in ((old.known_head.concept_predictor, head.concept_predictor),
                           (old.known_head.concept_embedding, head.concept_embedding)):
        assert len(module.weight) == rows(n + more, old.config.pad_multiple)
        assert module.weight.requires_grad
        close(module.weight[:n], before.weight[:n], "what it knows is as it was", atol=0)
        close(module.weight[n:], before.weight[:n].mean(0).expand(len(module.weight) - n, -1),
              "not the padding's numbers")
    same = model.transformer.tok_emb.weight
    close(same, old.transformer.tok_emb.weight, "all else is as it was", atol=0)
    assert model.transformer.lm_head.weight is same, "still tied"


def test_a_new_concepts_embedding_is_as_long_as_the_others():
    model = train_tiny.Steerling(CONFIG)
    embedding, lift = model.known_head.concept_embedding.weight, torch.zeros(8, 20)
    lift[:, 7] = 1.0
    before = embedding.detach().clone()
    train_tiny.start_concepts(model, lift, torch.arange(8), 6)
    assert torch.equal(embedding[:6], before[:6]), "the others have learnt theirs"
    length = before[:6].norm(dim=-1).mean()
    close(embedding[6].norm(), length, "one scale for all")
    assert torch.cosine_similarity(embedding[6], model.transformer.tok_emb.weight[7], 0) > 0.999


# ---- a step --------------------------------------------------------------------------------------

def test_the_plain_step_is_the_trainers_with_all_parts_left_out():
    args = train_tiny.Namespace(seed=0, batch=2, without=[
        "dropout", "forcing", "presence", "reconstruction", "independence", "alignment",
        "steering"])
    losses, moved = [], []
    for plain in (True, False):
        model = fresh()
        before = model.transformer.tok_emb.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        drawn = train_tiny.draw_step(STORIES, model.config, 3, 0.9, args)
        if plain:  # the noise that the trainer draws for step 3
            noise = torch.Generator().manual_seed(random.Random("noise 0 3").getrandbits(63))
            losses.append(train_tiny.plain_step(model, optimizer, drawn.batch.tokens, noise))
        else:
            lift = torch.zeros(model.config.n_concepts, model.config.vocab_size)
            objective = train_tiny.Objective(model, args.without, lift)
            found = train_tiny.take_step(objective, optimizer, drawn, 0.9, 0.01, torch.float32)
            assert found.keys() == {"token"}
            losses.append(found["token"])
        moved.append((model.transformer.tok_emb.weight.detach() - before).flatten())
    close(losses[0], losses[1], "one loss: cross-entropy at the masked positions")
    assert torch.cosine_similarity(*moved, dim=0) > 0.9999, "one direction (one is clipped)"


def test_a_plain_step_begins_with_no_gradient_of_the_step_before():
    model, tokens = fresh(), torch.randint(0, 200, (2, 64))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(2):
        train_tiny.plain_step(model, optimizer, tokens, torch.Generator().manual_seed(0))
        found.append(model.transformer.tok_emb.weight.grad.norm())
    close(found[1], found[0], "the same step of the same weights: gradients must not add up")


def take(model, optimizer=None, step=3, lr=0.0, dtype=torch.float32):
    """A step of the trainer on a window of stories, with every loss but steering's."""
    args = train_tiny.Namespace(seed=0, batch=1, without=["steering"])
    lift = torch.zeros(model.config.n_concepts, model.config.vocab_size)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    drawn = train_tiny.draw_step(STORIES, model.config, step, 0.9, args)
    return train_tiny.take_step(train_tiny.Objective(model, [], lift), optimizer, drawn, 0.9, lr,
                                dtype)


def test_no_step_begins_with_the_gradient_of_the_step_before(monkeypatch):
    monkeypatch.setattr(train_tiny.nn.utils, "clip_grad_norm_", lambda *args: None)  # hides it
    found = []
    for steps in ((3, 4), (4,)):  # at a rate of 0, so with the same weights
        model = fresh()
        for step in steps:
            take(model, step=step)
        found.append(model.transformer.tok_emb.weight.grad)
    close(found[0] / found[1].norm(), found[1] / found[1].norm(), "that of the last step alone")


def test_gradients_are_clipped_to_a_length_of_1_before_the_step():
    model = fresh()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    take(model, lr=0.5)
    moved = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3), "at a rate of 0.5, half of 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compute_in_the_dtype_that_is_asked_for_and_losses_in_float32(dtype):
    model, seen = fresh(), set()
    for block in model.transformer.blocks:
        block.attn.c_attn.register_forward_hook(lambda module, x, out: seen.add(out.dtype))
    losses = take(model, dtype=dtype)
    assert seen == {dtype} and {loss.dtype for loss in losses.values()} == {torch.float32}


def test_a_step_uses_the_learning_rate_that_it_is_given():
    """Not that of the step before."""
    model = fresh()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    before = model.transformer.tok_emb.weight.detach().clone()
    take(model, optimizer)
    assert torch.equal(model.transformer.tok_emb.weight, before), "a rate of 0 moves nothing"


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last_one(run, tmp_path, monkeypatch):
    numbers = iter(range(1, 11))
    monkeypatch.setattr(train_tiny, "take_step",
                        lambda *args: {"token": torch.tensor(float(next(numbers)))})
    asked, said = [], []
    monkeypatch.setattr(train_tiny, "held_out_loss", lambda model, batch: (
        asked.append(tuple(batch.tokens.shape)), 1.0)[1])
    monkeypatch.setattr(train_tiny.Run, "say", lambda self, line, passing=False: said.append(
        (line.split(":")[0], passing)))
    run("--steps", 10)
    assert [row["token"] for row in history_of(tmp_path / "out")] == [3.0, 8.0], (
        "1 to 5, then 6 to 10")
    assert asked == [(8, 64)] * 2, "eight held-out windows of the context's length"
    assert [row for row in said if row[0].startswith("step")] == [
        ("step 1", True), ("step 5", False), ("step 10", False)], "what is in the curve stays"


def test_what_is_shown_between_is_the_mean_so_far_too(run, monkeypatch):
    """A single step's losses, between lines of means, would look as if the loss jumped."""
    numbers = iter(range(1, 8))
    monkeypatch.setattr(train_tiny, "take_step",
                        lambda *args: {"token": torch.tensor(float(next(numbers)))})
    monkeypatch.setattr(train_tiny, "PRINT_EVERY", 0)
    said = re.findall(r"^step (\d): .* token ([\d.]+)", run("--steps", 7), re.M)
    assert said == [("1", "1.000"), ("2", "1.500"), ("3", "2.000"), ("4", "2.500"), ("5", "3.000"),
                    ("6", "6.000"), ("7", "6.500")], "of the steps since step 5, which was logged"


# ---- runs ----------------------------------------------------------------------------------------


def test_training_learns(run, tmp_path):
    out = run("--steps", 60, "--lr", 0.01)
    rows = [line for line in out.splitlines() if line.startswith("step ")]
    assert "tokens/s" in rows[0] and "min left" in rows[0]
    assert rows.pop(0).startswith("step 1:") and len(rows) == 12, "the first shows that it works"
    first, last = (float(row.split("held out ")[1]) for row in (rows[0], rows[-1]))
    assert "per character" not in out, "the tiny world has its own units"
    assert first > 5.8, "it starts near ln 829 = 6.7"
    assert last < 5.6, "60 steps teach at least how often each token occurs"
    assert "presence" in rows[0] and "respond" not in rows[0] and "respond" in rows[-1]


def test_a_run_leaves_a_model_that_loads_and_its_curve(run, tmp_path):
    out = run("--steps", 10)
    model, tokenizer = load(tmp_path / "out")
    assert model.config.n_embd == 32 and tokenizer.vocab_size == model.config.vocab_size
    assert (tmp_path / "out" / (LABELS + ".csv")).read_text().startswith("concept_id,concept_name")
    assert "nats per masked token" in out and out.count("o") > 10, "a curve of letters"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_same_seed_gives_the_same_weights(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run("--steps", 4, "--seed", seed, out=tmp_path / name)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert not same_files(tmp_path / "a", tmp_path / "c")


def test_minutes_end_a_run_too(run, tmp_path):
    began = time.monotonic()
    run("--minutes", 0.005)
    assert time.monotonic() - began < 60 and (tmp_path / "out" / "model.safetensors").exists()


def test_minutes_stand_in_place_of_steps(monkeypatch):
    for words, steps in (([], train_tiny.STEPS), (["--minutes", "9"], None),
                         (["--minutes", "9", "--steps", "7"], 7)):
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", *words])
        assert train_tiny.parse_args().steps == steps, words


def test_parts_can_be_left_out(run):
    out = run("--steps", 5, "--without", "presence", "independence")
    assert "presence" not in out and "independence" not in out and "reconstruction" in out


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank, world", [(-1, 0), (0, 0), (2, 2)])
def test_a_number_that_torchrun_cannot_have_set_is_one_line(run, monkeypatch, rank, world):
    monkeypatch.setattr(train_tiny, "RANK", rank)
    monkeypatch.setattr(train_tiny, "WORLD", world)
    assert "RANK and WORLD_SIZE" in run(status=2)


def test_a_batch_that_no_memory_holds_is_refused_at_once(run, tmp_path):
    assert "--batch 100000000: a step takes over" in run("--batch", 100_000_000, status=2)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["run.lock"]


def test_an_exercise_that_is_still_blank_is_one_line(run, monkeypatch):
    def blank(*args):
        raise NotImplementedError("exercise: corrupt")
    monkeypatch.setattr(train_tiny, "corrupt", blank)
    assert "the exercise corrupt is not written yet" in run("--steps", 1, status=2)


def test_a_run_that_diverges_is_ended_with_a_hint(run, monkeypatch):
    monkeypatch.setattr(train_tiny, "held_out_loss", lambda *args: math.nan)
    assert "try a smaller --lr" in run("--steps", 5, status=2)


def test_too_little_memory_is_one_line(run, monkeypatch):
    def fails(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B.")
    monkeypatch.setattr(train_tiny, "train", fails)
    assert "not enough memory: a smaller --batch" in run("--steps", 1, status=2)


# ---- other people's texts ------------------------------------------------------------------------


def test_a_model_without_named_concepts_detects_none_in_a_labelled_text(run, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(f"This is paragraph {i}." for i in range(400)))
    run("--steps", 5, "--text", tmp_path / "a.txt", "--vocab", 300)
    lines = [json.dumps({"text": f"This is paragraph {i}.", "concepts": [f"a{i % 2}", f"b{i % 3}"]})
             for i in range(400)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    out = run("--text", tmp_path / "b.jsonl", "--evaluate", tmp_path / "out")
    assert "bits per byte" in out and "AUC" not in out, "its concept 0 is not the text's first"


def test_plain_text_trains_without_labels_and_says_so(run, tmp_path, monkeypatch):
    text = "\n\n".join(f"This is paragraph {i} of many." for i in range(400))
    (tmp_path / "a.txt").write_text(text)
    out = run("--steps", 5, "--text", tmp_path / "a.txt", "--vocab", 300)
    assert "no labels" in out and "presence" not in out.split("step 5")[1]
    assert "express" not in out, "there is nothing to inject"
    model, tokenizer = load(tmp_path / "out")
    assert len(tokenizer.encode("This is paragraph")) == 3, "the words are the text's own"
    assert model.config.vocab_size <= 300
    per_character = float(re.search(r"nats per character ([0-9.]+)", out)[1])
    out = run("--text", tmp_path / "a.txt", "--evaluate", tmp_path / "out")
    assert float(re.search(r"([0-9.]+)  bound, nats per character", out)[1]) == pytest.approx(
        per_character, rel=0.2)
    assert "bits per byte" in out and out.count("--- sample") == 3
    assert "trained on other text" not in out
    (tmp_path / "b.txt").write_text(text.replace("many", "some"))
    assert "(it was trained on other text" in run("--text", tmp_path / "b.txt", "--evaluate",
                                                  tmp_path / "out"), "so the figure may be too good"
    measured = []
    monkeypatch.setattr(train_tiny, "measure_text",
                        lambda model, tokenizer, rest: measured.append(rest) or {})
    run("--text", tmp_path / "a.txt", "--evaluate", tmp_path / "out")
    ids = measured[0].tokens.tolist()
    assert tokenizer.decode(ids).endswith("paragraph 399 of many."), "not what was trained on"
    assert len(ids) < 0.11 * len(tokenizer.encode(text)), "the last tenth"


def test_processes_agree_on_when_to_save(run, monkeypatch):
    asked = []
    monkeypatch.setattr(train_tiny, "agreed", lambda x, device: (asked.append(x), x)[1])
    run("--steps", 10)  # each fifth step is logged, and it is time to save
    assert sum(x is True for x in asked) == 2, "clocks differ, and all must take part in a save"


def test_each_process_needs_room_for_its_own_windows_only(run, monkeypatch):
    asked = []

    def room(B, *rest):
        asked.append(B)
        raise ValueError("no room")
    monkeypatch.setattr(train_tiny, "WORLD", 2)
    monkeypatch.setattr(train_tiny.dist, "init_process_group", lambda *arguments: None)
    monkeypatch.setattr(train_tiny, "require_room", room)
    assert "no room" in run("--steps", 1, "--batch", 4, status=2)
    assert asked == [2], "of the four windows of a step"


def test_activations_that_are_computed_again_need_a_tenth_of_the_room(run, tmp_path, monkeypatch):
    """A layer of 32 numbers, two windows of 64 tokens: ten such numbers, or one, of four bytes."""
    deep = train_tiny.Config.tiny()  # 4 layers of 128, a context of 256
    monkeypatch.setattr(train_tiny, "free_memory", lambda device: 40 * 3 * 256 * 4 * 128)
    train_tiny.require_room(3, deep, torch.device("cpu"), False)
    train_tiny.require_room(30, deep, torch.device("cpu"), True)
    with pytest.raises(ValueError, match="--batch 4"):
        train_tiny.require_room(4, deep, torch.device("cpu"), False)
    numbers = 32 * 2 * 64
    monkeypatch.setattr(train_tiny, "free_memory", lambda device: 40 * numbers - 1)
    assert "a step takes over" in run("--steps", 1, "--batch", 2, status=2)
    run("--steps", 1, "--batch", 2, "--recompute", out=tmp_path / "fits")
    monkeypatch.setattr(train_tiny, "free_memory", lambda device: 4 * numbers - 1)
    assert "a step takes over" in run("--steps", 1, "--batch", 2, "--recompute", status=2,
                                      out=tmp_path / "does not")


def test_labelled_lines_train_their_concepts(run, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"text": f"line {i} and some more of it", "concepts": ["even"] * (i % 2 == 0)})
        + "\n" for i in range(400)))
    out = run("--steps", 5, "--text", tmp_path / "a.jsonl")
    assert "1 known concepts" in out and "presence" in out
    assert "express" in out, "a chunk's only concept is injected, too"
    assert "AUC" in run("--text", tmp_path / "a.jsonl", "--evaluate", tmp_path / "out")
    assert "0,even,,known," in (tmp_path / "out" / (LABELS + ".csv")).read_text()


def test_conversations_train_the_assistants_turns_alone(run, tmp_path):
    line = {"messages": [{"role": "user", "content": "What is it?"},
                         {"role": "assistant", "content": "It is a whale."}]}
    (tmp_path / "a.jsonl").write_text(400 * (json.dumps(line) + "\n"))
    run("--steps", 5, "--text", tmp_path / "a.jsonl")
    model, tokenizer = load(tmp_path / "out")
    assert model.config.eot_id == tokenizer.eot_id == tokenizer.vocab_size - 1
    corpus = Texts([tmp_path / "a.jsonl"], 0, 64)
    args = train_tiny.Namespace(seed=0, batch=8, without=[])
    drawn = train_tiny.draw_step(corpus, model.config, 3, 0.9, args)
    assert drawn.masked.any() and not (drawn.masked & ~drawn.batch.learnt).any()
    assert "whale" in tokenizer.decode(drawn.batch.tokens[drawn.batch.learnt].tolist())
    assert not torch.equal(drawn.masked, drawn.batch.learnt), "some of them, by the noise level"


def test_a_shard_is_read_with_the_runs_seed_and_context(monkeypatch):
    monkeypatch.setattr(train_tiny, "Atlas", lambda *args: args)
    args = train_tiny.Namespace(text=[Path("a.parquet")], seed=7, vocab=300, top=5,
                                concepts=Path("c.parquet"))
    assert train_tiny.make_corpus(args, 64, None, []) == (
        args.text, 7, 64, 300, None, [], args.concepts, 5)


def test_a_shard_of_fineweb_atlas_trains_and_goes_on(run, tmp_path):
    test_atlas = pytest.importorskip("test_atlas", reason="needs pyarrow")
    shard = test_atlas.shard(tmp_path, test_atlas.rows_of(400))
    arguments = ["--text", shard, "--concepts", test_atlas.names(tmp_path), "--top", 1]
    out = run("--steps", 10, *arguments)
    assert "3 known concepts" in out and "presence" in out and "nats per character" in out
    assert "AUC" in run(*arguments, "--evaluate", tmp_path / "out")
    assert "give both" in run("--text", shard, status=2)
    assert "give both" in run(*arguments[2:], status=2)


@pytest.mark.parametrize("content, message", [
    (b"", "has no text"), (b"\xff\xfe", "not UTF-8"), (b"too short", "too few"),
    (None, "No such file")])
def test_a_text_that_cannot_be_used_is_one_line(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    error = run("--text", tmp_path / "a.txt", status=2)
    assert message in error and "a.txt" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments, message", [
    (["--steps", 0], "--steps 0: at least 1"), (["--minutes", -1], "--minutes -1"),
    (["--minutes", 0], "--minutes 0"), (["--seed", 2**63], "--seed 9223372036854775808"),
    (["--minutes", "nan"], "--minutes nan"), (["--minutes", "inf"], "--minutes inf"),
    (["--lr", 0], "--lr 0"), (["--lr", 1], "--lr 1"), (["--batch", 0], "--batch 0"),
    (["--seed", -1], "--seed -1"), (["--top", 0], "--top 0"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--device", "abacus"], "'abacus' is not available"), (["--dtype", "int8"], "int8"),
    (["--without", "brain"], "brain"), (["--steps", "x"], "invalid int"),
    (["--init", "/nowhere"], "no checkpoint folder at /nowhere"),
    (["--init", "/nowhere", "--size", "tiny"], "--size tiny: the model of --init has its own"),
    (["--evaluate", "--steps", 9], "--steps 9: for training, and --evaluate trains nothing"),
    (["--evaluate", "--out", "/a"], "--out /a: for training"),
    (["--top", 3], "--top 3: for --concepts only"), (["--vocab", 300], "for --text only"),
    (["--vocab", 300, "--text", "a", "--init", "b"], "the model of --init has its own"),
    (["--evaluate", "/nowhere"], "no checkpoint folder at /nowhere")])
def test_wrong_arguments_end_with_one_line_and_status_2(run, arguments, message):
    error = run(*arguments, status=2)
    assert message in error and len(error.splitlines()) == 1


# ---- several processes ---------------------------------------------------------------------------


SCRIPT = f"""
import json, os, pathlib, sys, torch, train_tiny as t
t.SIZES["tiny"], t.LOG_EVERY, t.WARMUP, t.STEER_FROM, t.DROPOUT = {SMALL}, 1, 5, 0.5, 0.9
small, t.SMALL = t.SMALL, 0 if t.WORLD == 2 else t.SMALL  # each block by itself, or all together
train, make_optimizer, made = t.train, t.make_optimizer, []

def held(tensors):
    return sum(getattr(x, "to_local", lambda: x)().nbytes for x in tensors)

def trained(objective, *args):
    history, parameters = train(objective, *args), list(objective.parameters())
    moments = [x for state in made[0].state.values() for x in state.values() if x.dim()]
    numbers = [held(parameters), max(gradients), held(moments)]
    pathlib.Path(sys.argv[2], f"held{{t.RANK}}").write_text(json.dumps(numbers))
    made.clear()  # the run ends with nothing sharded left, as it does without this test
    return history

def making(model):
    t.SMALL = small  # for the optimizer the model is small
    made.append(make_optimizer(model))
    made[0].register_step_pre_hook(lambda optimizer, *rest: gradients.append(held(
        p.grad for p in optimizer.state if p.grad is not None)))
    return made[0]

t.train, t.make_optimizer, gradients = trained, making, []
t.main()
"""


def processes(n, folder, *arguments):
    """The command line of a run in n processes, and where it runs."""
    (folder / "script.py").write_text(SCRIPT)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(n), str(folder / "script.py"), "--out", str(folder / "out"), *arguments, *SHARED
            ], {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}


def one_of(rank, n, port, folder, arguments):
    """One process of a run, as torchrun starts it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for name in list(sys.modules):
        if name.split(".")[0] in ("steerling_min", "train_tiny"):
            del sys.modules[name]  # its rank is read when it is imported
    sys.argv = ["script.py", "--out", str(folder / "out"), *arguments, *SHARED]
    sys.stderr = open(folder / f"errors{rank}", "w", buffering=1)
    exec(SCRIPT, {})


def run_in_processes(n, folder, *arguments):
    if sys.platform == "win32":
        pytest.skip("Windows has no forks")
    from forks import FORKS
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [FORKS.Process(target=one_of, args=(rank, n, port, folder, arguments))
               for rank in range(n)]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    ended = [process.exitcode for process in started]
    for process in started:
        process.kill()
    assert ended == [0] * n, "\n".join(
        (folder / f"errors{rank}").read_text() for rank in range(n))


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_take_the_steps_of_one_and_hold_a_part_each(n, run, tmp_path,
                                                                      monkeypatch):
    """With gloo: the same global batch, the same losses; a run goes on in any number."""
    run_in_processes(n, tmp_path, "--steps", "10", "--recompute")
    monkeypatch.setattr(train_tiny, "STEER_FROM", 0.5)
    monkeypatch.setattr(train_tiny, "DROPOUT", 0.9)
    run("--steps", 10, out=tmp_path / "one", LOG_EVERY=1)
    histories = history_of(tmp_path / "one"), history_of(tmp_path / "out")
    assert len(histories[0]) == len(histories[1]) == 10
    for one, several in zip(*histories):
        assert one.keys() == several.keys() and "independence" in one
        for name in one:
            assert several[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), (
                f"step {one['step']}: the {name} loss of {n} processes is not that of one")
    model, other = load(tmp_path / "one")[0], load(tmp_path / "out")[0]
    full = 4 * sum(p.numel() for p in model.parameters())
    for rank in range(n):
        held = json.loads((tmp_path / "out" / f"held{rank}").read_text())
        for bytes, times, what in zip(held, (1, 1, 2), ("weights", "gradients", "moments")):
            assert bytes <= 1.1 * times * full / n, f"process {rank} holds too many {what}"
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        close(b, a, f"{name}: put together, the parts are the model", atol=1e-3)

    run("--resume", "--steps", 12, out=tmp_path / "out", LOG_EVERY=1)
    run("--resume", "--steps", 12, out=tmp_path / "one", LOG_EVERY=1)
    one, several = history_of(tmp_path / "one"), history_of(tmp_path / "out")
    assert len(several) == 12 and several[-1]["token"] == pytest.approx(one[-1]["token"], rel=1e-3)
    if n == 4:  # and back
        run_in_processes(n, tmp_path, "--resume", "--steps", "14")
        assert [row["step"] for row in history_of(tmp_path / "out")] == list(range(1, 15))


@pytest.mark.slow
def test_two_processes_start_from_a_checkpoint_in_several_files_as_one_does(run, tmp_path,
                                                                             monkeypatch):
    """Each reads its part; new concepts get rows that are the mean of the others."""
    run("--steps", 2, "--text", a_labelled_text(tmp_path, "first"), out=tmp_path / "old")
    monkeypatch.setattr(checkpoint, "SHARD", 100_000)
    load(tmp_path / "old")[0].save_pretrained(tmp_path / "sharded")
    for name in ("tokenizer.tiktoken", LABELS + ".csv"):
        shutil.copy(tmp_path / "old" / name, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*"))) > 2
    more = ["--init", str(tmp_path / "sharded"), "--steps", "3", "--text",
            str(a_labelled_text(tmp_path, "first", "second"))]
    run_in_processes(2, tmp_path, *more)
    monkeypatch.setattr(train_tiny, "STEER_FROM", 0.5)
    run(*more, out=tmp_path / "one", LOG_EVERY=1)
    for one, two in zip(*map(history_of, (tmp_path / "one", tmp_path / "out")), strict=True):
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


def a_labelled_text(folder, *names):
    """Lines whose concepts are these names in turn."""
    file = folder / f"{'-'.join(names)}.jsonl"
    file.write_text("".join(json.dumps({"text": f"A line of the {names[i % len(names)]} kind.",
                                        "concepts": [names[i % len(names)]]}) + "\n"
                            for i in range(400)))
    return file


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_a_line_says_so_and_the_run_goes_on(run, tmp_path):
    command, where = processes(2, tmp_path, "--steps", "1000")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               **where)
    for line in process.stdout:
        if line.startswith("step 20:"):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    out, error = process.communicate(timeout=120)
    assert process.returncode != 0
    ours = [line for line in error.splitlines() if line.startswith("script.py")
            or line.startswith("train_tiny.py")]
    assert len(ours) == 1 and "another process of this run has ended" in ours[0], error
    run("--resume", "--steps", 30)
    assert history_of(tmp_path / "out")[-1]["step"] == 30, "what was saved is intact"


def test_a_batch_is_shared_out_evenly_or_refused(run, monkeypatch):
    monkeypatch.setattr(train_tiny, "WORLD", 3)
    assert "--batch 4: a positive multiple of the 3 processes" in run(status=2)


# ---- the bundled model ---------------------------------------------------------------------------


def test_the_bundled_model_fits_its_tiny_configuration():
    model, tokenizer = load()
    assert model.config == train_tiny.Config.tiny() and isinstance(model, Steerling)
    assert tokenizer.encoding._mergeable_ranks == Stories(0).tokenizer.encoding._mergeable_ranks
