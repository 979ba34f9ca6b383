"""Attribution: why a token was written. From concepts to the token, and from the prompt to it.

A logit is a sum (`iguide.py`), so what each concept did for a token can be read off at the step
that committed the token: `unmask` passes on the hidden states of that step. A pass over the
finished text would answer another question, as it sees tokens that were masks at the time.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import require, require_concept
from .iguide import set_weights
from .model import Steerling
from .steering import Steering, decompose_under
from .unmasking import Step

# ---- concepts -> token ---------------------------------------------------------------------------


@dataclass
class Attribution:
    """The logits of n tokens taken apart: each is known.sum() + unknown.sum() + epsilon."""

    tokens: Tensor       # (n,) int64, the tokens asked about
    known_ids: Tensor    # (n, k) int64; an edited concept adds a column (`iguide.set_weights`)
    known: Tensor        # (n, k), weight * (embedding . tok_emb[token]), in logits
    unknown_ids: Tensor  # (n, k')
    unknown: Tensor      # (n, k')
    epsilon: Tensor      # (n,), what the concepts leave unexplained, in logits

    def parts(self) -> Tensor:
        """(n, 3): what known concepts, unknown ones and epsilon add up to. Their sum is the logit.
        """
        return torch.stack([self.known.sum(1), self.unknown.sum(1), self.epsilon], dim=1)

    def shares(self) -> Tensor:
        """(n, 3): the size of each part over the sum of the three sizes, 0 to 1.

        Known plus unknown is the report's *concept contribution* (arXiv 2608.07594, Eq. 22). Each
        part is summed before its absolute value is taken.
        """
        sizes = self.parts().abs()
        return sizes / sizes.sum(1, keepdim=True).clamp(min=1e-12)

    def __getitem__(self, rows) -> "Attribution":
        """That of some of the tokens: a slice, a mask or indices."""
        return Attribution(*(x[rows] for x in vars(self).values()))


@torch.no_grad()
def attribute(model: Steerling, hidden: Tensor, tokens: Tensor,
              steering: Steering | None = None) -> Attribution:
    """What each selected concept, and epsilon, contributed to the logits of tokens.

    Args: hidden (n, D), the states that the logits were computed from; tokens (n,) int64, the token
    asked about at each state; steering, the one used when the tokens were written: its edited
    weights, and the epsilon that was left, are applied again (`decompose_under`). (Injections are
    in the hidden states already. Suppression acts on logits, after all this.)
    """
    steering = Steering() if steering is None else steering
    everywhere = torch.ones(1, len(tokens), dtype=torch.bool, device=hidden.device)
    y = model.transformer.tok_emb(tokens)  # (n, D)
    parts, found = decompose_under(steering, model, hidden), []
    for head, ids, logits, edits in (
            (model.known_head, parts.known_ids, parts.known_logits, steering.known),
            (model.unknown_head, parts.unknown_ids, parts.unknown_logits, steering.unknown)):
        ids, weights = set_weights(ids, logits.sigmoid(), dict(edits), everywhere)  # (1, n, k)
        found += [ids[0], weights[0] * head.alignment(ids[0], y)]
    return Attribution(*[tokens, *found, (parts.epsilon[0] * y).sum(-1)])


def attribute_text(model: Steerling, steps: Iterable[Step], row: int = 0,
                   steering: Steering | None = None) -> tuple[Tensor, Attribution]:
    """The attribution of every token that a run of `unmask` wrote into one sequence.

    Returns the positions (n,), ascending, and the Attribution of the tokens there, each from the
    step that committed it. Tokens that an end token overwrote are left out. So are the tokens that
    it filled in. steering must be the one given to `unmask`.
    """
    steps = list(steps)
    positions, tokens, hidden = (torch.cat([getattr(step, name)[row] for step in steps])
                                 for name in ("positions", "ids", "hidden"))
    order = positions.argsort()
    order = order[steps[-1].tokens[row][positions[order]] == tokens[order]]  # what still stands
    return positions[order], attribute(model, hidden[order], tokens[order], steering)


class ChunkAttribution(NamedTuple):
    """What wrote a group of tokens, such as those of a chunk: shares of the mass of their logits.
    """

    known: dict[int, float]    # concept -> share, signed; the largest size first
    unknown: dict[int, float]
    epsilon: float             # 0 to 1


def chunk_attribution(found: Attribution) -> ChunkAttribution:
    """Which concepts, of both heads, did most for some tokens.

    Each token's contributions are divided by its absolute mass, the sum of the sizes of *all* its
    single contributions and epsilon. Then they are summed by concept and divided by the number of
    tokens. (This mass is larger than the parts of `Attribution.shares`, in which contributions of
    both signs cancel first: the two shares of epsilon differ.)
    """
    n = len(found.tokens)
    mass = n * (found.known.abs().sum(1) + found.unknown.abs().sum(1) + found.epsilon.abs())  # (n,)
    heads = []
    for ids, contributions in ((found.known_ids, found.known), (found.unknown_ids, found.unknown)):
        shares: dict[int, float] = defaultdict(float)
        for c, share in zip(ids.ravel().tolist(), (contributions / mass[:, None]).ravel().tolist()):
            shares[c] += share
        heads.append(dict(sorted(shares.items(), key=lambda item: -abs(item[1]))))
    return ChunkAttribution(heads[0], heads[1], (found.epsilon.abs() / mass).sum().item())


# ---- input tokens -> token -----------------------------------------------------------------------


def input_attribution(model: Steerling, tokens: Tensor, position: int, target: int,
                      steps: int = 32) -> Tensor:
    """How much each input token adds to the logit of `target` at `position`: (T,), in logits.

    Integrated gradients (Sundararajan et al., arXiv 1703.01365) from an all-mask input. Gradients
    are taken at mask + (j / steps) (x - mask) for j = 1 to steps, x being the tokens' embeddings
    and mask that of the mask (a right Riemann sum). Their mean, times (x - mask), is summed over D.
    The logit is the plain one, hidden . tok_emb[target]. The attributions nearly add up to
    logit(tokens) - logit(all masks). Positions that are masks get exactly 0. Later blocks get 0,
    too: the position cannot see them, so they are not passed to the model. Works under no_grad.

    Args: tokens (T,), partly masked, as they stood when the target was committed.
    """
    backbone, mask, S = model.transformer, model.config.mask_token_id, model.config.diff_block_size
    seen = tokens[: (position // S + 1) * S]  # up to the end of the position's block: (T',)
    with torch.no_grad():
        x = backbone.tok_emb(seen)  # (T', D)
        baseline = backbone.tok_emb.weight[mask].expand_as(x)
        parts = torch.arange(1, steps + 1, device=x.device, dtype=x.dtype) / steps
        path = baseline + parts[:, None, None] * (x - baseline)  # (steps, T', D)
    gradient = torch.zeros_like(x)
    for points in path.split(8):
        points = points.requires_grad_()
        with torch.enable_grad():
            hidden = backbone.from_embeddings(points)[:, position]  # (8, D), composed: no edits
            logits = hidden @ backbone.tok_emb.weight[target]
        gradient += torch.autograd.grad(logits.sum(), points)[0].sum(0)
    return F.pad(((x - baseline) * gradient / steps).sum(-1), (0, len(tokens) - len(seen)))


def average_inputs(attributions: Tensor, scope: Tensor) -> Tensor:
    """How much several tokens together owe to each input: input attributions (n, T) -> (T,).

    Each token's attributions are divided by their absolute sum over the inputs in scope (T,) bool,
    such as the prompt; then they are averaged. Inputs out of scope get 0. (This is the official
    package's summary; no command here prints it.)
    """
    inside = attributions * scope
    return (inside / inside.abs().sum(1, keepdim=True).clamp(min=1e-12)).mean(0)


# ---- what a concept does -------------------------------------------------------------------------


def promoted(model: Steerling, concept: int, n: int = 10, head: str = "known"
             ) -> tuple[Tensor, Tensor]:
    """The tokens that a concept raises most, and those that it lowers most: (n,) ids each.

    head: "known" or "unknown". Raises ValueError for a concept that does not exist; so do the two
    functions below.
    """
    require(head in ("known", "unknown"), "head", head, "'known', 'unknown'")
    table = model.known_head if head == "known" else model.unknown_head
    require_concept(head, concept, table.n_concepts)
    embedding = table.embedding(torch.tensor(concept, device=model.device))  # (D,)
    order = (model.transformer.tok_emb.weight @ embedding).float().argsort(descending=True)  # (V,)
    return order[:n], order.flip(0)[:n]


def nearest(model: Steerling, concept: int, n: int = 5) -> tuple[Tensor, Tensor]:
    """The known concepts whose embeddings point most nearly the same way: ids and cosines (n,)."""
    require_concept("known", concept, model.config.n_concepts)
    E = model.known_head.concept_embedding.weight.detach()[: model.config.n_concepts].float()
    ids, cosine = resembling(F.normalize(E[concept], dim=-1), F.normalize(E, dim=-1), n + 1)
    return ids[ids != concept], cosine[ids != concept]


@torch.no_grad()
def activations(model: Steerling, tokens: Tensor, concept: int) -> Tensor:
    """How present a known concept is at each token of a text: (B, T) -> (B, T), 0 to 1."""
    require_concept("known", concept, model.config.n_concepts)
    return model.known_head.logits(model.transformer(tokens))[..., concept].sigmoid()


# ---- the training data that a text resembles -----------------------------------------------------


@torch.no_grad()
def embed_chunks(model: Steerling, chunks: Sequence[Sequence[int]]) -> Tensor:
    """Embed chunks of token ids: (n, D), each the mean of its known features, of length 1.

    Chunks of one length are embedded together, 64 at a time. None may be empty.
    """
    found = torch.empty(len(chunks), model.config.n_embd)
    for length in {len(chunk) for chunk in chunks}:
        same = torch.tensor([i for i, chunk in enumerate(chunks) if len(chunk) == length])
        for rows in same.split(64):
            tokens = torch.tensor([list(chunks[i]) for i in rows], device=model.device)
            found[rows] = model.embed(tokens, "known").float().cpu()
    return F.normalize(found, dim=-1)


def resembling(chunk: Tensor, corpus: Tensor, n: int = 5) -> tuple[Tensor, Tensor]:
    """The chunks of a corpus most like one chunk: their numbers and cosines, (n,) each.

    Resemblance is not cause. It shows where similar text was seen in training, not what made the
    model write this text.
    Args: chunk (D,) and corpus (N, D), from `embed_chunks`.
    """
    cosine, ids = (corpus @ chunk).topk(min(n, len(corpus)))
    return ids, cosine


@torch.no_grad()
def present(model: Steerling, chunk: Sequence[int]) -> set[int]:
    """The known concepts that the model sees in a chunk: more than half present at some token."""
    out = model(torch.tensor([list(chunk)], device=model.device))
    return set(out.known_ids[out.known_logits > 0].tolist())
