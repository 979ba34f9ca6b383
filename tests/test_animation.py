"""The animated picture: every token, at its step, on the colour of what it was written by."""

import re
from xml.etree import ElementTree

import pytest

from steerling_min import Tokenizer, load, unmask
from steerling_min.files.labels import Labels
from steerling_min.views import animation as module
from steerling_min.views.animation import COLUMNS, HOLD, SECONDS, animation
from steerling_min.views.explain import COLOURS

SVG = "{http://www.w3.org/2000/svg}"
BYTES = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})


def parts(svg):
    """What appears: (text, the colour its place turns to, when in parts of a round), in order."""
    found = []
    for rect, text in zip([*svg][:-1], [*svg][1:]):
        if len(text) and text.tag == SVG + "text":
            fill, opacity = rect[0], text[0]
            assert (fill.get("attributeName"), opacity.get("attributeName")) == ("fill", "opacity")
            assert fill.get("keyTimes") == opacity.get("keyTimes")
            assert fill.get("values") == f"white;{rect.get('fill')}"
            assert opacity.get("values") == "0;1", "it is not seen before its step"
            found.append((text.text, rect.get("fill"), float(fill.get("keyTimes").split(";")[1])))
    return found


def still(svg):
    """What is there all the time: the prompt and the legend."""
    return [x.text for x in svg.iter(SVG + "text") if not len(x)]


@pytest.fixture
def drawn(monkeypatch):
    """drawn(tokens, prompt) -> the SVG of (text, step, written by) triples."""
    def drawn(tokens, prompt="p"):
        explained = {"tokens": [dict(zip(("text", "step", "written_by"), x)) for x in tokens]}
        monkeypatch.setattr(module, "explain", lambda *args: explained)
        steps = [None] * max(step for _, step, _ in tokens)
        return ElementTree.fromstring(animation(None, BYTES, None, steps, BYTES.encode(prompt)))
    return drawn


def test_a_token_appears_at_its_step_on_the_colour_of_what_wrote_it(drawn):
    svg = drawn([(" <b>", 2, "content"), (" &", 1, "discovered"), ("<|endofchunk|>", 3, "epsilon"),
                 ("A", 4, "known")])
    shown = SECONDS / (SECONDS + HOLD)
    assert parts(svg) == [(" <b>", COLOURS["content"][0], pytest.approx(shown * 2 / 4, abs=1e-3)),
                          (" &", COLOURS["discovered"][0], pytest.approx(shown / 4, abs=1e-3)),
                          ("A", COLOURS["known"][0], pytest.approx(shown, abs=1e-3))]
    assert [text.strip() for text in still(svg) if text.strip()] == [
        "p", "written by", "known: content", "known", "discovered", "epsilon"], "the legend"
    bold = [x.text for x in svg.iter(SVG + "text") if x.get("font-weight")]
    assert bold[0] == "p" and not {" <b>", " &", "A"} & {*bold}, "bold is the prompt"
    tiles = [rect.get("fill") for rect in svg.iter(SVG + "rect") if not len(rect)][1:]
    assert tiles == [COLOURS[name][0] for name in ("content", "known", "discovered", "epsilon")], (
        "the legend's colours are the tokens'")
    lines = {x.text: x.get("y") for x in svg.iter(SVG + "text")}
    assert lines[" <b>"] == lines[" &"] != lines["A"], "a chunk is a line of its own"


