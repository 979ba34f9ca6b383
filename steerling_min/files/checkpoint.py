"""Checkpoints: check every tensor of a folder against the model, then read; save atomically.

A folder holds config.json and either model.safetensors or shards with an index. Names, shapes and
dtypes stand in the files' headers. They are checked before the first weight is read.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..model import Steerling
from .config_json import config_to_dict, read_config, read_json
from .quantize import quantize, quantize_rows
from .writing import replacing

INDEX = "model.safetensors.index.json"
# The most bytes that a file of a written checkpoint holds. A single larger tensor may exceed this.
SHARD = 5 * 2**30
TOK_EMB, LM_HEAD = "transformer.tok_emb.weight", "transformer.lm_head.weight"  # one matrix, tied


def require_file(folder: Path, name: str) -> Path:
    """folder / name, or a FileNotFoundError that says which of the two is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no checkpoint folder at {folder}")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}")
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint: the index's, or model.safetensors."""
    if not (folder / INDEX).is_file():
        return [require_file(folder, "model.safetensors")]
    try:
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is not a weight index: {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{folder / INDEX} points outside its folder: {name!r}")
    return [require_file(folder, name) for name in names]


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtypes and shapes of the tensors in a safetensors file: {name: (dtype, shape)}.

    The library reads them from the file's header, and refuses a truncated or malformed file.
    """
    try:
        with safe_open(file, framework="pt") as f:
            tensors = {name: f.get_slice(name) for name in f.keys()}
            return {name: (x.get_dtype(), x.get_shape()) for name, x in tensors.items()}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None


def match_tensors(model: nn.Module, files: list[Path]) -> dict[str, Path]:
    """Find the file that stores each of the model's tensors: {name: file}. Reads only headers.

    tok_emb and lm_head are one matrix: a checkpoint may store it under either name, or under both.
    Raises ValueError, with the tensor's name, when a tensor is missing, unexpected, stored twice,
    of the wrong shape or not floating point.
    """
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, Path] = {}
    for file in files:
        for name, (dtype, shape) in read_header(file).items():
            if name not in expected:
                raise ValueError(f"{file} has an unexpected tensor {name}")
            if name in found:
                raise ValueError(f"{name} is stored twice: in {found[name].name} and {file.name}")
            if shape != expected[name]:
                raise ValueError(f"{name} in {file} has shape {shape}; the config makes it "
                                 f"{expected[name]}")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{name} in {file} has dtype {dtype}, not a float")
            found[name] = file
    tied = {TOK_EMB, LM_HEAD}
    have = found.keys() | tied if found.keys() & tied else found.keys()
    for name in expected:
        if name not in have:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
    return found


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinitely many where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu" and Path("/proc/meminfo").is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else math.inf  # not every kernel says
    return math.inf


def require_memory(model: nn.Module, device: torch.device, dtype: torch.dtype, int8: bool) -> None:
    """Raise ValueError, with the gigabytes missing, when the weights cannot fit on the device."""
    need = sum(parameter.numel() * (1 if int8 and parameter.dim() == 2 else dtype.itemsize)
               for parameter in model.parameters())
    free = free_memory(device)
    if need > free:
        raise ValueError(
            f"the weights take {need / 1e9:.1f} GB in {'int8' if int8 else dtype} and "
            f"{free / 1e9:.1f} GB are free on {device}: {(need - free) / 1e9:.1f} GB short; "
            "bfloat16 takes half of float32, and --quantize int8 half of that")


class Unfilled(TorchFunctionMode):
    """Within it no first weights are drawn (`nn.init.normal_` does nothing). On the meta device
    there are no numbers to draw, and PyTorch would import its compiler, a second's work, for that.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not nn.init.normal_:
            return function(*args, **(kwargs or {}))


def empty_model(folder: Path) -> Steerling:
    """The model in a checkpoint folder, on the meta device: it has shapes, and no numbers yet."""
    config = read_config(require_file(folder, "config.json"))
    layers = {name.split(".")[2] for file in weight_files(folder) for name in read_header(file)
              if name.startswith("transformer.blocks.")}
    if config.n_layers > len(layers):  # there may be a billion to build
        raise ValueError(f"{folder / 'config.json'} says n_layers = {config.n_layers}; the weights "
                         f"have {len(layers)} layers")
    try:
        with torch.device("meta"), Unfilled():
            model = Steerling(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: its sizes are too large: "
                         + str(error).partition("\n")[0]) from None
    return model


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, int8: bool) -> Steerling:
    """The model in a checkpoint folder (see `Steerling.from_pretrained`), filled tensor by tensor.

    The files are memory-mapped. On the CPU, in the stored dtype, the parameters *are* the mapped
    file: nothing is copied. Each tensor is read once, to see that its numbers are finite. With int8
    each matrix is quantized as soon as it is read.
    """
    model = empty_model(folder)
    found = match_tensors(model, weight_files(folder))
    require_memory(model, device, dtype, int8)
    if int8:
        quantize(model)  # shapes only: this model has no numbers yet
    place = "cpu" if device.type == "cpu" else str(device)  # safetensors knows no "cpu:0"
    state = {}
    for file in sorted(set(found.values())):
        with safe_open(file, framework="pt", device=place) as f:
            for name in f.keys():
                tensor = f.get_tensor(name).to(dtype)
                if not torch.stack(tensor.aminmax()).isfinite().all():
                    raise ValueError(f"{name} in {file} has values that are not finite in "
                                     f"{dtype}: the file is damaged, or its training diverged")
                if int8 and tensor.dim() == 2:
                    stem = name.removesuffix("weight")
                    state[stem + "int8"], state[stem + "scale"] = quantize_rows(tensor)
                else:
                    state[name] = tensor
    for name in [name for name in state if name.startswith("transformer.lm_head.")]:
        tensor, twin = state.pop(name), name.replace("lm_head", "tok_emb")
        if not torch.equal(tensor, state.setdefault(twin, tensor)):
            raise ValueError(f"{folder} stores different matrices for {TOK_EMB} and {LM_HEAD}, "
                             "which this model ties")
    model.load_state_dict(state, strict=False, assign=True)
    tie(model)
    return model.eval()


