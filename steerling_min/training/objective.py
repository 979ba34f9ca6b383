"""One training step's computation: from corrupted windows to named losses.

    hidden = transformer(noisy windows, injections)
    known, unknown = the heads' features of hidden
    composed = hidden, or for the windows without epsilon: labels' and predicted features
    token loss through composed; presence, reconstruction, independence, alignment
    respond and express, where something is injected
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion import token_loss
from ..iguide import UnknownHead, top_concepts
from ..model import Steerling
from ..steering import alpha_of, default_layer
from .data import Batch, has_concepts, places
from .distributed import joined, mean
from .losses import (alignment_loss, compose, express_loss, independence_loss, known_forcing,
                     presence_loss, reconstruction_loss, respond_loss, unknown_forcing)

# Weights of four losses; presence and respond have weight 1. With express at 0.1 the model learnt
# to answer an injection with the concept's words alone, over and over. Reconstruction and
# independence read a detached hidden state. So they train the unknown head and leave the backbone
# to language. When their gradients reached the backbone, independence at 50 instead of 1 cost 0.27
# nats on held-out text after 5,000 steps. Alignment is strong, because the token loss pushes a
# concept toward the words beside its own: with alignment at 4, one concept in ten promoted those.
EXPRESS, RECONSTRUCTION, INDEPENDENCE, ALIGNMENT = 0.01, 96.0, 3.0, 12.0
INJECTED = 1 / 2         # share of the chunks that one of their concepts is injected into
STRENGTHS = (4.0, 18.0)  # of the injections, in logits; `Steering.amplify` uses 8

PARTS = {  # parts that a run can leave out, to show what each is good for
    "dropout": "residual dropout; epsilon is in every window",
    "forcing": "teacher forcing of the known side",
    "presence": "the presence loss",
    "reconstruction": "the reconstruction loss",
    "independence": "the independence loss",
    "alignment": "the alignment loss",
    "steering": "the steering losses and their injections",
    "mean": "the plain mean over masked tokens; 1/t weights stand in",
    "prediction": "predicting the unknown side; instead it is forced, too: the trap of "
                  "`losses.compose`",
}


class Draws(NamedTuple):
    """Everything random in a step, for the B windows of one process."""

    batch: Batch
    noisy: Tensor             # (B, T) int64, the windows with masks in them
    masked: Tensor            # (B, T) bool, where
    t: Tensor                 # (B, T), the noise level of each token's block, 0 to 1
    dropped: Tensor           # (B,) bool, the windows without epsilon
    alone: Tensor             # (B, T) bool, the tokens that lack the unknown features there, too
    injected: Tensor | None   # (B, T) int64, the concept whose direction is injected; -1 for none;
                              # None: no steering losses yet
    strength: Tensor          # (B, T), how strongly, in logit units

    def to(self, device: torch.device) -> "Draws":
        rest: list = [x if x is None else x.to(device) for x in self[1:]]
        return Draws(Batch(*(x.to(device) for x in self.batch)), *rest)


class Objective(nn.Module):
    """Computes the losses of one step. It is a module because `distributed.shard` splits modules.
    """

    def __init__(self, model: Steerling, without: list[str], lift: Tensor,
                 spoken: Tensor | None = None, pull: float = 1.0):
        """Wrap a model for training; all tensors are on one device.

        without: names from PARTS to leave out. spoken (P,) int64: the model's concepts that occur
        in the data (None: all C). lift (P, V): what each of these lifts, from
        `losses.lift_weights`. pull, 0 to 1: the share of the gradient of the concepts' logits that
        reaches the backbone.
        """
        super().__init__()
        self.model, self.without, self.lift, self.pull = model, without, lift, pull
        self.spoken = slice(None) if spoken is None else spoken
        every = torch.arange(len(lift), device=lift.device)
        self.row = places(every if spoken is None else spoken, model.config.n_concepts)  # in lift

    def forward(self, draws: Draws, progress: float) -> dict[str, Tensor]:
        """Compute the losses by name: scalars, already times their weights. Their sum is the loss.
        progress, 0 to 1, drives the schedules."""
        batch, noisy, masked, t, dropped, alone, injected, strength = draws
        model, without = self.model, self.without
        embedding = model.known_head.concept_embedding.weight
        injections = {}
        if injected is not None:
            # Detached: the model must learn to follow the direction; the direction must not learn
            # to please the model. Else the embeddings of concepts that are injected often come to
            # promote other tokens than those they name.
            concepts, at = injected.clamp(min=0).unique(return_inverse=True)  # (n,), (B, T)
            directions = F.normalize(embedding.detach()[concepts], dim=-1)  # (n, D)
            per_logit = alpha_of(1.0, directions, model.transformer.tok_emb.weight).detach()  # (n,)
            alpha = (strength * per_logit[at]).where(injected >= 0, 0.0)  # (B, T)
            injections = {default_layer(model.config.n_layers, toward=True):
                          alpha[..., None] * directions[at]}  # (B, T, D)
        # float(): products come out in bfloat16 under autocast; sums and losses stay in float32
        hidden = model.transformer(noisy, injections).float()  # (B, T, D)

        # both ends of this lerp have the same values: only the gradient is scaled
        logits = model.known_head.logits(torch.lerp(hidden.detach(), hidden, self.pull))  # (B,T,C)
        # Only masked positions become tokens, so features are computed at these alone: M of them.
        at_masks, without_epsilon = hidden[masked], dropped[:, None].expand_as(masked)[masked]
        top, ids = logits[masked].topk(model.known_head.topk, dim=-1)  # (M, k)
        known = model.known_head.features(ids, top.sigmoid()).float()  # (M, D)
        # The same features, computed twice. Losses on the first reach only the unknown head. Where
        # epsilon is dropped, the token loss goes through the second and reaches the backbone, too.
        detached = unknown_features(model.unknown_head, at_masks.detach())  # (M, D)
        unknown = detached.index_put((without_epsilon,), unknown_features(
            model.unknown_head, at_masks[without_epsilon]))
        unknown = unknown.masked_fill(alone[masked][:, None], 0.0)
        labelled = labelled_features(batch, embedding)[masked].float()  # (M, D)
        # A concept that the data never label may still be present, so what is predicted for it is
        # kept.
        if len(self.lift) < logits.shape[-1]:
            weights = top.sigmoid() * (self.row[ids] < 0)  # (M, k)
            labelled = labelled + model.known_head.features(ids, weights).float()
        has_labels = batch.labels.shape[1] > 0 and len(self.lift) > 0  # not where there are none

        forcing = known_forcing(progress) if has_labels and "forcing" not in without else 0.0
        composed = compose(at_masks, known, unknown, labelled, without_epsilon, forcing,
                           unknown_forcing(progress) if "prediction" in without else 0.0)
        forced = torch.lerp(known, labelled, forcing)  # (M, D), what is on the known side
        token_logits = model.transformer.lm_head(composed)  # (M, V)
        weighting = "1/t" if "mean" in without else "none"
        losses = {"token": joined(token_loss(token_logits, batch.tokens, masked, t, weighting),
                                  len(token_logits) if weighting == "none" else masked.numel()),
                  "reconstruction": RECONSTRUCTION * reconstruction_loss(
                      detached, at_masks, forced),
                  # Scaled to mean square 1, so that this loss does not grow with the known
                  # features' length and crowd out reconstruction.
                  "independence": INDEPENDENCE * independence_loss(
                      known / mean(known.detach().square()).sqrt().clamp(min=1e-6), detached)}
        if has_labels:
            labels = has_concepts(batch.labels, logits.shape[-1])[:, self.spoken]  # (N, P)
            losses["presence"] = presence_loss(logits[..., self.spoken], batch.chunks, labels)
            losses["alignment"] = ALIGNMENT * alignment_loss(
                embedding[: logits.shape[-1]][self.spoken], model.transformer.tok_emb.weight,
                self.lift)
        if injected is not None:
            chunk, row = batch.chunks[masked], self.row[injected[masked]]  # (M,)
            at = (row >= 0) & (chunk >= 0)
            losses["respond"] = respond_loss(logits, injected)
            losses["express"] = EXPRESS * express_loss(token_logits[at], chunk[at], row[at],
                                                       self.lift > 0)
        return {name: loss for name, loss in losses.items() if name not in without}


def unknown_features(head: UnknownHead, hidden: Tensor) -> Tensor:
    """The unknown features (M, D) of hidden (M, D): of the head's top-k' concepts, as when text is
    written."""
    logits, ids = top_concepts(head, hidden[None])
    return head.features(ids, logits.sigmoid())[0].float()


def labelled_features(batch: Batch, embedding: Tensor) -> Tensor:
    """Sum the embeddings of the concepts that each token's chunk is labelled with: (B, T, D).

    It is 0 for special tokens (chunk -1). embedding is (at least C, D).
    """
    given = batch.labels[..., None] >= 0  # (N, K, 1)
    sums = (embedding[batch.labels] * given).sum(1)  # (N, D), one for each chunk
    return torch.cat([sums, sums.new_zeros(1, sums.shape[1])])[batch.chunks]  # row -1 is the last


def draw_injections(batch: Batch, weights: Tensor, generator: torch.Generator
                    ) -> tuple[Tensor, Tensor]:
    """Choose what to inject: for a share INJECTED of the chunks, one of the concepts that the chunk
    is labelled with, and a strength. The concept is drawn in proportion to weights (C,). The
    special token that ends a chunk belongs to it here.

    Returns concepts (B, T) int64, -1 where nothing is injected, and strengths (B, T).
    """
    N, given = len(batch.labels), batch.labels >= 0  # (N, K)
    labelled = given.any(1)
    concept = torch.full((N + 1,), -1)  # the last is for special tokens, whose chunk is -1
    if labelled.any():
        likely = weights[batch.labels] * given  # (N, K)
        one = torch.multinomial(likely[labelled], 1, generator=generator)
        concept[:N][labelled] = batch.labels[labelled].gather(1, one)[:, 0]
    concept[:N][torch.rand(N, generator=generator) >= INJECTED] = -1
    low, high = STRENGTHS
    strength = low + (high - low) * torch.rand(N + 1, generator=generator)
    chunks = batch.chunks.clone()
    chunks[:, 1:] = torch.where(chunks[:, 1:] < 0, chunks[:, :-1], chunks[:, 1:])
    return concept[chunks], strength[chunks]
