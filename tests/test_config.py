"""Config: what follows from its numbers, and a clear no to numbers that do not fit together."""

import dataclasses
import math

import pytest
import torch
from conftest import CONFIG, OFFICIAL

from steerling_min import Config, Steerling
from steerling_min.files.checkpoint import LM_HEAD

# ---- what follows from what ----------------------------------------------------------------------


def test_null_sizes_follow_from_others():
    given = dataclasses.replace(CONFIG, n_kv_heads=2, intermediate_size=40, topk_known=5,
                                topk_known_features=3)
    assert (given.kv_heads, given.mlp_hidden, given.known_topk) == (2, 40, 3)
    null = dataclasses.replace(given, n_kv_heads=None, intermediate_size=None,
                               topk_known_features=None)
    assert null.kv_heads == CONFIG.n_head, "no grouping: every query head has its own"
    assert null.mlp_hidden == 4 * CONFIG.n_embd, "mlp_ratio * n_embd"
    assert null.known_topk == 5, "topk_known"
    assert dataclasses.replace(null, mlp_ratio=2.6).mlp_hidden == 83, "2.6 * 32, rounded down"


def test_a_given_hidden_width_shapes_the_mlp():
    with torch.device("meta"):
        mlp = Steerling(dataclasses.replace(CONFIG, intermediate_size=40)).transformer.blocks[0].mlp
    assert mlp.c_fc.weight.shape == (80, 32), "up and gate in one matrix: 2F rows"


# ---- the published 8B ----------------------------------------------------------------------------


def test_the_8b_has_the_published_tensors():
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Steerling(Config.steerling_8b())
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == OFFICIAL["tensors"]
    assert len(shapes.keys() - {LM_HEAD}) == OFFICIAL["n_stored_tensors_lm_head_dropped"]
    assert not list(model.buffers()), "rotary tables are computed, not stored"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8_391_778_304 == OFFICIAL["total_params_tied_once"]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, True, "32", 1.5, None, [32], 2**31, 2**40], ids=repr)
@pytest.mark.parametrize("name", ["n_layers", "block_size", "n_unknown_concepts"])
def test_a_size_is_a_positive_whole_number(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert str(error.value) == (
        f"{name} = {value!r} is not supported; supported: a positive whole number")


@pytest.mark.parametrize("value", [0, -1.0, True, "10", math.nan, math.inf, 2**31], ids=repr)
@pytest.mark.parametrize("name", ["norm_eps", "clip_qkv", "mlp_ratio", "rope_base"])
def test_a_real_is_a_positive_number(name, value):
    with pytest.raises(ValueError) as error:
        Config(**{name: value})
    assert str(error.value) == f"{name} = {value!r} is not supported; supported: a positive number"


def test_the_mask_is_a_token_of_its_own():
    with pytest.raises(ValueError, match="eos_token_id = 7 .* another id than mask_token_id"):
        Config(eos_token_id=7, mask_token_id=7)  # else every mask would end a text


@pytest.mark.parametrize("value", [-1, 100_281, True, "1", 1.0, None], ids=repr)
@pytest.mark.parametrize("name", ["mask_token_id", "eos_token_id"])
def test_a_token_id_lies_in_the_vocabulary(name, value):
    with pytest.raises(ValueError, match=f"{name} = .* a token id below vocab_size = 100281"):
        Config(**{name: value})


def test_a_top_k_may_be_all_there_are():
    assert Config(unknown_topk=128, n_unknown_concepts=128).n_unknown_concepts == 128
    assert Config(n_concepts=32).topk_known == 32


@pytest.mark.parametrize("change, message", [
    ({"n_head": 24}, "n_head = 24 .* a divisor of n_embd = 4096"),
    ({"n_head": 4096}, "n_head = 4096 .* even quotient"),
    ({"n_kv_heads": 5}, "n_kv_heads = 5 .* a divisor of n_head = 32"),
    ({"n_concepts": 31}, "topk_known_features or topk_known = 32 .* at most n_concepts = 31"),
    ({"n_unknown_concepts": 127}, "unknown_topk = 128 .* at most n_unknown_concepts = 127"),
    ({"start_header_id": 7}, "start_header_id = 7 .* null where eot_id is null"),
    ({"end_header_id": 7}, "end_header_id = 7 .* null where eot_id is null"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_numbers_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
