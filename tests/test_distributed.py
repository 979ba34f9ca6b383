"""Sums over processes. What two processes make of it is tested in test_train_tiny.py."""

import math
import runpy

import sys

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from steerling_min.training import distributed
from steerling_min.training.distributed import agreed, mean, put, total


def test_alone_they_are_the_plain_sum_and_mean():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert total(x) is x and mean(x).item() == 3.0
    assert mean(x[:0]).item() == 0.0, "the mean of nothing costs nothing"
    assert agreed(5.0, x.device) == 5.0


def test_blocks_compute_in_the_runs_dtype_and_gradients_are_averaged_in_float32(monkeypatch):
    found = {}
    monkeypatch.setattr(distributed, "init_device_mesh", lambda *args: "mesh")
    monkeypatch.setattr(distributed, "fully_shard",
                        lambda module, mesh, mp_policy=None: found.update({module: mp_policy}))
    block, whole = torch.nn.Linear(2, 2), torch.nn.Linear(3, 3)
    distributed.shard(whole, [block], torch.bfloat16, torch.device("cpu"))
    assert list(found) == [block, whole], "the blocks first, then what is left"
    assert (found[block].param_dtype, found[block].reduce_dtype) == (torch.bfloat16, torch.float32)
    assert found[whole] is None, "embeddings and heads stay in float32"


def test_wrong_words_in_the_environment_are_no_number(monkeypatch):
    monkeypatch.setenv("RANK", "abc")
    monkeypatch.setenv("WORLD_SIZE", "0")
    found = runpy.run_path(distributed.__file__)
    assert found["RANK"] == -1 and found["WORLD"] == 0, "train_tiny.py says so, in a line"


def in_each_of_two(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    x = torch.tensor([[1.0, 2.0, 6.0], [4.0]][rank], requires_grad=True)
    assert total(x.sum()).item() == 13.0
    loss = mean(x.square())  # (1 + 4 + 36 + 16) / 4
    assert loss.item() == 14.25, "the mean over all elements, not the mean of two means"
    loss.backward()  # each process sends its loss back, and both are the same: twice the gradient
    torch.testing.assert_close(x.grad / 2, x.detach() * 2 / 4)
    assert mean(x.detach()[:0]).item() == 0.0
    assert mean(x.detach() if rank == 0 else x.detach()[:0]).item() == 3.0, (
        "a process that has nothing counts as nothing")
    mine = x.detach().sum()
    total(mine)
    assert mine.item() == [9.0, 4.0][rank], "what is summed is left as it is"
    assert agreed(float(rank + 5), x.device) == 5.0, "the first process says"
    assert agreed(1e9 + 1 / 8, x.device) == 1e9 + 1 / 8, "a clock's seconds need float64"
    dist.destroy_process_group()


def test_two_processes_share_one_mean_and_its_gradient(tmp_path):
    method = "spawn"
    if sys.platform != "win32":
        from forks import FORKS  # not forks of this process: autograd may have run in it
        method = FORKS.get_start_method()
    multiprocessing.start_processes(in_each_of_two, (str(tmp_path),), nprocs=2, start_method=method)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_finite_number_is_not_trained_on(value):
    with pytest.raises(ValueError, match="not a finite number"):
        put(torch.zeros(2), torch.tensor([1.0, value]))
