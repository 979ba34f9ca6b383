"""A training step on a small model: which loss reaches which weights, what is injected where."""

import dataclasses
import math

import pytest
import torch
from conftest import CONFIG

from steerling_min import Steerling
from steerling_min.data import Batch
from steerling_min.losses import compose, presence_loss
from steerling_min.objective import EXPRESS, PARTS, Draws, Objective, draw_injections

T = 12
BATCH = Batch(torch.randint(0, 15, (2, T), generator=torch.Generator().manual_seed(1)),
              torch.tensor([[-1] + [0] * 5 + [-1] + [1] * 5, [2] * 8 + [-1] + [3] * 3]),
              torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0],
                            [0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]).bool())
MASKED = torch.rand(2, T, generator=torch.Generator().manual_seed(2)) < 0.5
NOISY = BATCH.tokens.masked_fill(MASKED, CONFIG.mask_token_id)
LEVEL = torch.full((2, T), 0.5)
STRENGTH = torch.tensor([8.0, 6.0])
NOWHERE = torch.tensor([False, False])
HEADS = ("known_head.concept_embedding", "known_head.concept_predictor",
         "unknown_head.predictor_down", "unknown_head.predictor_up",
         "unknown_head.embedding_coef", "unknown_head.embedding_basis")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Steerling(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def losses(model, dropped=NOWHERE, progress=0.3, injected=None, without=(), batch=BATCH):
    objective = Objective(model, list(without), torch.ones(8, 20, dtype=torch.bool))
    draws = Draws(batch, NOISY, MASKED, LEVEL, dropped, torch.tensor([1, 3]), STRENGTH, injected)
    return objective(draws, progress)


def reached(model, loss):
    """The weights that a loss sends a gradient to."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name.removesuffix(".weight") for name, p in model.named_parameters()
            if p.grad is not None and (p.grad != 0).any()}


def test_with_epsilon_the_token_loss_sends_nothing_to_the_concept_heads(model):
    got = reached(model, losses(model)["token"])
    assert not got & set(HEADS), "composed = hidden: the heads explain, they do not decide"
    assert {"transformer.tok_emb", "transformer.blocks.0.attn.c_attn"} <= got


def test_without_epsilon_the_token_loss_trains_the_heads(model):
    all_dropped = ~NOWHERE
    got = reached(model, losses(model, all_dropped, progress=0.3)["token"])
    assert set(HEADS) <= got, "the only way from the backbone to the logits leads through them"


def test_while_labels_stand_in_fully_the_known_predictor_waits(model):
    got = reached(model, losses(model, ~NOWHERE, progress=0.1)["token"])
    assert "known_head.concept_predictor" not in got, "forcing is 1 until 15% of training"
    assert "known_head.concept_embedding" in got, "the labels' embeddings carry the prediction"
    assert "unknown_head.predictor_up" in got, "the unknown side is never forced"


def test_the_trap_with_both_sides_forced_nothing_reaches_the_heads(model):
    got = reached(model, losses(model, ~NOWHERE, progress=0.1, without=["prediction"])["token"])
    assert got & set(HEADS) <= {"known_head.concept_embedding"}, "labelled - labelled: rounding"
    assert "unknown_head.predictor_up" not in got


def test_each_concept_loss_reaches_its_own_head_and_the_backbone_below(model):
    found = losses(model)
    presence = reached(model, found["presence"])
    assert "known_head.concept_predictor" in presence
    assert not presence & {h for h in HEADS if h.startswith("unknown") or h.endswith("embedding")}
    for name in ("reconstruction", "independence"):
        got = reached(model, found[name]) & set(HEADS)
        assert got == {h for h in HEADS if h.startswith("unknown")}, f"{name}: the unknown head"
    for name, loss in found.items():
        assert "transformer.blocks.0.attn.c_attn" in reached(model, loss), f"{name} stops at a head"


def test_losses_weigh_1_but_for_express(model):
    found, hidden = losses(model), model.transformer(NOISY)
    expected = presence_loss(model.known_head.logits(hidden), BATCH.chunks, BATCH.labels)
    torch.testing.assert_close(found["presence"], expected)
    no_token = torch.zeros(8, 20, dtype=torch.bool)
    draws = Draws(BATCH, NOISY, MASKED, LEVEL, NOWHERE, torch.tensor([1, 3]), STRENGTH, MASKED)
    express = Objective(model, [], no_token)(draws, 0.3)["express"]
    assert express.item() == pytest.approx(-EXPRESS * math.log(1e-6), rel=1e-4)


def test_an_injected_direction_trains_its_embedding(model):
    got = reached(model, losses(model, injected=MASKED)["token"])
    assert got & set(HEADS) == {"known_head.concept_embedding"}, "the token loss reads the vector"


def test_unmasked_tokens_cost_nothing(model):
    """The originals under the masks are all that the token loss compares with."""
    other = BATCH.tokens.clone()
    other[~MASKED] = (other[~MASKED] + 1) % 15
    a, b = losses(model)["token"], losses(model, batch=BATCH._replace(tokens=other))["token"]
    assert torch.equal(a, b)


def test_composed_is_hidden_where_epsilon_stays(model):
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    composed = compose(hidden, other, other, other, torch.tensor([False, True]), 0.5)
    assert torch.equal(composed[0], hidden[0]) and not torch.equal(composed[1], hidden[1])


def test_injecting_changes_the_state_and_adds_the_steering_losses(model):
    injected = MASKED.clone()
    plain, steered = losses(model), losses(model, injected=injected)
    assert steered.keys() - plain.keys() == {"respond", "express"}
    assert plain["token"] != steered["token"], "the model reads what is injected"
    nothing = losses(model, injected=injected & False)
    assert torch.equal(nothing["token"], plain["token"]) and nothing["respond"] == 0


@pytest.mark.parametrize("part, missing", [
    ("presence", {"presence"}), ("reconstruction", {"reconstruction"}),
    ("independence", {"independence"})])
def test_a_loss_can_be_left_out(model, part, missing):
    assert losses(model).keys() - losses(model, without=[part]).keys() == missing
    assert part in PARTS


def test_the_mean_gives_way_to_one_over_t(model):
    plain, weighted = losses(model)["token"], losses(model, without=["mean"])["token"]
    expected = plain * MASKED.sum() / 0.5 / MASKED.numel()  # all levels are 0.5 here
    torch.testing.assert_close(weighted, expected)


def test_without_labels_only_the_supervised_losses_are_off(model):
    torch.manual_seed(0)
    unlabelled = Steerling(dataclasses.replace(CONFIG, n_concepts=1, topk_known=1,
                                               topk_known_features=1))
    batch = BATCH._replace(labels=BATCH.labels[:, :0])
    assert losses(unlabelled, ~NOWHERE, batch=batch).keys() == {
        "token", "reconstruction", "independence"}


def test_injections_take_a_labelled_concept_and_the_chunks_that_have_it():
    seen = set()
    for seed in range(60):
        concept, where = draw_injections(BATCH, torch.Generator().manual_seed(seed))
        for b in range(2):
            c = concept[b].item()
            chunks = [i for i in range(4) if BATCH.labels[i, c] and (BATCH.chunks[b] == i).any()]
            assert chunks, "the concept is one that the window's chunks have"
            inside = sum(BATCH.chunks[b] == i for i in chunks).bool()
            ends = torch.zeros_like(inside)
            ends[1:] = inside[:-1] & (BATCH.chunks[b, 1:] == -1)
            expected = inside | ends
            assert not where[b].any() or torch.equal(where[b], expected)
            seen.add((b, c, where[b].any().item()))
    assert seen == {(b, c, on) for b, c in ((0, 0), (0, 1), (0, 2), (1, 3), (1, 4))
                    for on in (True, False)}, "every concept, injected or not"


def test_without_labels_nothing_is_injected():
    concept, where = draw_injections(BATCH._replace(labels=BATCH.labels & False), torch.Generator())
    assert not where.any()
    concept, where = draw_injections(BATCH._replace(labels=BATCH.labels[:, :0]), torch.Generator())
    assert not where.any() and concept.tolist() == [0, 0]
