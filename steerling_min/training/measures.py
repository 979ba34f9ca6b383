"""The four measures of a concept layer, each defined once, under its authors' name.

    detection      does the model find the concepts that a chunk has?
    separation     do known and discovered (here: unknown) concepts say different things?
    contribution   how much of a token's logit goes through concepts?
    alignment      do the tokens that a concept promotes mean what its label says?

Sources: Guide Labs, "Interpretability has scaling laws" (2026); for contribution the technical
report, arXiv 2608.07594, Eq. 22. `look` shows a model noisy windows and keeps what the first three
are computed from; alignment is read off the embeddings.

Letters, besides those of `config.py`: N chunks, M masked tokens.
"""

import re
from bisect import bisect_left, bisect_right
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ..attribution import promoted
from ..diffusion import corrupt, noise_levels
from ..files.tokenizer import Tokenizer
from ..model import Steerling
from .data import Stream, cut, has_concepts
from .losses import log_absent
from .world import CONCEPTS, WORDS


def share(verdicts: list[bool]) -> float:
    """How many of them are true, 0 to 1; 0 where there is nothing to judge."""
    return sum(verdicts) / max(1, len(verdicts))


# ---- what a model makes of held-out text ---------------------------------------------------------


class Seen(NamedTuple):
    """Of the whole chunks in some noisy windows, and of their masked tokens."""

    present: Tensor          # (N, C), -log(1 - P): the larger, the surer that a chunk has a concept
    labels: Tensor           # (N, C) bool, whether it has
    right: Tensor            # (M,) bool, whether the token hidden there was thought the likeliest
    without_epsilon: Tensor  # (M,) bool, the same of known + unknown alone
    parts: Tensor            # (M, 3), that token's logit: what known, unknown and epsilon give
    named: Tensor            # (M,) bool, whether that token stands in a word that a concept names
    known: Tensor            # (M, D)
    unknown: Tensor          # (M, D)


@torch.no_grad()
def look(model: Steerling, stream: Stream, named: Tensor, t: float | None, n: int) -> Seen:
    """Show a model n windows of a stream at noise level t (None: as in training, uniform).

    named (tokens of the stream,) bool is from `in_named_words`. A chunk at a window's edge may have
    been cut there. It is not judged, because the word for its label may stand in the other part.
    """
    config, generator, found = model.config, torch.Generator().manual_seed(0), []
    for starts in (torch.arange(n) * config.block_size).split(8):
        batch = cut(stream, starts, config.block_size)
        level = noise_levels(len(starts), config.block_size, config.diff_block_size, generator)
        level = level if t is None else torch.full_like(level, t)
        noisy, masked = corrupt(batch.tokens, level * batch.learnt, config.mask_token_id, generator)
        out = model(noisy.to(model.device))

        N = len(batch.labels)
        absent = log_absent(model.known_head.logits(out.hidden).cpu(), batch.chunks, N)
        whole = ~torch.isin(torch.arange(N), batch.chunks[:, [0, -1]])
        tokens = batch.tokens[masked].to(model.device)
        y = model.transformer.tok_emb(tokens)  # (M, D)
        known, unknown, epsilon = (x[masked] for x in (out.known, out.unknown, out.epsilon))
        without_epsilon = model.transformer.lm_head(known + unknown)
        found.append(Seen(
            -absent[whole], has_concepts(batch.labels, config.n_concepts)[whole],
            out.logits[masked].argmax(-1) == tokens, without_epsilon.argmax(-1) == tokens,
            torch.stack([(x * y).sum(-1) for x in (known, unknown, epsilon)], dim=1),
            named[starts[:, None] + torch.arange(config.block_size)][masked], known, unknown))
    return Seen(*(torch.cat(x).cpu() for x in zip(*found)))


def in_named_words(tokens: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Which tokens (n,) of a text stand in a word, or pair of words, that a concept names: bool."""
    pieces = tokenizer.pieces(tokens.tolist())
    starts = list(accumulate(map(len, pieces), initial=0))[:-1]
    named = torch.zeros(len(starts), dtype=torch.bool)
    for word in re.finditer(rf"\b({'|'.join(WORDS.values())})\b", "".join(pieces)):
        named[bisect_right(starts, word.start()) - 1 : bisect_left(starts, word.end())] = True
    return named


# ---- detection, separation, contribution, alignment ----------------------------------------------


def auc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a random positive scores above a random negative; ties count half.

    scores (n,), labels (n,) bool, with at least one of each.
    """
    positives, negatives = scores[labels], scores[~labels].sort().values
    below = torch.searchsorted(negatives, positives)               # negatives that score less
    not_above = torch.searchsorted(negatives, positives, right=True)
    return ((below + not_above).double().mean() / (2 * len(negatives))).item()


def detection(present: Tensor, labels: Tensor) -> tuple[float, int]:
    """The mean AUC of concepts, each counting the same, and how many had to be left out.

    present, labels (N, C). No AUC is defined where no chunk has the concept, or every chunk.
    """
    judged = labels.any(0) & ~labels.all(0)
    found = [auc(present[:, c], labels[:, c]) for c in judged.nonzero()[:, 0]]
    return fmean(found), len(judged) - len(found)


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """Cross-covariance (D, D) of features (M, D)."""
    return (a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)


def separation(known: Tensor, unknown: Tensor) -> float:
    """How strongly two kinds of features (M, D) correlate: 0 if not at all, 1 if they are the same.

    It is the norm of their cross-covariance, divided by the geometric mean of the norms of their
    own covariances.
    """
    own = covariance(known, known).norm() * covariance(unknown, unknown).norm()
    return (covariance(known, unknown).norm() / own.sqrt()).item()


def contribution(parts: Tensor) -> list[float]:
    """The shares of known, unknown and epsilon in tokens' logits: three means over the M tokens.

    parts (M, 3) has each token's logit in three parts. A share is a part's absolute value over the
    sum of the three absolute values. A part is already a sum over concepts: the absolute value is
    taken after that sum (`attribution.Attribution.shares`). The share of known plus that of unknown
    is Eq. 22 of the report.
    """
    sizes = parts.abs()
    return (sizes / sizes.sum(1, keepdim=True).clamp(min=1e-12)).mean(0).tolist()


def alignment(model: Steerling, tokenizer: Tokenizer, lifted: Tensor) -> tuple[float, float]:
    """Do the tokens that a concept promotes most mean what its label says? Returns two shares.

    The first is over the concepts that name a word: how many of them promote that word most. Of a
    pair of words, either will do. The second is over the ten tokens that each topic, mood and form
    promotes most: how many of these are at least twice as likely in the concept's chunks, as
    lifted (C, V) bool says.
    """
    words, fitting = [], []
    for concept in range(len(CONCEPTS)):
        best = promoted(model, concept, 10)[0].tolist()
        if concept in WORDS:
            words.append(tokenizer.decode(best[:1]).strip() in WORDS[concept].split())
        else:
            fitting += lifted[concept, best].tolist()
    return share(words), share(fitting)
