"""iGuide, the concept layer between the hidden state and the logits.

    hidden = known + unknown + epsilon

`known` is a weighted sum of the embeddings of a few concepts that were named before training. A
weight is a sigmoid, not part of a softmax, as several concepts can be present at once. Only the k
largest count, so that an explanation is short:

    logits, ids = known_head.logits(hidden).topk(k)                              # (B, T, k) each
    known = (logits.sigmoid()[..., None] * known_head.embedding(ids)).sum(-2)    # (B, T, D)

(The code below does this without holding the k embeddings of every token, and can edit weights.)
`unknown` is the same over concepts that the model found by itself. They may be named afterwards.
(Guide Labs now calls them *discovered*; code and checkpoints keep `unknown`.) `epsilon` is
*defined* as what the two leave unexplained.
The logit of token v is the dot product of this sum with v's embedding. So it splits into a
contribution of each concept, weight * (embedding . tok_emb[v]), and one of epsilon.

With epsilon present the sum *is* the hidden state, up to rounding. So plain generation does not
depend on the concept heads at all: they explain it. Once a concept's weight is edited, epsilon is
left out, and the heads then determine the logits. (If epsilon were computed anew, it would undo the
edit: the sum would be the hidden state again.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config, require, require_concept

MAX_LOGIT = 15.0  # concept logits are clamped to +- this
LOGITS = 2**24    # concept logits held at a time, 64 MB: the 8B's unknown ones of 165 tokens


def rows(n: int, multiple: int) -> int:
    """Stored rows of a table of n concepts: n rounded up. Rows past n - 1 are padding."""
    return -(-n // multiple) * multiple


def weighted_sum(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * table[ids] over the last dimension, without holding the gathered rows.

    Args: table (rows, E), E being D or r; ids, weights (B, T, k). Returns (B, T, E).
    """
    k = ids.shape[-1]
    bags = F.embedding_bag(ids.reshape(-1, k), table, mode="sum",
                           per_sample_weights=weights.reshape(-1, k).to(table.dtype))
    return bags.view(*ids.shape[:-1], table.shape[1])


def dot_products(table: Tensor, ids: Tensor, y: Tensor) -> Tensor:
    """table[ids] . y without holding all gathered rows: table (rows, E), ids (n, k), y (n, E) ->
    (n, k)."""
    return torch.stack([(table[column] * y).sum(-1) for column in ids.T], dim=1)


