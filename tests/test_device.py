"""All is computed where the model is: a pretended GPU refuses what a real one would refuse.

On a CPU a forgotten `device=` changes nothing, and on a GPU nothing works without it. So these
tests mark tensors as lying on a card, watch every operation, and let none mix the two places.
"""

import argparse

import pytest
import torch
from conftest import CONFIG
from torch.overrides import TorchFunctionMode

import train_tiny
from steerling_min import Steering, Steerling, Tokenizer, generate, log_likelihood, unmask
from steerling_min.attribution import input_attribution, nearest, promoted
from steerling_min.views.explain import explain
from steerling_min.files.labels import Labels
from steerling_min.files.quantize import quantize

CARD = torch.device("cuda", 0)
WAITS = {"item", "tolist", "nonzero", "unique", "equal", "cpu", "__bool__", "__int__", "__float__",
         "__index__"}  # calls that bring numbers to Python


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(part)


def is_on_card(x):
    return getattr(x, "on_card", False)


def mark(x, on_card):
    for tensor in tensors_in(x):
        tensor.on_card = on_card
    return x


class Card(TorchFunctionMode):
    """What is made with device="cuda", or from what lies there, is marked; it stays in memory.

    As on a GPU, an operation takes tensors of one place only, but for numbers (0-dim tensors) from
    the CPU and indices into the card's tensors. `waits` counts the calls that bring a number to
    Python, for which a GPU has to finish all it was given.
    """

    waits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, attribute = func.__name__, getattr(func, "__self__", None)
        if name == "__get__" and attribute is torch.Tensor.device:  # x.device
            return CARD if is_on_card(args[0]) else torch.device("cpu")
        inputs = list(tensors_in([args, kwargs]))
        place = any(map(is_on_card, inputs))
        if name == "to":  # its device: a word, a torch.device, or that of a tensor
            for x in (*args[1:], kwargs.get("device")):
                if isinstance(x, str | torch.device):
                    place = torch.device(x).type == "cuda"
                elif isinstance(x, torch.Tensor):
                    place = is_on_card(x)
            args = [torch.device("cpu") if isinstance(x, str | torch.device) else x for x in args]
        elif name == "cpu":
            place = False
        elif name in ("__getitem__", "__setitem__"):
            place = is_on_card(args[0])
            indices = [x for x in tensors_in(args[1]) if is_on_card(x)]
            assert place or not indices, f"{name}: an index on the card, into the CPU's memory"
            self.waits += any(x.dtype == torch.bool for x in indices)
        elif name == "copy_":
            place = is_on_card(args[0])
        elif name not in ("__get__", "__set__"):
            assert {is_on_card(x) for x in inputs if x.dim() > 0} <= {place}, (
                f"{name} is given tensors on the card and on the CPU: a device= is missing")
        if kwargs.get("device") is not None:
            place = torch.device(kwargs["device"]).type == "cuda"
            kwargs["device"] = "cpu"
        if kwargs.get("generator") is not None:
            assert kwargs["generator"].on_card == place, f"{name}: the generator is elsewhere"
        self.waits += any(map(is_on_card, inputs)) and name in WAITS
        out = func(*args, **kwargs)
        if name in ("to", "cpu") and place != is_on_card(inputs[0]):
            out = out.clone()  # a move gives another tensor
        if hasattr(out, "__next__"):  # for row in tensor
            return iter(mark(list(out), place))
        return mark(out, place)


