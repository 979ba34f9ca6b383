"""What several test files share: a small config, and the official package's golden numbers."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerling_min import Config, Steerling, Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "tinyA"

CONFIG = Config(n_layers=1, n_head=4, n_kv_heads=2, n_embd=32, block_size=64, diff_block_size=4,
                n_concepts=8, topk_known=2, topk_known_features=2, n_unknown_concepts=8,
                unknown_topk=2, factorize_rank=4, vocab_size=20, eos_token_id=15, pad_token_id=16,
                bos_token_id=17, endofchunk_token_id=18, mask_token_id=19)

TEXT = " ".join(map("".join, product("abcd", repeat=4)))  # aaaa aaab aaac ...: 256 words

torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other


def close(actual: torch.Tensor, expected: torch.Tensor, lesson: str, atol: float = 1e-5) -> None:
    """Assert that two tensors agree; a failure shows the numbers and what they mean."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0,
                               msg=lambda numbers: f"{numbers}\n{lesson}")


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """Tensors that the official package computed from tests/golden/tinyA."""
    return load_file(GOLDEN / "io" / "io.safetensors")


@pytest.fixture(scope="session")
def model() -> Steerling:
    """The checkpoint that the golden tensors were computed with."""
    return Steerling.from_pretrained(GOLDEN)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A checkpoint of the tiny configuration: random weights, and a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    Steerling(Config.tiny(vocab_size=512)).save_pretrained(folder)
    Tokenizer.train(TEXT, 512).save(folder / "tokenizer.tiktoken")
    return folder
