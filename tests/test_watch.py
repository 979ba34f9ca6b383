"""The live view: what is on the screen, at any width, and plain lines elsewhere."""

import io
import os
import re

import pytest
import torch

from steerling_min import Tokenizer, load, unmask
from steerling_min.unmasking import Step
from steerling_min.views import watch as module
from steerling_min.views.watch import MASK, lines_of, watch, width

PLAIN = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def bundled():
    return load()


@pytest.fixture(autouse=True)
def a_terminal_with_colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def run(bundled, out, new=20, clock=None, **options):
    model, tokenizer = bundled
    prompt = tokenizer.encode("The old")
    steps = unmask(model, [prompt], new, seed=1, **options)
    return list(watch(steps, tokenizer, prompt, new, out)), tokenizer


def screens(text):
    """The pictures, one after the other, without colours."""
    return [PLAIN.sub("", part) for part in re.split(r"(?:\x1b\[\d+A)?\r\x1b\[J", text)]


def test_masks_turn_into_tokens_and_the_screen_is_left_clean(bundled, monkeypatch):
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
    monkeypatch.setattr(module, "FRAME", 0)
    pieces_of, seen, out = module.pieces_of, [], Terminal()
    monkeypatch.setattr(module, "pieces_of", lambda step, tokenizer, L, when, new: (
        seen.append(dict(when)), pieces_of(step, tokenizer, L, when, new))[1])
    steps, _ = run(bundled, out)
    written = {int(step.positions[0]): number for number, step in enumerate(steps)}
    assert seen[-1] == written, "position -> tokens before it: one a step here"
    colours = set(map(int, re.findall(r"38;5;(\d+)m", out.getvalue())))
    assert colours == set(module.COLOURS), "from the first step's to the last step's"
    run(bundled, Terminal(), new=16, steps=2)
    assert sorted(set(seen[-1].values())) == [0, 8], "eight tokens a step: half-way up the colours"


def test_a_piece_keeps_its_colour_where_the_line_is_broken():
    lines = lines_of([("plain ", None), ("one two", 61)], 10)
    assert len(lines) == 2 and all("\x1b[38;5;61m" in line for line in lines), lines


def test_lines_are_filled_and_colours_end_with_their_piece():
    red, plain = "\x1b[38;5;9m", "\x1b[0m"
    assert lines_of([("abcd", None)], 4) == ["abcd"], "to the last column"
    assert lines_of([("a\x07b\u200bc", None)], 9) == ["abc"], "what has no width is not written"
    assert lines_of([("ab", 9), ("cd", None), ("", 9)], 9) == [f"{red}ab{plain}cd{red}{plain}"]
    assert lines_of([("ab", 9)], 1) == [f"{red}a{plain}", f"{red}b{plain}"]


def test_a_tokens_colour_tells_its_step_dark_for_early_ones():
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
    step = Step(torch.tensor([[97, 98, 99, 100]]), (torch.tensor([2]),), (torch.tensor([99]),),
                (), (), ())
    pieces = module.pieces_of(step, tokenizer, 1, {1: 8, 2: 0, 3: 4}, 9)
    assert pieces == [("a", None), ("b", module.COLOURS[8]), ("c", module.COLOURS[0]),
                      ("d", module.COLOURS[4])], "the prompt is plain; nine steps, nine colours"


def test_a_picture_is_seen_when_it_is_drawn():
    """... and not when a buffer is full."""
    class Buffered(Terminal):
        seen = ""

        def flush(self):
            self.seen = self.getvalue()
    out = Buffered()
    assert module.redraw(out, [("a", None)], 0) == 1 and out.seen.endswith("a\n")


def test_a_picture_takes_the_place_of_the_one_before(bundled, monkeypatch):
    monkeypatch.setattr(module, "FRAME", 0)
    out = Terminal()
    run(bundled, out, new=4)
    assert out.getvalue().startswith("\r\x1b[J"), "above the first there is nothing to draw over"
    drawn = out.getvalue().split("\r\x1b[J")[1:]
    for before, after in zip(drawn, drawn[1:]):
        up = re.search(r"\x1b\[(\d+)A$", before)
        assert int(up[1]) == before.count("\n"), "back to its first line, and not above it"


