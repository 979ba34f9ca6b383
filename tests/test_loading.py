"""From a name to a model: its folder is found, its labels, and its tokenizer and device fit it."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, same_weights

from steerling_min import Config, Steerling, Tokenizer, load
from steerling_min.files import loading
from steerling_min.files.cli import Parser, one_line_errors
from steerling_min.files.loading import TINY, find_checkpoint, find_labels, pick_device
from steerling_min.files.tokenizer import RANK_FILE

# ---- finding a checkpoint ------------------------------------------------------------------------

HUB_ID = "guidelabs/steerling-8b"


def fake_cache(cache, files, repo=HUB_ID):
    """The Hugging Face cache's layout: snapshots of symlinks to blobs, and a ref that names one."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    for name in ("blobs", "refs", "snapshots/abc123", "snapshots/older"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123")
    for i, file in enumerate(files):
        shutil.copy(file, folder / "blobs" / f"blob{i}")
        (folder / "snapshots" / "abc123" / file.name).symlink_to(f"../../blobs/blob{i}")
    return folder / "snapshots" / "abc123"


CHECKPOINT = [GOLDEN / "config.json", GOLDEN / "model.safetensors"]


def test_a_cached_model_is_read(hub_cache, model):
    fake_cache(hub_cache, CHECKPOINT)
    assert same_weights(Steerling.from_pretrained(find_checkpoint(HUB_ID)), model)


@pytest.mark.parametrize("installed", [True, False])
def test_a_hub_id_that_is_not_cached_names_the_command(installed, monkeypatch, request):
    if installed:
        request.getfixturevalue("hub_cache")
    else:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint(HUB_ID)
    assert "\n" not in str(error.value)
    command = str(error.value).split("to download it: ")[1]
    assert command.endswith(f"&& hf download {HUB_ID} && hf download guidelabs/steerling "
                            "concept_labels.parquet"), "the weights, and the concepts' names"
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint("someone/else")
    assert str(error.value).endswith("&& hf download someone/else"), "other labels are not known"


def test_a_folder_wins_over_a_hub_id(tmp_path, monkeypatch, hub_cache):
    monkeypatch.chdir(tmp_path)
    fake_cache(hub_cache, CHECKPOINT)
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert find_checkpoint(HUB_ID) == Path(HUB_ID)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "nowhere", "../up", "a/b c"])
def test_a_path_that_is_no_folder_is_not_taken_for_a_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint folder at {name}$"):
        find_checkpoint(name)


# ---- finding its labels --------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, hub_cache):
    """Guide Labs' two repositories, downloaded: the weights' snapshot, and the labels file."""
    weights = fake_cache(hub_cache, CHECKPOINT)
    labels = tmp_path / "concept_labels.parquet"
    labels.touch()
    return weights, fake_cache(tmp_path / "hub", [labels], "guidelabs/steerling") / labels.name


def test_the_labels_of_the_hubs_models_are_in_a_repository_of_their_own(hub, tmp_path):
    weights, labels = hub
    assert find_labels(HUB_ID) == find_labels(weights) == labels
    instruct = fake_cache(tmp_path / "hub", CHECKPOINT, HUB_ID + "-instruct")
    assert find_labels(HUB_ID + "-instruct") == labels
    fake_cache(tmp_path / "hub", CHECKPOINT, "someone/steerling-8b")
    assert find_labels("someone/steerling-8b") is None, "its concepts may be others"
    beside = instruct / "concept_labels.csv"
    beside.touch()
    assert find_labels(HUB_ID + "-instruct") == beside, "what lies beside the weights is theirs"


def test_labels_that_were_not_downloaded_are_none(hub_cache):
    fake_cache(hub_cache, CHECKPOINT)
    assert find_labels(HUB_ID) is None
    labels = fake_cache(hub_cache, [GOLDEN / "config.json"], "guidelabs/steerling")
    assert find_labels(HUB_ID) is None, "the repository, without the file"
    (labels / "concept_labels.parquet").symlink_to("../../blobs/gone")
    assert find_labels(HUB_ID) is None, "a link to nothing"


