"""The diffusion: corruption, its loss, and the sampler that runs it backwards."""

import dataclasses
import itertools
import json
import math
from unittest import mock

import pytest
import torch
from conftest import CONFIG, GOLDEN, close

from steerling_min import Config, Steerling, diffusion, generate, load, unmask
from steerling_min.diffusion import (corrupt, likelihood_bound, log_likelihood, noise_levels,
                                     token_loss)
from steerling_min.steering import Injection, Steering


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small():
    """A small random model, sure enough of itself for its choices to differ."""
    torch.manual_seed(0)
    model = Steerling(CONFIG).eval().requires_grad_(False)
    torch.nn.init.normal_(model.transformer.tok_emb.weight, std=0.5)
    return model


# ---- corruption ----------------------------------------------------------------------------------

def test_every_block_of_every_sequence_has_its_own_noise_level():
    t = noise_levels(50, 40, 8, rng())
    assert t.shape == (50, 40) and torch.equal(t, noise_levels(50, 40, 8, rng())), (
        "(B, T), drawn from the generator")
    blocks = t.view(50, 5, 8)
    assert (blocks == blocks[..., :1]).all(), "one level inside a block"
    assert len(blocks[..., 0].unique()) == 250, "drawn for each block and each sequence"


def test_a_last_short_block_has_a_level_too():
    t = noise_levels(2, 11, 4, rng())
    assert t.shape == (2, 11), "T need not be a multiple of S: the last block is cut short"
    for begin, end in ((0, 4), (4, 8), (8, 11)):
        assert (t[:, begin:end] == t[:, begin:begin + 1]).all(), "blocks count from position 0"


def test_noise_levels_are_uniform():
    t = noise_levels(1000, 8, 2, rng())[:, ::2].flatten()
    quantiles = torch.quantile(t, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.03, rtol=0)


@pytest.mark.parametrize("level", [0.0, 0.2, 0.7, 1.0])
def test_each_token_is_masked_with_probability_t(level):
    tokens = torch.randint(0, 90, (64, 256), generator=rng(1))
    t = torch.full((64, 256), level)
    noisy, masked = corrupt(tokens, t, 99, rng(2))
    assert masked.float().mean().item() == pytest.approx(level, abs=0.02), (
        "masked where a uniform number, one for each token, is below t")
    assert (tokens < 90).all(), "the originals are left as they are: the loss needs them"
    assert torch.equal(masked, corrupt(tokens, t, 99, rng(2))[1]), "draws come from the generator"
    assert (noisy[masked] == 99).all() and torch.equal(noisy[~masked], tokens[~masked]), (
        "a masked token becomes the mask and nothing else changes")


def test_masking_is_independent_between_neighbours():
    tokens = torch.zeros(64, 256, dtype=torch.int64)
    _, masked = corrupt(tokens, torch.full((64, 256), 0.5), 9, rng())
    both = (masked[:, 1:] & masked[:, :-1]).float().mean().item()
    assert both == pytest.approx(0.25, abs=0.02)


def test_every_token_is_masked_by_its_own_level():
    t = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert torch.equal(corrupt(torch.zeros(2, 3, dtype=torch.int64), t, 9)[1], t == 1.0)


# ---- the loss ------------------------------------------------------------------------------------

def a_case():
    logits = torch.randn(2, 4, 7, generator=rng())
    tokens = torch.randint(0, 7, (2, 4), generator=rng(1))
    masked = torch.tensor([[True, False, True, False], [False, False, False, True]])
    t = torch.tensor([[0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 0.8, 0.8]])
    nll = -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return logits, tokens, masked, t, nll


def test_the_loss_is_the_mean_surprise_at_masked_positions():
    logits, tokens, masked, t, nll = a_case()
    expected = (nll[0, 0] + nll[0, 2] + nll[1, 3]) / 3
    close(token_loss(logits[masked], tokens, masked, t), expected, "the mean over the masked 3")
    assert token_loss(logits[masked].bfloat16(), tokens, masked, t).dtype == torch.float32


def test_unmasked_positions_send_no_gradient():
    logits, tokens, masked, t, _ = a_case()
    token_loss(logits.requires_grad_()[masked], tokens, masked, t).backward()
    assert (logits.grad[~masked] == 0).all() and (logits.grad[masked] != 0).any()


