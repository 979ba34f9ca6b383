"""What several test files share: small models, ways to write, the official package's numbers."""

import json
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from steerling_min import Config, Steerling, Tokenizer
from steerling_min.course.exercises import EXERCISES
from steerling_min.steering import Steering

GOLDEN = Path(__file__).parent / "golden" / "tinyA"
OFFICIAL = json.loads((Path(__file__).parent / "golden" / "state_dict_8b.json").read_text())

CONFIG = Config(n_layers=1, n_head=4, n_kv_heads=2, n_embd=32, block_size=64, diff_block_size=4,
                n_concepts=8, topk_known=2, topk_known_features=2, n_unknown_concepts=8,
                unknown_topk=2, factorize_rank=4, vocab_size=20, eos_token_id=15, pad_token_id=16,
                bos_token_id=17, endofchunk_token_id=18, mask_token_id=19)

TEXT = 2 * " ".join(map("".join, product("abcd", repeat=4)))  # aaaa aaab aaac ...: 256 words, twice

PROMPT = [[24, 31, 236, 254, 154, 21, 87, 89], [169, 99, 5, 171, 158, 246, 105, 9]]
MODES = {  # ways to write: options of unmask
    "entropy": {},
    "greedy": {"entropy_sampling": False, "temperature": 0.0},
    "temperature": {"entropy_sampling": False, "temperature": 1.0, "top_p": 0.95},
    "few steps": {"steps": 5},
    "threshold": {"confidence_threshold": 0.2},
    "guidance": {"cfg_scale": 1.5},
    "global": {"order": "global"},
    "global, guided": {"order": "global", "cfg_scale": 0.5, "steps": 7},
    "aligned": {"align": True},
    "aligned, threshold": {"align": True, "confidence_threshold": 0.3},
    "may end": {"allow_eos": True},
    "stop": {"stop_tokens": [151, 172, 69]},
    "amplified": {"steering": Steering.amplify((3, 5), 6.0, cutoff_tokens=9)},
    "unlearned": {"steering": Steering.unlearn(3, (4,)), "steps": 9},
    "amplified, guided": {"steering": Steering.amplify(3, cutoff_tokens=9) + Steering.amplify(7, 4),
                          "cfg_scale": 0.75},
    "amplified, guided, threshold": {  # rows reach the cutoff at different steps
        "steering": Steering.amplify(3, 4.0, cutoff_tokens=13), "cfg_scale": 0.75,
        "confidence_threshold": 0.3},
    "edited": {"steering": Steering(known=((3, 2.0), (7, 0.0)), unknown=((5, 3.0),))},
    "edited, epsilon kept": {"steering": Steering(known=((3, 2.0),), epsilon="keep")},
}

torch.set_num_threads(1)  # the tensors are tiny: more threads would only wait for each other


def close(actual: torch.Tensor, expected: torch.Tensor, lesson: str, atol: float = 1e-5) -> None:
    """Assert that two tensors agree; a failure shows the numbers and what they mean."""
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0,
                               msg=lambda numbers: f"{numbers}\n{lesson}")


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(tensor, b[name]) for name, tensor in a.state_dict().items())


@pytest.fixture(autouse=True)
def no_labels_from_elsewhere(monkeypatch):
    """A label file that whoever runs the tests has chosen is not one of the tests'."""
    monkeypatch.delenv("STEERLING_CONCEPTS_PATH", raising=False)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A folder in the place of the Hugging Face cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="pip install -e '.[hub]'")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


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


# ---- training ------------------------------------------------------------------------------------

SMALL = {"n_layers": 1, "n_embd": 32, "n_head": 2, "n_kv_heads": 1, "block_size": 64}
DEVICE = ["--device", "cpu"]
SHARED = [*DEVICE, "--batch", "4"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run train_tiny.py's main, small and logging often; returns what it prints."""
    import train_tiny

    def run(*arguments, out=tmp_path / "out", status=0, LOG_EVERY=5, SAVE_EVERY=0):
        usual = DEVICE if "--evaluate" in arguments else ["--out", out, *SHARED]
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", *map(str, [*usual, *arguments])])
        monkeypatch.setitem(train_tiny.SIZES, "tiny", SMALL)
        monkeypatch.setattr(train_tiny, "WARMUP", 5)
        monkeypatch.setattr(train_tiny, "LOG_EVERY", LOG_EVERY)
        monkeypatch.setattr(train_tiny, "SAVE_EVERY", SAVE_EVERY)
        try:
            train_tiny.main()
            ended = 0
        except SystemExit as error:
            ended = error.code
        printed = capsys.readouterr()
        assert ended == status, printed.err
        if status == 2:
            assert len(printed.err.splitlines()) == 1, "one line says what is wrong"
        return printed.err.strip() if status == 2 else printed.out
    return run


def history_of(folder):
    with safe_open(folder / "training.safetensors", framework="pt") as f:
        return json.loads(f.metadata()["run"])["history"]


def same_files(a, b, name="model.safetensors"):
    return (a / name).read_bytes() == (b / name).read_bytes()


# ---- the course's check --------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--exercise", choices=EXERCISES, help="a test that meets the blank of an "
                     "exercise that comes after this one waits: it is skipped, and does not fail")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report, order = (yield).get_result(), list(EXERCISES)
    exercise = item.config.getoption("--exercise")
    blank = call.excinfo and re.search(r"exercise: (\S+)", call.excinfo.exconly())
    if exercise and blank and blank[1] in order[order.index(exercise) + 1:]:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), None, f"waits for the exercise {blank[1]}")
