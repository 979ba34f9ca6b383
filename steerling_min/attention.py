"""Attention: which positions see which (mask), where they stand (rotary), attention itself."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import Config
from .norm import RMSNorm


def block_causal_mask(query: Tensor, key: Tensor, S: int) -> Tensor:
    """Which keys each query sees: those of its own block and of the blocks before it.

    Positions are absolute, counted from the start of the sequence. With S = 2 and six positions:

              key 0 1 2 3 4 5
        query 0   x x . . . .
              1   x x . . . .      a block is bidirectional inside ...
              2   x x x x . .
              3   x x x x . .      ... and causal across blocks.
              4   x x x x x x
              5   x x x x x x

    Args: query (Tq,) and key (Tk,) positions; S, the diffusion block size.
    Returns a bool tensor (Tq, Tk), True where query i may see key j: i // S >= j // S.
    """
    return query[:, None] // S >= key[None, :] // S  # (Tq, Tk)


def rotary_tables(positions: Tensor, d: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding (RoFormer, arXiv 2104.09864), in float32.

    Pair j of a head turns by position * base^(-2j/d) radians, j = 0 to d/2 - 1. The angles are laid
    out twice, [angles, angles], because pair j is made of the channels j and j + d/2 (the paper
    pairs neighbours).

    Args: positions (T,); d, the head size; base, the rotary base. Returns two (T, d) tensors on the
    device of positions; all is computed in float32.
    """
    j = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device)  # 0, 2, ... : (d/2,)
    inv_freq = 1.0 / base ** (j / d)
    angles = positions.float()[:, None] * inv_freq[None, :]  # (T, d/2)
    angles = torch.cat([angles, angles], dim=-1)             # (T, d)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of channels of x (..., T, d) by its angle; cos, sin (T, d), float32.

    x * cos + [-b, a] * sin, where x = [a, b] are the two halves of d. Computed in float32
    (`rope_full_precision`) and cast back to x's dtype.
    """
    a, b = x.chunk(2, dim=-1)  # two halves (..., T, d/2)
    turned = x * cos + torch.cat([-b, a], dim=-1) * sin  # float32, as cos and sin are
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normalised, rotated queries and keys."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.n_kv_heads = config.n_head, config.kv_heads
        self.head_dim, self.clip_qkv = config.head_dim, config.clip_qkv
        qkv = (self.n_head + 2 * self.n_kv_heads) * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, qkv, bias=False)  # D -> q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
                cache: "KVCache | None" = None) -> Tensor:
        """x (B, T, D) -> (B, T, D); cos, sin (T, d); mask (T, Tk), True where a key is seen.

        c_attn gives q, then k, then v, each as head after head. All three are clamped to +-
        clip_qkv (unless None). Then q and k are normalised over d and rotated. With a cache (this
        layer's part of it), k and v go through its `update`, and Tk is the cached positions plus T;
        else T. Query head i reads key/value head i // (H / G). The heads' outputs, side by side, go
        through c_proj.
        """
        B, T, D = x.shape
        qkv = self.c_attn(x)  # (B, T, (H + 2G) d)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        heads = qkv.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2G, T, d)
        q, k, v = heads.split([self.n_head, self.n_kv_heads, self.n_kv_heads], dim=1)
        q = rotate(self.q_norm(q), cos, sin)  # (B, H, T, d)
        k = rotate(self.k_norm(k), cos, sin)  # (B, G, T, d)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, G, Tk, d)
        # softmax(q k^T / sqrt(d)) v, the mask's False set to -inf
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.c_proj(out.transpose(1, 2).reshape(B, T, D))


# ---- for writing fast; skip it on a first reading ------------------------------------------------


@dataclass
class KVCache:
    """Keys and values of all layers, for a sequence whose blocks become final from left to right.

    No query sees beyond the end of its own block. So once the tokens of a block and of all blocks
    before it are final, their keys and values are final, too. With a cache, a forward pass runs on
    the tokens from `length` on only. It writes their keys and values behind the final ones, over
    whatever an earlier pass left there. Its queries see the final and the new ones. Only the caller
    knows which tokens are final, so the caller advances `length`: see `cache.cached_hidden`.
    """

    k: Tensor        # (n_layers, B, G, T, d); of one layer, (B, G, T, d)
    v: Tensor        # the same
    length: int = 0  # positions [0, length) are final; a multiple of S

    @classmethod
    def empty(cls, config: Config, batch: int, T: int, dtype: torch.dtype,
              device: torch.device) -> "KVCache":
        """Room for `batch` sequences of T tokens."""
        shape = (config.n_layers, batch, config.kv_heads, T, config.head_dim)
        k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(k, v)

    def of(self, layer: int) -> "KVCache":
        """One layer's part, in the same memory."""
        return KVCache(self.k[layer], self.v[layer], self.length)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, G, t, d) of one layer from `length` on; return those of positions
        [0, length + t)."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length:end] = k
        self.v[:, :, self.length:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]
