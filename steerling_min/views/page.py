"""One self-contained HTML page of a written text: its unmasking, its concepts, its inputs."""

import html
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..attribution import input_attribution
from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step
from .explain import COLOURS, PARTS, explain, legend
from .watch import live

INPUTS = 5  # input tokens listed for each token
TEMPLATE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")  # has @PLACES@


def inputs_of(model: Steerling, tokenizer: Tokenizer, steps: Sequence[Step], prompt: list[int],
              row: int) -> dict[int, list[dict]]:
    """For each written token, find the input tokens that did most for it, or against it.

    Returns {written position: [{"position", "text", "contribution" (logits)}]}, at most INPUTS of
    them, the largest first. Contributions are integrated gradients on the sequence as it stood
    before the token's step. Injections of steering are left out.
    """
    T, asked = steps[0].tokens.shape[1], sum(len(step.ids[row]) for step in steps)
    tokens = torch.full((T,), tokenizer.mask_token_id, device=steps[0].tokens.device)
    tokens[: len(prompt)] = torch.tensor(prompt, dtype=tokens.dtype)
    found: dict[int, list[dict]] = {}
    for step in steps:
        if live(sys.stderr):
            print(f"\rtraced {len(found)} of {asked} tokens", end="", file=sys.stderr, flush=True)
        pieces = tokenizer.pieces(tokens.tolist())
        for position, target in zip(step.positions[row].tolist(), step.ids[row].tolist()):
            scores = input_attribution(model, tokens, position, target)  # (T,)
            best = scores.abs().topk(min(INPUTS, T)).indices.tolist()
            found[position] = [{"position": i, "text": pieces[i], "contribution": scores[i].item()}
                               for i in best if scores[i] != 0]
        tokens = step.tokens[row]
    if live(sys.stderr):
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return found


def page(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
         prompt: list[int], row: int = 0, steering: Steering | None = None) -> str:
    """The page as a string. Its data are those of `explain.explain`, and each token's inputs."""
    explained = explain(model, tokenizer, labels, steps, row, steering)
    inputs = inputs_of(model, tokenizer, steps, prompt, row)
    for token in explained["tokens"]:
        token["inputs"] = inputs[token["position"]]
    data = {"prompt": tokenizer.pieces(prompt), "steps": len(steps), "parts": PARTS,
            "legend": legend(explained), "steered": steering is not None, **explained}
    data = json.loads(json.dumps(data), parse_float=lambda x: round(float(x), 6))  # read by eyes
    put = {"TITLE": html.escape(tokenizer.decode(prompt)[:60] or "steerling_min"),
           "COLOURS": "".join(f" --{name}: light-dark({light}, {dark});"
                              for name, (light, dark) in COLOURS.items()),
           # "<" could end the script element; as an escape it is the same JSON
           "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")}
    return re.sub("@([A-Z]+)@", lambda place: put[place[1]], TEMPLATE)
