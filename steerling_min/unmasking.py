"""Unmasking, the reverse of the diffusion: from masks only to text, surest first, step by step.

Each step asks the model about the masks of one window (`asked_logits`), by the plain way that
recomputes everything or the fast way that keeps what is final, and commits the tokens it is surest
of (`sampling.choose`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import KVCache
from .config import Config
from .model import Steerling
from .sampling import choose, commits_per_step, spread_steps, windows
from .steering import Steerer, Steering


@dataclass
class Step:
    """One denoising step of a batch of B sequences. Each tuple has one entry per sequence."""

    tokens: Tensor                   # (B, T), a copy: prompt and new tokens after this step
    positions: tuple[Tensor, ...]    # (n,) each: the positions just committed, surest first
    ids: tuple[Tensor, ...]          # (n,) each: the tokens put there
    confidences: tuple[Tensor, ...]  # (n,) each: the largest probability there, after penalty and
                                     # bans, 0 to 1; the token drawn may be another one
    hidden: tuple[Tensor, ...]       # (n, D) each: the states there, before any edit of concepts
    unwritten: Tensor                # (B,), masks left; after the last step 0, unless a text ended


def plain_hidden(model: Steerling, tokens: Tensor, asked: Tensor,
                 injections: dict[int, Tensor]) -> Tensor:
    """Hidden states (M, D) at the M positions asked for (B, T): the plain way, everything always.
    """
    return model.transformer(tokens, injections)[asked]


def cached_hidden(model: Steerling, tokens: Tensor, asked: Tensor, injections: dict[int, Tensor],
                  cache: KVCache) -> Tensor:
    """The same hidden states, equal up to rounding, with far less work: the fast way.

    Attention is causal across blocks, so keys and values of the blocks before the first mask are
    final, and come from the cache. (Injections go to masked positions: final blocks have none; for
    guidance see asked_logits.) For the same reason the blocks after the last position asked for
    cannot influence it, and are left out.

    With S = 4, a prompt of 6, seven new tokens and the window [6, 10) filled in the order 8, 6, 9,
    7:

        asked               computed   cache.length before and after
        6 7 8 9             0 to 11    0 -> 4    a block of the prompt is final
        6 7   9             4 to 11    4 -> 4
          7   9             4 to 11    4 -> 4
          7                 4 to  7    4 -> 4    nothing is asked of block 8 to 11
        10 11 12 (next)     4 to 12    4 -> 8    only now were 4 to 7 computed without masks

    A pass starts from the length before. After it the length moves to the start of the block of the
    first position asked for: all before that was computed in this very pass, or earlier, with the
    tokens that stay there. (In the fourth row position 7 was still a mask in the pass.)

    Args: asked (B, T), True at the positions asked for, all of them masks; no position before the
    first may change any more.
    """
    S = model.config.diff_block_size
    rows, positions = asked.nonzero(as_tuple=True)  # (M,) each
    numbers = positions.tolist()
    fresh = slice(cache.length, (max(numbers) // S + 1) * S)
    injections = {layer: vectors[:, fresh] for layer, vectors in injections.items()}
    hidden = model.transformer(tokens[:, fresh], injections, cache)  # (B, computed, D)
    cache.length = min(numbers) // S * S
    return hidden[rows, positions - fresh.start]


def asked_logits(model: Steerling, tokens: Tensor, asked: Tensor, L: int, cfg_scale: float,
                 steerer: Steerer, cache: KVCache | None) -> tuple[Tensor, Tensor]:
    """Logits (M, V), float32, guided and steered, and hidden states (M, D), at the M positions
    asked for (B, T).

    With epsilon the composed state is the hidden state, up to rounding, so the concept heads run
    only when a steering edits them (`Steerer.compose`).
    Classifier-free guidance (arXiv 2207.12598) if cfg_scale > 0: the batch runs twice, the second
    time with the prompt, positions [0, L), masked. With the logits c of the first and u of the
    second, logits = u + (cfg_scale + 1) (c - u); the hidden states are the first run's. All masks
    are injected, those of the second run's prompt included, whose keys are therefore final only
    until an injection ends at its cutoff: then the cache is emptied. Suppression comes last.

    Raises ValueError when a steering makes logits infinite or not a number.
    """
    mask_id = model.config.mask_token_id
    committed = (tokens[:, L:] != mask_id).sum(1)  # (B,)
    if cfg_scale > 0:
        blind = tokens.clone()
        blind[:, :L] = mask_id
        tokens, asked = torch.cat([tokens, blind]), torch.cat([asked, asked])  # (2B, T)
        committed = torch.cat([committed, committed])
    injections = steerer.vectors(tokens == mask_id, committed)
    if cache is None:
        hidden = plain_hidden(model, tokens, asked, injections)
    else:
        if cfg_scale > 0 and steerer.switched(committed):
            cache.length = 0
        hidden = cached_hidden(model, tokens, asked, injections, cache)
    logits = model.transformer.lm_head(steerer.compose(hidden)).float()
    if cfg_scale > 0:
        hidden, _ = hidden.chunk(2)
        c, u = logits.chunk(2)
        logits = u + (cfg_scale + 1) * (c - u)
    logits = steerer.suppress(logits)
    if steerer.steering != Steering() and not logits.isfinite().all():
        raise ValueError("the steering is too strong: logits are not finite numbers any more in "
                         f"{model.dtype}; a smaller strength is needed")
    return logits, hidden


@torch.no_grad()
def unmask(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
           max_new_tokens: int | None = None, *, steps: int | None = None,
           temperature: float = 1.2, top_p: float = 0.8, entropy_sampling: bool = True,
           repetition_penalty: float = 1.1, cfg_scale: float = 0.0,
           confidence_threshold: float | None = None, order: str = "window", align: bool = False,
           allow_eos: bool = False, stop_tokens: Sequence[int] = (), seed: int | None = None,
           steering: Steering | None = None, use_cache: bool = True) -> Iterator[Step]:
    """Write max_new_tokens after each prompt; yields a Step per denoising step.

    The sequence is the prompt and then masks, filled window by window. In each step the masked
    positions of the window where the model is most confident are committed, each with a token
    sampled from its own distribution. A committed token stays, unless an end of turn to its left
    ends the text. (A window is what is being filled, a block is who sees whom: windows counted
    from an unaligned prompt straddle two blocks, and see `align`.)

    prompt_tokens: (B, L); L may be 0. Row b draws from seed + b and equals its own single run. A
        window lasts until every row still being written has filled it; a row that has ended is
        asked no more, and its tuples in later steps are empty.
    max_new_tokens: None is 1024, or what the context has room for.
    steps: denoising steps in all, shared out over the windows; None commits one token per step.
    confidence_threshold: instead of steps, commit all positions at least this sure, at least one.
    entropy_sampling: the temperature follows each token's entropy, and `temperature` is ignored.
    temperature: with entropy_sampling=False; 0 is greedy.
    top_p: nucleus of every draw. repetition_penalty: on all tokens now in the sequence, 1 = none.
    cfg_scale: classifier-free guidance, away from what the model says when the prompt is masked.
    order: "window" (the official release 0.2), or "global" (0.1): all new positions are one window,
        and <|endoftext|> may be committed, which ends the sequence after that step.
    align: cut the windows at the edges of the attention blocks instead of counting from the
        prompt, so that no window fills the later of two blocks before the earlier is complete.
    allow_eos: let <|endoftext|> be committed: like an instruct model's <|eot_id|>, it fills all to
        its right with <|endoftext|> and ends the sequence; masks to its left stay. Of several in
        one step the leftmost counts, after the step's commits.
    stop_tokens: a sequence ends after a window that brought its new text one of these ids.
    seed: None draws differently every time.
    steering: push the text toward concepts, or away from them (`steering.py`).
    use_cache: exact block caching; False recomputes everything, for the same tokens (in float32;
        in bfloat16 the two round differently).

    Raises ValueError (at the first step), naming the argument, for a value that cannot be honoured.
    """
    check_options(model.config, steps, temperature, top_p, repetition_penalty, cfg_scale,
                  confidence_threshold, order, align, stop_tokens, seed)
    tokens, L = start_tokens(model, prompt_tokens, max_new_tokens)  # (B, T)
    (B, T), device, config = tokens.shape, tokens.device, model.config
    mask_id, eos_id = config.mask_token_id, config.eos_token_id
    steerer = Steerer(steering or Steering(), model)
    roles = special_roles(config, order, allow_eos, stop_tokens, device)
    draws = [torch.Generator(device) for _ in range(B)]
    for b, generator in enumerate(draws):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed + b)
    cache = None
    if use_cache:
        rows = 2 * B if cfg_scale > 0 else B
        cache = KVCache.empty(config, rows, T, model.dtype, device)
    active = torch.ones(B, dtype=torch.bool, device=device)  # rows still being written

    spans = [(L, T)] if order == "global" else windows(L, T - L, config.diff_block_size, align)
    for (start, end), s in zip(spans, spread_steps([end - start for start, end in spans], steps)):
        # how many tokens each step commits; None lets the confidence threshold decide
        counts = commits_per_step(end - start, s) if confidence_threshold is None else repeat(None)
        for count in counts:
            asked = (tokens == mask_id) & active[:, None]  # (B, T), where a token may be put
            asked[:, end:] = False
            # Python waits for a GPU only before the pass; after it, all is queued. (The plain way,
            # a threshold and a steering wait once more.)
            m = asked.sum(1).tolist()  # candidates in each row
            if not any(m):
                break  # the window is full, or every sequence has ended
            candidates = asked.nonzero()[:, 1].split(m)  # (m,) each, their positions
            logits, hidden = asked_logits(model, tokens, asked, L, cfg_scale, steerer, cache)
            commits = []
            for b, (row_logits, row_hidden) in enumerate(zip(logits.split(m), hidden.split(m))):
                chosen, ids, confidence = choose(
                    row_logits, tokens[b], count, confidence_threshold, roles.banned,
                    repetition_penalty, temperature, top_p, entropy_sampling, draws[b])  # (n,) each
                positions = candidates[b][chosen]  # (n,)
                tokens[b, positions] = ids
                commits.append((positions, ids, confidence, row_hidden[chosen]))
                if len(roles.end_turn) and len(ids):
                    # the leftmost end of turn, T if there is none
                    turn_end = positions.where(torch.isin(ids, roles.end_turn), T).min()
                    tokens[b].masked_fill_(torch.arange(T, device=device) > turn_end, eos_id)
                active[b] &= ~torch.isin(ids, roles.end).any()
            yield Step(tokens.clone(), *zip(*commits), (tokens == mask_id).sum(1))
        active &= ~torch.isin(tokens[:, L:end], roles.stop).any(1)


def generate(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
             max_new_tokens: int | None = None, **options) -> Tensor:
    """Write max_new_tokens after each prompt: (B, L) -> (B, L + new).

    Takes the arguments of `unmask` and returns the tokens of its last step. No mask is left in
    them, except what a sequence that ended early left unwritten.
    """
    for step in unmask(model, prompt_tokens, max_new_tokens, **options):
        tokens = step.tokens
    return tokens


class Roles(NamedTuple):
    """Token ids that mean something to the sampler, (n,) int64 each."""

    banned: Tensor    # never committed
    end: Tensor       # a sequence ends after the step that commits one of these
    end_turn: Tensor  # of those, the ones that turn all to their right into <|endoftext|>
    stop: Tensor      # a sequence ends when a window with one of these is full


def special_roles(config: Config, order: str, allow_eos: bool, stop_tokens: Sequence[int],
                  device: torch.device) -> Roles:
    """Who has which role under unmask's options of these names."""
    banned, end = [config.mask_token_id, config.pad_token_id], []
    end_turn = [] if config.eot_id is None else [config.eot_id]
    if allow_eos:
        end_turn.append(config.eos_token_id)
    elif order == "global":
        end.append(config.eos_token_id)
    else:
        banned.append(config.eos_token_id)
    return Roles(*(torch.tensor(ids, dtype=torch.int64, device=device)
                   for ids in (banned, end + end_turn, end_turn, list(stop_tokens))))


