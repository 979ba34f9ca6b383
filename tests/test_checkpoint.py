"""Checkpoints: what is saved comes back, what is damaged is named in one line."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, GOLDEN, OFFICIAL, same_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerling_min import Config, Steerling
from steerling_min.files import checkpoint
from steerling_min.files.checkpoint import INDEX, LM_HEAD, TOK_EMB
from steerling_min.files.config_json import config_to_dict, read_config

LN_F = "transformer.ln_f.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint that a test may damage: one file, the converter's config."""
    for name in ("config.json", WEIGHTS):
        shutil.copy(GOLDEN / name, tmp_path)
    return tmp_path


@pytest.fixture
def sharded(folder) -> Path:
    """The same checkpoint as two shards with an index."""
    shard(folder)
    return folder


def shard(folder):
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    weight_map = {}
    for file, part in zip(SHARDS, (names[:10], names[10:])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / WEIGHTS).unlink()


def edit(file, changes):
    """Rewrite a safetensors file with tensors replaced, added, or (None) removed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, file)


def refusal(path, error=ValueError) -> str:
    """Loading fails in one line, which is returned."""
    with pytest.raises(error) as caught:
        Steerling.from_pretrained(path)
    assert "\n" not in str(caught.value), "one line"
    return str(caught.value)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


# ---- saving and loading --------------------------------------------------------------------------


def test_what_is_saved_comes_back(model, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    again = Steerling.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(logits(again), logits(model))
    assert again.config == model.config
    assert again.transformer.lm_head.weight is again.transformer.tok_emb.weight, "still tied"
    assert not again.training


def test_the_file_has_the_official_names_and_the_tied_matrix_once(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS).keys() == load_file(GOLDEN / WEIGHTS).keys()
    assert LM_HEAD not in load_file(tmp_path / WEIGHTS)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file that does not say"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "steerling" and "concept" not in config, "the hub's layout"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_whoever_may_read_the_config_may_read_the_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "other").touch()  # a new file, as whoever saves has them
    assert len({(tmp_path / name).stat().st_mode for name in (
        WEIGHTS, "config.json", "other")}) == 1


def test_the_dtype_is_the_one_asked_for(folder):
    half = Steerling.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(folder)
    assert load_file(folder / WEIGHTS)[LN_F].dtype == torch.bfloat16, "saved as it is"
    assert same_weights(Steerling.from_pretrained(folder).to(torch.bfloat16), half)


@pytest.mark.parametrize("stored", [[TOK_EMB], [LM_HEAD], [TOK_EMB, LM_HEAD]],
                         ids=["tok_emb", "lm_head", "both"])
def test_either_or_both_of_the_tied_pair_may_be_stored(stored, folder, model):
    matrix = load_file(folder / WEIGHTS)[TOK_EMB].clone()
    changes = {name: matrix.clone() if name in stored else None for name in (TOK_EMB, LM_HEAD)}
    edit(folder / WEIGHTS, changes)
    assert same_weights(Steerling.from_pretrained(folder), model)


@pytest.mark.parametrize("value, dtype", [(torch.nan, torch.float32), (-torch.inf, torch.bfloat16),
                                          (7e4, torch.float16)], ids=str)
def test_weights_that_are_no_finite_numbers_are_named(folder, value, dtype):
    """As a run that diverged leaves them. float16 ends at 65,504."""
    weight = torch.ones(64)
    weight[7] = value
    edit(folder / WEIGHTS, {LN_F: weight})
    with pytest.raises(ValueError, match=f"{LN_F} in .* not finite in {dtype}"):
        Steerling.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("sizes, message", [
    ({"n_layers": 2**31 - 1}, "config.json says n_layers = 2147483647; the weights have 2 layers"),
    ({"n_embd": 2**30}, "its sizes are too large"),
    ({"n_unknown_concepts": 2**31 - 1, "factorize_rank": 2**31 - 1}, "its sizes are too large"),
    ({"intermediate_size": 2**31 - 1}, "has shape"),
], ids=str)
def test_sizes_that_no_machine_could_hold_are_refused_at_once(folder, sizes, message):
    config = dataclasses.replace(read_config(folder / "config.json"), **sizes)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    with pytest.raises(ValueError, match=message):
        Steerling.from_pretrained(folder)


def test_shards_equal_the_single_file(sharded, model):
    assert same_weights(Steerling.from_pretrained(sharded), model)


def test_the_indexs_files_win_over_strays(sharded, model):
    """The official package merges every *.safetensors that lies there."""
    save_file({LN_F: torch.zeros(64)}, sharded / WEIGHTS)
    save_file({LN_F: torch.zeros(64)}, sharded / "old.safetensors")
    assert same_weights(Steerling.from_pretrained(sharded), model)


def test_the_index_may_name_a_single_file(folder, model):
    names = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))
    assert same_weights(Steerling.from_pretrained(folder), model)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_on_the_cpu_weights_are_mapped_not_copied(folder):
    model = Steerling.from_pretrained(folder)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / WEIGHTS)):
            begin, end = line.split()[0].split("-")
            mapped.append(range(int(begin, 16), int(end, 16)))
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in pages for pages in mapped), f"{name} was copied"


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(folder):
    model = Steerling.from_pretrained(folder)
    before = logits(model)
    with torch.no_grad():
        model.transformer.ln_f.weight *= 2
    after = logits(model)
    model.save_pretrained(folder)
    assert torch.equal(logits(model), after), "the mapped old file lives on"
    again = Steerling.from_pretrained(folder)
    assert torch.equal(logits(again), after) and not torch.equal(before, after)


def test_a_cpu_may_be_numbered(folder, model):
    assert same_weights(Steerling.from_pretrained(folder, "cpu:0"), model)


# ---- damage --------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path):
    assert refusal(tmp_path / "nowhere", FileNotFoundError).endswith("nowhere")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert refusal(folder, FileNotFoundError) == f"{folder} has no {name}"


def test_a_missing_shard_is_named(sharded):
    (sharded / SHARDS[1]).unlink()
    assert refusal(sharded, FileNotFoundError) == f"{sharded} has no {SHARDS[1]}"


def test_a_config_that_is_not_json_is_named(folder):
    (folder / "config.json").write_text("n_layers: 2")
    assert "config.json is not JSON" in refusal(folder)


@pytest.mark.parametrize("left", [0, 4, 8, 1000, -1], ids=str)
def test_a_truncated_file_is_named(folder, left):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:left])
    assert f"{WEIGHTS} is damaged or not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("header", [b"[]", b"null", b"x", b"\xff\xfe", b'{"a": 1}'], ids=repr)
def test_a_file_whose_header_is_no_table_of_tensors_is_named(folder, header):
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{WEIGHTS} is damaged or not a safetensors file" in refusal(folder)


def test_a_file_of_no_tensors_has_no_layers(folder):
    (folder / WEIGHTS).write_bytes((2).to_bytes(8, "little") + b"{}")
    assert refusal(folder).endswith("config.json says n_layers = 2; the weights have 0 layers")


@pytest.mark.parametrize("change, message", [
    ({"data_offsets": [0, 256]}, "is damaged"), ({"shape": [1, 64]}, f"{LN_F} in"),
    ({"dtype": "I32"}, f"{LN_F} in")], ids=str)
def test_a_tensor_listed_twice_in_one_header_is_named(folder, change, message):
    """The safetensors library takes the last entry. It refuses bytes that no entry then has."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8:8 + size].rstrip()
    entry = json.dumps(json.loads(header)[LN_F] | change)
    header = header[:-1] + f', "{LN_F}": {entry}'.encode() + b"}"
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size:])
    assert message in refusal(folder)


