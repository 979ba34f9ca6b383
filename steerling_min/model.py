"""Steerling: the backbone, the concept layer, and the way from tokens to logits."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .backbone import Backbone
from .config import Config, require
from .iguide import Decomposition, KnownHead, UnknownHead, decompose


@dataclass
class Output(Decomposition):
    """Everything one forward pass knows, from the hidden state to the logits."""

    hidden: Tensor  # (B, T, D), what the concept layer took apart
    logits: Tensor  # (B, T, V), composed . tok_emb


class Steerling(nn.Module):
    """The whole model, under the parameter names of the published checkpoint.

        transformer                tokens -> hidden states              backbone.py
        known_head, unknown_head   hidden -> known, unknown, epsilon    iguide.py
        transformer.lm_head        composed -> logits                   the token embedding, again
    """

    def __init__(self, config: Config):
        """Random weights: N(0, 0.02); norms 1. The last matrix of each branch, c_proj, is scaled by
        1/sqrt(2 n_layers)."""
        super().__init__()
        self.config = config
        self.transformer = Backbone(config)
        self.known_head = KnownHead(config)
        self.unknown_head = UnknownHead(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=initial_std(name, config.n_layers))

    @property
    def device(self) -> torch.device:
        return self.transformer.ln_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations (int8 weights have another)."""
        return self.transformer.ln_f.weight.dtype

    def forward(self, tokens: Tensor, known: dict[int, float] | None = None,
                unknown: dict[int, float] | None = None, epsilon: str = "drop",
                positions: Tensor | None = None, injection: Tensor | None = None,
                inject_layer: int = 1) -> Output:
        """tokens (B, T) int64 -> Output, the logits of every position and how they came about.

        known, unknown, epsilon, positions: an intervention on concept weights (`iguide.decompose`).
        injection (B, T, D): added to the residual stream after every block from inject_layer on,
        counted from 1.

        Raises ValueError for tokens, or an intervention, that are not valid.
        """
        require_tokens("tokens", tokens, self.config)
        injections = {} if injection is None else {inject_layer: injection}
        hidden = self.transformer(tokens, injections)  # (B, T, D)
        parts = decompose(hidden, self.known_head, self.unknown_head,
                          known, unknown, epsilon, positions)
        return Output(**vars(parts), hidden=hidden, logits=self.transformer.lm_head(parts.composed))

    @torch.no_grad()
    def embed(self, tokens: Tensor, kind: str = "composed", pooling: str = "mean") -> Tensor:
        """Embed texts: tokens (B, T) int64 -> (B, D), or (B, T, D) with pooling "none".

        kind: which state, "hidden", "composed", "known" or "unknown". pooling: "mean" over the
        tokens, the "last" or the "first" token, or "none". Raises ValueError for another word.
        """
        kinds, pools = ("hidden", "composed", "known", "unknown"), ("mean", "last", "first", "none")
        require(kind in kinds, "kind", kind, ", ".join(kinds))
        require(pooling in pools, "pooling", pooling, ", ".join(pools))
        require_tokens("tokens", tokens, self.config)
        hidden = self.transformer(tokens)
        x = hidden if kind == "hidden" else getattr(
            decompose(hidden, self.known_head, self.unknown_head), kind)  # (B, T, D)
        return {"mean": x.mean(1), "last": x[:, -1], "first": x[:, 0], "none": x}[pooling]

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, int8: bool = False) -> "Steerling":
        """Read config.json and the weights of a checkpoint folder, in either published layout.

        int8: keep matrices in a byte per weight (`quantize.py`).
        Raises FileNotFoundError or ValueError with one line that says what is wrong.
        """
        from .files.checkpoint import load_model  # here: what reads files imports this module
        return load_model(Path(folder), torch.device(device), dtype, int8)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json under the official names and the hub's layout."""
        from .files.checkpoint import save_model
        save_model(self, Path(folder))


def initial_std(name: str, n_layers: int) -> float:
    """The standard deviation of a matrix's first weights, by its name."""
    return 0.02 / math.sqrt(2 * n_layers) if name.endswith("c_proj.weight") else 0.02


def require_tokens(name: str, tokens: Tensor, config: Config, least: int = 1) -> None:
    """Raise ValueError unless tokens (B, T) are ids of the vocabulary, B >= 1 and T >= least."""
    if (not isinstance(tokens, Tensor) or tokens.dim() != 2 or len(tokens) == 0
            or tokens.shape[1] < least or tokens.dtype not in (torch.int32, torch.int64)):
        got = (f"{tokens.dtype} of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else
               type(tokens).__name__)
        raise ValueError(f"{name} must be a tensor of whole numbers, of shape (B, T), B >= 1 and T "
                         f">= {least}; got {got}")
    if ((tokens < 0) | (tokens >= config.vocab_size)).any():
        raise ValueError(f"{name}: a token id is outside the vocabulary of {config.vocab_size}")