def test_labels_lie_beside_a_checkpoint(hub, tmp_path):
    assert find_labels(None) == TINY / "concept_labels.csv"
    folder = tmp_path / "mine"
    folder.mkdir()
    assert find_labels(folder) is None, "a folder of one's own is none of the hub's"
    for name in ("concept_labels.parquet", "concept_labels.csv"):  # the one written here wins
        (folder / name).touch()
        assert find_labels(folder) == folder / name


def test_a_variable_names_the_label_file(hub, tmp_path, monkeypatch):
    chosen = tmp_path / "chosen.parquet"
    monkeypatch.setenv("STEERLING_CONCEPTS_PATH", str(chosen))
    with pytest.raises(FileNotFoundError, match="^STEERLING_CONCEPTS_PATH: there is no file .*ch"):
        find_labels(HUB_ID)
    chosen.touch()
    assert find_labels(HUB_ID) == find_labels(None) == chosen
    monkeypatch.setenv("STEERLING_CONCEPTS_PATH", "")
    assert find_labels(HUB_ID) == hub[1], "empty is not set"


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


@pytest.mark.parametrize("name, value", [("mask_token_id", 506), ("eos_token_id", 0),
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


def test_gpus_are_counted_from_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device 'cuda:2' is not available here"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda") == torch.device("cuda"), "the only one"


@pytest.mark.parametrize("there, best, trained", [
    ({"cuda", "mps"}, "cuda", "cuda"), ({"mps"}, "mps", "cpu"), (set(), "cpu", "cpu")])
def test_auto_takes_a_gpu_for_large_models_only(monkeypatch, there, best, trained):
    """The tiny model is as fast on a CPU, and a Mac's GPU may lack an operator that it needs."""
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda kind=kind: kind in there)
    assert pick_device().type == best, "auto is cuda, else mps, else cpu"
    assert pick_device("auto", ("cuda", "cpu")).type == trained, "training takes no mps by itself"
    assert load()[0].device.type == "cpu", "the bundled model has 1.4 million parameters"


@pytest.mark.parametrize("message", [
    "The operator 'aten::_embedding_bag' is not currently implemented for the MPS device. If you "
    "want this op to be considered, please comment on https://github.com/pytorch/pytorch",
    "Could not run 'aten::sort' with arguments from the 'MPS' backend. This could be because: x"])
def test_an_operator_that_a_device_lacks_is_one_line(capfd, message):
    with pytest.raises(SystemExit) as stop, one_line_errors("sample.py", "less"):
        raise NotImplementedError(message)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "--device cpu" in error and "aten::" in error and "http" not in error


def test_int8_is_passed_on():
    model, _ = load(int8=True)
    assert any(x.dtype == torch.int8 for x in model.buffers())


def test_a_model_is_small_by_its_parameters_not_its_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "SMALL", 2_000_000)  # the bundled one: 1.4 million, 5.7 MB
    assert load()[0].device.type == "cpu"


def test_of_a_repositorys_snapshots_the_one_that_main_names_is_taken(hub_cache):
    folder = hub_cache / "models--a--b"
    for name in (f"{i:02}" for i in range(30)):
        (folder / "snapshots" / name).mkdir(parents=True)
    (folder / "refs").mkdir()
    for main in ("07", "21"):
        (folder / "refs" / "main").write_text(main)
        assert loading.cached("a/b") == folder / "snapshots" / main


def test_memory_that_ran_out_and_a_wrong_option_are_one_line(capfd):
    with pytest.raises(SystemExit) as stop, one_line_errors("sample.py", "fewer --num-samples"):
        raise MemoryError
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "fewer --num-samples" in error
    with pytest.raises(SystemExit):
        Parser(prog="sample.py").error("one\ntwo")
    assert capfd.readouterr().err.count("\n") == 1
