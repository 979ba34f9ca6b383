"""Choosing tokens: penalty, confidence, temperature, nucleus; and sharing out the steps."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG
from torch.utils._python_dispatch import TorchDispatchMode

from steerling_min.sampling import (Options, choose, commits_per_step, entropy_temperature,
                                    most_confident, nucleus, penalize_repetition, sample,
                                    sort_logits, spread_steps, windows)

P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])  # sorted: ids 1, 3, 4, 2, 0
SORTED = P[[1, 3, 4, 2, 0]]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- which token ---------------------------------------------------------------------------------

def test_repetition_makes_seen_tokens_less_likely_whatever_their_sign():
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0, 0.5]])
    out = penalize_repetition(logits, torch.tensor([0, 1, 4]), 2.0)
    assert out.tolist() == [[1.0, -4.0, 1.0, -1.0, 0.25]], "positive: divided; negative: multiplied"
    assert logits.tolist() == [[2.0, -2.0, 1.0, -1.0, 0.5]], "a new tensor is returned"


def test_a_token_is_penalised_once_however_often_it_stands_there():
    once = penalize_repetition(P[None].clone(), torch.tensor([3]), 1.5)
    often = penalize_repetition(P[None].clone(), torch.tensor([3, 3, 3]), 1.5)
    assert torch.equal(once, often), "once for each distinct token"


def test_the_nucleus_keeps_tokens_while_the_mass_before_them_is_within_top_p():
    for top_p, kept in ((0.0, 1), (0.39, 1), (0.5, 2), (0.7, 3), (1.0, 5)):
        p = nucleus(SORTED, top_p)
        assert (p > 0).sum() == kept, f"top_p {top_p}: mass before is 0, .4, .65, .85, .95"
        assert torch.equal(p[:kept], SORTED[:kept]), "kept probabilities are not changed"
    assert torch.equal(SORTED, P[[1, 3, 4, 2, 0]]), "p is left as it is"
    p = nucleus(torch.tensor([0.5, 0.25, 0.25]), 0.5)
    assert (p > 0).tolist() == [True, True, False], "0.5 before it is at most 0.5"


def test_logits_are_sorted_from_the_largest_down_and_of_equals_the_first_id_comes_first():
    logits = torch.tensor([0.5, -3.0, -torch.inf, 2.0, 0.5, 1e-42, 0.0])
    down, ids = sort_logits(logits)
    assert ids.tolist() == [3, 0, 4, 5, 6, 1, 2]
    torch.testing.assert_close(down, logits[ids] - 2.0)
    torch.testing.assert_close(down.softmax(-1), logits.softmax(-1)[ids])


def test_entropy_temperature_is_low_when_sure_and_high_when_not():
    sure = torch.zeros(50)
    sure[0] = 30.0
    assert entropy_temperature(sure, 0.8).item() == pytest.approx(0.3, abs=1e-4)
    assert entropy_temperature(torch.zeros(50), 0.8).item() == pytest.approx(0.7, abs=1e-4)


def test_entropy_is_measured_against_the_nucleus_size():
    p = torch.tensor([0.9, 0.05, 0.03, 0.02])  # cumulative .9 .95 .98 1: two <= 0.96, so k = 3
    entropy = -sum(q * math.log(q) for q in p.tolist())
    expected = 0.3 + 0.4 * entropy / math.log(3)
    assert entropy_temperature(p.log(), 0.96).item() == pytest.approx(expected, abs=1e-5), (
        "two cumulative probabilities are at most 0.96, so k = 3")
    two = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])  # cumulative .5 1 1 1, exactly
    expected = 0.3 + 0.4 * math.log(2) / math.log(5)
    assert entropy_temperature(two, 1.0).item() == pytest.approx(expected, abs=1e-5), (
        "k = 5: a cumulative probability that equals top_p counts")
    p = torch.tensor([0.9, 0.1])  # none is <= 0.8: k is 2 at least, else ln k would be 0
    entropy = -sum(q * math.log(q) for q in p.tolist())
    expected = 0.3 + 0.4 * entropy / math.log(2)
    assert entropy_temperature(p.log(), 0.8).item() == pytest.approx(expected, abs=1e-5), (
        "no cumulative probability is at most 0.8, and k is at least 2")


def test_banned_tokens_do_not_disturb_the_entropy():
    logits = torch.tensor([1.0, 0.5, -torch.inf])
    assert entropy_temperature(logits, 0.8).isfinite(), "0 ln 0 counts as 0"


def test_temperature_zero_is_greedy_and_draws_nothing():
    generator = rng()
    state = generator.get_state()
    assert sample(P.log(), 0.0, 0.8, False, generator) == 1
    assert torch.equal(generator.get_state(), state)


def test_draws_follow_the_distribution_within_the_nucleus():
    generator = rng()
    drawn = torch.stack([sample(P.log(), 1.0, 0.5, False, generator) for _ in range(2000)])
    share = drawn.bincount(minlength=5) / 2000
    expected = torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65
    torch.testing.assert_close(share, expected, atol=0.04, rtol=0)


class Waits(TorchDispatchMode):
    """Counts how often a number leaves the device, which has to be waited for."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.__name__.startswith("_local_scalar_dense")
        return op(*args, **(kwargs or {}))


