"""A training step on a small model: which loss reaches which weights, what is injected where."""

import dataclasses
from collections import defaultdict

import pytest
import torch
from conftest import CONFIG, close

from steerling_min import Steerling
from steerling_min.training import objective
from steerling_min.training.data import Batch, has_concepts
from steerling_min.training.losses import (alignment_loss, compose, independence_loss,
                                           known_forcing, presence_loss, reconstruction_loss)
from steerling_min.training.objective import (ALIGNMENT, EXPRESS, INDEPENDENCE, INJECTED, PARTS,
                                              RECONSTRUCTION, STRENGTHS, Draws, Objective,
                                              draw_injections, labelled_features)
from steerling_min.steering import Steerer, Steering

T = 12
BATCH = Batch(torch.randint(0, 15, (2, T), generator=torch.Generator().manual_seed(1)),
              torch.tensor([[-1] + [0] * 5 + [-1] + [1] * 5, [2] * 8 + [-1] + [3] * 3]),
              torch.tensor([[0, -1], [1, 2], [3, -1], [3, 4]]))
MASKED = torch.rand(2, T, generator=torch.Generator().manual_seed(2)) < 0.5
NOISY = BATCH.tokens.masked_fill(MASKED, CONFIG.mask_token_id)
LEVEL = torch.full((2, T), 0.5)
INJECT = torch.where(MASKED, torch.tensor([[0], [3]]), -1)  # concept 0 in one window, 3 in other
LIFT = torch.rand(8, 20, generator=torch.Generator().manual_seed(5))
STRENGTH = torch.tensor([[8.0], [6.0]]).expand(2, T)
NOWHERE = torch.tensor([False, False])
NOBODY = torch.zeros_like(MASKED)
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


def losses(model, dropped=NOWHERE, progress=0.3, injected=None, without=(), batch=BATCH,
           alone=NOBODY):
    objective = Objective(model, list(without), LIFT[: model.config.n_concepts])
    draws = Draws(batch, NOISY, MASKED, LEVEL, dropped, alone, injected, STRENGTH)
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
    assert "transformer.blocks.0.attn.c_attn" in got, "through it the language below learns, too"


def test_the_trap_with_both_sides_forced_nothing_reaches_the_heads(model):
    got = reached(model, losses(model, ~NOWHERE, progress=0.1, without=["prediction"])["token"])
    assert got & set(HEADS) <= {"known_head.concept_embedding"}, "labelled - labelled: rounding"
    assert "unknown_head.predictor_up" not in got


def test_each_concept_loss_reaches_its_own_head(model):
    found = losses(model, ~NOWHERE)
    presence = reached(model, found["presence"])
    assert "known_head.concept_predictor" in presence
    assert "transformer.blocks.0.attn.c_attn" in presence, "the backbone is to show the concepts"
    assert not presence & {h for h in HEADS if h.startswith("unknown") or h.endswith("embedding")}
    for name in ("reconstruction", "independence"):
        got = reached(model, found[name])
        assert got == {h for h in HEADS if h.startswith("unknown")}, f"{name}: this head alone"


def test_what_the_heads_supply_does_not_depend_on_which_windows_keep_epsilon(model):
    a, b = losses(model), losses(model, torch.tensor([True, False]))
    for name in ("reconstruction", "independence", "presence"):
        assert torch.equal(a[name], b[name]), f"{name} is a loss of all windows"
    assert a["token"] != b["token"], "a window without epsilon is predicted through concepts"


def test_the_state_without_epsilon_is_what_the_heads_say(model):
    """At full progress: a tenth the labels' features, the rest predicted; the unknown as is."""
    parts = model(NOISY)
    labelled = labelled_features(BATCH, model.known_head.concept_embedding.weight)
    composed = torch.lerp(parts.known, labelled, 0.1) + parts.unknown
    composed[0] = parts.hidden[0]
    logits = model.transformer.lm_head(composed)[MASKED]
    expected = torch.nn.functional.cross_entropy(logits, BATCH.tokens[MASKED])
    got = losses(model, torch.tensor([False, True]), progress=1.0)["token"]
    torch.testing.assert_close(got, expected)