class Generator(torch.Generator):
    """A generator of the CPU that remembers the device asked for."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu")
        generator.on_card = torch.device(device).type == "cuda"
        return generator

    def __init__(self, device="cpu"):
        pass


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Generator)
    with Card() as card:
        yield card


def on_the_card(model):
    mark([*model.parameters(), *model.buffers()], True)
    return model


@pytest.fixture
def small(card):
    torch.manual_seed(0)
    return on_the_card(Steerling(CONFIG).eval().requires_grad_(False))


def test_the_pretended_card_notices_a_forgotten_device(small):
    weight = small.transformer.ln_f.weight
    assert weight.device == CARD == (weight + 1.0).device and small.device == CARD
    for forgotten in (lambda: weight + torch.ones(32), lambda: torch.ones(32)[weight.long()],
                      lambda: torch.ones(32) * weight.sum()):
        with pytest.raises(AssertionError, match="on the card"):
            forgotten()
    assert torch.ones(32, device=weight.device).add(weight).device == CARD
    assert (weight * torch.tensor(2.0)).cpu().device.type == "cpu"


@pytest.mark.parametrize("options", [
    {}, {"use_cache": False}, {"align": True, "steps": 3}, {"confidence_threshold": 0.5},
    {"cfg_scale": 1.0}, {"order": "global"}, {"allow_eos": True}, {"stop_tokens": (3,)},
    {"entropy_sampling": False, "temperature": 0.0}, {"steering": Steering.amplify(1)},
    {"steering": Steering.unlearn(1), "cfg_scale": 1.0},
    {"steering": Steering(known=((2, 1.5),), unknown=((0, 0.5),))}], ids=str)
def test_texts_are_written_where_the_model_is(small, options):
    tokens = generate(small, [[1, 2, 3], [4, 5, 6]], 10, seed=0, **options)
    assert tokens.device == CARD


def test_a_text_is_explained_where_the_model_is(small):
    tokenizer = Tokenizer.train("abcd", 261)
    for steering in (None, Steering(known=((2, 1.5),))):
        steps = list(unmask(small, [[1, 2, 3]], 6, seed=0, steering=steering))
        explain(small, tokenizer, Labels([], 8, 8), steps, 0, steering)
    place = int(steps[0].positions[0][0])
    assert input_attribution(small, steps[-1].tokens[0], place, 3, 2).device == CARD
    assert promoted(small, 1, 2)[0].device == nearest(small, 1)[0].device == CARD
    assert log_likelihood(small, [1, 2], [3, 4], samples=2) < 0


def test_int8_weights_are_used_where_they_are(small):
    quantize(small)
    assert generate(on_the_card(small), [[1, 2, 3]], 5, seed=0).device == CARD


def test_training_runs_where_the_model_is(card, tmp_path, monkeypatch):
    fill = train_tiny.fill

    def filled(model, device, weight):
        with torch._C.DisableTorchFunction():  # from nowhere to the card: the pretence ends there
            return on_the_card(fill(model, "cpu", weight))
    monkeypatch.setattr(train_tiny, "fill", filled)
    corpus = train_tiny.Stories(0)
    args = argparse.Namespace(steps=3, minutes=None, batch=2, lr=1e-3, seed=0, without=[],
                              text=None, init=None, resume=False, compile=False, recompute=False,
                              dtype="float32", out=tmp_path)
    with train_tiny.Run(args) as run:
        model = train_tiny.make_model("tiny", corpus)
        counted, _ = corpus.windows("counted", 200, model.config.block_size)
        objective = train_tiny.prepare(model, corpus, counted, args, run, CARD)
        train_tiny.train(objective, corpus, args, run)  # its last steps inject concepts


def test_a_step_waits_for_the_device_before_its_pass_and_not_after(small, card, monkeypatch):
    """So that the device is given a step's whole work at once, and does not idle in between."""
    before, during = [], []
    forward = small.transformer.forward

    def counted(*args):
        before.append(card.waits)
        return forward(*args)
    monkeypatch.setattr(small.transformer, "forward", counted)
    for step in unmask(small, [[1, 2, 3], [4, 5, 6]], 8, seed=0):
        during.append(card.waits - before[-1])
    assert set(during) == {0}, (
        "a number made from a tensor (.item(), .tolist(), an if, a boolean index) in a step, after "
        "its forward pass has begun")
    assert before[-1] - before[-2] == 4, (
        "how many candidates each row has, and where (in unmask); where, and as numbers (in "
        "cached_hidden): however many rows there are")
