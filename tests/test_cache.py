"""The cache: it writes what recomputing everything writes, and computes few blocks."""

import dataclasses

import pytest
import torch
from conftest import CONFIG, MODES, PROMPT

from steerling_min import generate, unmask, unmasking
from steerling_min.attention import KVCache
from steerling_min.cache import cached_hidden
from steerling_min.steering import Steering


def test_each_pass_computes_what_the_docstrings_table_says(model):
    """With S = 8 in place of 4: a prompt of 12, 14 new tokens, the window [12, 20)."""
    tokens = torch.randint(0, 250, (2, 26), generator=torch.Generator().manual_seed(0))
    written = tokens.clone()
    tokens[:, 12:] = model.config.mask_token_id
    cache, computed = KVCache.empty(model.config, 2, 26, model.dtype, tokens.device), []
    hook = model.transformer.register_forward_pre_hook(
        lambda module, args: computed.append(args[0].shape[1]))
    for asked, end, before, after in (
            (range(12, 20), 24, 0, 8), ((12, 15, 19), 24, 8, 8), ((15, 19), 24, 8, 8),
            ((15,), 16, 8, 8), (range(20, 26), 26, 8, 16)):
        at = torch.zeros_like(tokens, dtype=torch.bool)
        at[:, list(asked)] = True
        tokens[:, 12:20] = written[:, 12:20].masked_fill(at[:, 12:20], model.config.mask_token_id)
        plain = model.transformer(tokens)[at]
        computed.clear()
        assert cache.length == before
        torch.testing.assert_close(cached_hidden(model, tokens, at, {}, cache), plain,
                                   atol=1e-5, rtol=1e-5, msg=f"other states at {list(asked)}")
        assert computed == [end - before], f"positions {before} to {end - 1}"
        assert cache.length == after, "final is what was computed without masks"
    hook.remove()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("B, L", [(2, 0), (2, 5), (1, 7), (2, 8)])
def test_the_cache_is_exact(model, mode, B, L):
    """The same commits in the same order, whether or not the prompt ends on a block's edge."""
    prompt = torch.tensor(PROMPT)[:B, :L]
    runs = [list(unmask(model, prompt, 27, seed=3, use_cache=use_cache, **MODES[mode]))
            for use_cache in (True, False)]
    assert len(runs[0]) == len(runs[1])
    for i, (fast, plain) in enumerate(zip(*runs)):
        for b in range(B):
            assert torch.equal(fast.positions[b], plain.positions[b]), f"step {i}: other positions"
            assert torch.equal(fast.ids[b], plain.ids[b]), f"step {i}: other tokens"
            error = (fast.confidences[b] - plain.confidences[b]).abs()
            assert (error <= 1e-5).all(), (
                f"step {i}: other confidences. Was a key read before its block was computed "
                "without masks, or a block not computed to its end?")
        assert torch.equal(fast.tokens, plain.tokens), f"step {i}: other tokens after it"


def test_a_block_that_has_masks_again_is_computed_again(model):
    """A sampler that takes tokens back asks about blocks that were final."""
    tokens = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = KVCache.empty(model.config, 2, 24, model.dtype, tokens.device)
    mask = model.config.mask_token_id
    for asked in ((20,), (9, 20), (3,), (20,)):
        at = torch.zeros_like(tokens, dtype=torch.bool)
        at[:, list(asked)] = True
        now = tokens.masked_fill(at, mask)
        torch.testing.assert_close(cached_hidden(model, now, at, {}, cache),
                                   model.transformer(now)[at], atol=1e-5, rtol=1e-5,
                                   msg=f"old keys were read when masks stood at {list(asked)}")


@pytest.mark.parametrize("L", [3, 8])
@pytest.mark.parametrize("options, long_steps", [
    ({}, 0), ({"cfg_scale": 1.5, "steering": Steering.unlearn(3)}, 0),
    ({"cfg_scale": 1.5, "steering": Steering.amplify(3, cutoff_tokens=40)}, 1),
], ids=["plain", "guided and injected", "until a cutoff"])
def test_the_cached_way_gives_the_plain_logits_and_computes_few_blocks(model, L, options,
                                                                       long_steps, monkeypatch):
    computed, errors = [], []
    inner, lm_head = unmasking.cached_hidden, model.transformer.lm_head

    def both(model, tokens, asked, injections, cache):
        plain = model.transformer(tokens, injections)[asked]
        hook = model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append(args[0].shape[1]), with_kwargs=True)
        fast = inner(model, tokens, asked, injections, cache)
        hook.remove()
        errors.append((lm_head(fast) - lm_head(plain)).abs().max().item())
        return fast
    monkeypatch.setattr(unmasking, "cached_hidden", both)
    generate(model, torch.tensor(PROMPT)[:, :L], 60, seed=1, **options)
    assert max(errors) <= 1e-5, f"step {errors.index(max(errors))} departs by {max(errors):.2e}"
    S = model.config.diff_block_size
    assert sum(t > 3 * S for t in computed) == long_steps, (
        "a step's work does not grow with the length of the text, but for the one after an "
        "injection's end under guidance")
    assert sorted(computed)[len(computed) // 2] <= 2 * S, "a window overlaps two blocks at most"


def test_without_grouping_the_cache_has_room_for_every_head():
    config = dataclasses.replace(CONFIG, n_kv_heads=None)  # then each query head has its own
    cache = KVCache.empty(config, 2, 8, torch.float32, torch.device("cpu"))
    assert cache.k.shape == cache.v.shape == (config.n_layers, 2, config.n_head, 8, config.head_dim)


def test_the_plain_way_recomputes_everything_at_every_step(model):
    lengths = []
    hook = model.transformer.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, PROMPT, 20, steps=6, seed=0, use_cache=False)
    hook.remove()
    assert lengths == [28] * 6