def test_one_over_t_weighs_lightly_masked_blocks_up():
    logits, tokens, masked, t, nll = a_case()
    expected = (nll[0, 0] / 0.5 + nll[0, 2] / 0.25 + nll[1, 3] / 0.8) / 8
    close(token_loss(logits[masked], tokens, masked, t, "1/t"), expected,
          "each surprise over its t, divided by all 8 tokens and not by the 3 masked ones")


def test_one_over_t_is_an_unbiased_mean_over_all_tokens():
    """A model that predicts uniformly is surprised by ln V at every token, at every level."""
    tokens = torch.zeros(400, 64, dtype=torch.int64)
    t = noise_levels(400, 64, 8, rng()).clamp(min=0.05)
    _, masked = corrupt(tokens, t, 9, rng(1))
    loss = token_loss(torch.zeros(400, 64, 10)[masked], tokens, masked, t, "1/t")
    assert loss.item() == pytest.approx(math.log(10), rel=0.03)


def test_nothing_masked_costs_nothing():
    logits, tokens, masked, t, _ = a_case()
    for weighting in ("none", "1/t"):
        none = masked & False
        loss = token_loss(logits.requires_grad_()[none], tokens, none, t, weighting)
        loss.backward()  # and it can be trained on
        assert loss == 0.0 and (logits.grad == 0.0).all()


def test_another_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting.*none.*1/t"):
        token_loss(*a_case()[:4], "t")


# ---- the likelihood bound ------------------------------------------------------------------------

def any_order_surprise(model, tokens, start):
    """What the bound bounds, exactly: in each block, every order of its tokens, equally likely."""
    (B, T), S, mask = tokens.shape, model.config.diff_block_size, model.config.mask_token_id
    nats = torch.zeros(B, dtype=torch.float64)
    for block in range(0, T, S):
        asked = [i for i in range(block, min(T, block + S)) if i >= start]
        for size in range(1, len(asked) + 1):
            subsets = list(itertools.combinations(asked, size))
            for subset in subsets:
                noisy = tokens[:, : min(T, block + S)].clone()
                noisy[:, list(subset)] = mask
                log_p = model(noisy).logits.double().log_softmax(-1)
                for i in subset:  # each token of the subset comes next in one order of size
                    nats -= log_p[:, i].gather(-1, tokens[:, i, None])[:, 0] / (
                        len(subsets) * size)
    return nats / (T - start)


@pytest.mark.parametrize("start", [0, 5])
def test_the_bound_averages_over_every_order_of_a_blocks_tokens(small, start):
    tokens = torch.randint(0, 15, (2, 10), generator=rng(3))
    estimate = likelihood_bound(small, tokens, start, 4000, rng())
    exact = any_order_surprise(small, tokens, start)
    close(estimate.double(), exact, "m ~ U{1..n} masks, n/m times their cross-entropies, earlier "
          "blocks clean", atol=0.08)


def test_the_bounds_samples_have_every_number_of_masks_equally_often(small):
    read = []
    hook = small.transformer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    likelihood_bound(small, torch.zeros(2, 4, dtype=torch.int64), samples=4, generator=rng())
    hook.remove()
    masks = (torch.cat(read) == small.config.mask_token_id).sum(-1)  # (B samples,)
    assert sorted(masks.tolist()) == [1, 1, 2, 2, 3, 3, 4, 4], (
        "m = 1 + floor(n (i + u) / samples), for less variance")


def test_the_bound_of_one_token_is_its_surprise(small):
    tokens = torch.randint(0, 15, (1, 9), generator=rng(3))
    noisy = torch.cat([tokens[:, :8], torch.tensor([[19]])], dim=1)
    expected = -small(noisy).logits[0, 8].log_softmax(-1)[tokens[0, 8]]
    close(likelihood_bound(small, tokens, 8, 1)[0], expected, "n = m = 1, nothing is random")


def test_later_blocks_do_not_enter_the_bound_of_earlier_ones(small):
    tokens = torch.randint(0, 15, (1, 12), generator=rng(3))
    first = likelihood_bound(small, tokens[:, :4], 0, 64, rng()) * 4
    both = likelihood_bound(small, tokens[:, :8], 0, 64, rng()) * 8
    second = likelihood_bound(small, tokens[:, :8], 4, 64, rng()) * 4
    assert both.item() == pytest.approx((first + second).item(), abs=0.6)
    assert torch.equal(first, likelihood_bound(small, tokens[:, :4], 0, 64, rng()) * 4)


