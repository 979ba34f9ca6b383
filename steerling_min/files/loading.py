"""From a name to a model that is ready to write: its folder, its tokenizer, its device."""

import os
import re
from pathlib import Path

import torch

from ..model import Steerling
from .tokenizer import RANK_FILE, Tokenizer
from .checkpoint import require_file
from .config_json import read_config

TINY = Path(__file__).parent.parent / "tiny"  # the bundled checkpoint


def load(path: str | Path | None = None, device: str = "auto", dtype: torch.dtype | None = None,
         int8: bool = False) -> tuple[Steerling, Tokenizer]:
    """A model and its tokenizer, ready to generate.

    path: a checkpoint folder, a hub id in the local Hugging Face cache, or None for the bundled
    tiny model. device "auto" takes cuda, else mps, else cpu. dtype None is bfloat16 on cuda and
    float32 elsewhere. int8: keep matrices in a byte per weight (`files/quantize.py`).

    Raises FileNotFoundError or ValueError with one line that says what is wrong.
    """
    folder = find_checkpoint(path)
    config = read_config(require_file(folder, "config.json"))
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


def find_checkpoint(name: str | Path | None) -> Path:
    """The folder that `name` means: None the bundled model, a folder, or a cached hub id.

    Raises FileNotFoundError; for a hub id that is not cached it gives the download command.
    """
    if name is None:
        return TINY
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise FileNotFoundError(f"no checkpoint folder at {name}")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    repo = cache / f"models--{str(name).replace('/', '--')}"
    if not (repo / "refs" / "main").is_file():
        raise FileNotFoundError(
            f"{name} is neither a folder nor in the Hugging Face cache ({cache}); to download it: "
            f"pip install -e \".[hub]\" && hf download {name}")
    return repo / "snapshots" / (repo / "refs" / "main").read_text().strip()


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
