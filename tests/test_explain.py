"""The explanation of a text: what is in it, and that it agrees with the run."""

import json

import pytest
import torch

from steerling_min import load, unmask
from steerling_min.views.explain import explain, print_explanation
from steerling_min.files.labels import Label, Labels

LABELS = Labels([Label(0, "sea"), Label(9, "afraid")], 24, 64)


@pytest.fixture(scope="module")
def explained():
    model, tokenizer = load()
    prompt = tokenizer.encode("The old sailor")
    steps = list(unmask(model, [prompt], 10, steps=4, seed=1))
    return steps, tokenizer, explain(model, tokenizer, LABELS, steps, top=3)


def test_every_written_token_is_there_in_the_order_of_the_text(explained):
    steps, tokenizer, found = explained
    positions = [token["position"] for token in found["tokens"]]
    assert positions == list(range(3, 13))
    assert [token["id"] for token in found["tokens"]] == steps[-1].tokens[0, 3:].tolist()
    for token in found["tokens"]:
        step = steps[token["step"]]
        at = step.positions[0].tolist().index(token["position"])
        assert step.ids[0][at] == token["id"] and step.confidences[0][at] == token["confidence"]
        assert tokenizer.decode([token["id"]], specials=True) == token["text"]


def test_the_largest_contributions_come_first_under_their_names(explained):
    for token in explained[2]["tokens"]:
        sizes = [abs(concept["contribution"]) for concept in token["concepts"]]
        assert len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
        for concept in token["concepts"]:
            assert concept["name"] == LABELS.name(concept["id"])


def test_shares_are_parts_of_one_and_json_holds_it_all(explained):
    found = explained[2]
    for shares in [found["shares"], *(token["shares"] for token in found["tokens"])]:
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    mean = torch.tensor([list(token["shares"].values()) for token in found["tokens"]]).mean(0)
    assert list(found["shares"].values()) == pytest.approx(mean.tolist(), abs=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_people_get_a_line_per_token(explained, capsys):
    print_explanation(explained[2])
    head, *rows, shares = capsys.readouterr().out.splitlines()
    assert len(rows) == 10 and "known" in shares
    assert all(repr(token["text"]) in row for token, row in zip(explained[2]["tokens"], rows))