def test_the_log_likelihood_of_a_continuation_is_minus_its_bound(small):
    prompt, continuation = [3, 1, 4, 1, 5], [9, 2, 6]
    bound = likelihood_bound(small, torch.tensor([prompt + continuation]), 5, 64, rng(2))
    found = log_likelihood(small, prompt, continuation, seed=2)
    assert found == pytest.approx(-3 * bound.item(), rel=1e-6) and found < 0
    assert found == log_likelihood(small, prompt, continuation, seed=2), "repeatable"
    assert math.isfinite(log_likelihood(small, [], continuation))


def test_what_the_bundled_model_learnt_is_likelier_than_what_it_never_saw():
    model, tokenizer = load()
    prompt = [tokenizer.bos_token_id, *tokenizer.encode("The old sailor Mara lived near the")]
    good, bad = (log_likelihood(model, prompt, tokenizer.encode(text))
                 for text in (" harbour with a dog", " dog harbour a with"))
    assert good > bad + 5


def test_nothing_to_score_is_refused(small):
    with pytest.raises(ValueError, match="continuation is empty"):
        log_likelihood(small, [1, 2], [])
    with pytest.raises(ValueError, match="start = 3"):
        likelihood_bound(small, torch.tensor([[1, 2, 3]]), 3)
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        log_likelihood(small, [1] * 60, [2] * 5)


# ---- the sampler: parity -------------------------------------------------------------------------

RECORDED = json.loads((GOLDEN / "generation.json").read_text())


def recorded_options(run):
    """The official names of a recorded run's options, turned into ours."""
    options = dict(run["config"])
    options["entropy_sampling"] = options.pop("use_entropy_sampling")
    options["stop_tokens"] = options.pop("stop_tokens") or ()
    if "steering" in run:
        steering = run["steering"]
        cutoff = steering["cutoff_tokens"]
        options["steering"] = Steering(
            (Injection(tuple(steering["concept_ids"]), steering["mai_lm_target"],
                       steering["inject_layer"], steering["normalize_mai_lm_target"],
                       cutoff if steering["inject_alpha_schedule"] == "hard_cutoff" else None),),
            tuple((int(c), x) for c, x in (steering["relu_logit_mask"] or {}).items()))
    return options


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("use_cache", [True, False])
def test_parity_of_every_commit_with_the_official_package(model, name, use_cache, monkeypatch):
    run = RECORDED[name]
    config = dataclasses.replace(model.config, eot_id=run.get("eot_id"))
    monkeypatch.setattr(model, "config", config)
    steps = list(unmask(model, run["prompt"], **recorded_options(run), use_cache=use_cache))
    for i, (step, commit) in enumerate(zip(steps, run["commits"])):
        ours = [i, step.positions[0].tolist(), step.ids[0].tolist()]
        assert ours == commit, f"the first step that departs is {i}: [step, positions, ids]"
    assert steps[-1].tokens[0].tolist() == run["tokens"]


# ---- the sampler: what holds for every text ------------------------------------------------------

PROMPT = [[24, 31, 236, 254, 154, 21, 87, 89], [169, 99, 5, 171, 158, 246, 105, 9]]
MODES = {
    "entropy": {},
    "greedy": {"entropy_sampling": False, "temperature": 0.0},
    "temperature": {"entropy_sampling": False, "temperature": 1.0, "top_p": 0.95},
    "few steps": {"steps": 5},
    "threshold": {"confidence_threshold": 0.2},
    "guidance": {"cfg_scale": 1.5},
    "global": {"order": "global"},
    "global, guided": {"order": "global", "cfg_scale": 0.5, "steps": 7},
    "aligned": {"align": True},
    "aligned, threshold": {"align": True, "confidence_threshold": 0.3},
    "may end": {"allow_eos": True},
    "stop": {"stop_tokens": [151, 172, 69]},
    "amplified": {"steering": Steering.amplify((3, 5), 6.0, cutoff_tokens=9)},
    "unlearned": {"steering": Steering.unlearn(3, (4,)), "steps": 9},
    "amplified, guided": {"steering": Steering.amplify(3, cutoff_tokens=9) + Steering.amplify(7, 4),
                          "cfg_scale": 1.5},
    "edited": {"steering": Steering(known=((3, 2.0), (7, 0.0)), unknown=((5, 3.0),))},
    "edited, epsilon kept": {"steering": Steering(known=((3, 2.0),), epsilon="keep")},
}


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
def test_the_cached_way_gives_the_plain_logits_and_computes_two_blocks(model, L, monkeypatch):
    computed, errors = [], []
    inner, lm_head = diffusion.cached_hidden, model.transformer.lm_head

    def both(model, tokens, masked, injections, cache):
        plain = diffusion.plain_hidden(model, tokens, masked, injections)
        hook = model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append(args[0].shape[1]), with_kwargs=True)
        fast = inner(model, tokens, masked, injections, cache)
        hook.remove()
        errors.append((lm_head(fast) - lm_head(plain)).abs().max().item())
        return fast
    monkeypatch.setattr(diffusion, "cached_hidden", both)
    generate(model, torch.tensor(PROMPT)[:, :L], 60, seed=1)
    assert max(errors) <= 1e-5, f"step {errors.index(max(errors))} departs by {max(errors):.2e}"
    S = model.config.diff_block_size
    assert max(computed) <= 3 * S, "a step's work does not grow with the length of the text"
    assert sorted(computed)[len(computed) // 2] <= 2 * S, "a window overlaps two blocks at most"


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_a_batch_is_what_it_would_be_alone(model, mode):
    together = generate(model, PROMPT, 20, seed=11, **MODES[mode])
    for b, prompt in enumerate(PROMPT):
        alone = generate(model, [prompt], 20, seed=11 + b, **MODES[mode])
        assert torch.equal(together[b], alone[0]), "row b draws from seed + b and stops by itself"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in (
    "may end", "stop", "global", "global, guided")])