def start_tokens(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
                 max_new_tokens: int | None) -> tuple[Tensor, int]:
    """Check the prompts and put the masks behind them: tokens (B, L + new) and L."""
    config, device = model.config, model.device
    if not isinstance(prompt_tokens, Tensor):
        lengths = sorted({len(row) for row in prompt_tokens})
        if len(lengths) > 1:
            raise ValueError("prompts in one batch must have equal lengths, "
                             f"not {lengths[0]} and {lengths[-1]} tokens")
        prompt_tokens = torch.tensor([list(row) for row in prompt_tokens], dtype=torch.int64)
    if prompt_tokens.dim() != 2 or len(prompt_tokens) == 0 or prompt_tokens.is_floating_point():
        raise ValueError("prompt_tokens must be whole numbers of shape (B, L), B >= 1; "
                         f"got {prompt_tokens.dtype} of shape {tuple(prompt_tokens.shape)}")
    B, L = prompt_tokens.shape
    room = config.block_size - L
    new = min(1024, room) if max_new_tokens is None else max_new_tokens
    if not isinstance(new, int) or not 1 <= new <= room:
        raise ValueError(f"{new} new tokens after a prompt of {L} do not fit the context of "
                         f"{config.block_size}; between 1 and {room} do" if room > 0 else
                         f"a prompt of {L} tokens leaves no room in the context of "
                         f"{config.block_size}")
    if ((prompt_tokens < 0) | (prompt_tokens >= config.vocab_size)).any():
        raise ValueError(f"a prompt has a token id outside the vocabulary of {config.vocab_size}")
    if (prompt_tokens == config.mask_token_id).any():
        raise ValueError(f"a prompt has the mask token {config.mask_token_id}; only new positions "
                         "are unmasked")
    masks = torch.full((B, new), config.mask_token_id)
    return torch.cat([prompt_tokens.cpu().long(), masks], dim=1).to(device), L


