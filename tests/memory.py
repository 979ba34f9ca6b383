"""What training takes on each card, in GB, from the configuration alone. Run by hand.

    python tests/memory.py

Weights are float32 and computed with in bfloat16 (`train_tiny.py --dtype bfloat16`), spread over
the cards by FSDP2 (`distributed.shard`), with AdamW, one window a card, and `--recompute`.
"""

import dataclasses
import sys
from pathlib import Path

import torch

from steerling_min import Config, Steerling

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_tiny  # noqa: E402

GB = 1e9


def inside_a_block(config: Config) -> int:
    """Bytes per token that a block's backward pass needs, bfloat16 being 2 of them, float32 4."""
    D, G, F = config.n_embd, config.kv_heads * config.head_dim, config.mlp_hidden
    attention = (2 * D                 # its input
                 + 2 * (D + 2 * G)     # q, k and v before they are clamped
                 + 8 * (D + G)         # q and k in float32, before and after their norm
                 + 2 * (D + 2 * G)     # what SDPA reads
                 + 4 * D)              # what it gives, and the same with the heads side by side
    mlp = 2 * D + 8 * F                # its input; up and gate, silu, their product
    norms = 2 * 8 * D                  # each branch's output in float32, before and after
    return attention + mlp + norms


def training(config: Config, cards: int, windows: int = 1, recompute: bool = True) -> dict:
    """GB on each card, by what they are for."""
    with torch.device("meta"):
        model = Steerling(config)
    P = sum(p.numel() for p in model.parameters())
    K = sum(p.numel() for p in model.transformer.blocks[0].parameters())
    rest = P - config.n_layers * K  # embeddings, heads: together for the whole step
    n, D, V, C = windows * config.block_size, config.n_embd, config.vocab_size, config.n_concepts
    masks, inside = n / 2, n * inside_a_block(config)
    sharded = cards > 1
    return {
        "weights": 4 * P / cards, "gradients": 4 * P / cards, "AdamW's moments": 8 * P / cards,
        "put together: embeddings and heads, their gradients": sharded * 8 * rest,
        "put together: two blocks, one's gradient": sharded * (2 * 2 + 2 + 4) * K,
        "activations of the blocks": 4 * n * D * config.n_layers + inside if recompute else
        inside * config.n_layers + 2 * config.n_layers * K,  # autocast's copies of the weights
        "the concepts' logits, their losses, gradients (4 as large)": 4 * 4 * n * C,
        "at masks: the tokens' logits (3), the discovered concepts' (2)":
        4 * masks * (3 * V + 2 * config.n_unknown_concepts)}


def main() -> None:
    full = Config()
    columns = {"the 8B, 8 cards": training(full, 8), "the 8B, 16 cards": training(full, 16)}
    print("| GB on each card |", " | ".join(columns), "|\n|" + "---|" * (1 + len(columns)))
    for name in next(iter(columns.values())):
        print(f"| {name} |", " | ".join(f"{x[name] / GB:.1f}" for x in columns.values()), "|")
    print("| sum |", " | ".join(f"{sum(x.values()) / GB:.1f}" for x in columns.values()), "|")
    large = dataclasses.replace(Config.tiny(795), n_concepts=294, **train_tiny.SIZES["large"])
    for recompute, measured in ((True, 16.8), (False, 37.6)):
        said = sum(training(large, 1, 8, recompute).values()) / GB
        print(f"--size large on one card, 8 windows, {'with' if recompute else 'without'} "
              f"--recompute: {said:.1f} GB; measured on an H200: {measured} GB")


if __name__ == "__main__":
    main()
