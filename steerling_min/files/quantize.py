"""Weight-only int8: one byte per weight instead of two or four, so that the 8B fits a 16 GB card.

Every row of a matrix gets one scale, its largest absolute value over 127:

    weight[i, j] ≈ int8[i, j] * scale[i],    |error| <= scale[i] / 2

Activations are not quantized. For a matrix product, a slice of rows at a time is widened to floats
again and then used. This saves memory and costs time. (It is per-row symmetric quantisation as in
LLM.int8(), arXiv 2208.07339, without the split into inliers and outliers.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8192  # rows that are widened at a time


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (rows, columns) -> int8 (rows, columns) and scale (rows, 1) in weight's dtype."""
    int8, scales = torch.empty_like(weight, dtype=torch.int8), []
    for part, out in zip(weight.split(ROWS), int8.split(ROWS)):
        # a row of zeros has any scale
        scale = (part.abs().amax(1, keepdim=True).float() / 127).clamp(min=1e-12).to(weight.dtype)
        out.copy_((part.float() / scale.float()).round().clamp(-127, 127))
        scales.append(scale)
    return int8, torch.cat(scales)


class Int8(nn.Module):
    """A matrix in int8, in the place of an nn.Linear (without bias) or of an nn.Embedding."""

    int8: Tensor   # (rows, columns)
    scale: Tensor  # (rows, 1)

    def __init__(self, weight: Tensor):
        super().__init__()
        int8, scale = quantize_rows(weight)
        self.register_buffer("int8", int8)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        """The matrix, widened anew at each use: for what reads the weights themselves."""
        return self.int8 * self.scale


class Int8Linear(Int8):
    def forward(self, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        slices = zip(self.int8.split(ROWS), self.scale.split(ROWS))
        return torch.cat([F.linear(x, int8 * scale) for int8, scale in slices], dim=-1)


class Int8Embedding(Int8):
    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., columns)."""
        return self.int8[ids] * self.scale[ids]


@torch.no_grad()
def quantize(model: nn.Module) -> None:
    """Replace every nn.Linear and nn.Embedding by its Int8 module, in place.

    Each original is freed as it is replaced. Two modules that shared a matrix then have one each;
    `checkpoint.tie` makes them share again.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child.weight))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, Int8Embedding(child.weight))