def check_options(config, steps, temperature, top_p, repetition_penalty, cfg_scale,
                  confidence_threshold, order, align, stop_tokens, seed) -> None:
    """Raise ValueError for the first of unmask's options that cannot be honoured."""
    whole = steps is None or (isinstance(steps, int) and steps >= 1)
    unit = confidence_threshold is None or 0 <= confidence_threshold <= 1
    known_ids = all(0 <= i < config.vocab_size for i in stop_tokens)
    for ok, name, value, supported in (
            (whole, "steps", steps, "None or a whole number, 1 or more"),
            (temperature == 0 or 1e-6 <= temperature <= 1e6, "temperature", temperature,
             "0 (greedy), or 1e-6 to 1e6"),
            (0 <= top_p <= 1, "top_p", top_p, "0 to 1"),
            (repetition_penalty > 0, "repetition_penalty", repetition_penalty, "above 0; 1 = none"),
            (cfg_scale >= 0, "cfg_scale", cfg_scale, "0 (off) or more"),
            (unit, "confidence_threshold", confidence_threshold, "None or 0 to 1"),
            (order in ("window", "global"), "order", order, "'window' or 'global'"),
            (seed is None or 0 <= seed < 2**63, "seed", seed, "None or 0 to 2^63 - 1"),
            (known_ids, "stop_tokens", stop_tokens, f"ids below {config.vocab_size}")):
        if not ok:
            raise ValueError(f"{name} = {value!r} is not supported; supported: {supported}")
    if steps is not None and confidence_threshold is not None:
        raise ValueError("steps and confidence_threshold exclude each other: give one")
    if order == "global" and align:
        raise ValueError("align cuts windows, and order='global' has none: give one")
