"""What only a real GPU can show; skipped where there is none. (`test_device.py` pretends one.)"""

import json

import pytest
import torch
from conftest import GOLDEN, MODES, PROMPT, close, history_of

from steerling_min import Steerling, generate, load, unmask
from steerling_min.attribution import input_attribution
from steerling_min.files.labels import load_labels
from steerling_min.files.loading import find_labels
from steerling_min.files.quantize import quantize
from steerling_min.views.explain import explain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")

GREEDY = {"entropy_sampling": False, "temperature": 0.0}


@pytest.fixture(scope="module")
def on_card():
    return Steerling.from_pretrained(GOLDEN, "cuda")


def test_float32_on_the_card_agrees_with_the_official_tensors(on_card, golden):
    out = on_card(golden["input_ids"].cuda())
    for name in ("hidden", "composed", "logits"):
        close(getattr(out, name).cpu(), golden[name], f"{name}: is TensorFloat-32 switched on?")


def test_greedy_texts_on_the_card_are_the_official_ones(on_card):
    recorded = {name: run for name, run in json.loads((GOLDEN / "generation.json").read_text()
                                                      ).items() if name.startswith("greedy")}
    assert recorded
    for name, run in recorded.items():
        config = run["config"]
        tokens = generate(on_card, run["prompt"], config["max_new_tokens"], **GREEDY,
                          steps=config["steps"], repetition_penalty=config["repetition_penalty"])
        assert tokens[0].tolist() == run["tokens"], name


@pytest.mark.parametrize("mode", MODES)
def test_the_cache_writes_what_recomputing_writes_on_the_card_as_well(on_card, mode):
    a, b = (generate(on_card, PROMPT, 20, seed=1, use_cache=cached, **MODES[mode])
            for cached in (True, False))
    assert a.device.type == "cuda" and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_its_pass_has_begun_a_step_never_waits_for_the_card(dtype):
    """CUDA itself is asked to refuse whatever would wait."""
    model, _ = load(device="cuda", dtype=dtype)

    def refuse(*args):
        torch.cuda.set_sync_debug_mode("error")
    handle = model.transformer.register_forward_pre_hook(refuse)
    try:
        for step in unmask(model, [[1, 2, 3], [4, 5, 6]], 40, seed=0):
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()


def test_int8_weights_write_on_the_card():
    model, tokenizer = load(device="cuda")
    assert model.dtype == torch.bfloat16, "on a GPU, the default is bfloat16"
    quantize(model)
    assert generate(model, [tokenizer.encode("The ")], 20, seed=0).shape[1] > 20


def test_a_text_is_explained_on_the_card_as_on_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model, tokenizer = load(device=device, dtype=torch.float32)
        labels = load_labels(find_labels(None), model.config)
        steps = list(unmask(model, [tokenizer.encode("The old")], 16, **GREEDY))
        rows = explain(model, tokenizer, labels, steps, 0, None)["tokens"]
        place = int(steps[0].positions[0][0])
        traced = input_attribution(model, steps[-1].tokens[0], place, 3, 2)
        found.append((rows, traced.cpu()))
    (a, traced_a), (b, traced_b) = found
    close(traced_b, traced_a, "integrated gradients", atol=1e-3)
    assert [row["id"] for row in a] == [row["id"] for row in b]
    for x, y in zip(a, b):
        assert x["logit"] == pytest.approx(y["logit"], abs=1e-3)


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--compile",)], ids=str)
def test_training_on_the_card_takes_the_steps_of_the_cpu(run, tmp_path, options):
    run("--steps", "10", out=tmp_path / "cpu")
    run("--steps", "10", "--device", "cuda", *options, out=tmp_path / "card")
    cpu, card = (history_of(tmp_path / place) for place in ("cpu", "card"))
    for a, b in zip(cpu, card, strict=True):
        assert b["token"] == pytest.approx(a["token"], rel=0.02 if options else 1e-3)


def test_a_run_on_the_card_goes_on_there(run, tmp_path):
    run("--steps", "10", "--device", "cuda")
    printed = run("--resume", "--steps", "20", "--device", "cuda")
    assert "step 20" in printed and "on 1 x cuda" in printed