class KnownHead(nn.Module):
    """Concepts named before training: a linear predictor, and an embedding for each."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_concepts, self.topk = config.n_concepts, config.known_topk
        stored = rows(config.n_concepts, config.pad_multiple)
        self.concept_predictor = nn.Linear(config.n_embd, stored, bias=False)
        self.concept_embedding = nn.Embedding(stored, config.n_embd)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> (..., C), C = n_concepts: the predictor's products, in hidden's dtype,
        then float32, clamped to +- MAX_LOGIT. Padding rows are left out before the product."""
        predictor = self.concept_predictor.weight[: self.n_concepts]  # (C, D)
        return F.linear(hidden, predictor).float().clamp(-MAX_LOGIT, MAX_LOGIT)

    def embedding(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D), the concepts' embeddings."""
        return self.concept_embedding.weight[ids]

    def features(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids, weights (B, T, k) -> (B, T, D), the weighted sum of concept embeddings."""
        return weighted_sum(self.concept_embedding.weight, ids, weights)

    def alignment(self, ids: Tensor, y: Tensor) -> Tensor:
        """ids (n, k), y (n, D) -> (n, k): each concept's embedding . y."""
        return dot_products(self.concept_embedding.weight, ids, y)


class UnknownHead(nn.Module):
    """Discovered concepts, in the 8B three times as many as known ones.

    Two full tables of them would be three times as large as all of the known head. So each table is
    a product of two thin matrices, through r numbers.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.n_concepts, self.topk = config.n_unknown_concepts, config.unknown_topk
        stored = rows(config.n_unknown_concepts, config.pad_multiple)
        r = config.factorize_rank
        self.predictor_down = nn.Linear(config.n_embd, r, bias=False)
        self.predictor_up = nn.Linear(r, stored, bias=False)
        self.embedding_coef = nn.Embedding(stored, r)
        self.embedding_basis = nn.Linear(r, config.n_embd, bias=False)

    def logits(self, hidden: Tensor) -> Tensor:
        """As in `KnownHead`, but through z, r numbers per token: hidden (..., D) -> (..., C)
        float32."""
        z = self.predictor_down(hidden)  # (..., r)
        return F.linear(z, self.predictor_up.weight[: self.n_concepts]).float().clamp(
            -MAX_LOGIT, MAX_LOGIT)

    def embedding(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D): the concepts' r coefficients times the basis."""
        return self.embedding_basis(self.embedding_coef.weight[ids])

    def features(self, ids: Tensor, weights: Tensor) -> Tensor:
        """ids, weights (B, T, k) -> (B, T, D): the weighted sum of the concepts' r coefficients (as
        KnownHead.features sums embeddings), then one product with the basis."""
        return self.embedding_basis(weighted_sum(self.embedding_coef.weight, ids, weights))

    def alignment(self, ids: Tensor, y: Tensor) -> Tensor:
        """ids (n, k), y (n, D) -> (n, k): each concept's embedding . y, through r numbers."""
        return dot_products(self.embedding_coef.weight, ids, y @ self.embedding_basis.weight)


def set_weights(ids: Tensor, weights: Tensor, edits: dict[int, float],
                positions: Tensor) -> tuple[Tensor, Tensor]:
    """Set the weights of chosen concepts at chosen positions, whether or not the head selected them
    there.

    At those positions the old weight of an edited concept becomes 0. For each edit a column is
    appended. It holds the new weight at those positions, and 0 at all others.

    Args: ids, weights (B, T, k), left as they are; edits, concept id -> weight; positions (B, T)
    bool. Returns ids and weights of shape (B, T, k + len(edits)).
    """
    for concept, value in edits.items():
        weights = weights.masked_fill((ids == concept) & positions[..., None], 0.0)
        ids = torch.cat([ids, torch.full_like(ids[..., :1], concept)], dim=-1)
        weights = torch.cat([weights, value * positions[..., None]], dim=-1)
    return ids, weights


def top_concepts(head: KnownHead | UnknownHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (B, T, D) -> logits and ids (B, T, k) of the top-k concepts, largest logit first.

    Logits of all concepts are computed for a slice of the B T tokens at a time: as many tokens as
    fit into LOGITS numbers, but at least one.
    """
    parts = hidden.flatten(0, 1).split(max(1, LOGITS // head.n_concepts))  # (tokens, D) each
    found = [head.logits(part).topk(head.topk, dim=-1) for part in parts]  # (tokens, k) each
    logits, ids = (torch.cat(x).view(*hidden.shape[:-1], head.topk) for x in zip(*found))
    return logits, ids


def apply_head(head: KnownHead | UnknownHead, hidden: Tensor, edits: dict[int, float] | None,
               positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply a head to the hidden state (B, T, D).

    Returns the ids and logits (B, T, k) of its top-k concepts, largest logit first, and its
    features (B, T, D) without and with the edits; a concept's weight is sigmoid(logit).
    """
    logits, ids = top_concepts(head, hidden)  # (B, T, k)
    weights = logits.sigmoid()
    plain = edited = head.features(ids, weights)  # (B, T, D)
    if edits:
        edited = head.features(*set_weights(ids, weights, edits, positions))
    return ids, logits, plain, edited


@dataclass
class Decomposition:
    """A hidden state taken apart; composed = known + unknown + epsilon.

    The features are those after an edit. The ids and logits are those that the heads selected
    before it.
    """

    known: Tensor           # (B, T, D)
    unknown: Tensor         # (B, T, D)
    epsilon: Tensor         # (B, T, D)
    composed: Tensor        # (B, T, D)
    known_ids: Tensor       # (B, T, k), largest logit first
    known_logits: Tensor    # (B, T, k) float32
    unknown_ids: Tensor     # (B, T, k')
    unknown_logits: Tensor  # (B, T, k') float32


def decompose(hidden: Tensor, known_head: KnownHead, unknown_head: UnknownHead,
              known: dict[int, float] | None = None, unknown: dict[int, float] | None = None,
              epsilon: str = "drop", positions: Tensor | None = None) -> Decomposition:
    """Take hidden (B, T, D) apart into concepts, optionally editing some of their weights.

    Each head keeps its top-k logits per token and weighs their embeddings by sigmoid(logit). Both
    heads read the hidden state. epsilon = hidden - (known + unknown), before any edit.

    known, unknown: concept id -> weight, an intervention on either head or both. positions (B, T)
    bool says where it applies; None means everywhere. There, epsilon "drop" leaves epsilon out (it
    is 0). With "keep", epsilon stays as it was before the edit: then nothing changes but the edited
    concepts' contributions. Positions that are not edited are untouched; without an edit (None or
    {}) epsilon stays everywhere.

    Raises ValueError, naming the value and what is supported, for a concept id out of range, a
    weight that is not finite, another word for epsilon, or positions that are not bool or have
    another shape.
    """
    require(epsilon in ("drop", "keep"), "epsilon", epsilon, "'drop', 'keep'")
    if positions is None:
        positions = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if positions.shape != hidden.shape[:2] or positions.dtype != torch.bool:
        raise ValueError(f"positions must be a bool mask of shape {tuple(hidden.shape[:2])}, "
                         f"not {positions.dtype} of shape {tuple(positions.shape)}")
    for name, head, edits in (("known", known_head, known), ("unknown", unknown_head, unknown)):
        for concept, weight in (edits or {}).items():
            require_concept(name, concept, head.n_concepts)
            require(abs(weight) < float("inf"), "weight", weight, "finite numbers")

    known_ids, known_logits, plain_known, known_now = apply_head(
        known_head, hidden, known, positions)
    unknown_ids, unknown_logits, plain_unknown, unknown_now = apply_head(
        unknown_head, hidden, unknown, positions)
    rest = hidden - (plain_known + plain_unknown)  # (B, T, D), epsilon
    if epsilon == "drop" and (known or unknown):
        rest = rest.masked_fill(positions[..., None], 0.0)
    return Decomposition(known_now, unknown_now, rest, known_now + unknown_now + rest,
                         known_ids, known_logits, unknown_ids, unknown_logits)
