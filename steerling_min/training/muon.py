"""Muon: AdamW, but some matrices (`train_tiny.make_optimizer` says which) take orthogonal steps.

A matrix's gradient is a sum of outer products, and a few of them are far larger than the rest. A
step along it moves the matrix mainly in those few directions. Muon writes the running mean of the
gradients as U S V^T and steps along U V^T: the same directions, all equally large. So what is rare
is learnt as fast as what is frequent. After 800 steps the tiny world's model has a held-out loss of
2.07, and with AdamW alone one of 2.84.

Source: Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024); for the
size of a step, arXiv 2502.16982. How the 8B was optimized is not published.
"""

import torch
from torch import Tensor

from .distributed import RANK, WORLD, parts, totals

MOMENTUM = 0.95
SIZE = 0.2  # root mean square of a step's numbers, per unit of learning rate: about AdamW's


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T for x = U S V^T, (m, n): singular values that were not tiny come out as 0.7 to
    1.2, those that were 0 stay 0.

    x is divided by its norm (the root of the sum of squares), so that no singular value is above 1.
    Then, five times, each singular value s becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5
    (Newton-Schulz). No decomposition is needed for that, only products: s^3 is x x^T x, s^5 is
    (x x^T)^2 x. The square x x^T is the smaller one: a matrix with m > n is transposed before.
    """
    if len(x) > x.shape[1]:
        return orthogonal(x.T).T
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        square = x @ x.T  # (m, m)
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x


class Muon(torch.optim.AdamW):
    """AdamW, and orthogonal steps for the groups of matrices that have "orthogonal": True.

    With the gradient g, such a matrix (m, n) takes the step

        mean = 0.95 mean + 0.05 g
        p    = (1 - lr decay) p - lr 0.2 sqrt(max(m, n)) orthogonal(0.05 g + 0.95 mean)
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        inside = [(p, group) for group in self.param_groups if group["orthogonal"]
                  for p in group["params"]]
        ahead = [torch.zeros(p.shape, device=p.device) for p, _ in inside]
        for (p, _), x in zip(inside, ahead):
            mean = self.state[p]["exp_avg"].lerp_(p.grad, 1 - MOMENTUM)
            mine, place = parts(p.grad.lerp(mean, MOMENTUM), x)  # Nesterov's momentum
            place.copy_(mine)
            p.grad = None  # AdamW passes by a parameter without a gradient
        # Zero where another process has the numbers: the sum over all is the whole. Then each
        # process makes its share of the steps orthogonal, and the sum has every step.
        steps = totals([orthogonal(x) if i * WORLD // len(ahead) == RANK else torch.zeros_like(x)
                        for i, x in enumerate(totals(ahead))])
        for (p, group), step in zip(inside, steps):
            mine, step = parts(p, SIZE * max(p.shape) ** 0.5 * step)
            mine.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)
        super().step()
