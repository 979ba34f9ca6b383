"""The animated picture: every token, at its step, in the colour of its concept's group."""

import re
from xml.etree import ElementTree

import pytest

from steerling_min import load, unmask
from steerling_min.views.animation import COLOURS, HOLD, SECONDS, animation
from steerling_min.files.loading import TINY
from steerling_min.files.labels import Label, Labels, load_labels

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run():
    model, tokenizer = load()
    prompt = tokenizer.encode("<The> & sailor")
    return model, tokenizer, prompt, list(unmask(model, [prompt], 20, seed=1))


def drawn(run, labels=None):
    model, tokenizer, prompt, steps = run
    labels = labels or load_labels(TINY / "concept_labels.csv", model.config)
    return ElementTree.fromstring(animation(model, tokenizer, labels, steps, prompt))


def written(svg):
    """The tokens that appear: (text, colour, when in parts of a round)."""
    return [(x.text, x.get("fill"), float(x[0].get("keyTimes").split(";")[1]))
            for x in svg.iter(SVG + "text") if x.get("opacity") == "0"]


def test_the_text_is_all_there_and_escaped(run):
    _, tokenizer, prompt, steps = run
    svg = drawn(run)
    text = "".join(x.text or "" for x in svg.iter(SVG + "text") if x.get("textLength"))
    expected = tokenizer.decode(steps[-1].tokens[0].tolist(), specials=True)
    expected = re.sub(r"<\|end\w+\|>", "", expected)
    assert text.replace(" ", "") == expected.replace(" ", ""), "spaces go where a line ends"


def test_a_token_appears_at_its_step(run):
    steps = run[3]
    order = {p: n for n, step in enumerate(steps) for p in step.positions[0].tolist()}
    expected = [SECONDS * (order[p] + 1) / len(steps) / (SECONDS + HOLD) for p in sorted(order)
                if run[1].decode([steps[-1].tokens[0, p].item()])]
    assert [when for *_, when in written(drawn(run))] == pytest.approx(expected, abs=1e-3)


def test_a_token_has_the_colour_of_its_concepts_group(run):
    assert {colour for _, colour, _ in written(drawn(run))} <= set(COLOURS[:3])
    C, n_unknown = run[0].config.n_concepts, run[0].config.n_unknown_concepts
    one = Labels([Label(c, str(c), "", "only") for c in range(C)], C, n_unknown)
    assert {colour for _, colour, _ in written(drawn(run, one))} == {COLOURS[0]}
    none = drawn(run, Labels([], C, n_unknown))
    assert {colour for _, colour, _ in written(none)} == {"#111"}, "no labels, no groups"


def test_nothing_is_loaded_from_elsewhere(run):
    model, tokenizer, prompt, steps = run
    labels = load_labels(TINY / "concept_labels.csv", model.config)
    text = animation(model, tokenizer, labels, steps, prompt)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "href" not in text and "script" not in text
