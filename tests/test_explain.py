"""The explanation of a text: what is in it, and that it agrees with the run."""

import dataclasses
import json

import pytest
import torch
from conftest import CONFIG

from steerling_min import Steerling, Tokenizer, load, unmask
from steerling_min.attribution import Attribution, attribute_text
from steerling_min.files.labels import Label, Labels
from steerling_min.unmasking import Step
from steerling_min.views import explain as module
from steerling_min.views.explain import COLOURS, explain, legend, print_explanation

BYTES = Tokenizer.from_ranks({bytes([i]): i for i in range(256)})  # a token per byte
EOC = BYTES.endofchunk_token_id
LABELS = [Label(0, "Hugo", type="entity"), Label(1, "calm"),
          Label(6, "states of being", type="tone", head="unknown")]
NAMED, AGAINST = "~ 'c' 'a' 'b'", "~ not 'd' 'f' 'e'"  # the discovered concept 5
# Two texts; in the second "p" is followed by "a", the two bytes of an e with an accent, the end of
# the chunk, and "b". All parts of its attribution can be added up by hand.
STEPS = [Step(torch.tensor([[112, 97, 97, 97, 97, 97], [112, 97, 0xc3, 0xa9, EOC, 98]]),
              (torch.tensor([1, 2, 3, 4, 5]), positions), (), (torch.ones(5), confidences), (), ())
         for positions, confidences in ((torch.tensor([4, 1]), torch.tensor([0.5, 0.25])),
                                        (torch.tensor([2, 3, 5]), torch.tensor([1.0, 0.5, 0.75])))]
FOUND = Attribution(
    tokens=STEPS[0].tokens[1, 1:],
    known_ids=torch.tensor([[0, 1], [0, 1], [2, 1], [0, 2], [1, 0]]),
    known=torch.tensor([[4.0, -1.0], [1.0, 1.0], [0.5, 0.0], [0.0, -3.0], [6.0, -2.0]]),
    unknown_ids=torch.tensor([[5, 6]] * 5),
    unknown=torch.tensor([[1.0, 0.5], [3.0, 1.0], [1.0, 1.0], [8.0, 0.0], [-1.0, 0.0]]),
    epsilon=torch.tensor([0.5, 0.0, 2.5, 1.0, 0.5]))


@pytest.fixture(scope="module")
def by_hand():
    """The explanation of the second text, the model, and how often it was asked for a name."""
    model = Steerling(dataclasses.replace(CONFIG, vocab_size=261, eos_token_id=256,
                                          pad_token_id=257, bos_token_id=258,
                                          endofchunk_token_id=EOC, mask_token_id=260))
    with torch.no_grad():
        for weight in (model.transformer.tok_emb.weight, model.unknown_head.embedding_coef.weight,
                       model.unknown_head.embedding_basis.weight):
            weight.zero_()
        model.transformer.tok_emb.weight[[99, 97, 98], 0] = torch.tensor([3.0, 2.0, 1.0])
        model.transformer.tok_emb.weight[[100, 102, 101], 0] = torch.tensor([-3.0, -2.0, -1.0])
        model.unknown_head.embedding_coef.weight[5, 0] = 1
        model.unknown_head.embedding_basis.weight[0, 0] = 1
    asked, rows = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attribute_text", lambda model, steps, row, steering: (
            rows.append(row), (torch.arange(1, 6), FOUND))[1])
        promoted = module.promoted
        patch.setattr(module, "promoted", lambda model, concept, *rest: (
            asked.append(concept), promoted(model, concept, *rest))[1])
        found = explain(model, BYTES, Labels(LABELS, 8, 8), STEPS, row=1, top=1)
    assert rows == [1]
    return found, asked


