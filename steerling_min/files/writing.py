"""Files that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def target(file: Path) -> Path:
    """The file that `file` means, through links. Raises ValueError unless it is a regular file, or
    none yet in a folder that is there."""
    file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is a folder or a device: give the name of a file to write")
    if not file.parent.is_dir():
        raise ValueError(f"there is no folder {file.parent} to write {file.name} into")
    return file


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Where to write `file`: a path that takes its place only when all of it has been written.

    It lies in a hidden folder beside the file. What a process that was killed leaves there, the
    next one removes.
    """
    file = target(file)
    folder = file.with_name(f".{file.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder / file.name
        os.replace(folder / file.name, file)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
