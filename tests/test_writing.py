"""Files are written whole or not at all, and nothing of the user's is in the way."""

import os
import re

import pytest
import torch
from safetensors import safe_open

from steerling_min.files.writing import replacing, stream_tensors, target


def write(file, text="new"):
    with replacing(file) as partial:
        partial.write_text(text)


def test_a_file_takes_its_place_when_all_of_it_is_written(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with replacing(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["x"]


def test_an_error_leaves_what_was_there(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_said_with_the_files_name(tmp_path):
    file = tmp_path / "x"
    file.write_text("old")
    said = f"^{re.escape(str(file))} was not written; what stood there before is intact: .*is full$"
    with pytest.raises(OSError, match=said), replacing(tmp_path / "y"), replacing(file) as partial:
        partial.write_text("half")
        raise OSError(28, "the disk is full")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_a_users_own_partial_file_stays(tmp_path):
    (tmp_path / "x.partial").write_text("mine")
    write(tmp_path / "x")
    assert (tmp_path / "x.partial").read_text() == "mine"


def test_what_a_killed_process_left_is_gone_after_the_next(tmp_path):
    """Also what a library wrote beside the path that it was given, as safetensors does."""
    left = tmp_path / ".x.partial"
    left.mkdir()
    (left / ".tmpAbC").write_text("15 megabytes")
    write(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    (tmp_path / "sub").mkdir()
    assert target(tmp_path / "sub" / ".." / "s") == target(tmp_path / "s"), "one file, two names"


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="a folder or a device"):
            write(place)
    with pytest.raises(ValueError, match="there is no folder .* to write x into"):
        write(tmp_path / "none" / "x")


def test_streamed_tensors_are_a_safetensors_file_of_the_librarys_format(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "empty": torch.zeros(0, 4), "number": torch.tensor(7.0),
               "name, longer": torch.randn(2)}
    file = tmp_path / "x.safetensors"
    stream_tensors(file, {name: x.shape for name, x in tensors.items()}, iter(tensors.values()),
                   {"run": "{}"})
    with safe_open(file, framework="pt") as f:
        assert f.metadata() == {"run": "{}"} and set(f.keys()) == set(tensors)
        for name, x in tensors.items():
            assert torch.equal(f.get_tensor(name), x), name
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0, "tensors begin at 8 bytes"
