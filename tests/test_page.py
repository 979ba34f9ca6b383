"""The page: complete in itself, safe for any text, and alive in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from steerling_min import load, unmask
from steerling_min.files.labels import Label, Labels
from steerling_min.views.page import page

PROMPT = 'The <script>alert("old")</script> & sailor'
NEW = 16
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


@pytest.fixture(scope="module")
def written():
    model, tokenizer = load()
    prompt = tokenizer.encode(PROMPT)
    steps = list(unmask(model, [prompt], NEW, seed=1, align=True))
    labels = Labels([Label(0, "sea & </script>")], model.config.n_concepts,
                    model.config.n_unknown_concepts)
    return steps, tokenizer, prompt, page(model, tokenizer, labels, steps, prompt)


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_needs_nothing_from_elsewhere(written):
    text = written[3]
    assert not re.search(r"https?:|src=|href=|@import|url\(", text.split('id="data"')[0])
    assert not re.search(r"https?:|fetch\(|XMLHttp|import\(", text.split("</script>", 1)[1])


def test_no_text_can_become_markup(written):
    text = written[3]
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert data_of(text)["prompt"] == PROMPT, "yet all of it is there"


def test_a_full_context_stays_under_a_megabyte(written):
    steps, tokenizer, prompt, text = written
    tokens = data_of(text)["tokens"]
    per_token = len(json.dumps(tokens)) / len(tokens)
    assert len(text) + 256 * per_token < 1e6


def test_inputs_are_those_of_the_step_that_committed_the_token(written):
    steps, tokenizer, prompt, text = written
    found = {token["position"]: token["inputs"] for token in data_of(text)["tokens"]}
    assert found.keys() == set(range(len(prompt), len(prompt) + NEW))
    first = steps[0].positions[0].item()
    assert all(item["position"] < len(prompt) for item in found[first]), "all else was masks"
    when = {step.positions[0].item(): i for i, step in enumerate(steps)}
    for position, items in found.items():
        assert len(items) <= 5
        for item in items:
            assert item["position"] < len(prompt) or when[item["position"]] < when[position]


HARNESS = """
<script>
const failures = [], result = {};
window.onerror = (message) => { failures.push(String(message)); };
const shown = () => [...document.querySelectorAll("#text span")].map((s) => s.textContent);
result.full = document.getElementById("text").textContent;
const range = document.getElementById("step");
range.value = 3;
range.dispatchEvent(new Event("input"));
result.masksAt3 = shown().filter((t) => t === "\\u2591").length;
range.value = range.max;
range.dispatchEvent(new Event("input"));
document.querySelectorAll("#text span")[2].dispatchEvent(new MouseEvent("mouseenter"));
result.about = document.getElementById("about").textContent;
result.bars = document.querySelectorAll("#about i.bar").length;
result.chosen = document.querySelectorAll("#text span.chosen").length;
result.bold = document.querySelector("#text b").children.length;
result.failures = failures;
const out = document.createElement("pre");
out.id = "result";
out.textContent = JSON.stringify(result);
document.body.append(out);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser_the_text_is_shown_hovered_and_played(written, tmp_path):
    steps, tokenizer, prompt, text = written
    early = '<script>window.onerror = (m) => { document.title = "error: " + m; };</script>'
    file = tmp_path / "page.html"
    text_and_harness = text.replace("<body>", "<body>" + early).replace("</body>", HARNESS)
    file.write_text(text_and_harness, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={tmp_path}/profile", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert "<title>error" not in done.stdout, done.stdout[:500]
    result = json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', done.stdout)[1]))
    ids = steps[-1].tokens[0].tolist()
    chunks = tokenizer.decode(ids, specials=True).split("<|endofchunk|>")
    assert result["full"] == "\n".join(chunks), "the page shows the generated text"
    assert result["masksAt3"] == NEW - 3, "the slider plays the unmasking"
    token = data_of(text)["tokens"][2]
    assert f"committed in step {token['step'] + 1} of {NEW}" in result["about"]
    assert token["concepts"][0]["name"] in result["about"] and result["chosen"] == 1
    assert result["bars"] == len(token["concepts"]) + len(token["inputs"])
    assert result["bold"] == 0 and result["failures"] == []
