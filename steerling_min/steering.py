"""Steering: push the text toward concepts, or away from them, while it is written.

Three kinds of edit, which can be combined by `+`:
- an injection adds a concept's direction to the residual stream of positions still masked;
- a suppression lowers the logits of the tokens that a concept promotes;
- an intervention sets a concept's weight in the concept layer (`iguide.decompose`).
"""

import math
from dataclasses import dataclass
from itertools import starmap
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import Config, require, require_concept
from .iguide import Decomposition, decompose
from .model import Steerling


@dataclass(frozen=True)
class Injection:
    """Add alpha * direction of a group of known concepts after every block from `layer` on."""

    ids: tuple[int, ...]       # their embeddings are summed
    strength: float            # alpha, or the logits that alpha is to be worth
    layer: int | None = None   # 1-based; None: early to push toward, the middle to push away
    logit_units: bool = True   # alpha = strength / max_v(tok_emb_v . direction); else = strength
    cutoff_tokens: int | None = None  # stop once this many tokens are committed; None: never


class Suppression(NamedTuple):
    """Lower the logits of the tokens that a known concept promotes, and only theirs."""

    id: int
    strength: float
    logit_units: bool = False  # True: logits off the most promoted token; False: a factor of
                               # relu(tok_emb . embedding)


UNLEARN, SUPPRESS = -4.0, 2.0  # logits: defaults of `Steering.unlearn`


@dataclass(frozen=True)
class Steering:
    """What to do to which concepts. `Steering.amplify(3) + Steering.unlearn(7)` does both."""

    injections: tuple[Injection, ...] = ()
    suppressions: tuple[Suppression | tuple[int, float], ...] = ()
    known: tuple[tuple[int, float], ...] = ()         # interventions: (concept, weight)
    unknown: tuple[tuple[int, float], ...] = ()
    epsilon: str = "drop"                             # under interventions: "drop" or "keep"

    @classmethod
    def amplify(cls, ids: int | tuple[int, ...], strength: float = 8.0, layer: int | None = None,
                cutoff_tokens: int | None = 32) -> "Steering":
        """The official preset that brings concepts out.

        strength is in logits. Take the token that the direction promotes most: its logit would rise
        by so much if the injection were added once, to the final state. (It is added after every
        layer from `layer` on, and the sum is normalised at the end: the logit moves by less or
        more.) layer None is `default_layer`: min(8, max(1, n_layers // 4)) for a strength above 0.
        """
        ids = (ids,) if isinstance(ids, int) else tuple(ids)
        return cls(injections=(Injection(ids, strength, layer, True, cutoff_tokens),))

    @classmethod
    def unlearn(cls, id: int, group: tuple[int, ...] = (), strength: float | None = None,
                suppression: float | None = None, layer: int | None = None,
                logit_units: bool = False) -> "Steering":
        """Keep a concept out, in two ways at once.

        First, the direction of the concept and its group is injected with a negative strength (a
        positive one would amplify), until the text ends. Second, the logits of the tokens that the
        concept itself promotes are lowered; the group's are not. The defaults are UNLEARN and
        SUPPRESS, in logits of the most promoted token: they suit any model. A number that you give
        is raw: alpha, and the factor of relu(tok_emb . embedding). With logit_units=True it is in
        logits, too. The official preset is raw, -7 and 20, made for the 8B. layer None is n_layers
        // 2, at least 1.
        """
        ids = tuple(dict.fromkeys((id, *group)))
        push, lower = ((default if x is None else x, logit_units or x is None)
                       for x, default in ((strength, UNLEARN), (suppression, SUPPRESS)))
        return cls(injections=(Injection(ids, push[0], layer, push[1], None),),
                   suppressions=(Suppression(id, *lower),))

    def __add__(self, other: "Steering") -> "Steering":
        """Both. Raises ValueError when only one of two interventions drops epsilon."""
        epsilons = {s.epsilon for s in (self, other) if s.known or s.unknown}
        if len(epsilons) > 1:
            raise ValueError("one steering keeps epsilon and the other drops it")
        return Steering(self.injections + other.injections, self.suppressions + other.suppressions,
                        self.known + other.known, self.unknown + other.unknown,
                        epsilons.pop() if epsilons else "drop")


def alpha_of(strength: float | Tensor, directions: Tensor, tok_emb: Tensor) -> Tensor:
    """How far to go along unit directions (..., D) for a strength in logit units: one alpha for
    each direction, (...).

    A step of alpha raises the logit of the token that the direction promotes most by `strength`:
    alpha = strength / max_v(tok_emb_v . direction). tok_emb is (V, D).
    """
    return strength / (directions @ tok_emb.T).amax(-1)


