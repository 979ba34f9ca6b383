"""A run's folder: what it refuses, what it keeps, and how a run goes on. See conftest's `run`."""

import json
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED, SMALL, history_of, same_files
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerling_min import load
from steerling_min.files.config_json import read_config, read_generation
from steerling_min.files.labels import LABELS, load_labels
from steerling_min.files.loading import TINY
from steerling_min.training import run as run_module
from steerling_min.training.run import LOCK, RUN, STATE, Run

MODEL = "model.safetensors"


@pytest.fixture
def sentences(tmp_path):
    """Write lines for --text, the even ones with a concept, and return their file."""
    def sentences(word="line", concept="even", name="a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(
            {"text": f"{word} {i} and some more of it", "concepts": [concept] * (i % 2 == 0)})
            + "\n" for i in range(400)))
        return tmp_path / name
    return sentences


# ---- interruptions -------------------------------------------------------------------------------


def a_process(pipe, folder):
    """What such a process does: run 40 steps, and write into a pipe. At the 20th it waits, so that
    it is not over before it is interrupted."""
    import train_tiny as t
    real, steps = t.take_step, count()

    def waiting(*args):
        if next(steps) == 20:
            time.sleep(30)
        return real(*args)
    t.SIZES["tiny"], t.LOG_EVERY, t.SAVE_EVERY, t.WARMUP, t.take_step = SMALL, 5, 0, 5, waiting
    t.torch.set_num_threads(1)
    sys.stdout = open(pipe, "w")
    sys.argv = ["train_tiny.py", "--steps", "40", "--out", str(folder), *SHARED]
    t.main()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals and pipes")
@pytest.mark.parametrize("way, status", [("SIGKILL", -9), ("head", 128 + 13)])
def test_an_interrupted_run_is_a_model_and_ends_with_the_same_weights(way, status, run, tmp_path):
    whole = tmp_path / "whole"
    run("--steps", 40, out=whole)
    from forks import FORKS
    os.mkfifo(tmp_path / "pipe")
    process = FORKS.Process(target=a_process, args=(tmp_path / "pipe", tmp_path / "out"))
    process.start()
    with open(tmp_path / "pipe") as output:
        for line in output:  # somewhere after step 10, perhaps while it saves
            if line.startswith("step 10:"):
                break
        if way == "SIGKILL":
            process.kill()
            process.join(60)
    process.join(60)
    assert process.exitcode == status
    model, _ = load(tmp_path / "out")
    assert model.config.n_embd == 32 and not same_files(tmp_path / "out", whole, MODEL)

    out = run("--resume")
    assert "step 5:" not in out and "step 35:" in out, "it went on where it was"
    assert same_files(tmp_path / "out", whole, MODEL), (
        "what a step draws must follow from the seed and the step alone")
    assert [row["step"] for row in history_of(tmp_path / "out")] == list(range(5, 41, 5))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *(
    [signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])])
def test_ctrl_c_waits_for_the_step_and_loses_nothing_of_it(run, tmp_path, monkeypatch, number):
    import train_tiny
    real = train_tiny.take_step

    def interrupted(*args):
        if args[3] > 0.4:
            signal.raise_signal(number)
        return real(*args)
    monkeypatch.setattr(train_tiny, "take_step", interrupted)
    before = signal.signal(number, signal.SIG_DFL)  # nohup may have started these tests
    try:
        out = run("--steps", 10, status=128 + number)
        assert "step 6; --resume goes on" in out and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert recorded(tmp_path / "out", "step") == 6


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_nohup_is_respected(run, monkeypatch):
    import train_tiny
    real = train_tiny.take_step
    monkeypatch.setattr(train_tiny, "take_step", lambda *args: (
        signal.raise_signal(signal.SIGHUP), real(*args))[1])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert "step 3; --resume goes on" in run("--steps", 3)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_run_that_is_over_says_so_and_its_plan_stays(run, tmp_path, steps):
    run("--steps", 5)
    before = (tmp_path / "out" / RUN).read_text()
    assert run("--resume", "--steps", steps, status=2).endswith(
        "is over, at step 5: give more --steps or --minutes")
    assert (tmp_path / "out" / RUN).read_text() == before


