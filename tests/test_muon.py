"""Muon: orthogonal steps for the groups that ask for them, AdamW for all else."""

import math

import pytest
import torch
from conftest import close

from steerling_min.training import muon
from steerling_min.training.muon import SIZE, Muon, orthogonal


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)], ids=str)
def test_orthogonal_keeps_the_directions_and_makes_their_sizes_about_equal(shape):
    U, _ = torch.linalg.qr(torch.randn(shape[0], 8, generator=rng()))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 8, generator=rng(1)))
    sizes = torch.tensor([100.0, 50, 20, 10, 5, 4, 3, 2])
    found = U.T @ orthogonal(U * sizes @ V.T) @ V  # diagonal, if the directions are the same
    close(found - found.diag().diag(), torch.zeros(8, 8), "each direction stays by itself")
    assert (found.diag() > 0.65).all() and (found.diag() < 1.25).all(), (
        f"the sizes were 100 to 2; five rounds bring all of them near 1, not to {found.diag()}")


def test_orthogonal_of_nothing_is_nothing():
    assert (orthogonal(torch.zeros(4, 6)) == 0).all(), "a gradient of 0 must not become NaN"


def steps(gradients, decay=0.0, orthogonal=True, lr=0.1):
    """Where a matrix of ones is after a step along each gradient."""
    p = torch.nn.Parameter(torch.ones(gradients[0].shape))
    optimizer = Muon([{"params": [p], "orthogonal": orthogonal}], lr=lr, weight_decay=decay,
                     betas=(0.9, 0.95))
    if orthogonal:
        optimizer.state[p] = {"exp_avg": torch.zeros_like(p)}
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8)], ids=str)
def test_the_size_of_a_step_follows_from_the_learning_rate_alone(shape):
    gradient = torch.randn(shape, generator=rng())
    (small, _), (large, _) = steps([0.001 * gradient]), steps([1000 * gradient])
    close(small, large, "only the gradient's directions count")
    size = (small - 1).square().mean().sqrt().item()
    assert size == pytest.approx(0.1 * SIZE, rel=0.2), "root mean square: lr * SIZE, as AdamW's"
    assert ((small - 1) * gradient).sum() < 0, "downhill"


def test_weight_decay_shrinks_the_matrix_and_is_no_part_of_the_step():
    gradient = torch.randn(12, 12, generator=rng())
    close(steps([gradient], decay=0.5)[0], steps([gradient])[0] - 0.1 * 0.5,
          "p (1 - lr decay), then the step")


def test_the_running_mean_of_gradients_is_kept_between_steps():
    first, second = torch.randn(2, 12, 12, generator=rng())
    _, state = steps([first, second])
    mean = 0.95 * 0.05 * first + 0.05 * second
    close(state["exp_avg"], mean, "19 parts of the mean so far, one of the new gradient")
    one, _ = steps([first])
    two, _ = steps([first, second])
    ahead = 0.05 * second + 0.95 * mean
    close(two, one - 0.1 * SIZE * math.sqrt(12) * orthogonal(ahead), "Nesterov: the mean, and once "
          "more a part of the gradient", atol=1e-5)


@pytest.mark.parametrize("n, processes", [(3, 2), (2, 4), (5, 3)])
def test_every_matrix_is_made_orthogonal_by_one_of_the_processes(monkeypatch, n, processes):
    """Each is asked alone: what the others would add to its sums is missing."""
    monkeypatch.setattr(muon, "totals", lambda tensors: tensors)
    monkeypatch.setattr(muon, "WORLD", processes)
    moved = torch.zeros(n)
    for rank in range(processes):
        monkeypatch.setattr(muon, "RANK", rank)
        matrices = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(n)]
        optimizer = Muon([{"params": matrices, "orthogonal": True}], lr=0.1, weight_decay=0.0)
        for p in matrices:
            p.grad, optimizer.state[p] = torch.eye(4), {"exp_avg": torch.zeros(4, 4)}
        optimizer.step()
        moved += torch.tensor([float((p != 1).any()) for p in matrices])
    assert moved.tolist() == [1.0] * n


def test_other_groups_take_adamws_steps():
    gradients = torch.randn(3, 12, 12, generator=rng())
    p = torch.nn.Parameter(torch.ones(12, 12))
    adamw = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    for gradient in gradients:
        p.grad = gradient
        adamw.step()
    close(steps(gradients, 0.1, orthogonal=False)[0], p, "untouched by Muon")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has one since 2.9")
def test_a_step_is_that_of_pytorchs_muon():
    """PyTorch's computes in bfloat16, so the last digits differ."""
    gradients = torch.randn(3, 12, 12, generator=rng())
    p = torch.nn.Parameter(torch.ones(12, 12))
    theirs = torch.optim.Muon([p], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        p.grad = gradient.clone()
        theirs.step()
    close(steps(gradients, 0.1)[0], p, "an independent implementation", atol=0.01)
