"""RMSNorm, the only normalisation in the model."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale each vector to root mean square 1, then by a learnt weight (arXiv 1910.07467).

    y = x * rsqrt(mean(x^2) + eps) * weight over the last dimension; all of it computed in float32,
    then returned in x's dtype. Unlike LayerNorm it neither centres nor adds a bias.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> (..., dim)."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)
