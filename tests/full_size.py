"""Does a full-size checkpoint really load? Run by hand: needs 17 GB of disk and about 19 GB free.

    python tests/full_size.py FOLDER

Writes a random 8B checkpoint into FOLDER, sharded as the official converter does it (four shards,
16.8 GB in bfloat16, one tensor in memory at a time), unless it is already there, then runs
`sample.py` on it on the CPU and reports the peak memory against the size of the weights.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from steerling_min import Config, Steerling
from steerling_min.files.checkpoint import INDEX, LM_HEAD
from steerling_min.files.config_json import config_to_dict

ROOT = Path(__file__).parent.parent
SHARD_BYTES = 5 * 2**30  # the converter starts a new shard when this would be exceeded


def plan_shards(shapes: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """Tensors in order, in shards of at most SHARD_BYTES of bfloat16."""
    shards, size = [{}], 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def write_shard(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of random bfloat16 tensors, one at a time: header length, header, data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                tensor.fill_(1.0)
            else:
                tensor.normal_(std=0.02)
            f.write(tensor.view(torch.uint8).numpy().data)


def write_checkpoint(folder: Path, config: Config) -> None:
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in Steerling(config).state_dict().items()
                  if name != LM_HEAD}
    shards = plan_shards(shapes)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        print(f"writing {name}: {len(shard)} tensors", flush=True)
        write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_dict(config), indent=2))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if not (folder / "config.json").exists():
        write_checkpoint(folder, Config.steerling_8b())
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    command = [sys.executable, ROOT / "sample.py", "--model", folder, "--prompt", "The old sailor",
               "--max-new-tokens", "2", "--dtype", "bfloat16", "--device", "cpu", "--seed", "0"]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"weights {weights / 1e9:.2f} GB, peak memory {peak / 1e9:.2f} GB, "
          f"ratio {peak / weights:.3f}")
    sys.exit(os.waitstatus_to_exitcode(status) or peak > 1.1 * weights)


if __name__ == "__main__":
    main()
