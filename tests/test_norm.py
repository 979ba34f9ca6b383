"""RMSNorm: size without direction."""

import torch
from conftest import close

from steerling_min.norm import RMSNorm


def test_every_vector_comes_out_with_root_mean_square_one():
    y = RMSNorm(64, eps=1e-12)(torch.randn(3, 5, 64) * 7 + 2)
    rms = y.square().mean(-1).sqrt()
    close(rms, torch.ones(3, 5), "divide by sqrt(mean(x^2)), not the norm")


def test_the_mean_is_not_subtracted():
    y = RMSNorm(8, eps=1e-12)(torch.full((1, 8), 3.0))
    assert (y > 0.99).all(), "RMSNorm does not centre: a constant stays (LayerNorm differs)"


def test_eps_is_added_to_the_mean_square_inside_the_root():
    y = RMSNorm(4, eps=3.0)(torch.ones(1, 4))
    close(y, torch.full((1, 4), 0.5), "1 / sqrt(1 + 3) = 0.5")


def test_the_weight_scales_each_channel():
    norm = RMSNorm(4, eps=1e-12)
    norm.weight.data = torch.tensor([1.0, 2.0, 0.0, -1.0])
    close(norm(torch.ones(1, 4)), norm.weight.data[None], "1 times the channel's own weight")


def test_half_precision_is_normalised_in_float32():
    x = torch.randn(2, 64).bfloat16() * 300
    norm = RMSNorm(64, eps=1e-5)
    norm.weight.data = torch.randn(64)
    y = norm.bfloat16()(x)
    exact = norm.float()(x.float())  # bfloat16 weights are exact in float32
    assert y.dtype == torch.bfloat16, "the result has the input's dtype"
    assert torch.equal(y, exact.bfloat16()), "square, mean, root and weight in float32; round once"