def test_a_tensor_in_two_shards_is_named(sharded):
    for file in SHARDS:
        edit(sharded / file, {LN_F: torch.ones(64)})
    assert refusal(sharded) == f"{LN_F} is stored twice: in {SHARDS[0]} and {SHARDS[1]}"


@pytest.mark.parametrize("name", ["transformer.blocks.1.attn.q_norm.weight", LN_F,
                                  "unknown_head.predictor_up.weight", TOK_EMB])
def test_a_missing_tensor_is_named(folder, name):
    edit(folder / WEIGHTS, {name: None})
    assert refusal(folder) == f"the checkpoint lacks the tensor {name}"


def test_an_unexpected_tensor_is_named(folder):
    edit(folder / WEIGHTS, {"transformer.blocks.2.ln_1.weight": torch.ones(64)})
    assert "unexpected tensor transformer.blocks.2.ln_1.weight" in refusal(folder)


@pytest.mark.parametrize("shape", [(65,), (1, 64), (64, 1), (0,)], ids=str)
def test_a_wrong_shape_is_named_with_both_shapes(folder, shape):
    edit(folder / WEIGHTS, {LN_F: torch.ones(shape)})
    message = refusal(folder)
    assert LN_F in message and f"{list(shape)}" in message and "[64]" in message


def test_a_transposed_matrix_is_named(folder):
    edit(folder / WEIGHTS, {TOK_EMB: load_file(folder / WEIGHTS)[TOK_EMB].T.contiguous()})
    assert f"{TOK_EMB} in {folder / WEIGHTS} has shape [64, 300]" in refusal(folder)


