"""Attribution: why a token was written. From concepts to the token, and from the prompt to it.

A logit is a sum (`iguide.py`), so what each concept did for a token can simply be read off, at the
step in which the token was committed: `unmask` hands the hidden states of that step on. A pass over
the finished text would answer another question, as it sees tokens that were masks at the time.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import require_concept
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
    epsilon: Tensor      # (n,), what the concepts leave over, in logits

    def mass(self) -> Tensor:
        """(n, 3): the absolute contributions of known concepts, unknown ones, epsilon, summed."""
        return torch.stack([self.known.abs().sum(1), self.unknown.abs().sum(1),
                            self.epsilon.abs()], dim=1)

    def shares(self) -> Tensor:
        """(n, 3): the mass of known, unknown and epsilon as parts of 1, token by token."""
        mass = self.mass()
        return mass / mass.sum(1, keepdim=True).clamp(min=1e-12)

    def __getitem__(self, rows) -> "Attribution":
        """That of some of the tokens: a slice, a mask or indices."""
        return Attribution(*(x[rows] for x in vars(self).values()))


def attribute(model: Steerling, hidden: Tensor, tokens: Tensor, steering: Steering | None = None
              ) -> Attribution:
    """What each selected concept, and epsilon, contributed to the logits of tokens.

    Args: hidden (n, D), the states that the logits were computed from; tokens (n,) int64, the one
    asked about at each; steering, whose interventions count as they did then: edited weights, and
    the epsilon that was left (`decompose_under`). (Injections are in the hidden states already.
    Suppression acts on logits, after all this.)
    """
    steering = steering or Steering()
    everywhere = torch.ones(1, len(tokens), dtype=torch.bool, device=hidden.device)
    y = model.transformer.tok_emb(tokens)  # (n, D)
    parts, found = decompose_under(steering, model, hidden), []
    for head, ids, logits, edits in (
            (model.known_head, parts.known_ids, parts.known_logits, steering.known),
            (model.unknown_head, parts.unknown_ids, parts.unknown_logits, steering.unknown)):
        ids, weights = set_weights(ids, logits.sigmoid(), dict(edits), everywhere)  # (1, n, k)
        found += [ids[0], weights[0] * head.alignment(ids[0], y)]
    return Attribution(tokens, *found, (parts.epsilon[0] * y).sum(-1))


def attribute_text(model: Steerling, steps: Iterable[Step], row: int = 0,
                   steering: Steering | None = None) -> tuple[Tensor, Attribution]:
    """The attribution of every token that a run of `unmask` wrote into one sequence.

    Returns the positions (n,), ascending, and the Attribution of the tokens there, each from the
    step that committed it. What an end of turn overwrote is left out, and so is what it filled in.
    steering must be the one given to `unmask`.
    """
    steps = list(steps)
    positions, tokens, hidden = (torch.cat([getattr(step, name)[row] for step in steps])
                                 for name in ("positions", "ids", "hidden"))
    order = positions.argsort()
    order = order[steps[-1].tokens[row][positions[order]] == tokens[order]]  # what still stands
    return positions[order], attribute(model, hidden[order], tokens[order], steering)


def chunk_attribution(found: Attribution) -> dict[int, float]:
    """What the known concepts did for some tokens, such as a chunk's: concept -> share of the
    logits' mass, signed.

    Each token's contributions are divided by its total absolute mass, and averaged over the tokens.
    """
    relative = found.known / found.mass().sum(1, keepdim=True)  # (n, k)
    shares = defaultdict(float)
    for concept, share in zip(found.known_ids.flatten().tolist(), relative.flatten().tolist()):
        shares[concept] += share / len(found.tokens)
    return dict(sorted(shares.items(), key=lambda item: -abs(item[1])))


# ---- input tokens -> token -----------------------------------------------------------------------


def input_attribution(model: Steerling, tokens: Tensor, position: int, target: int,
                      steps: int = 32) -> Tensor:
    """How much each input token adds to the logit of `target` at `position`: (T,), in logits.

    Integrated gradients (Sundararajan et al., arXiv 1703.01365) from an all-mask input: the path
    from the mask's embedding to each token's is walked in `steps` equal steps, and the gradients at
    their ends (a right Riemann sum) are averaged, multiplied by (embedding - mask's embedding) and
    summed over D. The logit is the plain one, hidden . tok_emb[target]. The attributions add up to
    logit(tokens) - logit(all masks), nearly; positions that are masks get exactly 0, and so do
    later blocks, which the position cannot see and which are therefore left out of the passes.

    Args: tokens (T,), partly masked, as they stood when the target was committed.
    """
    backbone, mask, S = model.transformer, model.config.mask_token_id, model.config.diff_block_size
    seen = tokens[: (position // S + 1) * S]  # up to the end of the position's block: (T',)
    with torch.no_grad():
        x = backbone.tok_emb(seen)  # (T', D)
        baseline = backbone.tok_emb.weight[mask].expand_as(x)
        parts = torch.arange(1, steps + 1, device=x.device, dtype=x.dtype) / steps
        path = baseline + parts[:, None, None] * (x - baseline)  # (steps, T, D)
    gradient = torch.zeros_like(x)
    for points in path.split(8):
        points = points.requires_grad_()
        with torch.enable_grad():
            hidden = backbone.from_embeddings(points)[:, position]  # (8, D), composed: no edits
            logits = hidden @ backbone.tok_emb.weight[target]
        gradient += torch.autograd.grad(logits.sum(), points)[0].sum(0)
    return F.pad(((x - baseline) * gradient / steps).sum(-1), (0, len(tokens) - len(seen)))


# ---- what a concept does -------------------------------------------------------------------------


def promoted(model: Steerling, concept: int, n: int = 10) -> tuple[Tensor, Tensor]:
    """The tokens that a known concept raises most, and those that it lowers most: (n,) ids each.

    Raises ValueError for a concept that there is not; so do the two functions below.
    """
    require_concept("known", concept, model.config.n_concepts)
    embedding = model.known_head.concept_embedding.weight[concept]
    alignment = (model.transformer.tok_emb.weight @ embedding).float()  # (V,)
    return alignment.topk(n).indices, (-alignment).topk(n).indices


def nearest(model: Steerling, concept: int, n: int = 5) -> tuple[Tensor, Tensor]:
    """The known concepts whose embeddings point most nearly the same way: ids and cosines (n,)."""
    require_concept("known", concept, model.config.n_concepts)
    E = model.known_head.concept_embedding.weight[: model.config.n_concepts].float()
    cosine = torch.cosine_similarity(E, E[concept][None], dim=-1)
    cosine[concept] = -torch.inf
    cosine, ids = cosine.topk(min(n, len(E) - 1))
    return ids, cosine


@torch.no_grad()
def activations(model: Steerling, tokens: Tensor, concept: int) -> Tensor:
    """How present a known concept is at each token of a text: (B, T) -> (B, T), 0 to 1."""
    require_concept("known", concept, model.config.n_concepts)
    return model.known_head.logits(model.transformer(tokens))[..., concept].sigmoid()