def test_everything_is_written_and_nothing_is_rewritten(model, mode):
    previous, mask_id = None, model.config.mask_token_id
    for step in unmask(model, PROMPT, 21, seed=5, **MODES[mode]):
        assert step.unwritten.tolist() == (step.tokens == mask_id).sum(1).tolist()
        if previous is not None:
            kept = previous != mask_id
            assert torch.equal(step.tokens[kept], previous[kept]), "a committed token stays"
        previous = step.tokens
    assert (previous[:, :8] == torch.tensor(PROMPT)).all(), "the prompt is not touched"
    new = previous[:, 8:]
    for never in (mask_id, model.config.pad_token_id, model.config.eos_token_id):
        assert (new != never).all(), "mask, pad and (in window order) EOS are never committed"


def test_a_step_says_what_it_committed(model):
    before = None
    for step in unmask(model, PROMPT, 12, steps=5, seed=0):
        for b in range(2):
            where, ids = step.positions[b], step.ids[b]
            assert torch.equal(step.tokens[b, where], ids)
            assert (step.confidences[b].diff() <= 0).all(), "surest first"
            if before is not None:
                changed = (step.tokens[b] != before[b]).nonzero()[:, 0]
                assert sorted(where.tolist()) == changed.tolist()
        before = step.tokens


def test_windows_are_finished_from_left_to_right(model):
    order = [step.positions[0].tolist() for step in unmask(model, PROMPT[:1], 24, seed=2)]
    assert [sorted(sum(order[i:i + 8], [])) for i in (0, 8, 16)] == [
        list(range(8 + i, 16 + i)) for i in (0, 8, 16)]


def test_global_order_takes_the_surest_position_of_the_whole_text(model):
    first = next(iter(unmask(model, PROMPT[:1], 40, order="global", seed=0)))
    tokens = torch.tensor(PROMPT[:1])
    tokens = torch.cat([tokens, torch.full((1, 40), model.config.mask_token_id)], 1)
    with torch.no_grad():
        logits = model(tokens).logits[0, 8:]
    seen = logits[:, PROMPT[0]]
    logits[:, PROMPT[0]] = torch.where(seen > 0, seen / 1.1, seen * 1.1)
    logits[:, [model.config.mask_token_id, model.config.pad_token_id]] = -torch.inf
    assert first.positions[0].item() == 8 + logits.softmax(-1).amax(-1).argmax().item()


def test_a_threshold_needs_fewer_steps_and_each_commit_reaches_it(model):
    steps = list(unmask(model, PROMPT[:1], 40, confidence_threshold=0.2, seed=0))
    assert len(steps) < 40
    for step in steps:
        confidences = step.confidences[0]
        assert len(confidences) == 1 or (confidences >= 0.2).all()


def test_the_same_seed_writes_the_same_text_and_another_does_not(model):
    a, b, c = (generate(model, PROMPT, 16, seed=seed).tolist() for seed in (1, 1, 2))
    assert a == b != c


# ---- the sampler: how texts end ------------------------------------------------------------------

