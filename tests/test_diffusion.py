"""The forward process: corruption, its loss, and the bound on a text's likelihood."""

import itertools
import math

import pytest
import torch
from conftest import CONFIG, close

from steerling_min import Steerling, load
from steerling_min.diffusion import (corrupt, likelihood_bound, log_likelihood, noise_levels,
                                     token_loss)


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
    assert len(t[:, [0, 4, 8]].unique()) == 6, "its own, not that of the block before"


def test_noise_levels_are_uniform():
    t = noise_levels(2000, 40, 2, rng())[:, ::2].flatten()  # 40,000 draws
    at = torch.tensor([0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
    close(torch.quantile(t, at), at, "t ~ U(0, 1): nearly clean and nearly masked blocks occur, "
          "and are what a text begins and ends with", atol=0.006)


def test_every_block_has_the_same_noise_wherever_it_stands_and_whatever_the_others_have():
    t = noise_levels(20_000, 10, 2, rng())[:, ::2]  # (20000, 5)
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    for block in range(5):
        close(torch.quantile(t[:, block], at), at, f"block {block}: t ~ U(0, 1)", atol=0.015)
    close(torch.corrcoef(t.T), torch.eye(5), "blocks draw independently", atol=0.03)


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
    one = masked & (torch.arange(4) == 2)
    close(token_loss(logits[one], tokens, one, t), nll[0, 2], "of one masked token, its own")


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


@pytest.mark.parametrize("weighting", ["none", "1/t"])
def test_the_loss_of_half_precision_logits_is_computed_in_float32(weighting):
    logits, tokens = torch.randn(500, 50, generator=rng()).bfloat16(), torch.arange(500)[None] % 50
    masked, t = torch.ones(1, 500, dtype=torch.bool), torch.full((1, 500), 0.3)
    losses = -logits.float().log_softmax(-1).gather(1, tokens[0][:, None])[:, 0]
    expected = losses.mean() if weighting == "none" else losses.mean() / 0.3
    close(token_loss(logits, tokens, masked, t, weighting), expected,
          "in bfloat16 a sum of 500 losses has three digits", atol=1e-4)


def test_another_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting.*none.*1/t"):
        token_loss(*a_case()[:4], "t")


# ---- the likelihood bound ------------------------------------------------------------------------

def those(tokens, about):
    """(B, T) bool: True at the positions `about` of every row."""
    return torch.isin(torch.arange(tokens.shape[1]), torch.tensor([*about])).expand(tokens.shape)


def any_order_surprise(model, tokens, asked_about):
    """What the bound bounds, exactly: in each block, every order of the tokens asked about."""
    (B, T), S, mask = tokens.shape, model.config.diff_block_size, model.config.mask_token_id
    nats = torch.zeros(B, dtype=torch.float64)
    for block in range(0, T, S):
        asked = [i for i in asked_about if block <= i < block + S]
        for size in range(1, len(asked) + 1):
            subsets = list(itertools.combinations(asked, size))
            for subset in subsets:
                noisy = tokens[:, : min(T, block + S)].clone()
                noisy[:, list(subset)] = mask
                log_p = model(noisy).logits.double().log_softmax(-1)
                for i in subset:  # each token of the subset comes next in one order of size
                    nats -= log_p[:, i].gather(-1, tokens[:, i, None])[:, 0] / (
                        len(subsets) * size)
    return nats / len(asked_about)


@pytest.mark.parametrize("about", [range(10), range(5, 10), [0, 2, 3, 9]], ids=str)
def test_the_bound_averages_over_every_order_of_a_blocks_tokens(small, about):
    tokens = torch.randint(0, 15, (2, 10), generator=rng(3))
    estimate = likelihood_bound(small, tokens, those(tokens, about), 4000, rng())
    exact = any_order_surprise(small, tokens, about)
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
    close(likelihood_bound(small, tokens, those(tokens, [8]), 1)[0], expected,
          "n = m = 1, nothing is random")


def test_rows_may_be_asked_about_different_tokens(small):
    tokens = torch.randint(0, 15, (2, 10), generator=rng(3))
    asked = torch.cat([those(tokens[:1], [1, 2, 8]), those(tokens[:1], [6])])
    found = likelihood_bound(small, tokens, asked, 4000, rng()).double()
    for row, about in enumerate(([1, 2, 8], [6])):
        close(found[row], any_order_surprise(small, tokens[row:row + 1], about)[0],
              "each row by its own number of tokens, those it is asked about", atol=0.1)


def test_later_blocks_do_not_enter_the_bound_of_earlier_ones(small):
    tokens = torch.randint(0, 15, (1, 12), generator=rng(3))
    first = likelihood_bound(small, tokens[:, :4], None, 64, rng())
    assert torch.equal(first, likelihood_bound(
        small, tokens, those(tokens, range(4)), 64, rng())), (
        "the same seed, the same first block, however long the text is: later blocks are unseen, "
        "and nothing is drawn for them before it")
    both = likelihood_bound(small, tokens[:, :8], None, 64, rng()) * 8
    second = likelihood_bound(small, tokens[:, :8], those(tokens[:, :8], range(4, 8)), 64, rng())
    assert both.item() == pytest.approx(4 * (first + second).item(), abs=0.6)


def test_the_log_likelihood_of_a_continuation_is_minus_its_bound(small):
    prompt, continuation = [3, 1, 4, 1, 5], [9, 2, 6]
    tokens = torch.tensor([prompt + continuation])
    bound = likelihood_bound(small, tokens, those(tokens, range(5, 8)), 64, rng(2))
    found = log_likelihood(small, prompt, continuation, seed=2)
    assert found == pytest.approx(-3 * bound.item(), rel=1e-6) and found < 0
    assert found == log_likelihood(small, prompt, continuation, seed=2), "repeatable"
    assert math.isfinite(log_likelihood(small, [], continuation))


def test_by_default_a_bound_takes_16_samples_and_a_log_likelihood_64_from_seed_0(small):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    assert torch.equal(likelihood_bound(small, tokens, generator=rng()),
                       likelihood_bound(small, tokens, None, 16, rng()))
    text = [3, 1], [4, 1, 5, 9, 2]
    assert log_likelihood(small, *text) == log_likelihood(small, *text, 64, 0)


def test_what_the_bundled_model_learnt_is_likelier_than_what_it_never_saw():
    model, tokenizer = load()
    prompt = [tokenizer.bos_token_id, *tokenizer.encode("The old sailor Mara lived near the")]
    good, bad = (log_likelihood(model, prompt, tokenizer.encode(text))
                 for text in (" harbour with a dog", " dog harbour a with"))
    assert good > bad + 5


def test_nothing_to_score_is_refused(small):
    for nothing in (lambda: log_likelihood(small, [1, 2], []),
                    lambda: log_likelihood(small, [1, 2], [3, CONFIG.mask_token_id]),
                    lambda: likelihood_bound(small, torch.ones(1, 3).long(), samples=0)):
        with pytest.raises(ValueError, match="nothing to score"):
            nothing()
    with pytest.raises(ValueError, match="65 tokens do not fit the context of 64"):
        log_likelihood(small, [1] * 60, [2] * 5)