def tie(model: Steerling) -> None:
    """Make lm_head and tok_emb hold one and the same matrix."""
    lm_head, tok_emb = model.transformer.lm_head, model.transformer.tok_emb
    for name, tensor in [*tok_emb.named_parameters(), *tok_emb.named_buffers()]:
        setattr(lm_head, name, tensor)


def save_model(model: Steerling, folder: Path) -> None:
    """Write weights and config.json; each file appears whole or not at all."""
    if any(tensor.dtype == torch.int8 for tensor in model.state_dict().values()):
        raise ValueError("a quantized model is not saved: its weights are in the checkpoint that "
                         "it was read from")
    save_tensors(model, (x.detach().contiguous() for x in model.parameters()), folder)


def parts_of(model: Steerling) -> list[list[str]]:
    """The parameters' names, shared out over the files of a checkpoint in their order."""
    parts: list[list[str]] = [[]]
    room = SHARD
    for name, x in model.named_parameters():
        if x.nbytes > room and parts[-1]:
            parts, room = [*parts, []], SHARD
        parts[-1].append(name)
        room -= x.nbytes
    return parts


def save_tensors(model: Steerling, tensors: Iterator[Tensor], folder: Path) -> None:
    """Write a model's config.json, and `tensors` as its weights.

    `tensors` are the model's parameters, in their order; the tied matrix comes once. They become
    model.safetensors. If they take more than SHARD bytes, they become several files and an index;
    only one file's tensors are in memory at a time. Raises ValueError when one file would be
    written into a folder that holds a sharded checkpoint.
    """
    parts = parts_of(model)
    if len(parts) == 1 and (folder / INDEX).exists():
        raise ValueError(f"{folder} holds a sharded checkpoint ({INDEX}); save to another folder")
    files = ["model.safetensors"] if len(parts) == 1 else [
        f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    folder.mkdir(parents=True, exist_ok=True)
    # No file takes its place before all are written. Then the weights do so first.
    with ExitStack() as stack:
        config = stack.enter_context(replacing(folder / "config.json"))
        config.write_text(json.dumps(config_to_dict(model.config), indent=2) + "\n")
        if len(parts) > 1:
            index = {"metadata": {"total_size": sum(x.nbytes for x in model.parameters())},
                     "weight_map": {name: file for file, names in zip(files, parts)
                                    for name in names}}
            stack.enter_context(replacing(folder / INDEX)).write_text(json.dumps(index, indent=2))
        for file, names in zip(files, parts):
            weights = stack.enter_context(replacing(folder / file))
            save_file(dict(zip(names, islice(tensors, len(names)))), weights,
                      metadata={"format": "pt"})
            shutil.copymode(config, weights)  # safetensors' files are the owner's alone