def test_known_concepts_alone_predict_some_tokens_of_the_windows_without_epsilon(model):
    parts, alone = model(NOISY), NOBODY.clone()
    alone[:, ::2] = True
    labelled = labelled_features(BATCH, model.known_head.concept_embedding.weight)
    known = torch.lerp(parts.known, labelled, 0.1)
    composed = torch.where(alone[..., None], known, known + parts.unknown)
    composed[0] = parts.hidden[0]
    logits = model.transformer.lm_head(composed)[MASKED]
    expected = torch.nn.functional.cross_entropy(logits, BATCH.tokens[MASKED])
    found = losses(model, torch.tensor([False, True]), progress=1.0, alone=alone)
    close(found["token"], expected, "the first window keeps epsilon, and so all three parts")
    whole = losses(model, torch.tensor([False, True]), progress=1.0)
    for name in ("reconstruction", "independence"):
        assert torch.equal(found[name], whole[name]), f"{name} is of what the head supplies"


def test_presence_weighs_1_the_others_as_they_say(model):
    assert (EXPRESS, RECONSTRUCTION, INDEPENDENCE, ALIGNMENT) == (0.01, 96, 3, 12), (
        "the weights that the README's table is of")
    found, hidden = losses(model), model.transformer(NOISY)
    labels = has_concepts(BATCH.labels, 8)
    expected = presence_loss(model.known_head.logits(hidden), BATCH.chunks, labels)
    torch.testing.assert_close(found["presence"], expected)
    parts = model(NOISY)
    labelled = labelled_features(BATCH, model.known_head.concept_embedding.weight)
    forced = torch.lerp(parts.known, labelled, known_forcing(0.3))
    expected = RECONSTRUCTION * reconstruction_loss(parts.unknown[MASKED], parts.hidden[MASKED],
                                                    forced[MASKED])
    torch.testing.assert_close(found["reconstruction"], expected)
    known = parts.known[MASKED] / parts.known[MASKED].square().mean().sqrt()
    expected = INDEPENDENCE * independence_loss(known, parts.unknown[MASKED])
    torch.testing.assert_close(found["independence"], expected)
    embedding = model.known_head.concept_embedding.weight
    with torch.no_grad():
        embedding *= 3
    larger = losses(model)["independence"]
    torch.testing.assert_close(larger, found["independence"], msg=(
        "larger known features must not make independence weigh more: it would forbid the unknown "
        "head to reconstruct what they leave of the hidden state"))


def test_alignment_compares_embeddings_with_the_lift(model):
    found = losses(model)["alignment"]
    embedding = model.known_head.concept_embedding.weight[:8]
    expected = alignment_loss(embedding, model.transformer.tok_emb.weight, LIFT)
    torch.testing.assert_close(found, ALIGNMENT * expected)
    assert reached(model, found) == {"known_head.concept_embedding"}


def test_respond_and_express_ask_about_what_was_injected_where_it_was(model):
    hidden = []
    model.transformer.register_forward_hook(lambda module, args, out: hidden.append(out))
    lifted = torch.rand(8, 20, generator=torch.Generator().manual_seed(3)) < 0.3
    injected = INJECT.clone()
    injected[0, 1:4] = 5  # at masks and at tokens: a whole chunk is injected into
    draws = Draws(BATCH, NOISY, MASKED, LEVEL, NOWHERE, NOBODY, injected, STRENGTH)
    found = Objective(model, [], lifted.float())(draws, 0.3)
    logits = model.known_head.logits(hidden[0])
    at = [(b, i) for b in range(2) for i in range(T) if injected[b, i] >= 0]
    assert not all(MASKED[b, i] for b, i in at), "the case needs tokens that are injected into"
    respond = [-logits[b, i, injected[b, i]].sigmoid().log() for b, i in at]
    close(found["respond"], torch.stack(respond).mean(), "of weight 1, at masks and at tokens")
    probabilities, chunks = model.transformer.lm_head(hidden[0]).softmax(-1), defaultdict(list)
    for b, i in at:
        if MASKED[b, i] and BATCH.chunks[b, i] >= 0:  # special tokens express nothing
            mass = probabilities[b, i, lifted[injected[b, i]]].sum()
            chunks[BATCH.chunks[b, i].item()].append(mass)
    express = [-(torch.stack(masses).mean() + 1e-6).log() for masses in chunks.values()]
    torch.testing.assert_close(found["express"], EXPRESS * torch.stack(express).mean())


