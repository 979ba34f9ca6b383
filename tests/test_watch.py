"""The live view: what is on the screen, at any width, and plain lines elsewhere."""

import io
import os
import re

import pytest
import torch

from steerling_min import load, unmask
from steerling_min.views import watch as module
from steerling_min.views.watch import FRAME, MASK, lines_of, watch, width

PLAIN = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def bundled():
    return load()


def run(bundled, out, new=20, clock=None, **options):
    model, tokenizer = bundled
    prompt = tokenizer.encode("The old")
    steps = unmask(model, [prompt], new, seed=1, **options)
    return list(watch(steps, tokenizer, prompt, new, out)), tokenizer


def screens(text):
    """The pictures, one after the other, without colours."""
    return [PLAIN.sub("", part) for part in re.split(r"(?:\x1b\[\d+A)?\r\x1b\[J", text)]


def test_masks_turn_into_tokens_and_the_screen_is_left_clean(bundled, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(module, "FRAME", 0)
    out = Terminal()
    steps, tokenizer = run(bundled, out)
    pictures = screens(out.getvalue())[1:]
    assert len(pictures) == 21 and pictures[-1] == "", "a picture per step; then it is wiped"
    masks = [picture.count(MASK) for picture in pictures[:-1]]
    assert masks == list(range(19, -1, -1)), "one mask less at every step"
    final = tokenizer.decode(steps[-1].tokens[0].tolist())
    assert pictures[-2].replace("\n", "") == final


def test_tokens_keep_the_colour_of_their_step(bundled, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(module, "FRAME", 0)
    out = Terminal()
    run(bundled, out)
    colours = set(map(int, re.findall(r"38;5;(\d+)m", out.getvalue())))
    assert colours == set(module.COLOURS), "from the first step's to the last step's"


def test_there_are_at_most_25_pictures_a_second(bundled, monkeypatch):
    now = iter(range(10**6))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000 + next(now) * FRAME / 10)
    out = Terminal()
    run(bundled, out)
    assert len(screens(out.getvalue())) < 8, "20 steps took 4 frames' time"


def test_every_line_fits_and_nothing_is_lost():
    text = "plain \u6f22\u5b57 e\u0301 and\nmore"
    for columns in range(2, 30):
        lines = [PLAIN.sub("", line) for line in lines_of([(text, None), (text, 61)], columns)]
        assert all(sum(map(width, line)) <= columns for line in lines)
        assert "".join(lines) == (text + text).replace("\n", "")


def test_wide_and_combining_characters_are_measured():
    assert [width(c) for c in ("a", "\u6f22", "\u0301", "\x07", "\u200b")] == [1, 2, 0, 0, 0]


def test_a_low_window_shows_the_end(bundled, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(module, "FRAME", 0)
    monkeypatch.setattr(module.shutil, "get_terminal_size", lambda: os.terminal_size((9, 4)))
    out = Terminal()
    run(bundled, out)
    assert all(picture.count("\n") <= 3 for picture in screens(out.getvalue()))


@pytest.mark.parametrize("out, no_colour", [(io.StringIO(), ""), (Terminal(), "1")])
def test_elsewhere_each_step_is_a_line(bundled, monkeypatch, out, no_colour):
    monkeypatch.setenv("NO_COLOR", no_colour)
    steps, tokenizer = run(bundled, out, steps=5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\x1b" not in out.getvalue()
    first = tokenizer.decode(steps[0].ids[0].tolist()[:1])
    assert lines[0].startswith(f"step 0: {first!r} at {steps[0].positions[0][0].item()}")


def test_steps_pass_through_unchanged(bundled):
    steps, _ = run(bundled, io.StringIO())
    model, tokenizer = bundled
    plain = list(unmask(model, [tokenizer.encode("The old")], 20, seed=1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(steps, plain, strict=True))