def scripted_run(model, wishes, new, **options):
    """A run in which position i wants token `wishes[i][0]`, `wishes[i][1]` surely."""
    def logits(model, tokens, masked, *_):
        logits = torch.zeros(*tokens.shape, model.config.vocab_size)
        for position, (token, sureness) in wishes.items():
            logits[:, position, token] = sureness
        return logits[masked], torch.zeros(int(masked.sum()), model.config.n_embd)
    with mock.patch.object(diffusion, "masked_logits", logits):
        return list(unmask(model, [[1, 2]], new, use_cache=False, temperature=0.0,
                           entropy_sampling=False, **options))


def test_end_of_turn_fills_what_is_right_of_it_and_leaves_masks_left_of_it(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=50))
    steps = scripted_run(model, {5: (40, 14.0), 4: (50, 12.0), 2: (41, 10.0)}, 6)
    mask, eos = model.config.mask_token_id, model.config.eos_token_id
    assert steps[-1].tokens.tolist() == [[1, 2, mask, mask, 50, eos, eos, eos]], (
        "the token at 5, committed before, is the one case of a committed token that changes")
    assert steps[-1].unwritten.tolist() == [2], "the result says how much was left unwritten"


def test_eos_is_banned_in_windows_unless_allowed(model):
    eos, mask = model.config.eos_token_id, model.config.mask_token_id
    wishes = {4: (eos, 12.0), 5: (40, 14.0)}
    assert (scripted_run(model, wishes, 6)[-1].tokens != eos).all()
    ended = scripted_run(model, wishes, 6, allow_eos=True)
    assert ended[-1].tokens.tolist() == [[1, 2, mask, mask, eos, eos, eos, eos]]


def test_in_global_order_eos_ends_after_its_step_and_fills_nothing(model):
    eos, mask = model.config.eos_token_id, model.config.mask_token_id
    ended = scripted_run(model, {4: (eos, 12.0), 5: (40, 14.0)}, 6, order="global")
    assert ended[-1].tokens.tolist() == [[1, 2, mask, mask, eos, 40, mask, mask]]


def test_stop_tokens_are_looked_for_in_new_text_after_a_window(model):
    wishes = {3: (60, 9.0)}
    assert len(scripted_run(model, wishes, 20, stop_tokens=[60])) == 8, "the window is finished"
    assert len(scripted_run(model, wishes, 20, stop_tokens=[1])) == 20, "the prompt does not stop"


# ---- wrong input ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"max_new_tokens": 0}, "0 new tokens"),
    ({"max_new_tokens": -3}, "-3 new tokens"),
    ({"max_new_tokens": 2.5}, "2.5 new tokens"),
    ({"max_new_tokens": 121}, "121 new tokens after a prompt of 8 .* 128; between 1 and 120"),
    ({"steps": 0}, "steps = 0"),
    ({"steps": 2.5}, "steps = 2.5"),
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": 1e-40}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"cfg_scale": -0.5}, "cfg_scale"),
    ({"confidence_threshold": 2.0}, "confidence_threshold"),
    ({"confidence_threshold": 0.5, "steps": 3}, "exclude each other"),
    ({"order": "random"}, "order = 'random'"),
    ({"order": "global", "align": True}, "align"),
    ({"stop_tokens": [300]}, "stop_tokens"),
    ({"seed": -1}, "seed"),
])
def test_an_option_that_cannot_be_honoured_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)


@pytest.mark.parametrize("prompt, message", [
    ([[1, 2], [1]], "equal lengths, not 1 and 2"),
    ([[1, 300]], "outside the vocabulary of 300"),
    ([[1, -1]], "outside the vocabulary"),
    ([[1, 299]], "mask token 299"),
    ([[1] * 128], "a prompt of 128 tokens leaves no room"),
    ([], "B >= 1"),
    (torch.tensor([1, 2]), r"shape \(B, L\)"),
    (torch.tensor([[1.0]]), "whole numbers"),
])
def test_a_prompt_that_cannot_be_continued_is_named(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, 8)


def test_an_empty_prompt_writes_from_nothing(model):
    assert generate(model, [[]], 9, seed=0).shape == (1, 9)


def test_without_a_length_the_context_is_filled(model):
    assert generate(model, [[1] * 120]).shape == (1, model.config.block_size)


def test_generation_works_in_bfloat16():
    torch.manual_seed(0)
    model = Steerling(dataclasses.replace(Config.tiny(), n_layers=1)).bfloat16().eval()
    assert generate(model, [[1, 2, 3]], 20, seed=0).shape == (1, 23)
