"""One training step's computation: from corrupted windows to named losses.

    hidden = transformer(noisy windows, injections)
    known, unknown = the heads' features of hidden
    composed = hidden, or for the windows without epsilon: labels' and predicted features
    token loss through composed; presence, reconstruction, independence; respond and express
"""

import torch
from torch import Tensor, nn

from .data import Batch
from .diffusion import token_loss
from .losses import (compose, express_loss, independence_loss, known_forcing, presence_loss,
                     reconstruction_loss, respond_loss, unknown_forcing)
from .model import Steerling
from .steering import alpha_of, amplify_layer, unit

EXPRESS = 0.1   # weight of the express loss; all others have weight 1
STRENGTH = 8.0  # of the injections, in logit units: what `Steering.amplify` uses

PARTS = {  # what a run can leave out (the last two: change), to see what it is good for
    "dropout": "residual dropout: epsilon is in every window",
    "forcing": "teacher forcing of the known side",
    "presence": "the presence loss",
    "reconstruction": "the reconstruction loss",
    "independence": "the independence loss",
    "steering": "the steering losses and their injections",
    "mean": "the plain mean over masked tokens: 1/t weights instead",
    "prediction": "the unknown side's own prediction: it is forced as well, the trap of `compose`",
}


class Objective(nn.Module):
    """The losses of one step. A module, because that is what DistributedDataParallel wraps."""

    def __init__(self, model: Steerling, without: list[str], lifted: Tensor):
        super().__init__()
        self.model, self.without, self.lifted = model, without, lifted

    def forward(self, batch: Batch, noisy: Tensor, masked: Tensor, t: Tensor, dropped: Tensor,
                progress: float, concept: Tensor, injected: Tensor | None) -> dict[str, Tensor]:
        """Named losses; their sum is what is minimised.

        noisy, masked, t (B, T): the corrupted windows, where they are masked, the noise levels.
        dropped (B,) bool: windows without epsilon. injected (B, T) bool: where the direction of
        concept (B,) is injected; None: nowhere, and no steering losses.
        """
        model, without = self.model, self.without
        embedding = model.known_head.concept_embedding.weight
        injections = {}
        if injected is not None:
            direction = unit(embedding[concept])  # (B, D)
            alpha = alpha_of(STRENGTH, direction, model.transformer.tok_emb.weight).detach()  # (B,)
            vectors = injected[..., None] * (alpha[:, None] * direction)[:, None]  # (B, T, D)
            injections = {amplify_layer(model.config.n_layers): vectors}
        # float(): under autocast products come out in bfloat16; sums and losses stay in float32
        hidden = model.transformer(noisy, injections).float()  # (B, T, D)

        logits = model.known_head.logits(hidden)  # (B, T, C)
        top, ids = logits.topk(model.known_head.topk, dim=-1)
        known = model.known_head.features(ids, top.sigmoid())  # (B, T, D)
        top, ids = model.unknown_head.logits(hidden).topk(model.unknown_head.topk, dim=-1)
        unknown = model.unknown_head.features(ids, top.sigmoid()).float()  # (B, T, D)
        labels = nn.functional.pad(batch.labels, (0, 0, 0, 1))[batch.chunks]  # (B, T, C) bool
        labelled = (labels.to(hidden) @ embedding[: labels.shape[-1]]).float()  # (B, T, D)

        supervised = labels.shape[-1] > 0
        composed = compose(
            hidden, known, unknown, labelled, dropped,
            known_forcing(progress) if supervised and "forcing" not in without else 0.0,
            unknown_forcing(progress) if "prediction" in without else 0.0)
        token_logits = model.transformer.lm_head(composed[masked])  # (M, V), M masked positions
        losses = {"token": token_loss(token_logits, batch.tokens, masked, t,
                                      "1/t" if "mean" in without else "none"),
                  "reconstruction": reconstruction_loss(unknown, hidden, labelled),
                  "independence": independence_loss(known, unknown)}
        if supervised:
            losses["presence"] = presence_loss(logits, batch.chunks, batch.labels)
        if injected is not None:
            rows, at = masked.nonzero()[:, 0], injected[masked]  # (M,): its window; is it injected?
            losses["respond"] = respond_loss(logits, concept, injected)
            losses["express"] = EXPRESS * express_loss(token_logits[at], rows[at], concept,
                                                       self.lifted)
        return {name: loss for name, loss in losses.items() if name not in without}


def injections(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose, in about half of the windows, one of the concepts that its chunks are labelled with.

    Returns the concepts (B,) and the positions (B, T) bool of the chunks that have them, each with
    the special token that ends it.
    """
    B, T = batch.tokens.shape
    if batch.labels.shape[1] == 0:  # no labels anywhere
        return torch.zeros(B, dtype=torch.int64), torch.zeros(B, T, dtype=torch.bool)
    chunks = batch.chunks.clone()
    chunks[:, 1:] = torch.where(chunks[:, 1:] < 0, chunks[:, :-1], chunks[:, 1:])
    none = torch.zeros(1, batch.labels.shape[1], dtype=torch.bool)
    has = torch.cat([batch.labels, none])[chunks]  # (B, T, C); chunk -1 is the row of none
    weights = has.any(1).float()  # (B, C), equal for all concepts in the window
    some = weights.any(1)
    concept = torch.zeros(B, dtype=torch.int64)
    concept[some] = torch.multinomial(weights[some], 1, generator=generator)[:, 0]
    chosen = some & (torch.rand(B, generator=generator) < 0.5)
    return concept, has[torch.arange(B), :, concept] & chosen[:, None]