def test_both_of_the_tied_pair_must_fit(folder):
    edit(folder / WEIGHTS, {LM_HEAD: torch.ones(299, 64)})
    assert f"{LM_HEAD} in {folder / WEIGHTS} has shape [299, 64]" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn],
                         ids=str)
def test_weights_that_are_no_plain_floats_are_named(folder, dtype):
    edit(folder / WEIGHTS, {LN_F: torch.ones(64).to(dtype)})
    assert f"{LN_F} in" in (message := refusal(folder)) and "dtype" in message


def test_a_tied_pair_that_differs_is_refused(folder):
    matrix = load_file(folder / WEIGHTS)[TOK_EMB].clone()
    matrix[299, 63] += 1
    edit(folder / WEIGHTS, {LM_HEAD: matrix})
    message = refusal(folder)
    assert TOK_EMB in message and LM_HEAD in message and "different" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"metadata": {}}', '{"weight_map": []}',
                                  '{"weight_map": {"a": ["b"]}}', "[" * 100_000,
                                  '{"weight_map": {}, "weight_map": {}}'],
                         ids=["empty", "list", "object", "no weight_map", "list of weights",
                              "list of files", "deep", "twice"])
def test_an_index_that_is_none_is_named(sharded, text):
    (sharded / INDEX).write_text(text)
    assert f"{INDEX} is not" in refusal(sharded), "a weight index, or JSON with an object"


def test_an_index_of_nothing_has_no_layers(sharded):
    (sharded / INDEX).write_text('{"weight_map": {}}')
    assert refusal(sharded).endswith("config.json says n_layers = 2; the weights have 0 layers")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors",
                                  "..\\x.safetensors"])
def test_an_index_may_not_point_outside_its_folder(sharded, name):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][LN_F] = name
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"points outside its folder: {name!r}" in refusal(sharded)


def test_an_index_cannot_vouch_for_a_tensor_that_no_shard_has(sharded):
    edit(sharded / SHARDS[1], {LN_F: None})
    assert refusal(sharded) == f"the checkpoint lacks the tensor {LN_F}"


def test_damage_is_found_before_any_weight_is_read(sharded, monkeypatch):
    edit(sharded / SHARDS[1], {LN_F: torch.ones(65)})
    real = checkpoint.safe_open

    def headers_only(*args, **kwargs):
        assert "device" not in kwargs, "a file was opened for its weights"
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "safe_open", headers_only)
    assert LN_F in refusal(sharded)


# ---- a save that fails, and memory ---------------------------------------------------------------


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_a_failed_save_leaves_the_old_checkpoint(folder, model, fails, monkeypatch):
    def full_disk(state, file, **kwargs):
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    def no_rename(source, target):
        raise OSError("Permission denied")

    if fails == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full_disk)
    else:
        monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(OSError):
        Steerling(CONFIG).save_pretrained(folder)
    assert same_weights(Steerling.from_pretrained(folder), model)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", WEIGHTS]


def test_where_the_weights_cannot_be_replaced_the_old_config_stays(folder, model, monkeypatch):
    """Windows does not replace a file that is in use."""
    replace = os.replace

    def not_weights(source, target):
        if str(target).endswith(".safetensors"):
            raise OSError("the file is in use")
        replace(source, target)
    monkeypatch.setattr(os, "replace", not_weights)
    with pytest.raises(OSError):
        Steerling(dataclasses.replace(model.config, rope_base=7.0)).save_pretrained(folder)
    assert Steerling.from_pretrained(folder).config == model.config, (
        "old weights beside another config would load, and write nonsense")


def test_two_files_have_an_index_too(tmp_path, model, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", sum(x.nbytes for x in model.parameters()) - 1)
    model.save_pretrained(tmp_path)
    assert len(set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())) == 2
    assert same_weights(Steerling.from_pretrained(tmp_path), model)


def test_a_save_that_fails_at_a_later_file_puts_none_in_its_place(tmp_path, model, monkeypatch):
    saved = []

    def full_disk(state, file, **kwargs):
        if saved:
            raise OSError("No space left on device")
        saved.append(save_file(state, file, **kwargs))
    monkeypatch.setattr(checkpoint, "SHARD", 10_000)
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "new")
    assert saved and not list((tmp_path / "new").iterdir()), "half a checkpoint is none"


def test_saving_over_a_sharded_checkpoint_is_refused(sharded, model):
    before = sorted(sharded.iterdir())
    with pytest.raises(ValueError, match=INDEX):
        model.save_pretrained(sharded)
    assert sorted(sharded.iterdir()) == before, (
        "its index would win over the file just written, and load the old weights")


def test_a_save_replaces_the_older_one(folder):
    torch.manual_seed(0)
    model = Steerling(CONFIG)
    model.save_pretrained(folder)
    again = Steerling.from_pretrained(folder)
    assert again.config == CONFIG and same_weights(again, model)


