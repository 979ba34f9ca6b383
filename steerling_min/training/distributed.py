"""What several processes of a training run share: sums and means, and a model in parts. With one
process they are plain sums and means, and the model is whole: then you may skip this file.

Every loss here is a mean over something whose number differs from process to process (masked
tokens, chunks). The mean of the processes' means would be another loss; so numerators and
denominators are summed over all of them first, and N processes take the step that one would.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

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

    All N processes compute the same loss, and each sends its gradient back. `backward` adds them
    up, so the gradient is N times too large. `shard` then takes the mean over the processes: that
    divides by N again.
    """
    return Total.apply(x) if dist.is_initialized() else x


def totals(tensors: list[Tensor]) -> list[Tensor]:
    """The total of each tensor, all in one message: a message for each would take more time."""
    if not (tensors and dist.is_initialized()):
        return tensors
    flat = total(torch.cat([x.flatten() for x in tensors]))
    return [x.view_as(y) for x, y in zip(flat.split([x.numel() for x in tensors]), tensors)]


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


# ---- a model in parts ----------------------------------------------------------------------------


def shard(objective: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype,
          device: torch.device) -> None:
    """Leave each process an equal part of every parameter, its gradient and its moments (FSDP2).

    A block's parameters are put together, in dtype, when the block is computed, and freed after
    that. All others (embeddings, heads) are put together when the step begins. A gradient is
    averaged over the processes in float32, and each keeps its part. Process r of N keeps n rows of
    a matrix, from row r n on; n is the matrix's number of rows divided by N, rounded up.
    """
    mesh = init_device_mesh(device.type, (WORLD,))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)


def parts(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of x, and what a whole tensor of values has in its place. Where x is not
    sharded, these are x and values themselves."""
    if not isinstance(x, DTensor):
        return x, values
    n = -(-len(values) // WORLD)
    return x.to_local(), values[RANK * n:(RANK + 1) * n]


def put(x: Tensor, values: Tensor) -> None:
    """Copy a whole tensor into x or, where x is sharded, this process's part of it. Raises
    ValueError for values that are infinite or not a number."""
    mine, values = parts(x, values)
    if not values.isfinite().all():
        raise ValueError("a weight or moment to start from is not a finite number: its file is "
                         "damaged")
    mine.copy_(values)


def whole(x: Tensor) -> Tensor:
    """All of x, put together from its parts: every process has to ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def gathered(objective: nn.Module) -> Iterator[None]:
    """Put together the parameters outside the blocks, for a pass that is not a training step."""
    if isinstance(objective, FSDPModule):
        objective.unshard()
    yield
    if isinstance(objective, FSDPModule):
        objective.reshard()