def test_each_token_has_its_three_parts_and_what_wrote_it(by_hand):
    tokens = by_hand[0]["tokens"]
    assert [[*token["parts"].values()] for token in tokens] == [
        [3, 1.5, 0.5], [2, 4, 0], [0.5, 2, 2.5], [-3, 8, 1], [4, -1, 0.5]]
    assert [token["logit"] for token in tokens] == [5, 6, 5, 6, 3.5], "their sums"
    assert tokens[3]["shares"] == pytest.approx(
        {"known": 3 / 12, "discovered": 8 / 12, "epsilon": 1 / 12}), "sizes, over their sum"
    assert [token["written_by"] for token in tokens] == [
        "entity", "discovered", "epsilon", "discovered", "known"], (
        "the largest part; a known one by the type of its largest concept, where that has a type")
    assert by_hand[0]["shares"]["epsilon"] == pytest.approx(
        (0.5 / 5 + 0 + 2.5 / 5 + 1 / 12 + 0.5 / 5.5) / 5), "the mean over the tokens"


def test_a_token_is_written_by_what_spoke_for_it_not_by_the_largest_size():
    """Known: +4 by Hugo, -5 by another; in all -1, 2 or 2.5. Discovered 1."""
    labels = Labels([Label(0, "Hugo", type="entity"), Label(1, "calm", type="tone")], 8, 8)
    for known, writer in (((4.0, -5.0, 0.0), "discovered"), ((4.0, -5.0, 3.0), "entity"),
                          ((0.5, -9.0, 2.0), "discovered")):
        found = Attribution(torch.tensor([97]), torch.tensor([[0, 1, 2]]), torch.tensor([known]),
                            torch.tensor([[6]]), torch.tensor([[1.0]]), torch.tensor([0.5]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "attribute_text", lambda *args, x=found: (torch.tensor([1]), x))
            patch.setattr(module, "promoted", lambda *args: (torch.tensor([97]), None))
            [token] = explain(None, BYTES, labels, STEPS, row=0)["tokens"]
        assert token["written_by"] == writer, (
            f"known contributions {known}: the largest part, by the concept that did most for it")


def test_the_largest_of_each_head_are_listed_and_named(by_hand):
    hugo = {"head": "known", "id": 0, "name": "Hugo", "type": "entity"}
    five = {"head": "discovered", "id": 5, "name": NAMED}
    tokens = by_hand[0]["tokens"]
    assert tokens[0]["concepts"] == [{**hugo, "contribution": 4}, {**five, "contribution": 1}]
    assert tokens[3]["concepts"] == [
        {**five, "contribution": 8},
        {"head": "known", "id": 2, "name": "concept 2", "contribution": -3}], "largest size first"
    assert by_hand[1] == [5, 5], "once for, once against; a label needs no looking up"


def test_a_discovered_concept_goes_by_what_it_raises_or_where_it_speaks_against_by_what_it_lowers(
        by_hand):
    names = [x["name"] for token in by_hand[0]["tokens"] for x in token["concepts"]
             if x["head"] == "discovered"]
    assert names == 4 * [NAMED] + [AGAINST], "the last one's contribution is -1"
    spaced = Tokenizer.from_ranks({**{bytes([i]): i for i in range(256)}, b" a": 256, b" b": 257})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attribute_text", lambda *args: (torch.arange(1, 6), FOUND))
        patch.setattr(module, "promoted", lambda *args: (
            torch.tensor([97, 256, 257, 98, 99, 100]), torch.tensor([101])))
        found = explain(None, spaced, Labels(LABELS, 8, 8), STEPS, row=1)["tokens"][0]["concepts"]
    assert "~ 'a' 'b' 'c'" in [x["name"] for x in found], "' a' and 'a' are named once"


def test_a_labelled_discovered_concept_goes_by_its_label(by_hand):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "attribute_text", lambda *args: (torch.arange(1, 6), FOUND))
        patch.setattr(module, "promoted", lambda *args: [torch.tensor([0xc3, EOC, 97])] * 2)
        found = explain(None, BYTES, Labels(LABELS, 8, 8), STEPS, row=1)["tokens"][0]["concepts"]
    assert {**found[-1], "contribution": 0} == {
        "head": "discovered", "id": 6, "name": "states of being", "type": "tone", "contribution": 0}
    assert r"~ b'\xc3' <|endofchunk|> 'a'" in [x["name"] for x in found], (
        "half a character and a special token are no words")


