"""One self-contained HTML page of a written text: its unmasking, its concepts, its inputs."""

import html
import json
import re
from collections.abc import Sequence

import torch

from ..attribution import input_attribution
from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step
from .explain import COLOURS, PARTS, explain, legend

INPUTS = 5  # input tokens listed for each token


def inputs_of(model: Steerling, tokenizer: Tokenizer, steps: Sequence[Step], prompt: list[int],
              row: int = 0) -> dict[int, list[dict]]:
    """For each written position the input tokens that did most for its token, at its step.

    {position: [{"position", "text", "contribution" (logits)}]}, by integrated gradients on the
    sequence as it stood before the step. What was injected is not part of it.
    """
    T = steps[0].tokens.shape[1]
    tokens = torch.full((T,), tokenizer.mask_token_id, device=steps[0].tokens.device)
    tokens[: len(prompt)] = torch.tensor(prompt, dtype=tokens.dtype)
    found = {}
    for step in steps:
        pieces = tokenizer.pieces(tokens.tolist())
        for position, target in zip(step.positions[row].tolist(), step.ids[row].tolist()):
            scores = input_attribution(model, tokens, position, target)  # (T,)
            best = scores.abs().topk(min(INPUTS, T)).indices.tolist()
            found[position] = [{"position": i, "text": pieces[i], "contribution": scores[i].item()}
                               for i in best if scores[i] != 0]
        tokens = step.tokens[row]
    return found


def page(model: Steerling, tokenizer: Tokenizer, labels: Labels, steps: Sequence[Step],
         prompt: list[int], row: int = 0, steering: Steering | None = None) -> str:
    """The page as a string. Its data are those of `explain.explain`, and each token's inputs."""
    explained = explain(model, tokenizer, labels, steps, row, steering)
    inputs = inputs_of(model, tokenizer, steps, prompt, row)
    for token in explained["tokens"]:
        token["inputs"] = inputs[token["position"]]
    data = {"prompt": tokenizer.pieces(prompt), "steps": len(steps), "parts": PARTS,
            "legend": legend(explained), "steered": steering is not None, **rounded(explained)}
    put = {"TITLE": html.escape(tokenizer.decode(prompt)[:60] or "steerling_min"),
           "COLOURS": "".join(f" --{name}: light-dark({light}, {dark});"
                              for name, (light, dark) in COLOURS.items()),
           # "<" could end the script element; as an escape it is the same JSON
           "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")}
    return re.sub("@([A-Z]+)@", lambda place: put[place[1]], TEMPLATE)


