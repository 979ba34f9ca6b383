"""From a name to a model: its folder is found, and its tokenizer and its device fit it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, same_weights

from steerling_min import Config, Steerling, Tokenizer, load
from steerling_min.files.loading import find_checkpoint
from steerling_min.files.tokenizer import RANK_FILE

# ---- finding a checkpoint ------------------------------------------------------------------------

HUB_ID = "guidelabs/steerling-8b"


def fake_cache(cache, source):
    """The Hugging Face cache's layout: snapshots of symlinks to blobs, and a ref that names one."""
    repo = cache / "models--guidelabs--steerling-8b"
    for name in ("blobs", "refs", "snapshots/abc123", "snapshots/older"):
        (repo / name).mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    for i, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(source / name, repo / "blobs" / f"blob{i}")
        (repo / "snapshots" / "abc123" / name).symlink_to(f"../../blobs/blob{i}")
    return repo / "snapshots" / "abc123"


@pytest.mark.parametrize("variable, cache", [
    ("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"),
    ("HOME", ".cache/huggingface/hub")])
def test_a_hub_id_is_looked_up_where_hf_download_puts_it(variable, cache, tmp_path, monkeypatch,
                                                         model):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(variable, str(tmp_path))
    snapshot = fake_cache(tmp_path / cache, GOLDEN)
    assert find_checkpoint(HUB_ID) == snapshot
    assert same_weights(Steerling.from_pretrained(find_checkpoint(HUB_ID)), model)


def test_a_hub_id_that_is_not_cached_names_the_download_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"hf download {HUB_ID}") as error:
        find_checkpoint(HUB_ID)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    fake_cache(tmp_path / "cache", GOLDEN)
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert find_checkpoint(HUB_ID) == Path(HUB_ID)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "nowhere", "../up", "a/b c"])
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint folder at {name}$"):
        find_checkpoint(name)


# ---- a model with its tokenizer ------------------------------------------------------------------


def test_a_rank_file_beside_the_weights_is_the_tokenizer(tiny_folder):
    model, tokenizer = load(tiny_folder, "cpu")
    assert tokenizer.vocab_size == model.config.vocab_size == 512
    assert not model.training and model.transformer.tok_emb.weight.dtype == torch.float32


@pytest.mark.parametrize("instruct", [False, True])
def test_without_a_rank_file_the_tokenizer_is_the_8bs(tiny_folder, tmp_path, monkeypatch, instruct):
    """cl100k_base, for an instruct model with its three tokens; here another stands in for it."""
    def cl100k(instruct=False):
        asked.append(instruct)
        return Tokenizer.from_file(tiny_folder / RANK_FILE, instruct)
    asked, more = [], {}
    monkeypatch.setattr(Tokenizer, "cl100k", cl100k)
    if instruct:
        more = dict(vocab_size=515, start_header_id=512, end_header_id=513, eot_id=514)
    Steerling(dataclasses.replace(Config.tiny(512), **more)).save_pretrained(tmp_path)
    load(tmp_path, "cpu")
    assert asked == [instruct]


@pytest.mark.parametrize("name, value", [("mask_token_id", 507), ("eos_token_id", 0),
                                         ("vocab_size", 520)])
def test_a_config_that_disagrees_with_the_tokenizer_is_refused(tiny_folder, tmp_path, name, value):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError) as error:
        load(folder, "cpu")
    tokenizers = {"mask_token_id": 511, "eos_token_id": 507, "vocab_size": 512}[name]
    assert f"config.json says {name} = {value}; the tokenizer has {tokenizers}" in str(error.value)


@pytest.mark.parametrize("device", ["nonsense", "", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_named(tiny_folder, device):
    with pytest.raises(ValueError, match=f"device {device!r} is not available here; .*cpu"):
        load(tiny_folder, device)
