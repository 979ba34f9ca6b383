"""The sampler: parity with the official one, and what holds for every text it writes."""

import copy
import dataclasses
import json
import math
from unittest import mock

import pytest
import torch
from conftest import CONFIG, GOLDEN, MODES, PROMPT, close

from steerling_min import Config, Steerling, generate, unmask, unmasking
from steerling_min.diffusion import likelihood_bound
from steerling_min.iguide import KnownHead, UnknownHead
from steerling_min.sampling import Options, penalize_repetition
from steerling_min.steering import Injection, Steerer, Steering
from steerling_min.unmasking import unmask_plainly

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
    other = [i for i, (ours, theirs) in enumerate(zip(steps[-1].tokens[0].tolist(), run["tokens"],
                                                      strict=True)) if ours != theirs]
    assert not other, (
        f"in the end other tokens stand at positions {other}, and " + (
            "every commit was right: see what unmasking.write puts behind an end of turn"
            if run["commits"] else "guidance decides (no commits were recorded): see asked_logits"))


def test_parity_of_the_defaults_with_the_official_package(model):
    run = RECORDED["entropy_seed42_default_rep1.1_steps6_p8"]
    tokens = generate(model, run["prompt"], 24, steps=6, seed=42)
    assert tokens[0].tolist() == run["tokens"], "top_p, the penalty and entropy sampling"
    assert Options().temperature == run["config"]["temperature"], "used without entropy sampling"


@pytest.mark.parametrize("prompt, new", [(PROMPT[0], 24), (PROMPT[1][:3], 21)])
def test_the_plain_loop_writes_what_unmask_writes_with_everything_off(model, prompt, new):
    plain = unmask_plainly(model, prompt, new)
    full = generate(model, [prompt], new, entropy_sampling=False, temperature=0.0,
                    repetition_penalty=1.0)
    assert plain.tolist() == full.tolist(), "greedy, a token per step, no penalty: one algorithm"


def test_the_plain_loop_writes_words_only(model):
    """Padding and <|endoftext|> would win nearly everywhere here."""
    never = [model.config.pad_token_id, model.config.eos_token_id]
    eager = copy.deepcopy(model)
    with torch.no_grad():
        eager.transformer.tok_emb.weight[never] = 100 * torch.tensor([[1.0], [-1.0]])
    assert not {*never} & {*unmask_plainly(eager, PROMPT[0], 8)[0].tolist()}


# ---- what enters the logits ----------------------------------------------------------------------

def first_logits(model, tokens, steering, cfg_scale=0.0, L=8):
    """The logits (M, V) that `unmask` would choose from, at the masks of tokens (B, T)."""
    asked = tokens == model.config.mask_token_id
    logits, _ = unmasking.asked_logits(model, tokens, asked, L, cfg_scale, Steerer(steering, model),
                                       None)
    return logits, asked


def with_masks(model, new=6):
    return torch.tensor([row + [model.config.mask_token_id] * new for row in PROMPT])


@pytest.mark.parametrize("epsilon", ["drop", "keep"])
def test_an_intervention_decides_what_is_written(model, epsilon):
    known, unknown = {3: 2.0, 7: 0.0}, {5: 3.0}
    tokens = with_masks(model)
    logits, asked = first_logits(model, tokens, Steering(
        known=tuple(known.items()), unknown=tuple(unknown.items()), epsilon=epsilon))
    expected = model(tokens, known, unknown, epsilon).logits[asked]
    close(logits, expected, "the logits of the composed state with the edited weights")


def test_under_guidance_the_masked_prompt_is_injected_too(model):
    tokens, steering = with_masks(model), Steering.amplify(3, 6.0)
    blind = tokens.clone()
    blind[:, :8] = model.config.mask_token_id
    logits, asked = first_logits(model, tokens, steering, cfg_scale=1.5)
    steerer, both = Steerer(steering, model), []
    for run in (tokens, blind):
        masks = run == model.config.mask_token_id
        (layer, vectors), = steerer.vectors(masks, torch.zeros(2)).items()
        both.append(model(run, injection=vectors, inject_layer=layer).logits[asked])
    c, u = both
    close(logits, u + 2.5 * (c - u), "u + (cfg_scale + 1) (c - u), each from its own injections",
          atol=1e-4)


@pytest.mark.parametrize("options", [
    {"steering": Steering(suppressions=((3, 5.0),))}, {"cfg_scale": 1.5}], ids=str)
