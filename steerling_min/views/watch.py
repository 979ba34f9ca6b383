"""Watch a text being unmasked in the terminal: masks turn into tokens, coloured by their step."""

import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TextIO

from ..files.tokenizer import Tokenizer
from ..unmasking import Step

MASK = "\u2591"  # a light block for each token not yet written
FRAME = 1 / 25   # seconds between two pictures, at least
COLOURS = (54, 61, 67, 73, 79, 114, 150, 186, 220)  # of the 256: early steps dark, late ones bright


def width(character: str) -> int:
    """Columns that a character takes: 0, 1 or 2."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cc", "Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def lines_of(pieces: list[tuple[str, int | None]], columns: int) -> list[str]:
    """Pieces of text, each with its colour (None: plain), as lines that fit into the columns."""
    lines, line, used = [], "", 0
    for text, colour in pieces:
        line += "" if colour is None else f"\x1b[38;5;{colour}m"
        for character in text:
            if character == "\n" or used + width(character) > columns:
                lines.append(line + "\x1b[0m")
                line, used = "" if colour is None else f"\x1b[38;5;{colour}m", 0
            if character != "\n" and (width(character) or unicodedata.combining(character)):
                line, used = line + character, used + width(character)
        line += "" if colour is None else "\x1b[0m"
    return [*lines, line]


def watch(steps: Iterable[Step], tokenizer: Tokenizer, prompt: list[int], new: int,
          out: TextIO | None = None) -> Iterator[Step]:
    """Show the first text of a run of `unmask` as it is written, passing its steps on.

    On a terminal the text is redrawn in place, at most 25 times a second. Where output is not a
    terminal, or NO_COLOR is set, each step is a line.
    """
    out = out or sys.stdout
    live = out.isatty() and not os.environ.get("NO_COLOR")
    when, drawn, last = {}, 0, 0.0  # position -> step; lines on screen; time of the last picture
    for number, step in enumerate(steps):
        positions, ids = step.positions[0].tolist(), step.ids[0].tolist()
        when.update(dict.fromkeys(positions, number))
        if live:
            done = not (step.tokens[0] == tokenizer.mask_token_id).any()
            if done or time.monotonic() - last >= FRAME:
                drawn = redraw(out, pieces_of(step, tokenizer, len(prompt), when, new), drawn)
                last = time.monotonic()
        else:
            texts = ", ".join(f"{tokenizer.decode([i], specials=True)!r} at {p}"
                              for p, i in zip(positions, ids))
            print(f"step {number}: {texts}", file=out, flush=True)
        yield step
    if live:
        redraw(out, [], drawn)


def pieces_of(step: Step, tokenizer: Tokenizer, L: int, when: dict[int, int], new: int
              ) -> list[tuple[str, int | None]]:
    """The text after a step: the prompt, tokens in the colour of their step, masks."""
    tokens = step.tokens[0].tolist()
    pieces = [(tokenizer.decode(tokens[:L]), None)]
    for position, token in enumerate(tokens[L:], start=L):
        if token == tokenizer.mask_token_id:
            pieces.append((MASK, None))
        else:
            text = "\n" if token == tokenizer.endofchunk_token_id else tokenizer.decode([token])
            shade = when.get(position, 0) * len(COLOURS) // max(1, new)
            pieces.append((text, COLOURS[min(shade, len(COLOURS) - 1)]))
    return pieces


def redraw(out: TextIO, pieces: list[tuple[str, int | None]], drawn: int) -> int:
    """Draw over the `drawn` lines of the last picture; returns how many there are now."""
    columns, rows = shutil.get_terminal_size()
    lines = lines_of(pieces, max(2, columns - 1))[-(rows - 1):] if pieces else []
    up = f"\x1b[{drawn}A" if drawn else ""
    out.write(f"{up}\r\x1b[J" + "".join(line + "\n" for line in lines))
    out.flush()
    return len(lines)
