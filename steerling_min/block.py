"""The transformer block: attention and an MLP, each normalised on its way *out*."""

from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Attention, KVCache
from .config import Config
from .norm import RMSNorm


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): one half of the hidden layer gates the other."""

    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 2 * config.mlp_hidden, bias=False)  # D -> [up, gate]
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D): c_proj(up * silu(gate)), up being the first half of c_fc(x)."""
        up, gate = self.c_fc(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.c_proj(up * F.silu(gate))


class Block(nn.Module):
    """x + ln_1(attn(x)), then x + ln_2(mlp(x)).

    The norms sit on the outputs of the two branches, attention and MLP (`norm_order` "post", as in
    OLMo 2, arXiv 2501.00656). What a branch reads is not normalised; what it adds is. This is not
    the post-norm of the first transformers: there, the sum was normalised, too.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.attn = Attention(config)
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor,
                cache: KVCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D): the two sums of the class, one after the other. The other
        arguments are passed to the attention."""
        x = x + self.ln_1(self.attn(x, cos, sin, mask, cache))
        return x + self.ln_2(self.mlp(x))