def test_suppression_and_guidance_come_before_the_repetition_penalty(model, options):
    steering, cfg_scale = options.get("steering", Steering()), options.get("cfg_scale", 0.0)
    logits, _ = first_logits(model, with_masks(model)[:1], steering, cfg_scale)
    logits = penalize_repetition(logits, with_masks(model)[0], 1.5)
    logits[:, [model.config.mask_token_id, model.config.pad_token_id,
               model.config.eos_token_id]] = -torch.inf
    step = next(unmask(model, PROMPT[:1], 6, repetition_penalty=1.5, seed=0, **options))
    close(step.confidences[0], logits.softmax(-1).amax(-1).max()[None], "the surest position's")


def test_the_concept_heads_rest_unless_a_weight_is_edited(model, monkeypatch):
    """With epsilon the composed state is the hidden state: nothing reads what they say."""
    used = []
    for head in (KnownHead, UnknownHead):
        monkeypatch.setattr(head, "logits", lambda self, hidden, logits=head.logits: (
            used.append(type(self)), logits(self, hidden))[1])
    for steering in (None, Steering.amplify(3), Steering.unlearn(3)):
        generate(model, PROMPT, 6, seed=0, steering=steering)
    assert not used, "concept logits were computed although no weight is edited"
    generate(model, PROMPT, 6, seed=0, steering=Steering(unknown=((5, 1.0),)))
    assert set(used) == {KnownHead, UnknownHead}


# ---- what holds for every text -------------------------------------------------------------------

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
    before = with_masks(model, 12)
    for step in unmask(model, PROMPT, 12, steps=5, seed=0):
        hidden = model.transformer(before)
        for b in range(2):
            where, ids = step.positions[b], step.ids[b]
            assert torch.equal(step.tokens[b, where], ids)
            assert (step.confidences[b].diff() <= 0).all(), "surest first"
            changed = (step.tokens[b] != before[b]).nonzero()[:, 0]
            assert sorted(where.tolist()) == changed.tolist()
            close(step.hidden[b], hidden[b, where], "the states of these positions, in their order")
        before = step.tokens


def test_windows_are_finished_from_left_to_right(model):
    order = [step.positions[0].tolist() for step in unmask(model, PROMPT[:1], 24, seed=2)]
    assert [sorted(sum(order[i:i + 8], [])) for i in (0, 8, 16)] == [
        list(range(8 + i, 16 + i)) for i in (0, 8, 16)]


@pytest.mark.parametrize("align, first", [(False, range(5, 13)), (True, range(5, 8))])
def test_a_window_is_counted_from_the_prompt_or_ends_with_its_block(model, align, first):
    order = [step.positions[0].item()
             for step in unmask(model, [PROMPT[0][:5]], 24, seed=2, align=align)]
    assert sorted(order[: len(first)]) == list(first)


def test_global_order_knows_no_windows(model):
    wishes = {20: (40, 9.0), 3: (41, 5.0)}  # the surest position lies two windows ahead
    assert scripted_run(model, wishes, 30, order="global")[0].positions[0].tolist() == [20]
    assert scripted_run(model, wishes, 30)[0].positions[0].tolist() == [3]


def test_global_order_takes_the_surest_position_of_the_whole_text(model):
    first = next(iter(unmask(model, PROMPT[:1], 40, order="global", seed=0)))
    tokens = with_masks(model, 40)[0]
    with torch.no_grad():
        logits = penalize_repetition(model(tokens[None]).logits[0, 8:], tokens, 1.1)
    logits[:, [model.config.mask_token_id, model.config.pad_token_id]] = -torch.inf
    assert first.positions[0].item() == 8 + logits.softmax(-1).amax(-1).argmax().item()


def test_a_threshold_needs_fewer_steps_and_each_commit_reaches_it(model):
    steps = list(unmask(model, PROMPT[:1], 40, confidence_threshold=0.2, seed=0))
    assert len(steps) < 40
    for step in steps:
        confidences = step.confidences[0]
        assert len(confidences) == 1 or (confidences >= 0.2).all()


def test_the_same_seed_writes_the_same_text_and_another_does_not(model):
    a, b, c, d = (generate(model, PROMPT, 16, seed=seed).tolist() for seed in (0, 0, 2, None))
    assert a == b != c, "seed 0 is a seed, too"
    assert len({str(x) for x in (a, c, d, generate(model, PROMPT, 16).tolist())}) == 4, (
        "without a seed every text is another")


