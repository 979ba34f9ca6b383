"""The unmasking of a text as an animated picture (SVG), for a README or a slide."""

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape

from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step
from .explain import COLOURS, explain, legend
from .watch import width

COLUMNS, WIDTH, HEIGHT = 88, 8.4, 24   # characters in a line; their size in pixels
SECONDS, HOLD = 8.0, 4.0               # of writing; of showing what was written
# Characters that XML cannot hold, not even escaped, or would change (a line feed is cut out).
FORBIDDEN = re.compile("[^\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def animation(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
              prompt: list[int], steering: Steering | None = None) -> str:
    """The first text of a run of `unmask` as an SVG that plays by itself, over and over.

    Each token's place is an empty box until the token's step. Then the token appears, and the box
    takes the colour of the part that wrote the token ("written_by" in `explain`).
    """
    explained = explain(model, tokenizer, labels, steps, 0, steering)
    # A text, the step in which it appears (None: it is there from the start), and its colour.
    pieces: list[tuple] = [(text, None, None) for text in tokenizer.pieces(prompt)]
    pieces += [(token["text"], token["step"], COLOURS[token["written_by"]][0])
               for token in explained["tokens"]]
    pieces.append(("\n\nwritten by", None, None))
    for writer, said in legend(explained).items():
        pieces += [("  ", None, None), (f" {said} ", None, COLOURS[writer][0])]
    x, y, marks = 0, 1, []
    for text, step, colour in pieces:
        when = None if step is None else SECONDS * step / len(steps) / (SECONDS + HOLD)
        if text in ("<|endofchunk|>", "<|endoftext|>"):  # a chunk is a line of its own
            text = "\n"
        lines = FORBIDDEN.sub("\ufffd", text.expandtabs(4)).split("\n")
        for number, part in enumerate(lines):
            if number or x and x + columns(part) > COLUMNS:
                x, y, part = 0, y + 1, part if number else part.lstrip()
            if part:
                marks.append(mark(part, x, y, colour, when))
            x += columns(part)
    wide, high = round(COLUMNS * WIDTH + 20), (y + 1) * HEIGHT
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 {wide} {high}" '
            f'width="{wide}" font-family="monospace" font-size="14">\n'
            f'<rect x="-10" width="{wide}" height="{high}" fill="white"/>\n'
            + "\n".join(marks) + "\n</svg>\n")


def columns(text: str) -> int:
    """Columns that a text takes: one at least, so that an accent alone is seen, too."""
    return max(sum(map(width, text)), 1) if text else 0


def mark(text: str, x: int, y: int, colour: str | None, when: float | None) -> str:
    """A text in its place, on its colour, or bold. It appears at the part `when` of every round."""
    length = columns(text) * WIDTH
    fade = "" if when is None else appear("opacity", when, "0", "1")
    place = f'x="{x * WIDTH:.0f}" y="{y * HEIGHT}" textLength="{length:.0f}"'
    tile = "" if colour is None else (
        f'<rect x="{x * WIDTH + .5:.1f}" y="{y * HEIGHT - 15}" width="{length - 1:.1f}" '
        f'height="20" fill="{colour}" stroke="#bbb">'
        + ("" if when is None else appear("fill", when, "white", colour)) + "</rect>")
    weight = ' font-weight="bold"' if colour is None else ""
    return f'{tile}<text {place}{weight} xml:space="preserve">{escape(text)}{fade}</text>'


def appear(attribute: str, when: float, before: str, after: str) -> str:
    """Change an attribute at the part `when` of every round."""
    return (f'<animate attributeName="{attribute}" dur="{SECONDS + HOLD:g}s" '
            f'repeatCount="indefinite" calcMode="discrete" values="{before};{after}" '
            f'keyTimes="0;{when:.3f}"/>')
