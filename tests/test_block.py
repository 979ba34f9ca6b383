"""The block: where the norms sit, and which half of the MLP gates."""

import torch

from steerling_min.attention import block_causal_mask, rotary_tables
from steerling_min.block import MLP, Block

from conftest import CONFIG, close


def test_the_mlp_gates_the_first_half_with_silu_of_the_second():
    mlp = MLP(CONFIG)
    assert mlp.c_fc.weight.shape == (2 * 128, 32), "F = mlp_ratio D = 4 * 32, twice: up and gate"
    mlp.c_fc.weight.data.zero_()
    mlp.c_fc.weight.data[0, 0] = 3.0    # up of hidden unit 0 = 3 x_0
    mlp.c_fc.weight.data[128, 1] = 1.0  # its gate = x_1
    mlp.c_proj.weight.data = torch.ones(32, 128)
    x = torch.zeros(1, 1, 32)
    x[..., 0], x[..., 1] = 2.0, -1.5
    silu = -1.5 / (1 + torch.tensor(1.5).exp())
    close(mlp(x), (6.0 * silu).expand(1, 1, 32),
          "c_fc gives [up, gate]; out = c_proj(up * silu(gate))")


def a_block():
    torch.manual_seed(1)
    block = Block(CONFIG)
    positions = torch.arange(8)
    cos, sin = rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_base)
    return block, (cos, sin, block_causal_mask(positions, positions, 4))


def test_the_norms_sit_on_the_branches_outputs():
    block, around = a_block()
    x = torch.randn(1, 8, 32)
    block.ln_1.weight.data = torch.rand(32) + 0.5
    after_attention = x + block.ln_1(block.attn(x, *around))
    expected = after_attention + block.ln_2(block.mlp(after_attention))
    close(block(x, *around), expected, "x + ln_1(attn(x)), then x + ln_2(mlp(x)) of the new x; "
          "each norm has a weight of its own")
    added = (block(x, *around) - after_attention).square().mean(-1).sqrt()
    close(added, torch.ones(1, 8), "ln_2 (weight 1) gives what the MLP adds root mean square 1",
          atol=1e-2)


def test_nothing_normalises_what_a_branch_reads():
    block, around = a_block()
    x = torch.randn(1, 8, 32)
    read = []
    block.attn.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    block(x, *around)
    assert torch.equal(read[0], x), "attention reads the residual stream itself (norm_order 'post')"


def test_the_stream_that_a_block_reads_is_left_as_it_is():
    block, around = a_block()
    x = torch.randn(1, 8, 32)
    before = x.clone()
    with torch.no_grad():  # nothing would object to x += ...
        block(x, *around)
    assert torch.equal(x, before), "it belongs to the caller"


def test_a_silent_branch_leaves_the_residual_stream_alone():
    block, around = a_block()
    block.attn.c_proj.weight.data.zero_()
    block.mlp.c_proj.weight.data.zero_()
    x = torch.randn(1, 8, 32)
    assert torch.equal(block(x, *around), x), "both branches are added to x"
