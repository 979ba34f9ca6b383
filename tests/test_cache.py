"""The cache: it writes what recomputing everything writes, and computes few blocks."""

import pytest
import torch
from conftest import MODES, PROMPT

from steerling_min import generate, unmask, unmasking
from steerling_min.steering import Steering


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("L", [0, 5, 8])
def test_the_cache_is_exact(model, mode, L):
    """The same commits in the same order, whether or not the prompt ends on a block's edge."""
    prompt = torch.tensor(PROMPT)[:, :L]
    runs = [list(unmask(model, prompt, 27, seed=3, use_cache=use_cache, **MODES[mode]))
            for use_cache in (True, False)]
    assert len(runs[0]) == len(runs[1])
    for i, (fast, plain) in enumerate(zip(*runs)):
        for b in range(2):
            assert torch.equal(fast.positions[b], plain.positions[b]), f"step {i}: other positions"
            assert torch.equal(fast.ids[b], plain.ids[b]), f"step {i}: other tokens"
            error = (fast.confidences[b] - plain.confidences[b]).abs()
            assert (error <= 1e-5).all(), (
                f"step {i}: other confidences. Was a key read before its block was computed "
                "without masks, or a block not computed to its end?")
        assert torch.equal(fast.tokens, plain.tokens), f"step {i}: other tokens after it"


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
        plain = unmasking.plain_hidden(model, tokens, asked, injections)
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


def test_the_plain_way_recomputes_everything_at_every_step(model):
    lengths = []
    hook = model.transformer.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1]))
    generate(model, PROMPT, 20, steps=6, seed=0, use_cache=False)
    hook.remove()
    assert lengths == [28] * 6