def test_each_chunk_has_the_official_shares_of_both_heads(by_hand):
    first, second = by_hand[0]["chunks"]
    assert (first["start"], first["end"], first["text"]) == (1, 4, "a\u00e9")
    assert (second["start"], second["end"], second["text"]) == (5, 6, "b"), "without the chunk end"
    masses = (4 + 1 + 1 + 0.5 + 0.5, 1 + 1 + 3 + 1 + 0, 0.5 + 0 + 1 + 1 + 2.5)
    assert first["epsilon"] == pytest.approx((0.5 / masses[0] + 2.5 / masses[2]) / 3)
    assert [(x["name"], x["share"]) for x in first["concepts"]] == [
        (NAMED, pytest.approx((1 / masses[0] + 3 / masses[1] + 1 / masses[2]) / 3)),
        ("Hugo", pytest.approx((4 / masses[0] + 1 / masses[1]) / 3))]
    assert [x["share"] for x in second["concepts"]] == [
        pytest.approx(6 / 9.5), pytest.approx(-1 / 9.5)], "signed"


def test_a_character_stands_with_the_last_of_its_tokens(by_hand):
    assert [token["text"] for token in by_hand[0]["tokens"]] == [
        "a", "", "\u00e9", "<|endofchunk|>", "b"]
    assert [token["step"] for token in by_hand[0]["tokens"]] == [1, 2, 2, 1, 2]
    assert [token["confidence"] for token in by_hand[0]["tokens"]] == [0.25, 1, 0.5, 0.5, 0.75]


def test_a_label_cannot_steer_the_terminal(by_hand, capsys):
    tokens = [{**token, "concepts": [{**x, "name": "\x1b[2Jred"} for x in token["concepts"]]}
              for token in by_hand[0]["tokens"]]
    print_explanation({**by_hand[0], "tokens": tokens})
    assert "\\x1b[2Jred" in (out := capsys.readouterr().out) and "\x1b" not in out


def test_people_get_a_line_per_token_and_a_block_per_chunk(by_hand, capsys):
    print_explanation(by_hand[0])
    assert capsys.readouterr().out == """\
logit = known concepts + discovered ones + epsilon; then those that did most, in logits
step  sure  token        logit = known  disc.   eps.
   1   25%  'a'            5.0 =   3.0 +  1.5 +  0.5  Hugo +4.0, ~ 'c' 'a' 'b' +1.0
   2  100%  ...            6.0 =   2.0 +  4.0 +  0.0  ~ 'c' 'a' 'b' +3.0, Hugo +1.0
   2   50%  '\u00e9'            5.0 =   0.5 +  2.0 +  2.5  ~ 'c' 'a' 'b' +1.0, concept 2 +0.5
   1   50%  chunk's end    6.0 =  -3.0 +  8.0 +  1.0  ~ 'c' 'a' 'b' +8.0, concept 2 -3.0
   2   75%  'b'            3.5 =   4.0 -  1.0 +  0.5  calm +6.0, ~ not 'd' 'f' 'e' -1.0
chunks: those that did most, in percent of the sizes of all single contributions
chunk 1: 'a\u00e9'
  known       Hugo +24.6%
  discovered  ~ 'c' 'a' 'b' +28.1%
  epsilon     19.0%
chunk 2: 'b'
  known       calm +63.2%
  discovered  ~ not 'd' 'f' 'e' -10.5%
  epsilon     5.3%
shares of the three parts, mean over tokens: known 40.2%, discovered 44.3%, epsilon 15.5%
"""


def test_its_lines_fit_however_long_the_names_are(by_hand, capsys):
    found = json.loads(json.dumps(by_hand[0]))
    for token in found["tokens"]:
        token["text"] *= 30
        for concept in token["concepts"]:
            concept["name"] = 8 * "very long "
    for chunk in found["chunks"]:
        chunk["text"] *= 60
    print_explanation(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line.endswith((" +4.0", " +3.0", " +1.0", " +8.0", " +6.0"))
               for line in lines[2:7]), "the name is cut, not the number"