def test_without_forcing_the_predicted_concepts_stand_alone(model):
    parts = model(NOISY)
    logits = model.transformer.lm_head(parts.known + parts.unknown)[MASKED]
    expected = torch.nn.functional.cross_entropy(logits, BATCH.tokens[MASKED])
    got = losses(model, ~NOWHERE, progress=0.1, without=["forcing"])["token"]
    torch.testing.assert_close(got, expected)


def test_an_injected_direction_is_a_constant(model):
    got = reached(model, losses(model, injected=INJECT)["token"])
    assert not got & set(HEADS), "the model is to follow it; it is not to please the model"


def test_unmasked_tokens_cost_nothing(model):
    """The originals under the masks are all that the token loss compares with."""
    other = BATCH.tokens.clone()
    other[~MASKED] = (other[~MASKED] + 1) % 15
    a, b = losses(model)["token"], losses(model, batch=BATCH._replace(tokens=other))["token"]
    assert torch.equal(a, b)


def test_composed_is_hidden_where_epsilon_stays(model):
    hidden, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    composed = compose(hidden, other, other, other, torch.tensor([[False], [True]]), 0.5)
    assert torch.equal(composed[0], hidden[0]) and not torch.equal(composed[1], hidden[1])


def test_rows_of_padding_are_never_injected(model):
    """Of an embedding that is 0, a logit's worth is infinite; times "nowhere" that is no number."""
    with torch.no_grad():
        model.known_head.concept_embedding.weight[model.config.n_concepts:] = 0.0
    found = losses(model, injected=INJECT)
    assert all(x.isfinite() for x in found.values()), found


def test_processes_are_joined_by_what_each_loss_is_a_mean_of(model, monkeypatch):
    counts = []
    monkeypatch.setattr(objective, "joined", lambda loss, count: (counts.append(count), loss)[1])
    losses(model)
    losses(model, without=("mean",))
    assert counts == [MASKED.sum(), MASKED.numel()], "1/t weights: a mean over all tokens"


def test_injecting_changes_the_state_and_adds_the_steering_losses(model):
    plain, steered = losses(model), losses(model, injected=INJECT)
    assert steered.keys() - plain.keys() == {"respond", "express"}
    assert plain["token"] != steered["token"], "the model reads what is injected"
    nothing = losses(model, injected=torch.full_like(INJECT, -1))
    assert torch.equal(nothing["token"], plain["token"]) and nothing["respond"] == 0


@pytest.mark.parametrize("part, missing", [
    ("presence", {"presence"}), ("reconstruction", {"reconstruction"}),
    ("independence", {"independence"}), ("alignment", {"alignment"})])
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
    found = losses(unlabelled, ~NOWHERE, batch=batch)
    assert found.keys() == {"token", "reconstruction", "independence"}
    parts = unlabelled(NOISY)
    logits = unlabelled.transformer.lm_head(parts.known + parts.unknown)[MASKED]
    close(found["token"], torch.nn.functional.cross_entropy(logits, BATCH.tokens[MASKED]),
          "no labels can stand in for what is predicted")


def test_of_concepts_that_the_data_never_speaks_of_labels_say_nothing(model):
    """A model that is trained further keeps what it knows: concepts 0 and 1 here."""
    objective = Objective(model, [], LIFT)
    draws = Draws(BATCH._replace(labels=BATCH.labels.where(BATCH.labels > 1, -1)), NOISY, MASKED,
                  LEVEL, ~NOWHERE, NOBODY, None, STRENGTH)
    before = objective(draws, 0.1)  # the labels stand in fully
    found = Objective(model, [], LIFT[2:], torch.arange(2, 8))(draws, 0.1)
    model.zero_grad()
    found["presence"].backward(retain_graph=True)
    grad = model.known_head.concept_predictor.weight.grad
    assert (grad[:2] == 0).all() and (grad[2:8] != 0).any(1).all(), "no label is not: absent"
    assert found["token"] != before["token"], "they are predicted where labels stand in"
    assert "known_head.concept_predictor" in reached(model, found["token"])


