"""One self-contained HTML page of a written text: its unmasking, its concepts, its inputs."""

import html
import json
from collections.abc import Sequence

import torch

from ..attribution import input_attribution
from ..files.labels import Labels
from ..model import Steerling
from ..steering import Steering
from ..files.tokenizer import Tokenizer
from ..unmasking import Step
from .explain import explain

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
        for position, target in zip(step.positions[row].tolist(), step.ids[row].tolist()):
            scores = input_attribution(model, tokens, position, target)  # (T,)
            best = scores.abs().topk(min(INPUTS, T)).indices.tolist()
            found[position] = [{"position": i, "contribution": scores[i].item(),
                                "text": tokenizer.decode([tokens[i].item()], specials=True)}
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
    data = {"prompt": tokenizer.decode(prompt), "start": len(prompt), "steps": len(steps),
            "steered": steering is not None, **rounded(explained)}
    # "<" could end the script element; as an escape it is the same JSON
    return TEMPLATE.replace("@TITLE@", html.escape(data["prompt"][:60] or "steerling_min")).replace(
        "@DATA@", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def rounded(value):
    """Floats anywhere in nested lists and dicts, to four digits: a page is read by eyes."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
body { font: 17px/1.7 Georgia, serif; max-width: 46em; margin: 2em auto; padding: 0 1em;
       color: #111; background: #fff; }
#text { white-space: pre-wrap; min-height: 8em; }
#text span { border-radius: 3px; cursor: default; }
#text span.mask { color: #767676; background: none !important; }
#text span:hover, #text span:focus, #text span.chosen { outline: 2px solid #111; }
#text span.input { border-bottom: 3px double #111; }
.controls, #about, footer { font: 14px/1.5 system-ui, sans-serif; }
.controls { display: flex; gap: 1em; align-items: center; margin: 1em 0; }
input[type=range] { flex: 1; }
#about { border-top: 1px solid #999; padding-top: 1em; min-height: 17em; }
table { border-collapse: collapse; margin: .4em 0 1em; }
td { padding: 0 1em 0 0; white-space: pre; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
i.bar { display: inline-block; height: .7em; background: #444; }
i.bar.minus { background: #fff; outline: 1px solid #444; }
</style>
</head>
<body>
<div id="text"></div>
<div class="controls"><button id="play">Play</button>
<input id="step" type="range" min="0" value="0" aria-label="denoising step">
<output id="at"></output></div>
<div id="about">Point at a token: which concepts and which input tokens it is due to, and when it
was committed. Early tokens are light, late ones dark.</div>
<footer></footer>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text"), about = document.getElementById("about");
const slider = document.getElementById("step"), at = document.getElementById("at");
const play = document.getElementById("play");
const prompt = document.createElement("b");
prompt.textContent = data.prompt;
text.append(prompt);
const spans = data.tokens.map((token) => {
  const span = document.createElement("span");
  span.tabIndex = 0;
  // one hue, getting darker: the order survives grey and colour blindness
  span.style.background = `hsl(205 70% ${96 - 34 * token.step / Math.max(1, data.steps - 1)}%)`;
  for (const event of ["mouseenter", "focus"])
    span.addEventListener(event, () => show(token, span));
  text.append(span);
  return span;
});
const written = (token) => token.text === "<|endofchunk|>" ? "\\n" : token.text;
function draw() {
  const step = Number(slider.value);
  data.tokens.forEach((token, i) => {
    const there = token.step < step;
    spans[i].textContent = there ? written(token) : "\\u2591";
    spans[i].classList.toggle("mask", !there);
  });
  at.textContent = `step ${step} of ${data.steps}`;
}
function rows(title, items, name) {
  const heading = document.createElement("div"), table = document.createElement("table");
  heading.textContent = title;
  const most = Math.max(...items.map((item) => Math.abs(item.contribution)), 1e-9);
  for (const item of items) {
    const row = table.insertRow();
    row.insertCell().textContent = name(item);
    const number = row.insertCell();
    number.className = "n";
    number.textContent = (item.contribution < 0 ? "\\u2212" : "+")
      + Math.abs(item.contribution).toFixed(2);
    const bar = document.createElement("i");
    bar.className = item.contribution < 0 ? "bar minus" : "bar";
    bar.style.width = `${8 * Math.abs(item.contribution) / most}em`;
    row.insertCell().append(bar);
  }
  about.append(heading, table);
}
function show(token, span) {
  const used = new Set(token.inputs.map((input) => input.position));
  spans.forEach((other, i) => {
    other.classList.toggle("chosen", other === span);
    other.classList.toggle("input", used.has(data.tokens[i].position));
  });
  about.textContent = "";
  const head = document.createElement("p"), share = token.shares;
  const percent = (x) => `${(100 * x).toFixed(1)} %`;
  head.textContent = `${JSON.stringify(token.text)}: committed in step ${token.step + 1} of `
    + `${data.steps}, ${percent(token.confidence)} sure; logit ${token.logit.toFixed(2)}, `
    + `of its mass ${percent(share.known)} known concepts, ${percent(share.unknown)} unknown ones, `
    + `${percent(share.epsilon)} epsilon`;
  about.append(head);
  rows("Known concepts, in logits", token.concepts, (item) => item.name);
  const without = data.steered ? " as they would be without steering" : "";
  rows("Input tokens, in logits" + without, token.inputs, (item) => JSON.stringify(item.text));
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
const total = data.shares;
document.querySelector("footer").textContent = "Mean shares of the logits' absolute mass: "
  + ["known", "unknown", "epsilon"].map((p) => `${p} ${(100 * total[p]).toFixed(1)} %`).join(", ");
</script>
</body>
</html>
"""