def test_steps_are_shown_as_they_come(bundled):
    model, tokenizer = bundled
    made, out = [], io.StringIO()

    def steps():
        for step in unmask(model, [tokenizer.encode("The old")], 5, seed=1):
            made.append(step)
            yield step
    for number, _ in enumerate(watch(steps(), tokenizer, tokenizer.encode("The old"), 5, out), 1):
        assert len(made) == out.getvalue().count("\n") == number, "not when all are there"


@pytest.mark.parametrize("model_takes, text_takes", [(0.0, 19 / 16), (1.0, 19.0)],
                         ids=["a fast model waits for eyes", "a slow one does not"])
def test_every_step_is_seen(bundled, monkeypatch, model_takes, text_takes):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "sleep", lambda seconds: now.append(now.pop() + seconds))
    model, tokenizer = bundled
    out, prompt = Terminal(), tokenizer.encode("The old")
    for _ in watch(unmask(model, [prompt], 20, seed=1), tokenizer, prompt, 20, out):
        last = now[0]
        now[0] += model_takes
    assert len(screens(out.getvalue())[1:]) == 21
    assert last - 1000 == pytest.approx(text_takes), "128 tokens of a fast model: 8 seconds"


def test_half_a_character_is_a_place_still_open(monkeypatch):
    monkeypatch.setattr(module, "FRAME", 0)
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})
    mask, texts = tokenizer.mask_token_id, []
    for ids in ([0xe2, mask, mask], [0xe2, mask, 0x95], [0xe2, 0x98, 0x95]):
        row = torch.tensor([[97, *ids]])
        step = Step(row, (torch.tensor([1]),), (torch.tensor([0xe2]),), (), (), ())
        texts.append("".join(text for text, _ in module.pieces_of(step, tokenizer, 1, {}, 3)))
        out = io.StringIO()
        list(watch([step], tokenizer, [97], 3, out))
        assert out.getvalue() == "step 1: b'\\xe2' at 1\n", "alone it is a byte"
    assert texts == ["a" + 3 * MASK, "a" + 3 * MASK, "a\u2615"]


def test_every_line_fits_and_nothing_is_lost():
    text = "plain \u6f22\u5b57 e\u0301 and\nmore"
    for columns in range(2, 30):
        lines = [PLAIN.sub("", line) for line in lines_of([(text, None), (text, 61)], columns)]
        assert all(sum(map(width, line)) <= columns for line in lines)
        assert "".join(lines) == (text + text).replace("\n", "")


def test_wide_and_combining_characters_are_measured():
    assert [width(c) for c in ("a", "\u6f22", "\u0301", "\x07", "\u200b")] == [1, 2, 0, 0, 0]
    assert width("\uff21") == 2, "a fullwidth letter"


def test_a_low_window_shows_the_end(bundled, monkeypatch):
    monkeypatch.setattr(module, "FRAME", 0)
    monkeypatch.setattr(module.shutil, "get_terminal_size",
                        lambda *_, **__: os.terminal_size((9, 4)))
    out = Terminal()
    steps, _ = run(bundled, out)
    pictures = screens(out.getvalue())
    assert max(picture.count("\n") for picture in pictures) == 3, "all rows but the cursor's"
    lines = [line for picture in pictures for line in picture.split("\n")]
    assert max(sum(map(width, line)) for line in lines) == 8, (
        "all but the last column, where a terminal would begin a line of its own")
    final = bundled[1].decode(steps[-1].tokens[0].tolist())
    assert pictures[-2].replace("\n", "") == final[-len(pictures[-2].replace("\n", "")):], (
        "what was written last, not the beginning")


@pytest.mark.parametrize("make, name, value", [
    (io.StringIO, "NO_COLOR", ""), (Terminal, "NO_COLOR", "1"), (Terminal, "TERM", "dumb")])
def test_elsewhere_each_step_is_a_line(bundled, monkeypatch, make, name, value):
    monkeypatch.setenv(name, value)
    out = make()
    steps, tokenizer = run(bundled, out, steps=5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\x1b" not in out.getvalue()
    first = tokenizer.decode(steps[0].ids[0].tolist()[:1])
    assert lines[0].startswith(f"step 1: {first!r} at {steps[0].positions[0][0].item()}")


def test_steps_pass_through_unchanged(bundled):
    steps, _ = run(bundled, io.StringIO())
    model, tokenizer = bundled
    plain = list(unmask(model, [tokenizer.encode("The old")], 20, seed=1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(steps, plain, strict=True))