def test_no_draw_waits_for_the_device():
    logits = torch.randn(20, 50, generator=rng())
    with Waits() as waits:
        choose(logits, torch.arange(5), 20, torch.tensor([7]), Options(), rng())
    assert waits.count == 0, (
        "a Python number made from a tensor (an index, an if, .item()) makes a GPU idle at each "
        "token: keep it a tensor")


def test_temperature_sharpens():
    generator = rng()
    drawn = [sample(P.log(), 0.25, 1.0, False, generator).item() for _ in range(500)]
    assert drawn.count(1) / 500 > 0.75, "p^(1/0.25) puts 0.82 on the best token of 0.4"


def test_the_nucleus_is_one_of_the_sharpened_distribution():
    drawn = {sample(P.log(), 0.25, 0.5, False, rng(seed)).item() for seed in range(100)}
    assert drawn == {1}, "at temperature 1/4 its 0.82 is beyond top_p 0.5: nothing comes after it"


def test_entropy_sampling_overrules_the_temperature():
    a, b = ([sample(P.log(), temperature, 0.9, True, rng(seed)).item() for seed in range(40)]
            for temperature in (0.0, 5.0))
    assert a == b and len(set(a)) > 1


# ---- which positions -----------------------------------------------------------------------------

LOGITS = torch.tensor([[0.0, 1.0], [0.0, 5.0], [3.0, 0.0], [0.0, 0.1]])


def test_the_surest_positions_come_first():
    confidence, chosen = most_confident(LOGITS, 3, None)
    assert chosen.tolist() == [1, 2, 0], "by the probability of each position's best token"
    torch.testing.assert_close(confidence[0], torch.tensor(5.0).sigmoid())


def test_the_threshold_is_compared_with_the_confidences_as_they_are():
    alike = torch.zeros(2, 4)
    alike[1, 2] = 1e-6
    reached = alike.softmax(-1).amax(-1)[1].item()  # by the second alone, though they are alike
    assert most_confident(alike, None, reached)[1].tolist() == [1]
    assert torch.equal(most_confident(alike, 2, None)[0], alike.softmax(-1).amax(-1)), (
        "what is reported are the confidences as they are, too")
    assert most_confident(alike, None, 1.0)[1].tolist() == [0], "none: the first of the equals"
    assert most_confident(LOGITS, None, 0.0)[1].tolist() == [1, 2, 0, 3], "surest first"


def test_masks_that_look_alike_are_filled_from_the_left():
    alike = torch.zeros(6, 4)
    alike[:, 2] = 1.0
    alike += 1e-6 * torch.randn(6, 4, generator=rng())  # float32 error
    assert most_confident(alike, 3, None)[1].tolist() == [0, 1, 2]


def test_positions_that_differ_by_more_than_rounding_are_told_apart_even_where_none_is_sure():
    logits = torch.zeros(2, 100)
    logits[0, 3], logits[1, 7] = 0.50, 0.51  # 1.64 and 1.65 percent
    assert most_confident(logits, 1, None)[1].tolist() == [1]


def test_very_sure_positions_are_still_told_apart():
    logits = torch.tensor([[12.0, 0.0], [14.0, 0.0], [13.0, 0.0]])  # 1 - p is 6e-6, 8e-7, 2e-6
    assert most_confident(logits, 3, None)[1].tolist() == [1, 2, 0]


def test_a_threshold_takes_all_that_reach_it_and_one_at_least():
    assert most_confident(LOGITS, None, 0.9)[1].tolist() == [1, 2]
    assert most_confident(LOGITS, None, 1.0)[1].tolist() == [1], "never none: no step is idle"
    assert len(most_confident(LOGITS, None, 0.0)[1]) == 4
    tie = torch.zeros(2, 2)
    assert len(most_confident(tie, None, 0.5)[1]) == 2, "at the threshold counts as reached"


def test_bans_and_penalty_come_before_confidence():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    greedy = Options(entropy_sampling=False, temperature=0.0, repetition_penalty=1.0)
    chosen, ids, confidence = choose(logits, torch.tensor([2]), 1, torch.tensor([0]), greedy, rng())
    assert (chosen.tolist(), ids.tolist()) == ([1], [1]), (
        "position 0 was sure only of a banned token")
    chosen, ids, _ = choose(logits, torch.tensor([0]), 1, torch.tensor([2]),
                            replace(greedy, repetition_penalty=100.0), rng())
    assert (chosen.tolist(), ids.tolist()) == ([1], [1]), "... or of one it repeats"


