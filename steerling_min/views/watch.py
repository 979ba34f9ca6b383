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
FRAME = 1 / 16   # seconds between two pictures, at least: 128 tokens take 8 seconds
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


def live(out: TextIO) -> bool:
    """Whether a text can be redrawn in place: on a terminal, unless NO_COLOR or TERM=dumb is set.
    """
    return (out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")


def watch(steps: Iterable[Step], tokenizer: Tokenizer, prompt: list[int], new: int,
          out: TextIO | None = None) -> Iterator[Step]:
    """Show the first text of a run of `unmask` as it is written, passing its steps on.

    Where `out` is live the text is redrawn in place, slowly enough for eyes; elsewhere each step is
    a line.
    """
    out = out or sys.stdout
    redrawn = live(out)
    # position -> tokens written before its step; lines on screen; time of the last picture
    when: dict[int, int] = {}
    drawn, last = 0, 0.0
    for number, step in enumerate(steps, start=1):
        positions, ids = step.positions[0].tolist(), step.ids[0].tolist()
        when.update(dict.fromkeys(positions, len(when)))
        if redrawn:
            time.sleep(max(0, last + FRAME - time.monotonic()))
            drawn = redraw(out, pieces_of(step, tokenizer, len(prompt), when, new), drawn)
            last = time.monotonic()
        else:
            texts = ", ".join(f"{tokenizer.quoted(i)} at {p}" for p, i in zip(positions, ids))
            print(f"step {number}: {texts}", file=out, flush=True)
        yield step
    if redrawn:
        redraw(out, [], drawn)


def pieces_of(step: Step, tokenizer: Tokenizer, L: int, when: dict[int, int], new: int
              ) -> list[tuple[str, int | None]]:
    """The text after a step: the prompt, tokens in the colour of their step, masks.

    A character of several tokens may be only partly written. Then it is shown like a mask.
    """
    tokens = step.tokens[0].tolist()
    pieces: list[tuple[str, int | None]] = [(tokenizer.decode(tokens[:L]), None)]
    for position, text in list(enumerate(tokenizer.pieces(tokens)))[L:]:
        if tokens[position] == tokenizer.mask_token_id:
            pieces.append((MASK, None))
        else:
            text = {"<|endofchunk|>": "\n", "<|endoftext|>": ""}.get(text, text)
            shade = when.get(position, 0) * len(COLOURS) // new
            pieces.append((text.replace("\ufffd", MASK), COLOURS[shade]))
    return pieces


def redraw(out: TextIO, pieces: list[tuple[str, int | None]], drawn: int) -> int:
    """Draw over the `drawn` lines of the last picture; returns how many there are now."""
    columns, rows = shutil.get_terminal_size()
    lines = lines_of(pieces, max(2, columns - 1))[-(rows - 1):] if pieces else []
    up = f"\x1b[{drawn}A" if drawn else ""
    out.write(f"{up}\r\x1b[J" + "".join(line + "\n" for line in lines))
    out.flush()
    return len(lines)
