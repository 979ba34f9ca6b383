"""The unmasking of a text as an animated picture (SVG), for a README or a slide."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step
from .explain import explain

COLUMNS, WIDTH, HEIGHT = 88, 8.4, 24   # characters in a line; their size in pixels
SECONDS, HOLD = 8.0, 4.0               # of writing; of showing what was written
# Okabe and Ito's colours, dark enough to read on white and apart in grey; "" is no group.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00")


def animation(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
              prompt: list[int], steering: Steering | None = None) -> str:
    """The first text of a run of `unmask` as an SVG that plays by itself, over and over.

    A token appears at its step, in the colour of the group of the known concept that did most for
    it; until then its place is grey.
    """
    explained = explain(model, tokenizer, labels, steps, 0, steering)["tokens"]
    groups = sorted({label.group for label in labels.known.values()} - {""})
    colour = dict(zip(groups, COLOURS))
    pieces = [(tokenizer.decode([i], specials=True), None, "#111") for i in prompt]
    for token in explained:
        best = max(token["concepts"], key=lambda c: c["contribution"], default=None)
        group = labels.known[best["id"]].group if best and best["id"] in labels.known else ""
        pieces.append((token["text"], token["step"], colour.get(group, "#111")))
    x, y, marks = 0, 1, []
    for text, step, fill in pieces:
        if text in ("<|endofchunk|>", "<|endoftext|>"):  # a chunk is a line of its own
            x, y, text = 0, y + 1, ""
        if x and x + len(text) > COLUMNS:
            x, y, text = 0, y + 1, text.lstrip()
        at = f'x="{x * WIDTH:.0f}" y="{y * HEIGHT}"'
        length = f'textLength="{len(text) * WIDTH:.0f}" xml:space="preserve"'
        if text and step is None:
            marks.append(f'<text {at} {length} fill="{fill}">{escape(text)}</text>')
        elif text:
            when = SECONDS * (step + 1) / len(steps) / (SECONDS + HOLD)
            marks.append(
                f'<rect x="{x * WIDTH + 2:.0f}" y="{y * HEIGHT - 13}" height="15" fill="#ddd" '
                f'width="{max(1, len(text) * WIDTH - 3):.0f}">{appear(when, 1, 0)}</rect>'
                f'<text {at} {length} fill="{fill}" opacity="0">{escape(text)}'
                f"{appear(when, 0, 1)}</text>")
        x += len(text)
    legend = "".join(f'<tspan fill="{colour[g]}" dx="16">{escape(g)}</tspan>' for g in groups
                     if g in colour)
    width, height = round(COLUMNS * WIDTH + 20), (y + 2) * HEIGHT
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 {width} {height}" '
            f'width="{width}" font-family="monospace" font-size="14">\n'
            f'<rect x="-10" width="{width}" height="{height}" fill="white"/>\n'
            + "\n".join(marks) + f'\n<text y="{(y + 1.5) * HEIGHT}" fill="#555">coloured by the '
            f"concept that did most:{legend}</text>\n</svg>\n")


def appear(when: float, before: int, after: int) -> str:
    """Change the opacity at the part `when` of every round."""
    return (f'<animate attributeName="opacity" dur="{SECONDS + HOLD:g}s" repeatCount="indefinite" '
            f'calcMode="discrete" values="{before};{after}" keyTimes="0;{when:.3f}"/>')