# ---- how texts end -------------------------------------------------------------------------------

def scripted_run(model, wishes, new, *more, **options):
    """A run in which position i wants token `wishes[i][0]`, `wishes[i][1]` surely; `more`, the
    wishes of further rows."""
    def logits(model, tokens, asked, *_):
        logits = torch.zeros(*tokens.shape, model.config.vocab_size)
        for row, row_wishes in zip(logits, (wishes, *more)):
            for position, (token, sureness) in row_wishes.items():
                row[position, token] = sureness
        return logits[asked], torch.zeros(int(asked.sum()), model.config.n_embd)
    with mock.patch.object(unmasking, "asked_logits", logits):
        return list(unmask(model, [[1, 2]] * (1 + len(more)), new, use_cache=False, temperature=0.0,
                           entropy_sampling=False, **options))


def test_end_of_turn_fills_what_is_right_and_leaves_masks_left_of_it(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=50))
    steps = scripted_run(model, {5: (40, 14.0), 4: (50, 12.0), 2: (41, 10.0)}, 6)
    mask, eos = model.config.mask_token_id, model.config.eos_token_id
    assert steps[-1].tokens.tolist() == [[1, 2, mask, mask, 50, eos, eos, eos]], (
        "the token at 5, committed before, is the one case of a committed token that changes")
    assert steps[-1].unwritten.tolist() == [2], "the result says how much was left unwritten"


def test_an_end_of_turn_in_the_prompt_ends_nothing(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=2))
    steps = scripted_run(model, {position: (41, 9.0) for position in range(2, 8)}, 6)
    assert steps[-1].tokens[0].tolist() == [1, 2] + [41] * 6, "a chat's prompt is full of them"


def test_of_several_ends_of_turn_in_a_step_the_leftmost_counts(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=50))
    steps = scripted_run(model, {3: (50, 9.0), 5: (50, 14.0), 6: (41, 12.0)}, 6, steps=1)
    eos = model.config.eos_token_id
    assert steps[-1].tokens[0, 3:].tolist() == [50, eos, eos, eos, eos]


def test_a_rows_end_does_not_end_the_others(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=50))
    steps = scripted_run(model, {4: (50, 12.0)}, 6, {4: (41, 12.0)})
    eos = model.config.eos_token_id
    assert len(steps) == 6 and steps[-1].unwritten.tolist() == [2, 0]
    assert steps[-1].tokens[0, 4:].tolist() == [50, eos, eos, eos]
    assert steps[-1].tokens[1, 4] == 41 and (steps[-1].tokens[1] != eos).all()
    assert len(steps[0].ids[0]) == 1 and len(steps[1].ids[0]) == 0, "it is asked no more"


def test_eos_is_banned_in_windows_unless_allowed(model):
    eos = model.config.eos_token_id
    wishes = {4: (eos, 12.0), 5: (40, 14.0)}
    assert (scripted_run(model, wishes, 6)[-1].tokens != eos).all()
    ended = scripted_run(model, wishes, 6, allow_eos=True)
    assert (ended[-1].tokens == eos).any()


@pytest.mark.parametrize("order", ["window", "global"])
def test_a_text_that_ends_is_whole_up_to_its_end(model, order):
    """The end comes first, or after what it makes void; then its left is written, and it alone."""
    eos = model.config.eos_token_id
    wishes = {12: (43, 20.0), 4: (eos, 12.0), 5: (40, 14.0), 2: (41, 9.0), 3: (42, 8.0)}
    steps = scripted_run(model, wishes, 20, order=order, allow_eos=True)
    assert steps[-1].tokens[0].tolist() == [1, 2, 41, 42] + [eos] * 18
    assert steps[-1].unwritten.tolist() == [0]
    assert len(steps) == (4 if order == "window" else 5), "no step is spent on what is void"


