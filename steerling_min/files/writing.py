"""Files that are written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor


def target(file: Path) -> Path:
    """Follow links to the file that is to be written.

    Raises ValueError when its folder does not exist, or when it is itself a folder or a device.
    """
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is a folder or a device: give the name of a file to write")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} to write {file.name} into")
    return file


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Where to write `file`: a path that takes its place only when all of it has been written.

    The path lies in a hidden folder beside the file. If a process is killed and leaves that folder
    behind, the next process that writes the file removes it.
    """
    file = target(file)
    folder = file.with_name(f".{file.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / file.name
        os.replace(folder / file.name, file)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # this has been said, of a file that is written together with this one
        raise OSError(f"{file} was not written; what stood there before is intact: {error}"
                      ) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stream_tensors(file: Path, shapes: Mapping[str, torch.Size], tensors: Iterable[Tensor],
                   metadata: dict[str, str]) -> None:
    """Write float32 tensors as a safetensors file, one at a time, so that none has to wait in
    memory for the others (`safetensors.torch.save_file` wants them all at once).

    The file is the header's length (8 bytes, little endian), the header (JSON, padded to 8 bytes),
    then the tensors' bytes. shapes: {name: shape} in the order of tensors.
    """
    header: dict[str, dict] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for tensor in tensors:
            f.write(tensor.contiguous().numpy().tobytes())
