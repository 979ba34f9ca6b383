"""From logits to tokens, for one sequence: which masked positions to fill next, and with what.

Letters: m masked positions, n of them filled in this step, V vocabulary, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Config, require


@dataclass(frozen=True)
class Options:
    """How `unmask` writes. The defaults are the official package's; `check` reads the types."""

    # Denoising steps in all, shared out over the windows. None commits one token per step.
    steps: int | None = None
    # Instead of steps: each step commits every position whose confidence is at least this, 0 to 1,
    # and always at least one.
    confidence_threshold: int | float | None = None
    # The temperature follows the entropy of each position's distribution; `temperature` is ignored.
    entropy_sampling: bool = True
    # Used without entropy_sampling; 0 is greedy.
    temperature: int | float = 1.2
    # The nucleus of every draw, 0 to 1.
    top_p: int | float = 0.8
    # Applied to every token already in the sequence, prompt included; 1 turns it off.
    repetition_penalty: int | float = 1.1
    # Classifier-free guidance, away from what the model says when the prompt is masked; 0 is off.
    cfg_scale: int | float = 0.0
    # What is filled at a time. "window": S positions, as in release 0.2 of the official package.
    # "global": all new positions, as in its release 0.1; then <|endoftext|> may be committed, and
    # ends the sequence after that step. Within either, the surest position comes first.
    order: str = "window"
    # Cut the windows at the edges of the attention blocks instead of counting from the prompt, so
    # that no window fills the later of two blocks before the earlier is complete.
    align: bool = False
    # Let <|endoftext|> be committed. All to its right becomes <|endoftext|>, and the sequence ends
    # when all to its left is written. (An instruct model's <|eot_id|> fills its right in the same
    # way, but ends the sequence at once: masks to its left stay.) If a step commits several end
    # tokens, all its tokens are written first; then the leftmost end token acts.
    allow_eos: bool = False
    # A sequence ends after the window in which one of these ids was written.
    stop_tokens: Sequence = ()
    # Row b of a batch draws from seed + b. None draws differently every time.
    seed: int | None = None

    def check(self, config: Config) -> None:
        """Raise ValueError, naming the option, for the first that cannot be honoured."""
        for name, kind in Options.__annotations__.items():
            value = getattr(self, name)
            require(isinstance(value, kind), name, value, str(getattr(kind, "__name__", kind)))
        for ok, name, supported in (
                (self.steps is None or self.steps >= 1, "steps", "None or 1 or more"),
                (1e-6 <= (self.temperature or 1) <= 1e6, "temperature", "0, or 1e-6 to 1e6"),
                (0 <= self.top_p <= 1, "top_p", "0 to 1"),
                (0 < self.repetition_penalty <= 1e6, "repetition_penalty", "above 0; 1 = none"),
                (0 <= self.cfg_scale <= 1e6, "cfg_scale", "0 (off) to 1e6"),
                (0 <= (self.confidence_threshold or 0) <= 1, "confidence_threshold", "0 to 1"),
                (self.order in ("window", "global"), "order", "'window' or 'global'"),
                (self.seed is None or 0 <= self.seed < 2**63, "seed", "None or 0 to 2^63 - 1"),
                (all(i in range(config.vocab_size) for i in self.stop_tokens), "stop_tokens",
                 f"ids below {config.vocab_size}")):
            require(ok, name, getattr(self, name), supported)
        if self.steps is not None and self.confidence_threshold is not None:
            raise ValueError("steps and confidence_threshold exclude each other: give one")
        if self.order == "global" and self.align:
            raise ValueError("align cuts windows, and order='global' fills all at once: give one")


def penalize_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make tokens already present less likely. The penalty is the same however often they occur.

    A positive logit is divided by the penalty (CTRL, arXiv 1909.05858); any other is multiplied, as
    dividing would make it likelier.
    Args: logits (m, V); tokens (T,), the sequence, prompt included. Returns a new tensor
    (m, V); logits stays as it is.
    """
    seen = logits[:, tokens]  # (m, T); only these columns change, out of a large vocabulary
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits.index_copy(1, tokens, seen)  # the same value, where a token stands twice


def sort_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits (V,), float32 -> logits minus their maximum, in descending order, and their token ids.

    Ties go to the smaller id. (Subtracting a number from all logits changes no softmax.) Floats of
    0 or more are ordered like their bits read as integers, and a CPU sorts integers four times as
    fast: with 100,000 tokens that matters in every draw.
    """
    below = logits.max() - logits  # (V,), 0 or more
    bits, ids = below.view(torch.int32).sort(stable=True)
    return -bits.view(torch.float32), ids


def entropy_temperature(logits: Tensor, top_p: float) -> Tensor:
    """A temperature that follows the model's doubt: 0.3 when it is sure, up to 0.7 when not.

    p = softmax(logits); k = max(2, 1 + the number of cumulative probabilities that are at most
    top_p): roughly the size of the nucleus. H(p) = -sum p ln p over all tokens; one of probability
    0 (logit -inf: banned) counts 0. temperature = 0.3 + 0.4 min(1, H(p) / ln k).
    Args: logits (V,), largest first. Returns a scalar tensor: a Python number would force a GPU
    synchronisation.
    """
    p = logits.softmax(-1)
    k = (1 + (p.cumsum(-1) <= top_p).sum()).clamp(min=2)
    entropy = torch.special.entr(p).sum()  # -sum p ln p, 0 where p is 0
    return 0.3 + 0.4 * (entropy / k.log()).clamp(max=1.0)


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """Top-p filtering (arXiv 1904.09751): drop the tail of the distribution.

    Tokens are kept while the probability *before* them, cumsum - p, is at most top_p, so the first
    always is. (On equality the paper keeps one token less.) What is kept is not rescaled:
    torch.multinomial does that.
    Args: p (V,), largest first, left as it is. Returns (V,), zero where dropped.
    """
    before = p.cumsum(-1) - p
    return p.where(before <= top_p, 0.0)


