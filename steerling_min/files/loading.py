"""Turn a model's name into a model that is ready to write.

This means finding its folder, its tokenizer, a device, and the file with its concepts' names.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import Steerling
from .tokenizer import RANK_FILE, Tokenizer
from .checkpoint import require_file, weight_files
from .config_json import read_config
from .labels import DOWNLOAD_LABELS, LABELS, LABELS_REPO

TINY = Path(__file__).parent.parent / "tiny"  # the bundled checkpoint
DEVICES = ("cuda", "mps", "cpu")
SMALL = 10_000_000  # with fewer parameters, neither a GPU nor more threads make writing faster


def load(path: str | Path | None = None, device: str = "auto", dtype: torch.dtype | None = None,
         int8: bool = False) -> tuple[Steerling, Tokenizer]:
    """A model and its tokenizer, ready to generate.

    path: a checkpoint folder, a hub id in the local Hugging Face cache, or None for the bundled
    tiny model. device "auto" takes cuda, else mps, else cpu; for files of under 4 * SMALL bytes the
    cpu. dtype None is bfloat16 on cuda and float32 elsewhere. int8: keep matrices in a byte per
    weight (`files/quantize.py`).

    Raises FileNotFoundError or ValueError with one line that says what is wrong.
    """
    folder = find_checkpoint(path)
    tokenizer = load_tokenizer(folder)
    size = sum(file.stat().st_size for file in weight_files(folder))
    chosen = pick_device(device, ("cpu",) if size < 4 * SMALL else DEVICES)
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return Steerling.from_pretrained(folder, chosen, dtype, int8), tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: its own, or cl100k. ValueError where config.json disagrees."""
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
    return tokenizer


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
    folder = cached(str(name))
    if folder is None:
        labels = f" && {DOWNLOAD_LABELS}" if str(name).startswith("guidelabs/") else ""
        raise FileNotFoundError(
            f"{name} is neither a folder nor in the Hugging Face cache; to download it: "
            f"pip install -e \".[hub]\" && hf download {name}{labels}")
    return folder


def find_labels(name: str | Path | None) -> Path | None:
    """Find the label file of a model, or None. `name` means what it means to `find_checkpoint`.

    Three places are tried in this order: the file that the environment variable
    STEERLING_CONCEPTS_PATH names, a file beside the checkpoint, and, for Guide Labs' models in the
    hub's cache, the cached file of LABELS_REPO. Raises FileNotFoundError when the variable names
    a file that does not exist.
    """
    chosen = os.environ.get("STEERLING_CONCEPTS_PATH")
    if chosen:
        if not Path(chosen).is_file():
            raise FileNotFoundError(f"STEERLING_CONCEPTS_PATH: there is no file {chosen}")
        return Path(chosen)
    folder = find_checkpoint(name)
    folders = [folder, cached(LABELS_REPO) if "models--guidelabs--" in str(folder) else None]
    files = [place / (LABELS + suffix) for place in folders if place
             for suffix in (".csv", ".parquet")]
    return next((file for file in files if file.is_file()), None)


def cached(repo: str) -> Path | None:
    """The folder of a hub repository as last downloaded, or None where it never was."""
    try:
        from huggingface_hub import snapshot_download  # the hub extra; `hf download` is its command
        return Path(snapshot_download(repo, local_files_only=True))
    except (ImportError, FileNotFoundError, ValueError):  # ValueError: no name of a repository
        return None


def pick_device(name: str = "auto", auto: Sequence[str] = DEVICES) -> torch.device:
    """The torch device of that name. "auto" takes the first kind in `auto` that this machine has.

    Raises ValueError when the machine lacks the device.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    available = [kind for kind in DEVICES if present[kind]]
    if name == "auto":
        return torch.device(next(kind for kind in auto if present[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if (device is None or device.type not in available
            or device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r} is not available here; "
                         f"available: {', '.join(available)}")
    return device
