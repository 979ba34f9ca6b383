"""config.json: both published layouts are read, one is written, another architecture is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import CONFIG, GOLDEN, OFFICIAL

from steerling_min import Config
from steerling_min.files.config_json import (FIXED, GENERATION, config_from_dict, config_to_dict,
                                                read_config, read_generation)

HUB = {  # the 8B, flat, with keys that only the official code has a use for
    "architectures": ["SteerlingForCausalLM"], "auto_map": {"AutoConfig": "configuration.Config"},
    "torch_dtype": "bfloat16", "transformers_version": "4.57.0", "model_type": "steerling",
    "n_layers": 32, "n_head": 32, "n_kv_heads": 4, "n_embd": 4096,
    "block_size": 4096, "diff_block_size": 64, "vocab_size": 100281,
    "mlp_type": "swiglu", "mlp_ratio": 4, "intermediate_size": None,
    "use_rms_norm": True, "norm_eps": 1e-5, "norm_order": "post", "use_qk_norm": True,
    "use_rope": True, "rope_base": 500000.0, "rope_full_precision": True, "clip_qkv": 10.0,
    "use_bias": False, "weight_sharing": True, "interpretable": True,
    "n_concepts": 33732, "topk_known": 32, "topk_known_features": 32, "concept_dim": 4096,
    "n_unknown_concepts": 101196, "unknown_topk": 128, "use_unknown": True,
    "factorize_unknown": True, "factorize_rank": 256, "apply_topk_to_unknown": True,
    "use_epsilon_correction": True, "topk_on_logits": False, "use_attention_known": False,
    "use_attention_unknown": False, "pad_multiple": 16, "concept_block_size": 2048,
    "eos_token_id": 100257, "pad_token_id": 100277, "bos_token_id": 100278,
    "endofchunk_token_id": 100279, "mask_token_id": 100280,
}
CONVERTER = {**OFFICIAL["config_model"], "vocab_size": 100281,  # the 8B, concept fields nested
             "concept": OFFICIAL["config_concept"]}


def write(folder, data) -> Path:
    (folder / "config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder / "config.json"


# ---- what is read, and what is written -----------------------------------------------------------


@pytest.mark.parametrize("layout", [HUB, CONVERTER], ids=["hub", "converter"])
def test_both_published_layouts_describe_the_8b(layout, tmp_path):
    assert read_config(write(tmp_path, layout)) == Config.steerling_8b()


def test_the_nested_block_size_is_not_the_context_length():
    data = json.loads((GOLDEN / "config.json").read_text())
    assert data["block_size"] == 128 and data["concept"]["block_size"] == 4096
    assert config_from_dict(data).block_size == 128, "4096 is the concept heads' streaming size"
    del data["block_size"]
    with pytest.raises(ValueError, match="lacks block_size"):
        config_from_dict(data)


def test_a_byte_order_mark_is_read_over(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(CONFIG)), encoding="utf-8-sig")
    assert read_config(tmp_path / "config.json") == CONFIG, "some editors write one"


@pytest.mark.parametrize("config", [
    Config.steerling_8b(), Config.tiny(), CONFIG,
    dataclasses.replace(CONFIG, n_kv_heads=None, intermediate_size=40, clip_qkv=None,
                        topk_known_features=None),
    Config(vocab_size=100_284, start_header_id=100_281, end_header_id=100_282, eot_id=100_283),
], ids=["8b", "tiny", "test", "nulls", "instruct"])
def test_what_is_saved_is_read_back(config, tmp_path):
    assert read_config(write(tmp_path, config_to_dict(config))) == config


def test_what_is_saved_is_the_hubs_layout():
    saved = config_to_dict(Config.steerling_8b())
    for name in HUB.keys() - {"architectures", "auto_map", "torch_dtype", "transformers_version"}:
        assert name in saved, f"the hub's file states {name}"
        assert saved[name] == HUB[name] or name == "concept_block_size"
    assert saved["concept_block_size"] == 4096, "the official package's default; unused here"


@pytest.mark.parametrize("name", ["n_kv_heads", "topk_known_features", "intermediate_size"])
def test_left_out_means_null_not_the_8bs_value(name):
    data = {key: value for key, value in HUB.items() if key != name}
    assert config_from_dict(data) == config_from_dict({**HUB, name: None})


def test_a_switch_that_is_left_out_is_as_it_must_be():
    sizes = {key: value for key, value in HUB.items() if key not in FIXED}
    assert config_from_dict(sizes) == Config.steerling_8b()


# ---- what is refused -----------------------------------------------------------------------------

UNSUPPORTED = {
    "mlp_type": "gelu", "use_rms_norm": False, "norm_order": "pre", "use_qk_norm": False,
    "use_rope": False, "rope_full_precision": False, "use_bias": True, "weight_sharing": False,
    "interpretable": False, "use_unknown": False, "use_attention_known": True,
    "use_attention_unknown": True, "factorize_unknown": False, "apply_topk_to_unknown": False,
    "use_epsilon_correction": False, "topk_on_logits": True,
    "model_type": "gpt2", "concept_dim": 2048,
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("layout", [HUB, CONVERTER], ids=["hub", "converter"])
def test_another_architecture_is_refused_by_name(layout, name, tmp_path):
    value = UNSUPPORTED[name]
    nested = name in layout.get("concept", {})
    data = {**layout, "concept": {**layout["concept"], name: value}} if nested else {
        **layout, name: value}
    with pytest.raises(ValueError) as error:
        read_config(write(tmp_path, data))
    message = str(error.value)
    assert f"{name} = {value!r} is not supported; supported: " in message
    assert repr({**HUB, "model_type": "causal_diffusion"}[name]) in message.split("supported: ")[1]
    assert "config.json" in message, "the file is named, too"


def test_every_switch_has_a_refused_value():
    assert FIXED.keys() <= UNSUPPORTED.keys(), "add the new switch to UNSUPPORTED"


def test_a_folder_may_ask_for_0_and_for_false(tmp_path):
    asked = {"temperature": 0, "allow_eos": False, "top_p": None, "other": 3}
    (tmp_path / GENERATION).write_text(json.dumps(asked))
    assert read_generation(tmp_path, Config.tiny()) == {
        "temperature": 0, "allow_eos": False}, "null and what is not known is ignored"


@pytest.mark.parametrize("name", ["n_layers", "n_head", "n_embd", "block_size", "diff_block_size",
                                  "norm_eps", "rope_base", "clip_qkv", "vocab_size",
                                  "n_concepts", "topk_known", "n_unknown_concepts",
                                  "unknown_topk"])
def test_what_must_not_be_guessed_is_named_when_missing(name, tmp_path):
    data = {key: value for key, value in HUB.items() if key != name}
    with pytest.raises(ValueError, match=f"config.json: the config lacks {name}$"):
        read_config(write(tmp_path, data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"concept": 3}', "[" * 100_000,
                                  '{"n_layers": ' + "9" * 5000 + "}"],
                         ids=["empty", "cut", "list", "null", "concept", "deep", "long"])
def test_a_file_that_holds_no_config_is_named(text, tmp_path):
    with pytest.raises(ValueError, match="config.json") as error:
        read_config(write(tmp_path, text))
    assert "\n" not in str(error.value)