@pytest.mark.parametrize("T", [12, 5])  # more than the 6 concepts with labels, and fewer
def test_labels_stand_in_for_their_concepts_and_the_others_are_predicted(model, T):
    spoken = torch.tensor([0, 1, 3, 4, 6, 7])  # 2 and 5, which it predicts most, have no labels
    labels = BATCH.labels.where(BATCH.labels != 2, -1)
    tokens, chunks, noisy, masked = (x[:, :T] for x in (BATCH.tokens, BATCH.chunks, NOISY, MASKED))
    draws = Draws(Batch(tokens, chunks, labels), noisy, masked, LEVEL[:, :T], ~NOWHERE,
                  NOBODY[:, :T], None, STRENGTH[:, :T])
    found = Objective(model, [], LIFT[spoken], spoken)(draws, 0.1)
    parts, E = model(noisy), model.known_head.concept_embedding.weight
    weights = parts.known_logits.sigmoid() * ~torch.isin(parts.known_ids, spoken)
    given = torch.stack([E[ids[ids >= 0]].sum(0) for ids in labels])[chunks]
    given = given.where(chunks[..., None] >= 0, 0.0)
    known = given + (weights[..., None] * E[parts.known_ids]).sum(-2)
    logits = model.transformer.lm_head(known + parts.unknown)[masked]
    close(found["token"], torch.nn.functional.cross_entropy(logits, tokens[masked]),
          "labels for the concepts that have some, predictions for the others")


def test_where_labels_stand_in_fully_only_unlabelled_concepts_are_predicted(model):
    """Concepts 0 to 2, of which the data say nothing."""
    draws = Draws(BATCH._replace(labels=BATCH.labels.where(BATCH.labels > 2, -1)), NOISY, MASKED,
                  LEVEL, ~NOWHERE, NOBODY, None, STRENGTH)
    model.zero_grad()
    Objective(model, [], LIFT[3:], torch.arange(3, 8))(draws, 0.1)["token"].backward()
    grad = model.known_head.concept_predictor.weight.grad
    assert (grad[3:8] == 0).all() and (grad[:3] != 0).any(), "labels of 3 to 7 are known"


def test_a_tenth_of_the_presence_losss_gradient_reaches_the_backbone_if_it_is_to(model):
    """Its head learns with all of it; with all of it in the backbone texts were not learnt."""
    found = []
    for pull in (0.1, 1.0):
        model.zero_grad()
        objective = Objective(model, [], LIFT, pull=pull)
        draws = Draws(BATCH, NOISY, MASKED, LEVEL, NOWHERE, NOBODY, None, STRENGTH)
        loss = objective(draws, 0.3)["presence"]
        loss.backward()
        found.append((loss.detach(), model.known_head.concept_predictor.weight.grad.clone(),
                      model.transformer.blocks[0].attn.c_attn.weight.grad.clone()))
    (loss, head, backbone), (whole_loss, whole_head, whole_backbone) = found
    close(loss, whole_loss, "the loss is the same", atol=1e-6)
    close(head, whole_head, "so is what its own matrix learns", atol=1e-6)
    close(10 * backbone, whole_backbone, "a tenth of the gradient", atol=4e-6)
    assert whole_backbone.abs().max() > 1e-3


def test_an_injected_concept_is_found_by_its_number_where_data_speak_of_few(model):
    """Of concepts 3 to 7: row 0 of lift is concept 3's, and concept 0 has none."""
    def express(first, lift, spoken):
        injected = torch.where(MASKED, torch.tensor([[first], [3]]), -1)
        draws = Draws(BATCH, NOISY, MASKED, LEVEL, NOWHERE, NOBODY, injected, STRENGTH)
        return Objective(model, [], lift, spoken)(draws, 0.1)["express"]
    lift = LIFT * (LIFT > 0.5)
    few = lift[3:], torch.arange(3, 8)
    close(express(4, *few), express(4, lift, None), "concepts 4 and 3")
    assert express(0, *few) == express(-1, *few) != express(7, *few), (
        "concept 0, of which no data speak, is left out: it is not the last of those that have")