def test_an_earlier_end_takes_the_place_of_a_later_one(model):
    eos = model.config.eos_token_id
    wishes = {6: (eos, 14.0), 4: (eos, 12.0), 3: (42, 9.0), 2: (41, 8.0)}
    steps = scripted_run(model, wishes, 6, {p: (41, 9.0) for p in range(2, 8)}, allow_eos=True)
    assert steps[-1].tokens.tolist() == [[1, 2, 41, 42] + [eos] * 4, [1, 2] + [41] * 6], (
        "and the other row of the batch is none the shorter for it")


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
    ({"max_new_tokens": 121}, "121 new tokens after a prompt of 8 .*; whole numbers from 1 to 120"),
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
    ({"stop_tokens": [1.5]}, "stop_tokens"),
    ({"stop_tokens": iter([1])}, "stop_tokens"),
    ({"stop_tokens": "ab"}, "stop_tokens"),
    ({"stop_tokens": 7}, "stop_tokens"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"temperature": None}, "temperature = None is not supported; supported: int | float"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": "0.8"}, "top_p"),
    ({"cfg_scale": math.inf}, "cfg_scale"),
    ({"repetition_penalty": math.inf}, "repetition_penalty"),
    ({"align": "no"}, "align = 'no' is not supported; supported: bool"),
    ({"max_new_tokens": "8"}, "8 new tokens"),
    ({"steering": "sea"}, "steering = 'sea'"),
    ({"steering": Steering.amplify("sea")}, "known concept 's' does not exist"),
    ({"steering": Steering.amplify(3, "8")}, "strength = '8'"),
])
def test_an_option_that_cannot_be_honoured_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, **options)


@pytest.mark.parametrize("prompt, message", [
    ([[1, 2], [1]], "batch of equally long lists of token ids"),
    ([1, 2], "batch of equally long lists of token ids"),
    ("The", "batch of equally long lists"), (["The"], "batch of equally long"), (7, "batch of"),
    (None, "batch of"), ([[1, None]], "batch of"), ([[1, 2**70]], "batch of"),
    ([[1.7]], "prompt_tokens must be a tensor of whole numbers"),
    ([[1, 300]], "outside the vocabulary of 300"),
    ([[1, -1]], "outside the vocabulary"),
    ([[1, 299]], "mask token 299"),
    ([[1] * 128], "a prompt of 128 tokens leaves no room"),
    ([], "B >= 1"),
    (torch.tensor([1, 2]), r"shape \(B, T\)"),
    (torch.tensor([[1.0]]), "whole numbers"),
])
def test_a_prompt_that_cannot_be_continued_is_named(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, 8)


@pytest.mark.parametrize("ask", [
    lambda model, tokens: model(tokens), lambda model, tokens: model.embed(tokens),
    lambda model, tokens: likelihood_bound(model, tokens)], ids=["forward", "embed", "bound"])
@pytest.mark.parametrize("tokens", [[[1, 300]], [[-1]], [[]], [1, 2], [[1.5]]], ids=str)
def test_what_are_no_token_ids_is_named(model, ask, tokens):
    with pytest.raises(ValueError, match="tokens"):
        ask(model, torch.tensor(tokens))
    with pytest.raises(ValueError, match="tokens must be a tensor .* got list"):
        ask(model, tokens)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_a_broken_model_is_named_and_writes_nothing(value):
    """As a run leaves it that has diverged: greedy, it would write whatever has the lowest id."""
    torch.manual_seed(0)
    model = Steerling(CONFIG).eval()
    model.transformer.ln_f.weight.data[:] = value
    model.transformer.tok_emb.weight.data *= 1e3
    with pytest.raises(ValueError, match="logits are not finite numbers .* weights are broken"):
        generate(model, [[1, 2]], 4, entropy_sampling=False, temperature=0.0)


def test_an_empty_prompt_writes_from_nothing(model):
    assert generate(model, [[]], 9, seed=0).shape == (1, 9)
    assert generate(model, [[]], 1, seed=0).shape == (1, 1), "a single token, too"


def test_without_a_length_1024_tokens_are_written():
    model = Steerling(dataclasses.replace(CONFIG, block_size=1100)).eval()
    assert next(unmask(model, [[1, 2, 3]], seed=0)).tokens.shape == (1, 3 + 1024)


def test_without_a_length_the_context_is_filled(model):
    assert generate(model, [[1] * 120]).shape == (1, model.config.block_size)


def test_generation_works_in_bfloat16():
    torch.manual_seed(0)
    model = Steerling(dataclasses.replace(Config.tiny(), n_layers=1)).bfloat16().eval()
    assert generate(model, [[1, 2, 3]], 20, seed=0).shape == (1, 23)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_no_finite_number_is_said_and_not_drawn_from(model, wrong):
    def broken(module, args, logits):
        logits = logits.clone()
        logits[0, 7] = wrong
        return logits
    with model.transformer.lm_head.register_forward_hook(broken):
        with pytest.raises(ValueError, match="logits are not finite numbers any more in .*float32"):
            generate(model, PROMPT, 4, seed=0)
