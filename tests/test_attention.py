"""Attention: the mask, the rotary embedding, grouped heads, the cache."""

import math

import pytest
import torch
from conftest import CONFIG, close

from steerling_min.attention import Attention, KVCache, block_causal_mask, rotary_tables, rotate



def inputs(T, S=4, seed=0):
    """Random x (2, T, 32) and the tables and mask of T positions."""
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(T)
    cos, sin = rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_base)
    return x, cos, sin, block_causal_mask(positions, positions, S)


# ---- the mask ------------------------------------------------------------------------------------

def test_the_mask_is_the_truth_table_of_the_definition():
    positions = torch.arange(6)
    table = ["xx....",
             "xx....",
             "xxxx..",
             "xxxx..",
             "xxxxxx",
             "xxxxxx"]
    expected = torch.tensor([[cell == "x" for cell in row] for row in table])
    mask = block_causal_mask(positions, positions, 2)
    assert mask.dtype == torch.bool, "a bool mask: SDPA would add one of floats to the scores"
    assert torch.equal(mask, expected), (
        "query i (row) sees key j (column) exactly when i // S >= j // S")


def test_a_block_of_one_is_causal_and_a_block_of_all_is_bidirectional():
    positions = torch.arange(7)
    assert torch.equal(block_causal_mask(positions, positions, 1), torch.ones(7, 7).tril().bool())
    assert block_causal_mask(positions, positions, 7).all()


def test_blocks_are_counted_from_the_start_of_the_sequence():
    whole = block_causal_mask(torch.arange(12), torch.arange(12), 4)
    part = block_causal_mask(torch.arange(6, 12), torch.arange(12), 4)
    assert torch.equal(part, whole[6:]), "positions are absolute, whichever queries are asked for"


# ---- rotary --------------------------------------------------------------------------------------

def test_position_zero_is_not_turned():
    cos, sin = rotary_tables(torch.tensor([0]), 8, 500_000.0)
    x = torch.randn(1, 8)
    close(rotate(x, cos, sin), x, "positions are counted from 0: the first turns by no angle")


def test_the_angle_of_pair_j_is_position_times_base_to_the_minus_2j_over_d():
    cos, sin = rotary_tables(torch.tensor([3]), 4, 100.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == sin.shape == (1, 4)
    angles = [3.0, 3.0 * 100 ** -0.5]  # j = 0, 1 with d = 4
    close(cos[0, :2], torch.tensor([math.cos(a) for a in angles]), "position * base^(-2j/d)")
    close(cos[0, 2:], cos[0, :2], "the angles are laid out twice: [angles, angles]")
    close(sin[0], torch.tensor([math.sin(a) for a in angles * 2]), "the same angles' sines")


def test_angles_are_exact_to_the_end_of_the_longest_context():
    """With the 8B's numbers. bfloat16 counts to 256 and float16 to 2,048, then they skip."""
    positions = [1, 255, 257, 2047, 2049, 4094, 4095]
    cos, sin = rotary_tables(torch.tensor(positions), 128, 500_000.0)
    angles = torch.tensor([[i * 500_000.0 ** (-2 * j / 128) for j in range(64)] * 2
                           for i in positions], dtype=torch.float64)
    for found, expected in ((cos, angles.cos()), (sin, angles.sin())):
        error = (found - expected).abs().amax(1)  # an angle of 4,095 has 12 bits left of 24
        assert (error < 1e-3).all(), (
            f"off by {error.tolist()} at positions {positions}: positions, frequencies and angles "
            "are float32 numbers, in a half-precision model, too")


def test_a_pair_turns_counter_clockwise():
    quarter = torch.full((1, 2), math.pi / 2)
    turned = rotate(torch.tensor([[1.0, 0.0]]), quarter.cos(), quarter.sin())
    close(turned, torch.tensor([[0.0, 1.0]]),
          "(1, 0) turned by 90 degrees is (0, 1): rot([a, b]) = [-b, a]")


def test_pairs_are_channels_j_and_j_plus_half():
    cos, sin = rotary_tables(torch.tensor([5]), 8, 10_000.0)
    x = torch.zeros(1, 8)
    x[0, 1] = 1.0
    touched = rotate(x, cos, sin)[0].nonzero().flatten().tolist()
    assert touched == [1, 5], "channel 1 of 8 is paired with channel 1 + 4, not with its neighbour"


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        cos, sin = rotary_tables(torch.tensor([i, j]), 8, 10_000.0)
        turned = rotate(torch.stack([q, k]), cos, sin)
        return (turned[0] @ turned[1]).item()
    assert score(3, 1) == pytest.approx(score(50, 48), abs=1e-4), "both are 2 apart"
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-4), "2 apart is not 1 apart"