def test_injections_take_one_concept_of_a_chunk_for_the_whole_chunk_and_its_end():
    seen, strengths = set(), []
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        injected, strength = draw_injections(BATCH, torch.ones(8), generator)
        assert STRENGTHS[0] <= strength.min() and strength.max() <= STRENGTHS[1]
        for n in range(4):
            b = int((BATCH.chunks[1] == n).any())
            at = (BATCH.chunks[b] == n).nonzero()[:, 0]
            end = at[-1] + 1
            at = [*at, end] if end < T else at  # cut off by the window's edge, or ended
            assert len(set(injected[b, at].tolist())) == 1, "a chunk and its end have one concept"
            assert len(set(strength[b, at].tolist())) == 1
            strengths.append(strength[b, at[0]].item())
            seen.add((n, injected[b, at[0]].item()))
        assert injected[0, 0] == -1, "what ends no chunk is left alone"
    assert seen == {(0, 0), (1, 1), (1, 2), (2, 3), (3, 3), (3, 4), (0, -1), (1, -1), (2, -1),
                    (3, -1)}, "every concept that a chunk has, or none"
    assert len(set(strengths)) == 400, "each chunk has a strength of its own"
    low, high = STRENGTHS
    assert (low, high) == (4, 18) and min(strengths) < 4.2 and max(strengths) > 17.7
    assert abs(sum(strengths) / 400 - 11) < 4 * 14 / 12**0.5 / 20, "uniform, 4 to 18 logits"


def test_a_concept_of_more_weight_is_injected_more_often():
    weights, found = torch.tensor([1.0, 1, 3, 1, 1, 1, 1, 1]), []
    for seed in range(600):
        injected, _ = draw_injections(BATCH, weights, torch.Generator().manual_seed(seed))
        found.append(injected[0, 8].item())  # of chunk 1, which has 1 and 2
    assert abs(found.count(2) / (found.count(1) + found.count(2)) - 3 / 4) < 0.1


def test_a_share_of_the_chunks_is_injected_into():
    found = []
    for seed in range(300):
        injected, _ = draw_injections(BATCH, torch.ones(8), torch.Generator().manual_seed(seed))
        found += [bool((injected[BATCH.chunks == n] >= 0).all()) for n in range(4)]
    assert abs(sum(found) / len(found) - INJECTED) < 0.05


def test_without_labels_nothing_is_injected():
    for labels in (torch.full_like(BATCH.labels, -1), BATCH.labels[:, :0]):
        injected, _ = draw_injections(BATCH._replace(labels=labels), torch.ones(8),
                                      torch.Generator())
        assert (injected == -1).all()


def test_a_concepts_own_direction_is_injected_at_its_strength_and_nowhere_else():
    """The vectors that reach the backbone, against `Steering.amplify` of the same concept."""
    torch.manual_seed(0)
    model = Steerling(dataclasses.replace(CONFIG, n_layers=4))  # early, 1, is not the middle, 2
    seen = {}
    forward = model.transformer.forward
    model.transformer.forward = lambda tokens, injections: (
        seen.update(injections), forward(tokens, injections))[1]
    losses(model, injected=INJECT)
    (layer, vectors), = seen.items()
    for c, strength in ((0, 8.0), (3, 6.0)):
        steerer = Steerer(Steering.amplify(c, strength), model)
        (expected_layer, found), = steerer.vectors(INJECT == c, torch.zeros(2)).items()
        assert layer == expected_layer
        torch.testing.assert_close(vectors * (INJECT == c)[..., None], found)
    assert (vectors[INJECT < 0] == 0).all() and not vectors.requires_grad


def test_the_originals_are_what_is_predicted(model):
    expected = torch.nn.functional.cross_entropy(model(NOISY).logits[MASKED], BATCH.tokens[MASKED])
    torch.testing.assert_close(losses(model)["token"], expected)


def test_a_token_has_its_chunks_labels_and_a_special_token_none():
    embedding = torch.randn(8, 32, generator=torch.Generator().manual_seed(4))
    found = labelled_features(BATCH, embedding)
    assert (found[BATCH.chunks < 0] == 0).all(), "chunk -1 is no chunk, not the last one"
    for n, ids in enumerate([[0], [1, 2], [3], [3, 4]]):
        expected = embedding[ids].sum(0).expand(int((BATCH.chunks == n).sum()), -1)
        torch.testing.assert_close(found[BATCH.chunks == n], expected)
    nothing = BATCH._replace(labels=BATCH.labels[:, :0])
    assert (labelled_features(nothing, embedding) == 0).all(), "texts without any labels"
