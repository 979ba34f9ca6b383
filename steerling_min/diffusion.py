"""Masked diffusion: how text is corrupted, and how good a model that undoes it is.

Forward process: tokens of a text become <|mask|>. The model learns to predict the originals at the
masked positions (`token_loss`). With the right weights, these predictions bound how likely it finds
the whole text (`likelihood_bound`). The reverse process, from masks to text, is `unmasking.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .model import Steerling, require_tokens


def noise_levels(B: int, T: int, S: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw a noise level t ~ U(0, 1) for every diffusion block of every sequence: the probability
    that a token of the block becomes a mask. Returns (B, T) on the CPU, constant in a block. Blocks
    are counted from position 0, and the last may be short. The generator must be on the CPU."""
    n_blocks = -(-T // S)
    t = torch.rand(B, n_blocks, generator=generator)
    return t.repeat_interleave(S, dim=1)[:, :T]


def corrupt(tokens: Tensor, t: Tensor, mask_token_id: int,
            generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Replace each token by the mask with probability t, independently.

    One number u ~ U(0, 1) is drawn for each token. Where u < t the token is masked.
    Args: tokens (B, T) int64, not changed; t (B, T) in [0, 1]; t and generator on the CPU. Returns
    the noisy tokens and a bool tensor, True where a token was masked, both (B, T), on the device of
    tokens.
    """
    draws = torch.rand(tokens.shape, generator=generator)
    masked = (draws < t).to(tokens.device)
    return tokens.masked_fill(masked, mask_token_id), masked


def token_loss(logits: Tensor, tokens: Tensor, masked: Tensor, t: Tensor,
               weighting: str = "none") -> Tensor:
    """Cross-entropy of the original tokens at the masked positions, in nats.

    weighting "none": the mean over masked tokens. "1/t": each masked token's loss is multiplied by
    1/t of its block. The sum is divided by the number of all tokens, B T, masked or not. For
    uniform t its expectation is an upper bound on the negative log-likelihood per token of a block,
    given the noisy blocks before it (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992). Which of the
    two the 8B was trained with is not published. The trainer here takes "none": with 1/t the rare
    blocks of few masks set the gradient.
    Args: logits (M, V) at the M masked positions, in order; tokens, the originals, masked and t (B,
    T). Computed in float32. Returns a scalar; 0 where nothing is masked. Raises ValueError, naming
    it and what is supported, for another weighting.
    """
    if weighting not in ("none", "1/t"):
        raise ValueError(f"weighting = {weighting!r} is not supported; supported: 'none', '1/t'")
    losses = F.cross_entropy(logits.float(), tokens[masked], reduction="none")  # (M,)
    if weighting == "none":
        return losses.sum() / max(1, len(losses))
    return (losses / t.to(losses)[masked]).sum() / tokens.numel()


@torch.no_grad()
def likelihood_bound(model: Steerling, tokens: Tensor, asked: Tensor | None = None,
                     samples: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """An upper bound on -log p of the tokens asked about: (B,) nats per token asked about.

    It goes block by block, as text is written: earlier blocks are clean, later ones unseen. Tokens
    of the block that are not asked about (of a conversation, the user's) are clean, too. Imagine
    that the n asked about are written one by one, in a random order. When m of them are still
    masked, the next one costs, on average, the mean of the m cross-entropies. A whole order costs
    the sum of these means over m = n, ..., 1, which is n times their average. So one drawn m, with
    m random tokens masked, gives the estimate n/m times the sum of their cross-entropies:

        bound of a block = n * E[mean cross-entropy at m random masks], m uniform on 1 .. n

    A block's samples are averaged, blocks are added up, and the sum is divided by the row's tokens
    asked about.

    Why is it a bound? The block's probability is the mean of p over all orders. The mean of -log p
    is never less than -log of that mean (Jensen). So this bounds a writer with a random order. The
    sampler writes the surest first: another distribution. Whatever noise the model was trained
    with, this is a bound. For a single block it is the same as with "1/t" (LLaDA, arXiv 2502.09992,
    equation 6), which also has noise in earlier blocks; but counting masks has less variance than
    drawing t. The m of a block's samples are spread evenly over 1 .. n: sample i has m = 1 +
    floor(n (i + u) / samples), at most n, with one u ~ U(0, 1) for each row. Draws are made block
    by block, u first, and only where something is asked: so a longer text has the same draws in its
    first blocks.

    The concept heads are not needed: with epsilon, composed = hidden.
    Args: tokens (B, T) without masks; asked (B, T) bool on the CPU, by default all; samples, the
    draws per block; generator on the CPU. Raises ValueError("nothing to score: ...") where a row
    has no token asked about, or has a mask, or samples < 1; and as `require_tokens` does.
    """
    require_tokens("tokens", tokens, model.config)
    asked = torch.ones(tokens.shape, dtype=torch.bool) if asked is None else asked
    (B, T), S, device = tokens.shape, model.config.diff_block_size, tokens.device
    if not asked.any(1).all() or samples < 1 or (tokens == model.config.mask_token_id).any():
        raise ValueError(f"nothing to score: a row has a mask, or nothing asked, or {samples = }")
    nats = torch.zeros(B, device=device)
    for block in range(0, T, S):
        here = asked[:, None, block : block + S]  # (B, 1, up to S)
        if not here.any():
            continue
        n = here.sum(-1)  # (B, 1), how many are asked about
        u = (torch.arange(samples) + torch.rand((B, 1), generator=generator)) / samples
        m = (u * n).long().clamp(max=n - 1) + 1  # (B, samples), 1 to n
        order = torch.rand((B, samples, here.shape[-1]), generator=generator)
        order = order.masked_fill(~here, 2.0).argsort(-1).argsort(-1)  # the others come last
        masked = F.pad(order < m[..., None], (block, 0)).to(device)  # m random ones of the n
        clean = tokens[:, None, : masked.shape[-1]].expand(masked.shape)  # (B, samples, end)
        noisy = clean.masked_fill(masked, model.config.mask_token_id)
        hidden = model.transformer(noisy.flatten(0, 1))  # composed, since nothing is edited
        logits = model.transformer.lm_head(hidden[masked.flatten(0, 1)])  # (M, V)
        losses = torch.zeros(masked.shape, device=device)
        losses[masked] = F.cross_entropy(logits.float(), clean[masked], reduction="none")
        nats += (losses.sum(-1) * (n / m.clamp(min=1)).to(device)).mean(1)
    return nats / asked.sum(1).to(device)


def log_likelihood(model: Steerling, prompt: Sequence[int], continuation: Sequence[int],
                   samples: int = 64, seed: int = 0) -> float:
    """How likely the model finds a continuation of a prompt: a lower bound on its log-probability.

    In nats, for the whole continuation; the larger, the likelier. To rank several continuations of
    one prompt, compare them (or their values per token). Both are token ids; the prompt may be
    empty. Raises ValueError when the continuation is empty, or when both together outgrow the
    context.
    """
    tokens = torch.tensor([[*prompt, *continuation]], device=model.device)
    asked = torch.arange(tokens.shape[1])[None] >= len(prompt)
    generator = torch.Generator().manual_seed(seed)
    return -len(continuation) * likelihood_bound(model, tokens, asked, samples, generator).item()
