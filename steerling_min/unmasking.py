"""Unmasking, the reverse of the diffusion: a row of masks becomes text, step by step, surest first.

`unmask_plainly` is the idea, and nothing else. `unmask` is the same loop with everything that makes
it useful: batches, draws, several tokens per step, guidance, steering, and a cache of what is
final. `config.py` has the letters of the shapes.
"""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import KVCache
from .cache import cached_hidden
from .config import Config
from .model import Steerling, require_tokens
from .sampling import Options, choose, commits_per_step, spread_steps, windows
from .steering import Steerer, Steering


@torch.no_grad()
def unmask_plainly(model: Steerling, prompt: Sequence[int], new: int) -> Tensor:
    """Write `new` tokens after a prompt; returns all token ids, (1, T).

    Windows of S masks are filled from left to right. Each step asks the model about the whole
    sequence. It finds the position in the window where the likeliest token is surest, and writes
    that token there.
    """
    config, mask = model.config, model.config.mask_token_id
    never = [mask, config.pad_token_id, config.eos_token_id]  # they are not words
    tokens = torch.tensor([[*prompt, *[mask] * new]], device=model.device)  # (1, T)
    for start in range(len(prompt), len(prompt) + new, config.diff_block_size):
        window = slice(start, start + config.diff_block_size)
        while (tokens[0, window] == mask).any():
            logits = model(tokens).logits[0, window]           # (S, V), fewer at the end
            logits[:, never] = -torch.inf
            confidence, best = logits.softmax(-1).max(-1)      # (S,) each
            confidence[tokens[0, window] != mask] = 0          # what is written stays
            surest = confidence.argmax()
            tokens[0, start + surest] = best[surest]
    return tokens


@dataclass
class Step:
    """One denoising step of a batch of B sequences. Each tuple has one entry per sequence."""

    tokens: Tensor                   # (B, T), a copy: prompt and new tokens after this step
    positions: tuple[Tensor, ...]    # (n,) each: the positions just committed, surest first
    ids: tuple[Tensor, ...]          # (n,) each: the tokens put there
    confidences: tuple[Tensor, ...]  # (n,) each: the largest probability there, after penalty and
                                     # bans, 0 to 1; the token drawn may be another one
    hidden: tuple[Tensor, ...]       # (n, D) each: the states there, before any edit of concepts
    unwritten: Tensor                # (B,), masks left; after the last step 0, unless the row
                                     # has ended early


@torch.no_grad()
def unmask(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
           max_new_tokens: int | None = None, *, steering: Steering | None = None,
           use_cache: bool = True, **options) -> Iterator[Step]:
    """Write max_new_tokens after each prompt; yields a Step per denoising step.

    The sequence is the prompt and then masks, filled window by window. In each step the masked
    positions of the window where the model is most confident are committed, each with a token
    sampled from its own distribution. A committed token is never revised, with one exception: the
    end of a text or of a turn overwrites all to its right. (A window is what is being filled; a
    block decides who sees whom.)

    prompt_tokens: (B, L); L may be 0. Row b equals its own single run. With a confidence threshold
        rows fill a window at different speeds; the next window begins when all have. A row that has
        ended gets no more tokens, and its tuples in later steps are empty.
    max_new_tokens: None is 1024, or what the context has room for.
    steering: push the text toward concepts, or away from them (`steering.py`).
    use_cache: exact block caching; False recomputes everything.
    options: the fields of `sampling.Options`, by name: steps, temperature, top_p, seed, ...

    Raises ValueError (at the first step), naming the argument, for a value that cannot be honoured.
    """
    how, config, mask = Options(**options), model.config, model.config.mask_token_id
    how.check(config)
    tokens, L = start_tokens(model, prompt_tokens, max_new_tokens)  # (B, T)
    (B, T), device = tokens.shape, tokens.device
    steerer = Steerer(Steering() if steering is None else steering, model)
    rows = 2 * B if how.cfg_scale > 0 else B
    cache = KVCache.empty(config, rows, T, model.dtype, device) if use_cache else None
    roles = special_roles(config, how, device)
    seed = secrets.randbits(62) if how.seed is None else how.seed
    draws = [torch.Generator(device).manual_seed(seed + b) for b in range(B)]
    active = torch.ones(B, dtype=torch.bool, device=device)  # rows still being written

    for (start, end), counts in schedule(L, T, config.diff_block_size, how):
        for count in counts:
            asked = (tokens == mask) & active[:, None]  # (B, T), where to write
            asked[:, end:] = False
            # Python waits for a GPU only before the pass; after it, all is queued.
            # (use_cache=False, a threshold and a steering each add one more wait.)
            m = asked.sum(1).tolist()  # candidates in each row
            if not any(m):
                break  # the window is full, or every sequence has ended
            candidates = asked.nonzero()[:, 1].split(m)  # (m,) each, their positions
            logits, hidden = asked_logits(model, tokens, asked, L, how.cfg_scale, steerer, cache)
            commits = []
            for b, (row_logits, row_hidden) in enumerate(zip(logits.split(m), hidden.split(m))):
                chosen, ids, sure = choose(row_logits, tokens[b], count, roles.banned, how,
                                           draws[b])
                commits.append((candidates[b][chosen], ids, sure, row_hidden[chosen]))
                write(tokens[b], candidates[b][chosen], ids, roles)
                active[b] &= ~torch.isin(ids, roles.end).any()
            positions, put, confidences, states = zip(*commits)
            yield Step(tokens.clone(), positions, put, confidences, states, (tokens == mask).sum(1))
        active &= ~torch.isin(tokens[:, L:end], roles.stop).any(1)