def rounded(value):
    """Floats anywhere in nested lists and dicts, to six digits: a page is read by eyes."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


TEMPLATE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --page: light-dark(#fff, #111); --ink: light-dark(#111, #f4f4f4);
        --line: light-dark(#767676, #8c8c8c);@COLOURS@ }
html { scroll-padding-bottom: 52vh; }
body { font: 17px/1.7 Georgia, serif; max-width: 46em; margin: 1em auto; padding: 0 1em;
       color: var(--ink); background: var(--page); }
#text { white-space: pre-wrap; overflow-wrap: break-word; min-height: 6em; margin-bottom: 1em; }
#text span, #legend span { border-radius: 3px; cursor: default; }
#text span.prompt { font-weight: bold; }
/* a mask keeps the place of its token */
#text span[inert] { color: transparent; background: none !important;
                    box-shadow: inset 0 0 0 1px var(--line); }
#text span:hover, #text span:focus, #text span.chosen { outline: 2px solid var(--ink); }
#text span.input { border-bottom: 3px double var(--ink); }
.controls, #legend, #about, footer { font: 14px/1.5 system-ui, sans-serif; }
.controls { display: flex; gap: 1em; align-items: center; margin: 1em 0; }
input[type=range] { flex: 1; min-width: 0; }
#legend span { padding: 0 .4em; margin-right: .5em; display: inline-block; }
#about { position: sticky; bottom: 0; max-height: 50vh; overflow: auto; background: var(--page);
         border-top: 1px solid var(--line); padding: .5em 0; display: flex; flex-wrap: wrap;
         gap: 0 2em; }
#about p { width: 100%; margin: 0 0 .5em; }
td { padding: 0 1em 0 0; white-space: pre-wrap; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: pre; }
i.bar { display: inline-block; height: .7em; background: var(--ink); }
i.bar.minus { background: none; outline: 1px solid var(--ink); }
</style>
</head>
<body>
<div class="controls"><button id="play">Play</button>
<input id="step" type="range" min="0" value="0" aria-label="denoising step">
<output id="at"></output></div>
<div id="text"></div>
<div id="legend">written by </div>
<div id="about"><p>Point at a token: which concepts and which input tokens it is due to, and when it
was written.</p></div>
<footer></footer>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), about = document.getElementById("about");
const slider = document.getElementById("step"), at = document.getElementById("at");
const play = document.getElementById("play");
function add(parent, name, content) {
  const element = document.createElement(name);
  element.textContent = content;
  parent.append(element);
  return element;
}
const shown = (piece) => piece === "<|endofchunk|>" ? "\u00b6\n" : piece;
const places = {};  // position -> its span
data.prompt.forEach((piece, i) => {
  places[i] = add(text, "span", shown(piece));
  places[i].className = "prompt";
});
for (const token of data.tokens) {
  const span = places[token.position] = add(text, "span", shown(token.text));
  span.tabIndex = 0;
  span.style.background = `var(--${token.written_by})`;
  for (const event of ["mouseenter", "focus"])
    span.addEventListener(event, () => show(token));
}
for (const [name, said] of Object.entries(data.legend))
  add(document.getElementById("legend"), "span", said).style.background = `var(--${name})`;
function draw() {
  const step = Number(slider.value);
  for (const token of data.tokens) places[token.position].inert = token.step >= step;
  at.textContent = `step ${step} of ${data.steps}`;
}
const signed = (x, digits) => (x < 0 ? "\u2212" : "+") + Math.abs(x).toFixed(digits);
function rows(title, items, most) {
  const list = add(about, "div", title), table = add(list, "table", "");
  for (const item of items) {
    const row = table.insertRow();
    row.insertCell().textContent = item.name;
    row.insertCell().textContent = signed(item.contribution, 2);
    row.cells[1].className = "n";
    const bar = add(row.insertCell(), "i", "");
    bar.className = item.contribution < 0 ? "bar minus" : "bar";
    bar.style.width = `${6 * Math.abs(item.contribution) / most}em`;
  }
}
function show(token) {
  const used = new Set(token.inputs.map((input) => input.position));
  for (const [position, span] of Object.entries(places)) {
    span.classList.toggle("chosen", Number(position) === token.position);
    span.classList.toggle("input", used.has(Number(position)));
  }
  about.textContent = "";
  add(about, "p", `${JSON.stringify(token.text)}: written in step ${token.step + 1} of `
    + `${data.steps}, ${(100 * token.confidence).toFixed(1)} % sure, `
    + `with a logit of ${token.logit.toFixed(2)}. All below is in logits.`);
  const of = (head) => token.concepts.filter((concept) => concept.head === head);
  const lists = [
    ["The logit is the sum of", data.parts.map(
      (part) => ({name: part, contribution: token.parts[part]}))],
    ["Known concepts", of("known")], ["Discovered concepts", of("discovered")],
    ["Input tokens" + (data.steered ? ", as they would be without steering" : ""),
     token.inputs.map((input) => ({...input, name: JSON.stringify(input.text)}))]];
  const most = Math.max(...lists.flatMap(([, items]) => items)
    .map((item) => Math.abs(item.contribution)), 1e-9);  // one scale for all bars
  for (const [title, items] of lists) rows(title, items, most);
  const chunk = data.chunks.find((x) => x.start <= token.position && token.position < x.end);
  if (chunk) add(about, "p", "Its chunk is due to " + chunk.concepts.slice(0, 5).map(
    (x) => `${x.name} ${signed(100 * x.share, 1)} %`).join(", ")
    + `; epsilon ${(100 * chunk.epsilon).toFixed(1)} %.`);
}
let timer = null;
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
play.addEventListener("click", () => {
  if (timer !== null) return stop();
  if (Number(slider.value) === data.steps) slider.value = 0;
  play.textContent = "Pause";
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    draw();
    if (Number(slider.value) === data.steps) stop();
  }, 80);
});
slider.addEventListener("input", draw);
slider.max = data.steps;
slider.value = data.steps;
draw();
document.querySelector("footer").textContent = "Shares of the three parts, mean over tokens: "
  + data.parts.map((part) => `${part} ${(100 * data.shares[part]).toFixed(1)} %`).join(", ");
</script>
</body>
</html>
"""
