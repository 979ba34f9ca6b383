"""The page: complete in itself, safe for any text, and alive in a browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import CONFIG

from steerling_min import Steerling, Steering, Tokenizer, load, unmask
from steerling_min.attribution import input_attribution
from steerling_min.files.labels import Label, Labels
from steerling_min.views.explain import COLOURS, explain
from steerling_min.files.loading import TINY
from steerling_min.views.page import TEMPLATE, page

PROMPT = 'The <script>alert("old")</script> & @DATA@ caf\u00e9 \u2615 @TITLE@ sailor'
NEW = 8
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def written():
    model, tokenizer = load()
    prompt = [*tokenizer.encode(PROMPT), tokenizer.endofchunk_token_id]
    steps = list(unmask(model, [prompt] * 2, NEW, seed=1, align=True))
    labels = Labels([Label(i, f"{i} & </script>") for i in range(model.config.n_concepts)],
                    model.config.n_concepts, model.config.n_unknown_concepts)
    return steps, tokenizer, prompt, page(model, tokenizer, labels, steps, prompt, row=1)


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_needs_nothing_from_elsewhere(written):
    text = written[3]
    assert not re.search(r"https?:|src=|href=|@import|url\(", text.split('id="data"')[0])
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(", text.split("</script>", 1)[1])


def test_no_text_can_become_markup(written):
    text = written[3]
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert "<" not in re.search(r'id="data">(.*?)</script>', text, re.S)[1], "<!-- hides"
    assert " & </script>" in str(data_of(text)["tokens"]), "nor any label"
    assert "".join(data_of(text)["prompt"]) == PROMPT + "<|endofchunk|>", "yet all of it is there"
    assert "<title>The &lt;script&gt;alert(&quot;old&quot;)&lt;/script&gt; &amp; @DATA@ caf" in text


def test_a_token_is_shown_as_explain_has_it(written):
    steps, tokenizer, prompt, text = written
    data = data_of(text)
    assert len(data["prompt"]) == len(prompt), "one by one: inputs among them can be pointed at"
    for token in data["tokens"]:
        assert token["id"] == steps[-1].tokens[1, token["position"]], "of the second text"
        assert token["logit"] == pytest.approx(sum(token["parts"].values()), abs=1e-5)
        assert {item["head"] for item in token["concepts"]} == {"known", "discovered"}
    everywhere = data["prompt"] + [item["text"] for token in data["tokens"]
                                   for item in (token, *token["inputs"])]
    assert not any("\ufffd" in piece for piece in everywhere)


@pytest.mark.parametrize("steering", [None, Steering(known=((3, 2.0),))], ids=["plain", "edited"])
def test_each_text_of_a_batch_has_its_own_explanation_and_its_own_inputs(steering):
    """Of two texts with two prompts the second, against `explain` and `input_attribution`."""
    torch.manual_seed(0)
    model = Steerling(dataclasses.replace(CONFIG, vocab_size=261, eos_token_id=256,
                                          pad_token_id=257, bos_token_id=258,
                                          endofchunk_token_id=259, mask_token_id=260)).eval()
    torch.nn.init.normal_(model.transformer.tok_emb.weight, std=0.5)
    model.requires_grad_(False)
    tokenizer, labels = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}), Labels([], 8, 8)
    prompts = [[97, 98, 99], [122, 121, 120]]
    steps = list(unmask(model, prompts, 6, steps=4, seed=1, steering=steering))
    data = data_of(page(model, tokenizer, labels, steps, prompts[1], 1, steering))
    assert (data["steps"], data["steered"]) == (4, steering is not None)
    explained = explain(model, tokenizer, labels, steps, 1, steering)
    when = {int(i): n for n, step in enumerate(steps) for i in step.positions[1]}
    before = [torch.tensor(prompts[1] + [260] * 6), *(step.tokens[1] for step in steps)]
    for token, shown in zip(explained["tokens"], data["tokens"], strict=True):
        inputs = shown.pop("inputs")
        scores = input_attribution(model, before[when[token["position"]]], token["position"],
                                   token["id"])
        largest = sorted(range(9), key=lambda i: -abs(scores[i].item()))[:5]
        assert [(x["position"], x["contribution"]) for x in inputs] == [
            (i, pytest.approx(scores[i].item(), abs=1e-6)) for i in largest if scores[i] != 0], (
            "for and against, the largest first, as the text stood before the step; masks are none")
        assert shown["parts"] == pytest.approx(token["parts"], abs=1e-6), "six digits"
        same = ("position", "id", "text", "step", "written_by")
        assert [shown[x] for x in same] == [token[x] for x in same]
        assert [x["name"] for x in shown["concepts"]] == [x["name"] for x in token["concepts"]]


def test_a_token_has_a_light_colour_by_day_and_a_dark_one_by_night(written):
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: light-dark({light}, {dark});" in written[3]


def test_a_full_context_stays_under_a_megabyte(written):
    steps, tokenizer, prompt, text = written
    tokens = data_of(text)["tokens"]
    per_token = len(json.dumps(tokens)) / len(tokens)
    assert len(text) + 256 * per_token < 1e6


def test_the_page_in_the_repository_is_small_and_as_pages_are_now():
    """It is: python sample.py --prompt "The old sailor" --seed 2 --max-new-tokens 96 --html FILE"""
    text = TINY.with_name("views").joinpath("story.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    for part in re.split("@[A-Z]+@", TEMPLATE):
        assert part in text, "write it anew: pages have another form"


def test_inputs_are_those_of_the_step_that_committed_the_token(written):
    steps, tokenizer, prompt, text = written
    found = {token["position"]: token["inputs"] for token in data_of(text)["tokens"]}
    assert found.keys() == set(range(len(prompt), len(prompt) + NEW))
    first = steps[0].positions[1].item()
    assert all(item["position"] < len(prompt) for item in found[first]), "all else was masks"
    when = {step.positions[1].item(): i for i, step in enumerate(steps)}
    for position, items in found.items():
        assert len(items) <= 5
        for item in items:
            assert item["position"] < len(prompt) or when[item["position"]] < when[position]


HARNESS = """
<script>
{  // names of its own
const failures = [], result = {};
window.onerror = (message) => { failures.push(String(message)); };
const all = (selector) => [...document.querySelectorAll(selector)];
const move = (step) => {
  const range = document.getElementById("step");
  range.value = step;
  range.dispatchEvent(new Event("input"));
};
const places = () => all("#text span").map((s) => {
  const box = s.getBoundingClientRect();
  return [box.left, box.top, box.width, box.height].join();
});
document.body.style.width = "358px";  // a phone's 390, less the margins
result.full = document.getElementById("text").textContent;
const before = places();
move(3);
result.masksAt3 = all("#text span").filter((s) => s.inert).length;
result.moved = places().filter((place, i) => place !== before[i]).length;
result.wider = document.getElementById("text").scrollWidth > 358;
move(document.getElementById("step").max);
result.last = all("#text span[inert]").length;
all("#text span[tabindex]")[2].dispatchEvent(new MouseEvent("mouseenter"));
result.about = document.getElementById("about").textContent;
result.bars = all("#about tr").map((row) => [row.cells[1].textContent,
                                             parseFloat(row.querySelector("i").style.width)]);
result.chosen = all("#text span.chosen").length;
result.inputs = all("#text span").flatMap((s, i) => s.className.includes("input") ? [i] : []);
result.first = document.querySelector("button, input, [tabindex]").id;
result.endWidth = all("#text span.prompt").at(-1).getBoundingClientRect().width;
result.legend = all("#legend span").map((s) => s.textContent);
result.sticky = getComputedStyle(document.getElementById("about")).position;
result.page = getComputedStyle(document.body).backgroundColor;
result.children = all("#text span *").length;
result.failures = failures;
const out = document.createElement("pre");
out.id = "result";
out.textContent = JSON.stringify(result);
document.body.append(out);
}
</script>
"""


@pytest.fixture(params=["light", "dark"])
def seen(written, tmp_path, request):
    """What a browser makes of the page, in the light and in the dark scheme."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    early = '<script>window.onerror = (m) => { document.title = "error: " + m; };</script>'
    file = tmp_path / "page.html"
    file.write_text(written[3].replace("<body>", "<body>" + early).replace("</body>", HARNESS),
                    encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={tmp_path}/profile", "--dump-dom",
         f"--blink-settings=preferredColorScheme={int(request.param == 'light')}", file.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert "<title>error" not in done.stdout, done.stdout[:500]
    result = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout)[1]))
    assert result["failures"] == []
    assert result["page"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(17, 17, 17)"}[
        request.param]
    return result


