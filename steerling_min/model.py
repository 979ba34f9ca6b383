"""Steerling: the backbone, the concept layer, and the way from tokens to logits."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .backbone import Backbone
from .config import Config
from .iguide import Decomposition, KnownHead, UnknownHead, decompose
from .tokenizer import RANK_FILE, Tokenizer


@dataclass
class Output(Decomposition):
    """Everything one forward pass knows, from the hidden state to the logits."""

    hidden: Tensor  # (B, T, D), what the concept layer took apart
    logits: Tensor  # (B, T, V), composed . tok_emb


class Steerling(nn.Module):
    """The whole model. Its parameter names are those of the published checkpoint."""

    def __init__(self, config: Config):
        """Random weights: N(0, 0.02), what ends a branch scaled by 1/sqrt(2 n_layers), norms 1."""
        super().__init__()
        self.config = config
        self.transformer = Backbone(config)
        self.known_head = KnownHead(config)
        self.unknown_head = UnknownHead(config)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith("c_proj.weight")
                scale = 1 / math.sqrt(2 * config.n_layers) if ends_branch else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    @property
    def device(self) -> torch.device:
        return self.transformer.ln_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.transformer.ln_f.weight.dtype

    def forward(self, tokens: Tensor, known: dict[int, float] | None = None,
                unknown: dict[int, float] | None = None, epsilon: str = "drop",
                positions: Tensor | None = None, injection: Tensor | None = None,
                inject_layer: int = 1) -> Output:
        """tokens (B, T) int64 -> Output, the logits of every position and how they came about.

        known, unknown, epsilon, positions: an intervention on concept weights (`iguide.decompose`).
        injection (B, T, D): added to the residual stream after every block from inject_layer on,
        counted from 1.
        """
        injections = {} if injection is None else {inject_layer: injection}
        hidden = self.transformer(tokens, injections)  # (B, T, D)
        parts = decompose(hidden, self.known_head, self.unknown_head,
                          known, unknown, epsilon, positions)
        return Output(**vars(parts), hidden=hidden,
                      logits=self.transformer.lm_head(parts.composed))

    @torch.no_grad()
    def embed(self, tokens: Tensor, kind: str = "composed", pooling: str = "mean") -> Tensor:
        """Embed texts: tokens (B, T) int64 -> (B, D), or (B, T, D) with pooling "none".

        kind: which state, "hidden", "composed", "known" or "unknown". pooling: "mean" over the
        tokens, the "last" or the "first" token, or "none". Raises ValueError for another word.
        """
        pools = {"mean": lambda x: x.mean(1), "last": lambda x: x[:, -1],
                 "first": lambda x: x[:, 0], "none": lambda x: x}
        for name, value, supported in (("kind", kind, ("hidden", "composed", "known", "unknown")),
                                       ("pooling", pooling, tuple(pools))):
            if value not in supported:
                raise ValueError(f"{name} = {value!r} is not supported; supported: "
                                 + ", ".join(supported))
        if tokens.shape[1] == 0:
            raise ValueError("there are no tokens to embed")
        return pools[pooling](getattr(self(tokens), kind))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, int8: bool = False) -> "Steerling":
        """Read config.json and the weights of a checkpoint folder, in either published layout.

        int8: keep matrices in a byte per weight (`quantize.py`).
        Raises FileNotFoundError or ValueError with one line that says what is wrong.
        """
        folder = Path(folder)
        config = Config.load(checkpoint.require_file(folder, "config.json"))
        with torch.device("meta"):  # shapes only: nothing is allocated until it is read
            model = cls(config)
        checkpoint.load_weights(model, folder, torch.device(device), dtype, int8)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.json under the official names and the hub's layout."""
        checkpoint.save(self, Path(folder))


def load(path: str | Path | None = None, device: str = "auto", dtype: torch.dtype | None = None,
         int8: bool = False) -> tuple[Steerling, Tokenizer]:
    """A model and its tokenizer, ready to generate.

    path: a checkpoint folder, a hub id in the local Hugging Face cache, or None for the bundled
    tiny model. device "auto" takes cuda, else mps, else cpu. dtype None is bfloat16 on cuda and
    float32 elsewhere. int8: keep matrices in a byte per weight (`quantize.py`).

    Raises FileNotFoundError or ValueError with one line that says what is wrong.
    """
    folder = checkpoint.find_checkpoint(path)
    config = Config.load(checkpoint.require_file(folder, "config.json"))
    instruct = config.eot_id is not None
    if (folder / RANK_FILE).is_file():
        tokenizer = Tokenizer.from_file(folder / RANK_FILE, instruct)
    else:
        tokenizer = Tokenizer.cl100k(instruct)
    for name, token_id in {"vocab_size": config.vocab_size, **config.token_ids}.items():
        if getattr(tokenizer, name) != token_id:
            raise ValueError(f"{folder / 'config.json'} says {name} = {token_id}; the tokenizer "
                             f"has {getattr(tokenizer, name)}")
    chosen = pick_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return Steerling.from_pretrained(folder, chosen, dtype, int8), tokenizer


def pick_device(name: str = "auto") -> torch.device:
    """The torch device of that name; "auto" is cuda > mps > cpu. ValueError if it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    available = [kind for kind in present if present[kind]]
    if name == "auto":
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (device is None or device.type not in available
            or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available here; "
                         f"available: {', '.join(available)}")
    return device