def test_the_edges_of_what_an_option_may_be():
    Options(top_p=0.0, stop_tokens=(0, 19), steps=1, seed=0).check(CONFIG)
    Options(top_p=1.0, confidence_threshold=1.0, temperature=0.0).check(CONFIG)
    Options(temperature=1e-6, repetition_penalty=1e6).check(CONFIG)
    Options(temperature=1e6, cfg_scale=1e6, seed=2**63 - 1).check(CONFIG)
    for change, name in (({"stop_tokens": (3, 20)}, "stop_tokens"), ({"top_p": -1e-9}, "top_p"),
                         ({"stop_tokens": (3, -1)}, "stop_tokens"), ({"steps": 0}, "steps"),
                         ({"seed": -1}, "seed"), ({"repetition_penalty": 0.0}, "repetition"),
                         ({"temperature": 1e6 + 1}, "temperature"), ({"seed": 2**63}, "seed"),
                         ({"cfg_scale": 1e6 + 1}, "cfg_scale"),
                         ({"repetition_penalty": 1e6 + 1}, "repetition")):
        with pytest.raises(ValueError, match=name):
            Options(**change).check(CONFIG)


def test_a_row_without_masks_commits_nothing():
    chosen, ids, confidence = choose(torch.empty(0, 3), torch.tensor([0]), 2, torch.tensor([0]),
                                     Options(), rng())
    assert len(chosen) == len(ids) == len(confidence) == 0


# ---- the schedule --------------------------------------------------------------------------------

def test_windows_are_counted_from_the_prompts_end():
    assert windows(5, 20, 8, align=False) == [(5, 13), (13, 21), (21, 25)]
    assert windows(0, 8, 8, align=False) == [(0, 8)]


def test_aligned_windows_are_cut_at_block_edges():
    assert windows(5, 20, 8, align=True) == [(5, 8), (8, 16), (16, 24), (24, 25)]
    assert windows(8, 16, 8, align=True) == [(8, 16), (16, 24)]
    assert windows(5, 2, 8, align=True) == [(5, 7)]


@pytest.mark.parametrize("L", range(0, 20, 3))
@pytest.mark.parametrize("new", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("align", [True, False])
def test_windows_cover_the_new_positions_once(L, new, align):
    covered = [i for start, end in windows(L, new, 8, align) for i in range(start, end)]
    assert covered == list(range(L, L + new))
    assert all(0 < end - start <= 8 for start, end in windows(L, new, 8, align))


def test_steps_are_shared_in_proportion_with_largest_remainders_first():
    assert spread_steps([8, 8, 8], 12) == [4, 4, 4], "equal windows: the official even split"
    assert spread_steps([8, 8, 8], 13) == [5, 4, 4], "earlier windows first among equals"
    assert spread_steps([5, 8, 8, 3], 12) == [3, 4, 4, 1], "shares 2.5, 4, 4, 1.5"
    assert spread_steps([8, 3], 5) == [4, 1], "shares 3.64, 1.36: the larger remainder is .64"
    assert spread_steps([2, 9, 9], 4) == [1, 2, 1], "shares .4, 1.8, 1.8: one each comes first"


def test_what_the_minimum_of_one_gave_out_is_taken_back_from_those_above_their_share():
    assert spread_steps([1, 1, 1, 17], 5) == [1, 1, 1, 2], "shares .25, .25, .25, 4.25"
    assert spread_steps([1, 1, 1, 9, 8], 6) == [1, 1, 1, 2, 1], (
        "shares .3, .3, .3, 2.7, 2.4: 1, 1, 1, 2, 2 is one too many, and 2 is nearer to 2.4")


def test_without_steps_every_token_has_its_own():
    assert spread_steps([3, 8, 8], None) == [3, 8, 8]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 11, 18, 19, 20, 1000])
@pytest.mark.parametrize("lengths", [[3, 8, 8], [19], [1, 16, 2], [1, 1, 1, 16]])
def test_no_step_is_idle_and_none_is_lost(lengths, steps):
    counts = spread_steps(lengths, steps)
    assert sum(counts) == min(max(steps, len(lengths)), sum(lengths)), (
        "as many steps as asked for, but one per window at least, and one per token at most")
    for m, s in zip(lengths, counts):
        per_step = commits_per_step(m, s)
        assert sum(per_step) == m and min(per_step) >= 1 and len(per_step) == s


def test_the_first_steps_of_a_window_commit_one_more():
    assert commits_per_step(8, 3) == [3, 3, 2]
    assert commits_per_step(8, 8) == [1] * 8