def generate(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
             max_new_tokens: int | None = None, **options) -> Tensor:
    """Write max_new_tokens after each prompt: (B, L) -> (B, L + new).

    Takes the arguments of `unmask` and returns the tokens of its last step. Masks are left only
    where a row has ended early (`special_roles`).
    """
    for step in unmask(model, prompt_tokens, max_new_tokens, **options):
        tokens = step.tokens
    return tokens


def schedule(L: int, T: int, S: int, how: Options
             ) -> Iterator[tuple[tuple[int, int], list[int] | list[None]]]:
    """Plan the steps. Yields, for each window (start, end) of the new positions [L, T), how many
    tokens each step commits: None where the confidence threshold decides (then the last steps may
    have nothing left to do)."""
    spans = [(L, T)] if how.order == "global" else windows(L, T - L, S, how.align)
    steps = spread_steps([end - start for start, end in spans], how.steps)
    for (start, end), s in zip(spans, steps):
        decided = how.confidence_threshold is None
        yield (start, end), commits_per_step(end - start, s) if decided else [None] * (end - start)


def asked_logits(model: Steerling, tokens: Tensor, asked: Tensor, L: int, cfg_scale: float,
                 steerer: Steerer, cache: KVCache | None) -> tuple[Tensor, Tensor]:
    """Ask the model about the masks to fill, with guidance and steering. Returns logits (M, V),
    float32, and hidden states (M, D), at the M positions that are True in asked (B, T).

    With epsilon the composed state is the hidden state, up to rounding, so the concept heads run
    only when a steering edits them (`Steerer.compose`).

    Classifier-free guidance (arXiv 2207.12598) if cfg_scale > 0: the batch runs twice, the second
    time with the prompt, positions [0, L), masked. Let c be the logits of the first run and u those
    of the second: logits = u + (cfg_scale + 1) (c - u). The hidden states are those of the first
    run. In the second run the prompt is masks, so injections act there, too. When an injection ends
    at its cutoff, the cached keys of that prompt are stale, and the cache is emptied. Suppression
    comes last.

    Raises ValueError for logits that are infinite or not a number. (On a GPU this check makes
    Python wait, so it is made there only under a steering.)
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
        hidden = model.transformer(tokens, injections)[asked]
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
    waits = logits.device.type == "cpu" or steerer.steering != Steering()
    if waits and not torch.stack(logits.aminmax()).isfinite().all():  # one pass, unlike isfinite
        raise ValueError(f"logits are not finite numbers any more in {model.dtype}: the steering "
                         "is too strong, or the model's weights are broken")
    return logits, hidden


class Roles(NamedTuple):
    """Token ids that mean something to the sampler, (n,) int64 each but the first."""

    eos: int          # <|endoftext|>
    banned: Tensor    # never committed
    end: Tensor       # the sequence ends after the step that commits one of these
    last: Tensor      # these turn all to their right into <|endoftext|>
    stop: Tensor      # the sequence ends only after the window that has one of these


def special_roles(config: Config, how: Options, device: torch.device) -> Roles:
    """What each special token may do.

    <|mask|> and <|pad|> are never written. <|eot_id|>, where the model has one, turns all to its
    right into <|endoftext|> and ends the row at once: masks to its left stay. A stop token ends the
    row when its window is full: later windows stay masks. <|endoftext|> depends on the options:

        allow_eos=True        it turns all to its right into itself; its left is still written
        else, order "global"  it ends the row at once and fills nothing: masks may stay
        else                  it is never written: the row goes on to its full length
    """
    banned = [config.mask_token_id, config.pad_token_id]
    end = [] if config.eot_id is None else [config.eot_id]
    last = list(end)
    role = last if how.allow_eos else end if how.order == "global" else banned
    role.append(config.eos_token_id)
    return Roles(config.eos_token_id, *(torch.tensor(ids, dtype=torch.int64, device=device)
                                        for ids in (banned, end, last, list(how.stop_tokens))))


def write(row: Tensor, positions: Tensor, ids: Tensor, roles: Roles) -> None:
    """Put the ids of a step at their positions of a sequence (T,), in place. The leftmost of
    roles.last among them, if any, turns all to its right into <|endoftext|>."""
    row[positions] = ids
    if len(roles.last) and len(ids):
        last = positions.where(torch.isin(ids, roles.last), len(row)).min()  # T: there is none
        row.masked_fill_(torch.arange(len(row), device=row.device) > last, roles.eos)


def start_tokens(model: Steerling, prompt_tokens: Tensor | Sequence[Sequence[int]],
                 max_new_tokens: int | None) -> tuple[Tensor, int]:
    """Check the prompts and put the masks behind them: tokens (B, L + new) and L."""
    config, device = model.config, model.device
    if not isinstance(prompt_tokens, Tensor):
        try:
            rows = [list(row) for row in prompt_tokens]
            prompt_tokens = torch.tensor(rows, dtype=None if any(rows) else torch.int64)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError("prompt_tokens must be a batch of equally long lists of token ids, "
                             "such as [tokenizer.encode(text)]") from None
    require_tokens("prompt_tokens", prompt_tokens, config, least=0)
    B, L = prompt_tokens.shape
    room = config.block_size - L
    new = min(1024, room) if max_new_tokens is None else max_new_tokens
    if not isinstance(new, int) or not 1 <= new <= room:
        raise ValueError(f"{new} new tokens after a prompt of {L} do not fit the context of "
                         f"{config.block_size}; whole numbers from 1 to {room} do" if room > 0 else
                         f"a prompt of {L} tokens leaves no room in the context of "
                         f"{config.block_size}")
    if (prompt_tokens == config.mask_token_id).any():
        raise ValueError(f"a prompt has the mask token {config.mask_token_id}; only new positions "
                         "are unmasked")
    masks = torch.full((B, new), config.mask_token_id)
    return torch.cat([prompt_tokens.cpu().long(), masks], dim=1).to(device), L
