"""What several test files share: a small config, and the official package's golden numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerling_min import Config, Steerling

GOLDEN = Path(__file__).parent / "golden" / "tinyA"

CONFIG = Config(n_layers=1, n_head=4, n_kv_heads=2, n_embd=32, block_size=64, diff_block_size=4,
                n_concepts=8, topk_known=2, topk_known_features=2, n_unknown_concepts=8,
                unknown_topk=2, factorize_rank=4, vocab_size=20, eos_token_id=15, pad_token_id=16,
                bos_token_id=17, endofchunk_token_id=18, mask_token_id=19)

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Tensors that the official package computed from tests/golden/tinyA."""
    return load_file(GOLDEN / "io" / "io.safetensors")


@pytest.fixture(scope="session")
def model() -> Steerling:
    """The checkpoint that the golden tensors were computed with."""
    return Steerling.from_pretrained(GOLDEN)