def test_characters_of_several_tokens_and_wide_ones_have_their_place(drawn):
    svg = drawn([("", 1, "tone"), ("\u65e5\u672c", 2, "tone"), ("\u0301", 3, "tone")],
                "caf\u00e9 \u2615")
    prompt = "".join(still(svg)).split("written by")[0]
    assert prompt == "caf\u00e9 \u2615"
    places = {x.text: (float(x.get("x")), float(x.get("textLength")))
              for x in svg.iter(SVG + "text")}
    assert [text for text, *_ in parts(svg)] == ["\u65e5\u672c", "\u0301"]
    x, length = places["\u65e5\u672c"]
    assert module.columns("") == 0
    assert length == pytest.approx(4 * module.WIDTH, abs=1), "two columns each"
    assert places["\u0301"] == (pytest.approx(x + length, abs=1), pytest.approx(8, abs=1))
    assert all(float(rect.get("width")) > 0 for rect in svg.iter(SVG + "rect"))


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\r", "\ufffe"])
def test_a_control_character_leaves_it_well_formed(drawn, character):
    assert still(drawn([("a", 1, "tone")], f"p{character}p"))[:3] == ["p", "\ufffd", "p"]


def test_line_feeds_and_tabs_are_kept(drawn):
    svg = drawn([("a\n\nb", 1, "tone")], "p\tp\nq")
    lines = {x.text: int(x.get("y")) // module.HEIGHT for x in svg.iter(SVG + "text")}
    assert (lines["p"], lines["q"], lines["a"], lines["b"]) == (1, 2, 2, 4)
    assert "    " in still(svg)


def test_a_line_has_88_columns_and_not_one_more(drawn):
    svg = drawn([("b" * 87, 1, "tone"), ("c", 1, "tone"), ("d" * 87, 1, "tone")], "a")
    lines = {x.text: int(x.get("y")) // module.HEIGHT for x in svg.iter(SVG + "text")}
    assert (lines["a"], lines["b" * 87], lines["c"], lines["d" * 87]) == (1, 1, 2, 2)


def test_a_line_that_is_wrapped_begins_with_no_space(drawn):
    svg = drawn([("b" * 87, 1, "tone"), (" c", 1, "tone"), ("d", 1, "tone")], "a")
    x = {x.text.strip(): (x.text, float(x.get("x"))) for x in svg.iter(SVG + "text")}
    assert x["c"] == ("c", 0.0) and 0 < x["d"][1] <= module.WIDTH


def test_what_is_explained_is_the_first_text_under_its_steering(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "explain", lambda *args: asked.append(args) or {"tokens": []})
    animation("model", BYTES, "labels", ["steps"], [97], "steering")
    assert asked == [("model", BYTES, "labels", ["steps"], 0, "steering")], (
        "edited weights wrote the text: without the steering other concepts would be shown")


@pytest.fixture(scope="module")
def run():
    model, tokenizer = load()
    prompt = tokenizer.encode("<The> & sailor")
    return model, tokenizer, prompt, list(unmask(model, [prompt], 40, seed=1))


def test_the_text_is_all_there_and_fits(run):
    model, tokenizer, prompt, steps = run
    text = animation(model, tokenizer, Labels([], 24, 64), steps, prompt)
    svg = ElementTree.fromstring(text)
    shown = "".join(x.text for x in svg.iter(SVG + "text")).split("written by")[0]
    expected = tokenizer.decode(steps[-1].tokens[0].tolist(), specials=True)
    expected = re.sub(r"<\|end\w+\|>", "", expected)
    assert shown.replace(" ", "") == expected.replace(" ", ""), "spaces go where a line ends"
    left, top, wide, high = map(float, svg.get("viewBox").split())
    for x in svg.iter(SVG + "text"):
        assert float(x.get("x")) + float(x.get("textLength")) <= COLUMNS * module.WIDTH + 1
        assert top < float(x.get("y")) <= top + high - 5, "the last line is in the picture, too"
    ground = svg.find(SVG + "rect")
    assert (left, wide) == (-10, round(COLUMNS * module.WIDTH + 20)), "ten on each side"
    assert [float(ground.get(name)) for name in ("x", "width", "height")] == [left, wide, high]
    lowest = max(float(x.get("y")) for x in svg.iter(SVG + "text"))
    assert high - lowest <= module.HEIGHT, "nothing is below the last line"
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "href" not in text and "script" not in text, "nothing is loaded from elsewhere"