def recorded(folder, what):
    """A run's "step" or "seconds", as saved."""
    with safe_open(folder / STATE, framework="pt") as f:
        return json.loads(f.metadata()["run"])[what]


def test_a_minute_is_sixty_seconds(run, tmp_path, monkeypatch):
    """By a clock on which a step, of 4 windows of 64 tokens, takes 16 seconds."""
    import train_tiny
    clock, saved, save = count(100.0, 16.0), [], Run.save
    monkeypatch.setattr(train_tiny, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(Run, "save", lambda self, *args: (
        saved.append(self.step), save(self, *args))[1])
    out = run("--minutes", 8, SAVE_EVERY=160)
    assert recorded(tmp_path / "out", "seconds") == 480.0 and "step 31" not in out
    assert "step 15: 16 tokens/s, 4.0 min left" in out
    assert "step 30: 16 tokens/s, 0.0 min left" in out
    assert saved == [0, 15, 30, 30], "first; after a line, if 160 seconds are over; last"
    out = run("--resume", "--minutes", 12, SAVE_EVERY=160)
    assert recorded(tmp_path / "out", "seconds") == 720.0
    assert "step 35: 16 tokens/s, 2.7 min left" in out


def a_run(tmp_path):
    return Run(Namespace(out=tmp_path / "out", resume=False))


def test_a_model_of_stories_likes_to_write_as_the_bundled_one_does(run, tmp_path, sentences):
    run("--steps", 1)
    config = read_config(tmp_path / "out" / "config.json")
    bundled = read_generation(TINY, config)
    assert bundled["allow_eos"] and read_generation(tmp_path / "out", config) == bundled, (
        "stories repeat names on purpose, and end: generation_config.json must say so")
    run("--steps", 1, "--text", sentences(), out=tmp_path / "text")
    assert read_generation(tmp_path / "text", config) == {}, "other texts have the usual defaults"


def test_the_third_ctrl_c_waits_no_longer(tmp_path):
    """torchrun hands on the one that its processes have had from the terminal: two are one."""
    with a_run(tmp_path).stopping_between_steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_process_stops_when_the_torchrun_that_started_it_is_gone(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(run_module.os, "getppid", lambda: 1)
    assert not run.stopped(), "alone it goes on, as under nohup"
    monkeypatch.setattr(run_module, "WORLD", 2)
    assert run.stopped()


def test_a_failed_save_leaves_the_state_before_it(run, tmp_path, monkeypatch):
    run("--steps", 10)
    before = (tmp_path / "out" / STATE).read_bytes()

    def fails(file, *args):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(run_module, "stream_tensors", fails)
    assert "No space left on device" in run("--resume", "--steps", 15, status=2)
    assert (tmp_path / "out" / STATE).read_bytes() == before
    assert not list((tmp_path / "out").glob("*.partial"))


# ---- what is not overwritten ---------------------------------------------------------------------


def test_a_run_is_not_overwritten_by_accident(run):
    run("--steps", 5)
    assert "--resume goes on with it" in run("--steps", 5, status=2)


@pytest.mark.parametrize("name", [MODEL, "model.safetensors.index.json"])
def test_a_model_that_no_run_has_left_is_not_overwritten(run, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"weights")
    for more in ([], ["--init", "nowhere"]):
        assert f"holds a model ({name})" in run("--steps", 5, *more, status=2)
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]


def test_a_runs_folder_and_those_above_it_are_made(run, tmp_path):
    run("--steps", 1, out=tmp_path / "new" / "er")
    assert (tmp_path / "new" / "er" / MODEL).exists()


def test_a_model_that_lacks_its_run_is_not_written_over(run, tmp_path):
    """As in a copy that is not complete."""
    run("--steps", 2)
    (tmp_path / "out" / RUN).unlink()
    assert f"has no {RUN}" in run("--resume", status=2)
    assert "holds a model (model.safetensors), and no run" in run("--steps", 3, status=2)


def test_a_run_goes_on_without_its_old_lock(run, tmp_path):
    """People delete lock files, and copies leave them out."""
    run("--steps", 2)
    (tmp_path / "out" / LOCK).unlink()
    assert "step 3" in run("--resume", "--steps", 3)


@pytest.mark.parametrize("out, message", [
    ("", "--out .: a folder of the run's own"), ("file", "File exists"), ("file/x", "Not a dir")])
def test_a_folder_that_cannot_be_one_is_refused(run, tmp_path, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert message in run("--steps", 5, out=out, status=2)


def test_what_cannot_be_saved_is_found_before_the_first_step(run, tmp_path, monkeypatch):
    import train_tiny
    monkeypatch.setattr(train_tiny, "take_step", lambda *args: pytest.fail("a step was taken"))
    monkeypatch.setattr(run_module, "stream_tensors", lambda *args: (_ for _ in ()).throw(
        OSError(30, "Read-only file system")))
    assert "Read-only" in run("--steps", 5, status=2)


def test_two_processes_do_not_train_in_one_folder(run, tmp_path):
    run("--steps", 5)
    with FileLock(tmp_path / "out" / LOCK):  # whose process is alive; killed ones stand above
        assert "another process trains in" in run("--resume", "--steps", 9, status=2)
    run("--resume", "--steps", 9)


# ---- going on ------------------------------------------------------------------------------------


def test_a_run_goes_on_by_its_own_options(run, tmp_path, sentences):
    text = sentences()
    run("--text", text, "--steps", 6, "--lr", 0.001, "--without", "dropout", "steering",
        "--recompute")
    options = json.loads((tmp_path / "out" / RUN).read_text())["options"]
    assert options["lr"] == 0.001 and options["text"] == [str(text)]
    assert options["without"] == ["dropout", "steering"] and options["steps"] == 6

    run("--resume", "--steps", 12, "--lr", 0.001)
    run("--text", text, "--steps", 12, "--lr", 0.001, "--without", "dropout", "steering",
        out=tmp_path / "again")
    options = json.loads((tmp_path / "out" / RUN).read_text())["options"]
    assert options["steps"] == 12 and options["recompute"]
    [row] = [row for row in history_of(tmp_path / "out") if row["step"] == 10]
    again = history_of(tmp_path / "again")[1]
    assert row.keys() == again.keys() and row != again, "its first half had another schedule"


def test_steps_and_minutes_take_each_others_place(run, tmp_path):
    run("--steps", 5)
    minutes = recorded(tmp_path / "out", "seconds") / 60 + 0.01
    run("--resume", "--minutes", minutes)
    options = json.loads((tmp_path / "out" / RUN).read_text())["options"]
    assert options["minutes"] == minutes and options["steps"] is None
    assert "is over, at step" in run("--resume", status=2)
    step = recorded(tmp_path / "out", "step") + 2
    run("--resume", "--steps", step)
    options = json.loads((tmp_path / "out" / RUN).read_text())["options"]
    assert (options["minutes"], options["steps"]) == (None, step)


@pytest.mark.parametrize("other, message", [
    (["--seed", 1], "has seed = 0, not 1"), (["--size", "small"], "has size = tiny, not small"),
    (["--lr", 0.001, "--batch", 2], "has batch = 4, not 2; lr = 0.006, not 0.001"),
    (["--dtype", "bfloat16"], "has dtype = float32, not bfloat16"),
    (["--without", "dropout"], "has without = [], not ['dropout']")])
def test_another_run_is_refused_by_what_is_other(run, other, message):
    run("--steps", 5)
    assert run("--steps", 5, "--resume", *other, status=2).endswith(message)


@pytest.mark.parametrize("other", [{"word": "word"}, {"concept": "odd"}])
def test_a_text_that_has_changed_is_refused(run, sentences, other):
    run("--steps", 2, "--text", sentences())
    sentences(**other)
    assert "are not those that the run" in run("--resume", "--steps", 4, status=2)


def test_a_text_may_have_moved(run, sentences):
    run("--steps", 2, "--text", sentences())
    run("--resume", "--steps", 4, "--text", sentences(name="b.jsonl"))


def test_nothing_to_resume_is_said(run, tmp_path):
    assert f"has no {RUN}; leave --resume out to start" in run("--resume", status=2)
    assert not (tmp_path / "out").exists()


# ---- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The tensors and the metadata of a state, and its folder."""
    out = tmp_path_factory.mktemp("good") / "out"
    with pytest.MonkeyPatch.context() as patch:
        import train_tiny
        patch.setattr(sys, "argv", ["train_tiny.py", "--out", str(out), "--steps", "3", *SHARED])
        patch.setitem(train_tiny.SIZES, "tiny", SMALL)
        train_tiny.main()
    return out


ANY = "transformer.ln_f.weight"


def damage_tensor(name, change):
    def damage(tensors, progress):
        tensors[name] = change(tensors[name])
    return damage


def damage_progress(**fields):
    def damage(tensors, progress):
        progress.update(fields)
    return damage


@pytest.mark.parametrize("damage, message", [
    (damage_tensor(f"weights.{ANY}", lambda x: x[:1]), f"weights.{ANY} is ('F32', [1])"),
    (damage_tensor(f"weights.{ANY}", lambda x: x.int()), f"weights.{ANY} is ('I32', [32])"),
    (damage_tensor(f"exp_avg.{ANY}", lambda x: x[:3]), f"exp_avg.{ANY} is ('F32', [3])"),
    (damage_tensor(f"exp_avg_sq.{ANY}", lambda x: x.half()), "('F16', [32])"),
    (damage_tensor(f"step.{ANY}", lambda x: x[None]), f"step.{ANY} is ('F32', [1])"),
    (lambda tensors, _: tensors.pop(f"step.{ANY}"), f"step.{ANY} is None"),
    (lambda tensors, _: tensors.update(more=torch.ones(1)), "more is ('F32', [1])"),
    (damage_progress(step=-5), "no step"), (damage_progress(step=1.5), "no step"),
    (damage_progress(step=float("nan")), "no step"), (damage_progress(step=True), "no step"),
    (damage_progress(seconds="1"), "no step"), (damage_progress(seconds=-1.0), "no step"),
    (damage_progress(history=[1]), "no step"), (damage_progress(history={"step": 1}), "no step"),
    (damage_progress(history=[{"step": 1}]), "no step"), (damage_progress(more=1), "no step"),
    (damage_progress(history=[{"step": 1, "held out": "low"}]), "no step"),
    (damage_progress(history=[{"step": 1, "held out": float("nan")}]), "no step")])
def test_a_damaged_state_is_one_line(good, run, tmp_path, damage, message):
    shutil.copytree(good, tmp_path / "out")
    file = tmp_path / "out" / STATE
    tensors = load_file(file)
    with safe_open(file, framework="pt") as f:
        progress = json.loads(f.metadata()["run"])
    damage(tensors, progress)
    save_file(tensors, file, metadata={"run": json.dumps(progress)})
    error = run("--resume", "--steps", 5, status=2)
    assert message in error and STATE in error


@pytest.mark.parametrize("file, content, message", [
    (STATE, b"half a fil", "damaged"), (RUN, b"{", "does not describe a run"),
    (RUN, b"[]", "does not"), (RUN, b'{"options": 1, "data": ""}', "does not"),
    (RUN, b"\xff", "does not"),
    (RUN, b'{"options": {"seed": "x"}, "data": ""}', "invalid int value: 'x'"),
    (RUN, b'{"options": {"batch": {}}, "data": ""}', "invalid"),
    (RUN, b'{"options": {"colour": "blue"}, "data": ""}', "colour"),
    ("config.json", b"{}", "lacks n_layers"), ("tokenizer.tiktoken", b"x", "not a tiktoken rank"),
    (STATE, None, "No such file or directory: ")])
def test_damaged_files_are_one_line(good, run, tmp_path, file, content, message):
    shutil.copytree(good, tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    if content is not None:
        (tmp_path / "out" / file).write_bytes(content)
    assert message in run("--resume", "--steps", 5, status=2)


# ---- what is printed -----------------------------------------------------------------------------


def test_a_passing_line_fits_the_terminal_and_is_printed_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(run_module.shutil, "get_terminal_size",
                        lambda *_, **__: os.terminal_size((40, 24)))
    run = a_run(tmp_path)
    run.say("step 1: " + 50 * "x", passing=True)
    run.say("done")
    first, last = capsys.readouterr().out.split("\r")
    assert first == "\x1b[Kstep 1: " + 31 * "x" and last == "\x1b[Kdone\n"


def test_without_a_terminal_lines_are_whole(tmp_path, capsys):
    a_run(tmp_path).say(100 * "x", passing=True)
    assert capsys.readouterr().out == 100 * "x" + "\n"


def test_standard_output_may_be_closed(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        run("--steps", 2)
    assert (tmp_path / "out" / MODEL).exists()


# ---- starting from a checkpoint ------------------------------------------------------------------


def test_the_stories_concepts_are_added_to_another_models(run, tmp_path, sentences):
    run("--steps", 2, "--text", sentences(concept="in the winter"), out=tmp_path / "a")
    out = run("--steps", 2, "--init", tmp_path / "a")
    assert "295 known concepts" in out, "the world's 294 come after it"


def test_a_text_without_labels_leaves_the_concepts_as_they_are(run, tmp_path, sentences):
    run("--steps", 2, "--text", sentences(), out=tmp_path / "a")
    (tmp_path / "a.txt").write_text(400 * "some more of it\n")
    out = run("--steps", 5, "--init", tmp_path / "a", "--text", tmp_path / "a.txt")
    assert "no labels" in out and "presence" not in out.split("step 5")[1]
    assert known(tmp_path / "out") == ["even"]


def test_a_model_without_concepts_takes_those_of_the_text(run, tmp_path, sentences):
    (tmp_path / "a.txt").write_text(400 * "some more of it\n")
    run("--steps", 2, "--text", tmp_path / "a.txt", out=tmp_path / "a")
    run("--steps", 2, "--init", tmp_path / "a", "--text", sentences())
    assert known(tmp_path / "out") == ["even"]


def test_what_a_concept_has_learnt_is_no_new_start(run, tmp_path, sentences, monkeypatch):
    import train_tiny
    counts = []
    monkeypatch.setattr(train_tiny, "start_concepts",
                        lambda model, lift, spoken, n=0: counts.append(n))
    run("--steps", 2, "--text", sentences(), out=tmp_path / "a")
    run("--steps", 2, "--init", tmp_path / "a", "--text", sentences("new", "odd"))
    assert counts == [0, 1], "of the second run's concepts the first is the old model's"


def test_discovered_concepts_keep_their_names(run, tmp_path, sentences):
    run("--steps", 2, "--text", sentences(), out=tmp_path / "a")
    with (tmp_path / "a" / (LABELS + ".csv")).open("a") as file:
        file.write("3,Discovery,,unknown,,\n")  # one known concept: discovered concept 2
    run("--steps", 2, "--init", tmp_path / "a", "--text", sentences("new", "odd"))
    labels = load_labels(tmp_path / "out" / (LABELS + ".csv"), load(tmp_path / "out")[0].config)
    assert labels.name(2, "unknown") == "Discovery", "though a known one has come before them"


@pytest.mark.parametrize("lines, message", [
    (400, "none with a name, so they cannot be matched"), (3, "tokens are too few")])
def test_what_a_checkpoint_cannot_go_on_with_is_one_line(run, tmp_path, sentences, tiny_folder,
                                                         lines, message):
    text = sentences()
    text.write_text("\n".join(text.read_text().splitlines()[:lines]))
    assert message in run("--init", tiny_folder, "--text", text, "--steps", 2, status=2)


def known(folder):
    """The names of the known concepts of a model."""
    labels = load_labels(folder / (LABELS + ".csv"), load(folder)[0].config)
    return [label.name for label in labels.known.values()]


def test_a_model_goes_on_with_another_text_and_keeps_what_it_knew(run, tmp_path, sentences):
    text = sentences()
    run("--steps", 5, "--text", text, "--seed", 1, out=tmp_path / "a")  # other first weights
    out = run("--steps", 2, "--init", tmp_path / "a", "--text", sentences("new", "odd"))
    before, tokenizer = load(tmp_path / "a")
    model, same = load(tmp_path / "out")
    assert tokenizer.encode("line and more") == same.encode("line and more"), "its words stay"
    assert "2 known concepts" in out and known(tmp_path / "out") == ["even", "odd"]
    assert model.config.n_concepts == 2 and model.config.n_embd == before.config.n_embd
    moved = (model.transformer.tok_emb.weight - before.transformer.tok_emb.weight).abs().max()
    assert 0 < moved < 0.1, "the weights are its own, two steps on"
    run("--resume", "--steps", 4)
    assert known(tmp_path / "out") == ["even", "odd"]