def test_rotation_is_done_in_float32():
    cos, sin = rotary_tables(torch.arange(40), 16, 500_000.0)
    x = torch.randn(40, 16).bfloat16()
    assert cos.dtype == torch.float32, "rope_full_precision: tables in float32"
    assert torch.equal(rotate(x, cos, sin), rotate(x.float(), cos, sin).bfloat16()), (
        "compute in float32 and round once")


# ---- attention -----------------------------------------------------------------------------------

def test_attention_is_softmax_over_the_visible_keys():
    """Against a loop over heads and queries, in float64, from the formulas alone."""
    torch.manual_seed(0)
    attn = Attention(CONFIG)
    attn.q_norm.weight.data, attn.k_norm.weight.data = torch.rand(8) + 0.5, torch.rand(8) + 0.5
    attn.c_attn.weight.data *= 20  # a third of q, k and v are clamped
    x, cos, sin, mask = inputs(T=10)
    qkv = (x @ attn.c_attn.weight.T).clamp(-10, 10)
    q, k, v = qkv[..., :32], qkv[..., 32:48], qkv[..., 48:]
    out = torch.zeros(2, 10, 32, dtype=torch.float64)
    for b in range(2):
        for head in range(4):
            group = head // 2  # H / G = 2 query heads share one key/value head
            mine, theirs = slice(head * 8, head * 8 + 8), slice(group * 8, group * 8 + 8)
            qh = rotate(attn.q_norm(q[b, :, mine]), cos, sin).double()
            kh = rotate(attn.k_norm(k[b, :, theirs]), cos, sin).double()
            for i in range(10):
                seen = [j for j in range(10) if i // 4 >= j // 4]
                p = (qh[i] @ kh[seen].T / math.sqrt(8)).softmax(-1)
                out[b, i, mine] = p @ v[b, seen, theirs].double()
    expected = out @ attn.c_proj.weight.T.double()
    close(attn(x, cos, sin, mask).double(), expected,
          "c_attn gives q, k, v, each head after head; clamp, norm, rotation; scores / sqrt(d); "
          "two query heads to each key/value head; heads side by side into c_proj", atol=1e-4)


def test_projections_are_clamped_before_the_heads_are_split():
    attn = Attention(CONFIG)
    x, cos, sin, mask = inputs(T=4)
    attn.q_norm = attn.k_norm = torch.nn.Identity()
    attn.c_attn.weight.data[48:] = 0.0                 # v ...
    attn.c_attn.weight.data[48:, 0] = 1000.0           # ... is 1000 times channel 0, all of it
    attn.c_proj.weight.data = torch.eye(32)
    for sign in (1.0, -1.0):
        x[..., 0] = sign
        out = attn(x, cos, sin, mask)
        close(out, torch.full_like(out, 10.0 * sign), "clip_qkv = 10 bounds v, too, on both sides")


def test_without_clip_qkv_nothing_is_clamped():
    attn = Attention(CONFIG)
    attn.clip_qkv = None
    x, cos, sin, mask = inputs(T=4)
    small = attn(x, cos, sin, mask)
    attn.c_attn.weight.data[48:] *= 1e4
    torch.testing.assert_close(attn(x, cos, sin, mask), small * 1e4, rtol=1e-4, atol=1e-2)


def test_later_blocks_change_nothing_and_the_own_block_does():
    attn = Attention(CONFIG)
    x, cos, sin, mask = inputs(T=8)
    before = attn(x, cos, sin, mask)
    changed = x.clone()
    changed[:, 6] += 1.0
    difference = (attn(changed, cos, sin, mask) - before).abs().amax((0, 2))
    assert (difference[:4] == 0).all(), "block 0 must not see block 1: causal across blocks"
    assert (difference[4:] > 0).all(), "all of block 1 sees position 6: bidirectional inside"


# ---- the cache -----------------------------------------------------------------------------------

def test_a_pass_over_the_rest_equals_a_pass_over_everything():
    attn = Attention(CONFIG)
    x, cos, sin, mask = inputs(T=12)
    cache = KVCache.empty(CONFIG, 2, 12, x.dtype, x.device)
    whole = attn(x, cos, sin, mask, cache.of(0))
    cache.length = 8
    rest = attn(x[:, 8:], cos[8:], sin[8:], mask[8:], cache.of(0))
    close(rest, whole[:, 8:], "keys go into the cache normalised and rotated", atol=1e-6)
    close(whole, attn(x, cos, sin, mask), "an empty cache changes nothing", atol=1e-6)


def test_what_an_earlier_pass_wrote_behind_length_is_never_read():
    attn = Attention(CONFIG)
    x, cos, sin, mask = inputs(T=12)
    cache = KVCache.empty(CONFIG, 2, 12, x.dtype, x.device)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    attn(x[:, :4], cos[:4], sin[:4], mask[:4, :4], cache.of(0))
    cache.length = 4
    out = attn(x[:, 4:8], cos[4:8], sin[4:8], mask[4:8, :8], cache.of(0))
    assert not out.isnan().any(), "only [0, length) and the pass's own keys may be seen"
