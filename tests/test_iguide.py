"""The concept layer: which concepts are kept, what they add up to, what an edit changes."""

import dataclasses

import pytest
import torch
from conftest import CONFIG, close
from torch.utils._python_dispatch import TorchDispatchMode

from steerling_min import iguide
from steerling_min.iguide import (KnownHead, UnknownHead, decompose, rows, set_weights,
                                  top_concepts, weighted_sum)


def heads():
    """Two random heads whose tables have 16 stored rows for 8 concepts: 8 rows are padding."""
    torch.manual_seed(0)
    known, unknown = KnownHead(CONFIG), UnknownHead(CONFIG)
    for parameter in [*known.parameters(), *unknown.parameters()]:
        torch.nn.init.normal_(parameter)
    return known, unknown


HIDDEN = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)) / 4


# ---- selection -----------------------------------------------------------------------------------

def test_padding_rows_are_never_selected():
    known, unknown = heads()
    assert known.concept_predictor.weight.shape[0] == 16, "rows are rounded up to pad_multiple"
    assert [rows(n, 16) for n in (1, 15, 16, 17, 32)] == [16, 16, 16, 32, 32], (
        "a full table is full")
    larger = UnknownHead(dataclasses.replace(CONFIG, n_unknown_concepts=20))
    assert larger.predictor_up.weight.shape[0] == 32, "20 concepts, rounded up to a multiple of 16"
    for head, predictor in ((known, known.concept_predictor), (unknown, unknown.predictor_up)):
        predictor.weight.data[8:] = 100.0 * predictor.weight.data[8:].sign()
        assert head.logits(HIDDEN).shape[-1] == 8, "logits exist for the n_concepts first rows only"
    parts = decompose(HIDDEN, known, unknown)
    assert parts.known_ids.max() < 8 and parts.unknown_ids.max() < 8