def grey(colour):
    """How light a colour is to the eye: L* of CIE Lab, 0 to 100; and its luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
              for c in (int(colour[i: i + 2], 16) / 255 for i in (1, 3, 5))]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16, luminance


@pytest.mark.parametrize("scheme, letters", [(0, "#111111"), (1, "#f4f4f4")])
def test_colours_can_be_read_on_and_told_apart_in_grey(scheme, letters):
    lightness, luminance = zip(*(grey(pair[scheme]) for pair in COLOURS.values()))
    for own in luminance:
        dark, light = sorted([own, grey(letters)[1]])
        assert (light + 0.05) / (dark + 0.05) >= 4.5, "WCAG's contrast of text"
    steps = sorted(lightness)
    assert min(b - a for a, b in zip(steps, steps[1:])) > 5, (
        "whoever sees no red, or no colour, sees which is lighter")


def test_the_legend_names_what_occurs(by_hand):
    assert [*legend(by_hand[0]).items()] == [
        ("entity", "known: entity"), ("known", "known"), ("discovered", "discovered"),
        ("epsilon", "epsilon")]


# ---- with a model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    model, tokenizer = load()
    prompt = tokenizer.encode("The old sailor")
    steps = list(unmask(model, [prompt] * 2, 10, steps=4, seed=1))
    return model, tokenizer, prompt, steps


@pytest.fixture(scope="module", params=[0, 1])
def explained(run, request):
    model, tokenizer, _, steps = run
    return request.param, explain(model, tokenizer, Labels([Label(0, "sea")], 24, 64), steps,
                                  request.param, top=3)


def test_every_written_token_is_there_in_the_order_of_the_text(run, explained):
    _, tokenizer, _, steps = run
    row, found = explained
    assert [token["position"] for token in found["tokens"]] == list(range(3, 13))
    assert [token["id"] for token in found["tokens"]] == steps[-1].tokens[row, 3:].tolist()
    for token in found["tokens"]:
        step = steps[token["step"] - 1]
        at = step.positions[row].tolist().index(token["position"])
        assert step.ids[row][at] == token["id"] and step.confidences[row][at] == token["confidence"]
        assert tokenizer.decode([token["id"]], specials=True) == token["text"]


def test_the_parts_sum_to_the_logit_of_the_step(run, explained):
    model, _, _, steps = run
    row, found = explained
    for token in found["tokens"]:
        step = steps[token["step"] - 1]
        hidden = step.hidden[row][step.positions[row].tolist().index(token["position"])]
        logit = (hidden @ model.transformer.tok_emb.weight[token["id"]]).item()
        assert token["logit"] == pytest.approx(logit, abs=1e-4)
        assert sum(token["parts"].values()) == pytest.approx(token["logit"], abs=1e-5)
        assert sum(token["shares"].values()) == pytest.approx(1, abs=1e-5)


def test_three_of_each_head_come_the_largest_first(run, explained):
    model, _, _, steps = run
    row, found = explained
    _, attribution = attribute_text(model, steps, row)
    for token, known, unknown in zip(found["tokens"], attribution.known, attribution.unknown):
        sizes = [abs(concept["contribution"]) for concept in token["concepts"]]
        assert len(sizes) == 6 and sizes == sorted(sizes, reverse=True)
        for head, values in (("known", known), ("discovered", unknown)):
            assert [abs(x["contribution"]) for x in token["concepts"] if x["head"] == head] == (
                values.abs().topk(3).values.tolist())


def test_a_text_of_a_batch_is_explained_as_it_is_alone(run, explained):
    model, tokenizer, prompt, _ = run
    row, found = explained
    alone = explain(model, tokenizer, Labels([Label(0, "sea")], 24, 64),
                    list(unmask(model, [prompt], 10, steps=4, seed=1 + row)), top=3)
    for a, b in zip(found["tokens"], alone["tokens"], strict=True):
        assert (a["text"], a["step"], a["written_by"]) == (b["text"], b["step"], b["written_by"])
        assert a["parts"] == pytest.approx(b["parts"], abs=1e-3)


def test_json_holds_it_all(explained):
    assert json.loads(json.dumps(explained[1])) == explained[1]
