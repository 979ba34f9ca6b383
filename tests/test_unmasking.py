"""The sampler: parity with the official one, and what holds for every text it writes."""

import dataclasses
import json
import math
from unittest import mock

import pytest
import torch
from conftest import GOLDEN

from steerling_min import Config, Steerling, generate, unmask, unmasking
from steerling_min.steering import Injection, Steering

# ---- parity --------------------------------------------------------------------------------------

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


# ---- what holds for every text -------------------------------------------------------------------

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
    inner, lm_head = unmasking.cached_hidden, model.transformer.lm_head

    def both(model, tokens, masked, injections, cache):
        plain = unmasking.plain_hidden(model, tokens, masked, injections)
        hook = model.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: computed.append(args[0].shape[1]), with_kwargs=True)
        fast = inner(model, tokens, masked, injections, cache)
        hook.remove()
        errors.append((lm_head(fast) - lm_head(plain)).abs().max().item())
        return fast
    monkeypatch.setattr(unmasking, "cached_hidden", both)
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


# ---- how texts end -------------------------------------------------------------------------------

def scripted_run(model, wishes, new, **options):
    """A run in which position i wants token `wishes[i][0]`, `wishes[i][1]` surely."""
    def logits(model, tokens, masked, *_):
        logits = torch.zeros(*tokens.shape, model.config.vocab_size)
        for position, (token, sureness) in wishes.items():
            logits[:, position, token] = sureness
        return logits[masked], torch.zeros(int(masked.sum()), model.config.n_embd)
    with mock.patch.object(unmasking, "masked_logits", logits):
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
