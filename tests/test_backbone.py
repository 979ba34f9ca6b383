"""The backbone against the official package, layer by layer."""

import dataclasses

import pytest
import torch

from steerling_min.attention import KVCache
from steerling_min.backbone import Backbone

from conftest import CONFIG, close

TOLERANCE = 1e-5  # float32, absolute


def test_parity_every_layer_equals_the_official_package(model, golden):
    """Walks the layers in order and names the first that departs."""
    seen = {}
    hooks = [block.register_forward_hook(lambda m, args, out, i=i: seen.update({f"layer{i}": out}))
             for i, block in enumerate(model.transformer.blocks)]
    with torch.no_grad():
        seen["hidden"] = model.transformer(golden["input_ids"])
    for hook in hooks:
        hook.remove()
    for name in ("layer0", "layer1", "hidden"):
        error = (seen[name] - golden[name]).abs().max().item()
        assert error <= TOLERANCE, f"the first that departs is {name}, by {error:.2e}"


def test_parity_a_length_that_is_no_multiple_of_the_block(model, golden):
    with torch.no_grad():
        hidden = model.transformer(golden["odd.input_ids"])[:, -8:]
    close(hidden, golden["odd.hidden_last8"], "the last block is short: its positions and its mask "
          "are those of a whole one, cut off", atol=TOLERANCE)


def test_in_half_precision_the_angles_stay_float32():
    backbone, seen = a_backbone().bfloat16(), []
    for block in backbone.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.extend(args[1:3]))
    backbone(torch.arange(12)[None])
    assert seen and all(x.dtype == torch.float32 for x in seen), (
        "bfloat16 has three digits, too few for a rotation by 255 steps (rope_full_precision)")


def a_backbone():
    torch.manual_seed(0)
    return Backbone(CONFIG).eval()


def test_the_output_matrix_is_the_embedding():
    backbone = a_backbone()
    assert backbone.lm_head.weight is backbone.tok_emb.weight, "weight_sharing: one tied matrix"


def test_tokens_of_later_blocks_change_nothing():
    backbone = a_backbone()
    tokens = torch.randint(0, 15, (1, 12))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 15
    difference = (backbone(tokens) - backbone(changed)).abs().amax((0, 2))
    assert (difference[:8] == 0).all(), "a later block is seen: attention is causal across blocks"
    assert (difference[8:] > 0).all(), "the token's own block does not see it"


def test_injection_starts_after_the_named_layer():
    backbone = a_backbone_of_three_layers()
    tokens, vector = torch.randint(0, 15, (1, 6)), torch.randn(1, 6, 32)
    streams = {}
    for layer in (None, 1, 2, 3):
        out = []
        hooks = [module.register_forward_pre_hook(lambda m, args, out=out: out.append(args[0]))
                 for module in [*backbone.blocks, backbone.ln_f]]
        backbone(tokens, {} if layer is None else {layer: vector})
        streams[layer] = out  # what blocks 1, 2, 3 and ln_f read
        for hook in hooks:
            hook.remove()
    for layer in (1, 2, 3):
        for place in range(4):
            same = torch.equal(streams[layer][place], streams[None][place])
            assert same == (place < layer), (
                f"inject_layer {layer} adds after blocks >= {layer} (1-based) and before ln_f")
    torch.testing.assert_close(streams[3][3], streams[None][3] + vector)


def test_injections_of_several_layers_are_all_added():
    """With silent blocks the stream is the tokens' embeddings and what was injected so far."""
    backbone = a_backbone_of_three_layers()
    for block in backbone.blocks:
        block.attn.c_proj.weight.data.zero_()
        block.mlp.c_proj.weight.data.zero_()
    tokens, (a, b) = torch.randint(0, 15, (2, 6)), torch.randn(2, 2, 6, 32)
    read = []
    backbone.ln_f.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    backbone(tokens, {3: a, 2: b})
    close(read[0], backbone.tok_emb(tokens) + a + 2 * b,
          "a after layer 3; b after layers 2 and 3: each layer's own, and each of them")


def a_backbone_of_three_layers():
    torch.manual_seed(0)
    return Backbone(dataclasses.replace(CONFIG, n_layers=3)).eval()


@pytest.mark.parametrize("layer", [0, -1, 4])
def test_a_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(ValueError, match=f"{layer}.*1 to 3"):
        a_backbone_of_three_layers()(torch.zeros(1, 2, dtype=torch.int64),
                                     {layer: torch.zeros(1, 2, 32)})


def test_a_sequence_beyond_the_context_is_refused():
    backbone = a_backbone()
    tokens = torch.zeros(1, 65, dtype=torch.int64)
    assert backbone(tokens[:, :64]).shape == (1, 64, 32), "all of the context may be used"
    with pytest.raises(ValueError, match="65.*64"):
        backbone(tokens)
    cache = KVCache.empty(CONFIG, 1, 65, torch.float32, tokens.device)
    cache.length = 60
    with pytest.raises(ValueError, match="65.*64"):
        backbone(tokens[:, 60:], cache=cache)  # what the cache holds is part of the sequence


def test_with_a_cache_only_the_rest_is_computed():
    backbone = a_backbone_of_three_layers()
    tokens = torch.randint(0, 15, (2, 14))
    whole = backbone(tokens)
    cache = KVCache.empty(backbone.config, 2, 14, whole.dtype, whole.device)
    backbone(tokens[:, :8], cache=cache)
    cache.length = 8
    rest = backbone(tokens[:, 8:], cache=cache)
    close(rest, whole[:, 8:], "positions, mask and rotary angles count from the start")