def test_in_a_browser_the_text_is_shown_hovered_and_played(written, seen):
    steps, tokenizer, prompt, text = written
    whole = tokenizer.decode(steps[-1].tokens[1].tolist(), specials=True)
    assert seen["full"] == whole.replace("<|endofchunk|>", "\u00b6\n") and seen["children"] == 0
    assert (seen["masksAt3"], seen["last"]) == (NEW - 3, 0), "the slider plays the unmasking"
    assert seen["moved"] == 0 and not seen["wider"], "masks keep the places of their tokens"
    assert seen["endWidth"] > 5, "the end of a chunk can be pointed at"
    assert seen["first"] == "play" and seen["sticky"] == "sticky"
    data = data_of(text)
    token = data["tokens"][2]
    assert f"written in step {token['step']} of {NEW}" in seen["about"] and seen["chosen"] == 1
    assert all(item["name"] in seen["about"] for item in token["concepts"])
    assert seen["inputs"] == sorted(item["position"] for item in token["inputs"]), (
        "its inputs are underlined, the prompt's too")
    assert seen["legend"] == [*data["legend"].values()]
    parts = [*token["parts"].values()]
    sizes = parts + [item["contribution"] for item in token["concepts"] + token["inputs"]]
    assert len(seen["bars"]) == len(sizes)
    for number, width in seen["bars"]:
        size = float(number.replace("\u2212", "-"))
        assert width == pytest.approx(6 * abs(size) / max(map(abs, sizes)), abs=0.02), (
            "all bars of a token have one scale")