def sample(logits: Tensor, temperature: float, top_p: float, entropy_sampling: bool,
           generator: torch.Generator) -> Tensor:
    """Draw one token from logits (V,); returns a scalar int64 tensor.

    Entropy sampling chooses the temperature itself; otherwise temperature 0 is greedy. It makes one
    torch.multinomial draw on the sorted nucleus, as the official package does, so that seeds agree.
    """
    if temperature == 0 and not entropy_sampling:
        return logits.argmax()
    logits, ids = sort_logits(logits)
    heat = entropy_temperature(logits, top_p) if entropy_sampling else temperature
    p = nucleus((logits / heat).softmax(-1), top_p)
    # indexed by a tensor of one element: a number of Python would have to wait for a GPU
    return ids[torch.multinomial(p, 1, generator=generator)].squeeze(0)


def most_confident(logits: Tensor, count: int | None, threshold: float | None
                   ) -> tuple[Tensor, Tensor]:
    """The positions to fill now: those whose best token is the most probable, surest first.

    `count` of them; or, when count is None, every one at or above the confidence threshold, at
    least one. Of equals the earliest comes first. Rounding must not decide between equals (without
    a prompt, all masks look alike at first). Let p be the largest confidence. An error of 1e-5 in a
    logit can change p by 1e-5 p (1 - p). So a confidence c counts as equal to p if p - c is less
    than that. This is for the order only: the threshold is compared with each confidence as it is.
    If none reaches it, the first in the order is taken.
    Args: logits (m, V), m >= 1. Returns the confidences as they are (n,) and rows of logits (n,).
    """
    confidence = logits.softmax(-1).amax(-1)  # (m,)
    best = confidence.max()
    ranked = confidence.where(confidence < best - 1e-5 * best * (1 - best), best)
    order = ranked.argsort(descending=True, stable=True)  # (m,)
    chosen = order[:count] if threshold is None else order[confidence[order] >= threshold]
    chosen = chosen if len(chosen) else order[:1]
    return confidence[chosen], chosen


def choose(logits: Tensor, tokens: Tensor, count: int | None, banned: Tensor, options: Options,
           generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One step's commits: penalty, then bans, then the surest positions, then a draw for each.

    Args: logits (m, V) of the masked positions; tokens (T,), the sequence; count, how many to fill,
    or None where options.confidence_threshold decides; banned, ids that may not be committed.
    Returns rows of logits, token ids and confidences, (n,) each, surest first; none at all for a
    sequence without masks, m = 0.
    """
    if len(logits) == 0:
        return banned[:0], banned[:0], logits[:, 0]
    logits = penalize_repetition(logits, tokens, options.repetition_penalty)  # a copy, so in place:
    logits.index_fill_(-1, banned, -torch.inf)
    confidence, chosen = most_confident(logits, count, options.confidence_threshold)  # (n,)
    ids = torch.stack([sample(row, options.temperature, options.top_p, options.entropy_sampling,
                              generator) for row in logits[chosen]])  # row (V,), ids (n,)
    return chosen, ids, confidence


def spread_steps(lengths: list[int], steps: int | None) -> list[int]:
    """Share out denoising steps over windows in proportion to their lengths.

    None is one step per token. The counts add up to `steps` where that is possible. No window is
    empty. Each gets at least one step, and at most as many as it has tokens, so that every step
    commits something. First each gets its share, steps * m / total, rounded down, but at least one.
    Steps left over go one by one to the window where share - steps is largest. If the minimum of
    one made the sum too large, steps are taken back one by one: each time from the window where
    share - steps is smallest, among those with more than one step. Among equals the earlier window
    comes first. Whole numbers only: rounding must not decide.
    """
    total = sum(lengths)
    steps = total if steps is None else max(len(lengths), min(steps, total))
    counts = [max(1, steps * m // total) for m in lengths]

    def owed(i):
        return steps * lengths[i] - counts[i] * total

    while sum(counts) < steps:
        counts[max(range(len(counts)), key=owed)] += 1
    while sum(counts) > steps:
        counts[min((i for i, c in enumerate(counts) if c > 1), key=owed)] -= 1
    return counts


def commits_per_step(m: int, s: int) -> list[int]:
    """How many of a window's m tokens each of its s steps commits: m // s, and one more in each of
    the first m % s."""
    return [m // s + (i < m % s) for i in range(s)]


def windows(L: int, new: int, S: int, align: bool) -> list[tuple[int, int]]:
    """Cut the new positions [L, L + new) into windows of S, filled from left to right.

    They are counted from the prompt's end. With `align` they are cut at the attention blocks' edges
    (the first is then shorter, unless L is such an edge).
    """
    first = S - L % S if align else S
    edges = [L, *range(L + first, L + new, S), L + new]
    return list(zip(edges[:-1], edges[1:]))