def test_the_largest_logits_are_kept_largest_first():
    known, unknown = heads()
    parts = decompose(HIDDEN, known, unknown)
    for head, ids, logits in ((known, parts.known_ids, parts.known_logits),
                              (unknown, parts.unknown_ids, parts.unknown_logits)):
        every = head.logits(HIDDEN)
        assert ids.shape == (2, 5, 2), "top-k: topk_known_features and unknown_topk, both 2 here"
        assert torch.equal(logits, every.sort(descending=True).values[..., :2])
        assert torch.equal(logits, every.gather(-1, ids)), "ids and logits belong together"


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation inside it makes."""

    numel = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return out


def test_a_long_text_never_has_the_logits_of_all_concepts_at_once(monkeypatch):
    monkeypatch.setattr(iguide, "LOGITS", 100_500)
    config = dataclasses.replace(CONFIG, n_concepts=1000, n_unknown_concepts=1000)
    known, unknown = KnownHead(config), UnknownHead(config)
    hidden = torch.randn(2, 400, 32, generator=torch.Generator().manual_seed(0))
    with Largest() as largest, torch.no_grad():
        parts = decompose(hidden, known, unknown)
    assert largest.numel <= 100 * 1000, (
        "at most LOGITS logits at a time (4096 tokens of the 8B's unknown head would be 1.7 GB), "
        "and padding rows are left out before the product")
    alone = decompose(hidden[1:, -3:], known, unknown)
    assert torch.equal(parts.unknown_ids[1:, -3:], alone.unknown_ids), "slices in their order"
    close(parts.known[1:, -3:], alone.known, "a token's concepts do not depend on other tokens")
    with Largest() as largest, torch.no_grad():
        known.alignment(parts.known_ids.flatten(0, 1), hidden.flatten(0, 1))
    assert largest.numel == hidden.numel(), "embeddings are gathered one concept of each at a time"


@pytest.mark.parametrize("room", [1, 8, 24, 1000])
def test_tokens_are_ranked_alike_in_parts_of_any_size(monkeypatch, room):
    monkeypatch.setattr(iguide, "LOGITS", room)
    for head in heads():
        logits, ids = top_concepts(head, HIDDEN)
        every = head.logits(HIDDEN)
        close(logits, every.topk(2, dim=-1).values, "largest first")
        assert torch.equal(ids, every.topk(2, dim=-1).indices), "each token's own"


def test_logits_are_clamped_to_15():
    known, unknown = heads()
    for head in (known, unknown):
        logits = head.logits(HIDDEN * 1000)
        assert logits.max() == 15.0 and logits.min() == -15.0
        assert head.bfloat16().logits(HIDDEN.bfloat16()).dtype == torch.float32, "ranked in float32"


def test_selection_ranks_by_logit_where_float32_sigmoids_tie():
    known, unknown = heads()
    logits = torch.tensor([14.91, 14.92, 14.95, 14.90, 14.93, 14.97])
    assert len(logits.sigmoid().unique()) == 1, "the case needs equal sigmoids"
    known.concept_predictor.weight.data.zero_()
    known.concept_predictor.weight.data[:6, 0] = logits
    hidden = torch.zeros(1, 1, 32)
    hidden[..., 0] = 1.0
    assert decompose(hidden, known, unknown).known_ids.flatten().tolist() == [5, 2], (
        "large logits have one float32 sigmoid; the official package ranks by it, we by logit")


# ---- features ------------------------------------------------------------------------------------

def test_weighted_sum_is_a_sum_of_table_rows():
    table, weights = torch.randn(9, 4), torch.rand(2, 3, 5)
    ids = torch.randint(0, 9, (2, 3, 5))
    torch.testing.assert_close(weighted_sum(table, ids, weights),
                               (table[ids] * weights[..., None]).sum(-2))


def test_a_heads_features_are_the_weighted_sum_of_its_embeddings():
    ids, weights = torch.tensor([[[0, 7, 0]], [[3, 5, 6]]]), torch.rand(2, 1, 3)
    for head in heads():
        summed = (head.embedding(ids) * weights[..., None]).sum(-2)  # (2, 1, 32)
        close(head.features(ids, weights), summed, "a concept may come twice", atol=1e-5)


def test_known_features_weigh_embeddings_by_sigmoid():
    known, unknown = heads()
    parts = decompose(HIDDEN, known, unknown)
    rows = known.concept_embedding.weight[parts.known_ids]  # (2, 5, k, 32)
    weighed = parts.known_logits.sigmoid()[..., None] * rows
    torch.testing.assert_close(parts.known, weighed.sum(-2))


def test_unknown_embeddings_are_coefficients_times_basis():
    known, unknown = heads()
    parts = decompose(HIDDEN, known, unknown)
    embedding = unknown.embedding_coef.weight @ unknown.embedding_basis.weight.T  # (16, 32), dense
    dense = (parts.unknown_logits.sigmoid()[..., None] * embedding[parts.unknown_ids]).sum(-2)
    torch.testing.assert_close(parts.unknown, dense, atol=1e-5, rtol=1e-5)
    predictor = unknown.predictor_up.weight @ unknown.predictor_down.weight  # (16, 32)
    logits = (HIDDEN @ predictor.T)[..., :8].clamp(-15, 15)
    torch.testing.assert_close(unknown.logits(HIDDEN), logits, atol=1e-4, rtol=1e-4)


# ---- the decomposition ---------------------------------------------------------------------------

def test_with_epsilon_composed_is_the_hidden_state():
    parts = decompose(HIDDEN, *heads())
    close(parts.composed, HIDDEN, "epsilon = hidden - (known + unknown), and stays")
    close(parts.known + parts.unknown + parts.epsilon, parts.composed, "the three add up to it")
    assert parts.epsilon.abs().max() > 0.1, "the concepts leave something over"


def test_with_epsilon_no_gradient_reaches_the_concept_heads():
    known, unknown = heads()
    decompose(HIDDEN.requires_grad_(), known, unknown).composed.square().sum().backward()
    for parameter in [*known.parameters(), *unknown.parameters()]:
        assert parameter.grad.abs().max() < 1e-5, "known and unknown cancel: composed is hidden"
    HIDDEN.requires_grad_(False).grad = None


def test_without_epsilon_gradient_reaches_every_table():
    known, unknown = heads()
    parts = decompose(HIDDEN, known, unknown)
    (parts.known + parts.unknown).square().sum().backward()
    for parameter in [*known.parameters(), *unknown.parameters()]:
        assert parameter.grad.abs().max() > 1e-3


# ---- interventions -------------------------------------------------------------------------------

def test_a_weight_is_set_whether_the_concept_was_selected_or_not():
    ids, weights = torch.tensor([[[4, 7]]]), torch.tensor([[[0.9, 0.5]]])
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    for concept, total in ((7, {4: 0.9, 7: 2.0}), (1, {4: 0.9, 7: 0.5, 1: 2.0})):
        new_ids, new_weights = set_weights(ids, weights, {concept: 2.0}, everywhere)
        sums = {}
        for i, w in zip(new_ids.flatten().tolist(), new_weights.flatten().tolist()):
            sums[i] = sums.get(i, 0.0) + w
        assert sums == pytest.approx(total), "the new weight replaces the old one; others stay"


def test_weights_are_set_at_the_chosen_positions_only():
    ids, weights = torch.tensor([[[4, 7], [7, 4]]]), torch.tensor([[[0.9, 0.5], [0.8, 0.6]]])
    before = ids.clone(), weights.clone()
    first = torch.tensor([[True, False]])
    new_ids, new_weights = set_weights(ids, weights, {7: 2.0, 1: 3.0}, first)
    assert new_ids.shape == new_weights.shape == (1, 2, 4), "a column for each of the two edits"
    dense = torch.zeros(1, 2, 8).scatter_add(-1, new_ids, new_weights)
    close(dense[0, 0, [1, 4, 7]], torch.tensor([3.0, 0.9, 2.0]), "both edits, at position 0")
    close(dense[0, 1, [1, 4, 7]], torch.tensor([0.0, 0.6, 0.8]), "position 1 is not one")
    assert torch.equal(ids, before[0]) and torch.equal(weights, before[1]), (
        "the arguments are left as they are")


def test_epsilon_is_left_out_at_edited_positions_only():
    known, unknown = heads()
    positions = torch.zeros(2, 5, dtype=torch.bool)
    positions[0, 3] = True
    plain = decompose(HIDDEN, known, unknown)
    edited = decompose(HIDDEN, known, unknown, known={1: 3.0}, positions=positions)
    assert (edited.epsilon[positions] == 0).all(), "epsilon would undo the edit"
    torch.testing.assert_close(edited.composed[positions],
                               (edited.known + edited.unknown)[positions])
    assert torch.equal(edited.composed[~positions], plain.composed[~positions]), (
        "the official package drops epsilon everywhere; here other positions are untouched")


def test_an_edit_that_changes_no_weight_leaves_epsilon_out_all_the_same():
    known, unknown = heads()
    ids = decompose(HIDDEN, known, unknown).known_ids
    absent = next(c for c in range(8) if not (ids[0, 0] == c).any())
    parts = decompose(HIDDEN, known, unknown, known={absent: 0.0})
    assert not parts.epsilon.any(), ("at some tokens the concept was not selected: with epsilon "
                                     "there, and without it elsewhere, tokens would not compare")


@pytest.mark.parametrize("which", ["known", "unknown"])
def test_keeping_epsilon_changes_the_edited_contribution_and_nothing_else(which):
    known, unknown = heads()
    plain = decompose(HIDDEN, known, unknown)
    edited = decompose(HIDDEN, known, unknown, **{which: {2: 1.7}}, epsilon="keep")
    if which == "known":
        embedding = known.concept_embedding.weight[2]
        ids, logits = plain.known_ids, plain.known_logits
    else:
        embedding = unknown.embedding_basis.weight @ unknown.embedding_coef.weight[2]
        ids, logits = plain.unknown_ids, plain.unknown_logits
    old = (logits.sigmoid() * (ids == 2)).sum(-1, keepdim=True)  # 0 where it was not selected
    assert 0 < (ids == 2).any(-1).sum() < 10, "the case needs both kinds of position"
    torch.testing.assert_close(edited.composed - plain.composed, (1.7 - old) * embedding,
                               atol=1e-5, rtol=1e-5)


def test_an_edit_of_unknown_concepts_alone_has_an_effect():
    known, unknown = heads()
    edited = decompose(HIDDEN, known, unknown, unknown={5: 2.0})
    assert (edited.epsilon == 0).all() and not torch.allclose(edited.composed, HIDDEN), (
        "the official package recomputes epsilon and so cancels this edit; we do not")


def test_no_edit_keeps_epsilon_whatever_the_option_says():
    known, unknown = heads()
    for empty in (None, {}):
        parts = decompose(HIDDEN, known, unknown, known=empty, epsilon="drop")
        close(parts.composed, HIDDEN, "no edit, nothing to take back: epsilon stays")


def test_concepts_are_counted_from_zero():
    for head in ("known", "unknown"):
        edited = decompose(HIDDEN, *heads(), **{head: {0: 5.0}})
        assert (edited.composed - HIDDEN).abs().max() > 0.1, f"{head} concept 0 can be edited"


@pytest.mark.parametrize("head, concept, last", [
    ("known", 8, 7), ("known", -1, 7), ("unknown", 20, 19), ("unknown", -1, 19)])
def test_a_concept_that_does_not_exist_is_refused(head, concept, last):
    both = heads()[0], UnknownHead(dataclasses.replace(CONFIG, n_unknown_concepts=20))
    with pytest.raises(ValueError, match=f"{head} concept {concept}\\b.*0 to {last}"):
        decompose(HIDDEN, *both, **{head: {concept: 1.0}})
    decompose(HIDDEN, *both, **{head: {last: 1.0}})  # each head has concepts of its own


def test_options_that_make_no_sense_are_refused():
    for weight in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match=f"weight = {weight} is not supported.*finite numbers"):
            decompose(HIDDEN, *heads(), unknown={1: weight})
    with pytest.raises(ValueError, match="remove.*drop.*keep"):
        decompose(HIDDEN, *heads(), known={1: 0.0}, epsilon="remove")
    for positions in (torch.ones(5, dtype=torch.bool), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"positions.*\(2, 5\)"):
            decompose(HIDDEN, *heads(), known={1: 0.0}, positions=positions)
