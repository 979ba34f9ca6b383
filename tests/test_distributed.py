"""Sums over processes. What two processes make of it is tested in test_train_tiny.py."""

import os
import subprocess
import sys

import torch

from steerling_min.distributed import agreed, mean, total

TWO = """
import torch, torch.distributed as dist
from steerling_min.distributed import RANK, agreed, mean, total
dist.init_process_group("gloo")
x = torch.tensor([[1.0, 2.0, 6.0], [4.0]][RANK], requires_grad=True)
assert total(x.sum()).item() == 13.0
loss = mean(x.square())  # (1 + 4 + 36 + 16) / 4
assert loss.item() == 14.25, "the mean over all elements, not the mean of two means"
loss.backward()  # each process sends its loss back, and the two are the same: twice the gradient
torch.testing.assert_close(x.grad / 2, x.detach() * 2 / 4)
assert mean(x.detach()[:0]).item() == 0.0
assert agreed(float(RANK + 5), x.device) == 5.0, "the first process says"
dist.destroy_process_group()
"""


def test_alone_they_are_the_plain_sum_and_mean():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert total(x) is x and mean(x).item() == 3.0
    assert mean(x[:0]).item() == 0.0, "the mean of nothing costs nothing"
    assert agreed(5.0, x.device) == 5.0


def test_two_processes_share_one_mean_and_its_gradient(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", str(script)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