def default_layer(n_layers: int, toward: bool) -> int:
    """The layer from which to inject, unless another is given: an early one, 8 at most, to push
    toward a concept; the middle to push away."""
    return min(8, max(1, n_layers // 4)) if toward else max(1, n_layers // 2)


class Steerer:
    """A Steering made ready for one model: what the sampler asks at every step."""

    def __init__(self, steering: Steering, model: Steerling):
        """Raises ValueError for a concept or a layer that the model does not have."""
        self.model, self.steering = model, steering
        config, tok_emb = model.config, model.transformer.tok_emb.weight  # (V, D)
        check(steering, config)
        if steering.injections or steering.suppressions:
            tok_emb = tok_emb.float()  # in half precision this copies a big matrix: only if needed

        def embeddings(*ids):
            return model.known_head.concept_embedding.weight[list(ids)].float()  # (n, D)
        self.active: list[list[bool]] | None = None  # at the last call of `switched`
        self.injections = []  # (layer, cutoff_tokens, alpha * direction (D,))
        for injection in steering.injections:
            direction = F.normalize(embeddings(*injection.ids).sum(0), dim=0)  # (D,)
            strength = injection.strength
            layer = injection.layer or default_layer(config.n_layers, toward=strength > 0)
            alpha = alpha_of(strength, direction, tok_emb) if injection.logit_units else strength
            self.injections.append((layer, injection.cutoff_tokens, alpha * direction))
        self.suppression = torch.zeros(len(tok_emb), device=tok_emb.device)  # (V,)
        for concept, strength, logit_units in starmap(Suppression, steering.suppressions):
            promoted = (tok_emb @ embeddings(concept)[0]).relu()  # (V,)
            scale = promoted.amax().clamp(min=1e-12) if logit_units else 1.0
            self.suppression += strength / scale * promoted

    def vectors(self, masked: Tensor, committed: Tensor) -> dict[int, Tensor]:
        """What to inject in this step: {layer: (B, T, D)}, in the model's dtype. A position gets
        the vector if it is masked and its row has fewer than cutoff_tokens committed tokens (None:
        no limit); all others get 0. Injections that start at the same layer are added. Every
        injection's layer is a key, even if its values are all 0.

        Args: masked (B, T) bool; committed (B,), how many new positions of each sequence are not
        masks now.
        """
        found: dict[int, Tensor] = {}
        for layer, cutoff, vector in self.injections:
            active = masked if cutoff is None else masked & (committed < cutoff)[:, None]
            found[layer] = found.get(layer, 0.0) + active[..., None] * vector
        return {layer: x.to(self.model.dtype) for layer, x in found.items()}

    def switched(self, committed: Tensor) -> bool:
        """Whether an injection has ended in some row since the last call; also at the first."""
        before = self.active
        self.active = [(committed < cutoff).tolist() for _, cutoff, _ in self.injections
                       if cutoff is not None]
        return self.active != before

    def suppress(self, logits: Tensor) -> Tensor:
        """logits (M, V), lowered for the tokens that suppressed concepts promote."""
        return logits - self.suppression if self.steering.suppressions else logits

    def compose(self, hidden: Tensor) -> Tensor:
        """hidden (M, D) -> composed (M, D) under the interventions; hidden itself without any."""
        if not self.steering.known and not self.steering.unknown:
            return hidden
        return decompose_under(self.steering, self.model, hidden).composed[0]


def decompose_under(steering: Steering, model: Steerling, hidden: Tensor) -> Decomposition:
    """hidden (n, D) taken apart under a steering's interventions, as a batch of one."""
    return decompose(hidden[None], model.known_head, model.unknown_head, dict(steering.known),
                     dict(steering.unknown), steering.epsilon)


def check(steering: Steering, config: Config) -> None:
    """Raise ValueError if the model lacks a concept or layer, or a strength is not a finite number.
    """
    require(isinstance(steering, Steering), "steering", steering, "a Steering")
    require(steering.epsilon in ("drop", "keep"), "epsilon", steering.epsilon, "'drop', 'keep'")
    for injection in steering.injections:
        require(bool(injection.ids), "ids", injection.ids, "at least one concept")
        require(injection.layer is None or injection.layer in range(1, config.n_layers + 1),
                "layer", injection.layer, f"1 to {config.n_layers}")
    edits = [*(("known", *edit) for edit in steering.known),
             *(("unknown", *edit) for edit in steering.unknown)]
    pushed = [("known", c, x.strength) for x in steering.injections for c in x.ids]
    lowered = [("known", c, strength) for c, strength, *_ in steering.suppressions]
    for kind, concept, strength in edits + pushed + lowered:
        require_concept(kind, concept,
                        config.n_concepts if kind == "known" else config.n_unknown_concepts)
        require(isinstance(strength, Real) and math.isfinite(strength), "strength", strength,
                "finite numbers")
        if sum(edit[:2] == (kind, concept) for edit in edits) > 1:
            raise ValueError(f"{kind} concept {concept} is given two weights")
