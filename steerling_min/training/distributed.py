"""Sums and means over all processes of a training run; with one process, plain sums and means.

Every loss here is a mean over something whose number differs from process to process (masked
tokens, chunks). The mean of the processes' means would be another loss; so numerators and
denominators are summed over all of them first, and N processes take the step that one would.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

# torchrun sets both: this process's number, and how many there are (-1: no number at all)
RANK, WORLD = (int(said) if said.isdecimal() else -1 for said in (
    os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")))


class Total(torch.autograd.Function):
    """all_reduce with a gradient: x enters every process's sum, so all their gradients add up."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return Total.forward(context, gradient)


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, same shape, in each of them.

    The gradient of a loss that all of N processes compute comes back N times as large, since each
    sends its own; DistributedDataParallel, which averages over processes, makes that right.
    """
    return Total.apply(x) if dist.is_initialized() else x


def joined(loss: Tensor, count: int) -> Tensor:
    """The mean over all processes of a loss that each has averaged over `count` things of its own.
    """
    n = loss.new_tensor(float(count))
    return total(loss * n) / total(n).clamp(min=1)


def mean(x: Tensor) -> Tensor:
    """The mean of x's elements over all processes, a scalar; 0 where none has any."""
    return joined(x.sum() / max(1, x.numel()), x.numel())


def agreed(x: float, device: torch.device) -> float:
    """The first process's x: clocks differ, and all processes must stop at the same step."""
    if not dist.is_initialized():
        return x
    value = torch.tensor(x, dtype=torch.float64, device=device)
    dist.broadcast(value, 0)
    return value.item()
