"""The backbone: embed, run the blocks, normalise. It knows nothing of concepts."""

import torch
from torch import Tensor, nn

from .attention import KVCache, block_causal_mask, rotary_tables
from .block import Block
from .config import Config, require
from .norm import RMSNorm


class Backbone(nn.Module):
    """Tokens to hidden states. The checkpoint calls it `transformer`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.n_layers)])
        self.ln_f = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.tok_emb.weight  # tied; used after the concept layer, not here

    def forward(self, tokens: Tensor, injections: dict[int, Tensor] | None = None,
                cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) int64 -> hidden (B, T, D), after ln_f; see `from_embeddings`."""
        return self.from_embeddings(self.tok_emb(tokens), injections, cache)

    def from_embeddings(self, x: Tensor, injections: dict[int, Tensor] | None = None,
                        cache: KVCache | None = None) -> Tensor:
        """x (B, T, D), embedded tokens -> hidden (B, T, D), after ln_f.

        injections, {layer: (B, T, D)}: each is added to the residual stream after every block whose
        1-based number is at least its layer. With a cache, x begins at position cache.length, and
        so do the injections and the result; the cache supplies what lies before.

        Raises ValueError, with both numbers, when the sequence, cached tokens included, is longer
        than the context of config.block_size tokens. (The rotary angles beyond it were never
        trained.) Also when a key of injections is not a layer, 1 to n_layers.
        """
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit the context of {self.config.block_size}")
        injections = injections or {}
        for layer in injections:
            require(1 <= layer <= self.config.n_layers, "inject_layer", layer,
                    f"1 to {self.config.n_layers}")
        keys = torch.arange(end, device=x.device)  # (Tk,) absolute positions
        queries = keys[start:]                          # (T,)
        mask = block_causal_mask(queries, keys, self.config.diff_block_size)
        cos, sin = rotary_tables(queries, self.config.head_dim, self.config.rope_base)
        for layer, block in enumerate(self.blocks):
            x = block(x, cos, sin, mask, cache and cache.of(layer))
            for inject_layer, injection in injections.items():
                if layer + 1 >= inject_layer:
                    x = x + injection
        return self.ln_f(x)