def test_the_8b_is_written_in_the_files_that_the_official_converter_makes():
    with torch.device("meta"):
        model = Steerling(Config()).to(torch.bfloat16)
    parts, sizes = checkpoint.parts_of(model), {n: p.nbytes for n, p in model.named_parameters()}
    official = OFFICIAL["converter_shards_5GiB"]
    ours = [sum(map(sizes.get, names)) for names in parts]
    assert len(ours) == len(official) and max(ours) <= 5 * 2**30
    for a, b in zip(ours, official):
        assert abs(a - b["bytes_tensors"]) < 0.3e9, "it has a block's matrices in another order"


def test_a_large_model_is_written_in_several_files_one_after_the_other(model, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD", 60_000)
    waiting = []

    def one_at_a_time(state, file, metadata):
        waiting.append(sum(x.nbytes for x in state.values()))
        save_file(state, file, metadata)
    monkeypatch.setattr(checkpoint, "save_file", one_at_a_time)
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    n = len(files)
    assert n > 2 and files == [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    largest = max(p.nbytes for p in model.parameters())
    assert max(waiting) <= max(60_000, largest) and len(waiting) == n
    assert index["metadata"]["total_size"] == sum(waiting)
    assert same_weights(Steerling.from_pretrained(tmp_path), model)

    def full_disk(state, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")
    other = Steerling(model.config)
    other.save_pretrained(tmp_path)
    assert same_weights(Steerling.from_pretrained(tmp_path), other), "a run saves again and again"
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path)
    assert same_weights(Steerling.from_pretrained(tmp_path), other), "all are replaced, or none"


def set_meminfo(monkeypatch, text):
    """Let /proc/meminfo hold this text, on systems without one, too."""
    read_text, is_file = Path.read_text, Path.is_file
    meminfo = Path("/proc/meminfo")
    monkeypatch.setattr(Path, "read_text", lambda self, *args, **kwargs: (
        text if self == meminfo else read_text(self, *args, **kwargs)))
    monkeypatch.setattr(Path, "is_file", lambda self: self == meminfo or is_file(self))


def test_too_little_memory_is_said_in_gigabytes_before_loading(monkeypatch):
    with torch.device("meta"):
        model = Steerling(CONFIG)
        model.weights = torch.nn.Parameter(torch.empty(8_000_000, 1_000))
    set_meminfo(monkeypatch, "MemTotal: 99999999 kB\nMemAvailable: 16000000 kB\n")
    with pytest.raises(ValueError, match="32.0 GB in torch.float32 and 16.4 GB are free on cpu: "
                                         "15.6 GB short"):
        checkpoint.require_memory(model, torch.device("cpu"), torch.float32, False)
    set_meminfo(monkeypatch, "MemAvailable: 16000000 kB\n")
    checkpoint.require_memory(model, torch.device("cpu"), torch.bfloat16, False)  # 16.0 of 16.4 GB
    set_meminfo(monkeypatch, "MemAvailable: 8000000 kB\n")
    checkpoint.require_memory(model, torch.device("cpu"), torch.bfloat16, True)  # 8.0 of 8.2 GB
    set_meminfo(monkeypatch, "MemAvailable: 7000000 kB\n")
    with pytest.raises(ValueError, match="8.0 GB in int8 and 7.2 GB"):
        checkpoint.require_memory(model, torch.device("cpu"), torch.bfloat16, True)
    assert checkpoint.free_memory(torch.device("cpu")) == 7_000_000 * 1024
    assert checkpoint.free_memory(torch.device("mps")) == float("inf"), "it does not say"
    with torch.device("meta"):
        model.weights = torch.nn.Parameter(torch.empty(8_000_000_000))
    with pytest.raises(ValueError, match="16.0 GB in int8"):  # only matrices are made small
        checkpoint.require_memory(model, torch.device("cpu"), torch.bfloat16, True)


def test_no_first_weights_are_drawn_before_the_checkpoints_are_read(monkeypatch):
    """To draw them where there is no memory, PyTorch imports its compiler: a second's work."""
    drawn = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: drawn.append(tensor))
    Steerling.from_pretrained(GOLDEN)
    assert not drawn, "empty_model leaves first weights out"


def test_loading_asks_for_memory_first(folder, monkeypatch):
    set_meminfo(monkeypatch, "MemAvailable: 100 kB\n")
    assert "GB short" in refusal(folder)


def test_where_the_system_does_not_say_loading_goes_on(folder, monkeypatch, model):
    set_meminfo(monkeypatch, "MemTotal: 1 kB\nMemFree: 1 kB\n")
    assert same_weights(Steerling.from_pretrained(folder), model)
