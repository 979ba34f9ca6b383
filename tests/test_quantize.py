"""Int8 weights: how far they are from the originals, and that nothing else changes."""

import pytest
import torch

from steerling_min import Steerling, generate, load, log_likelihood
from steerling_min.attribution import promoted
from steerling_min.files.loading import TINY
from steerling_min.files.quantize import ROWS, Int8Embedding, Int8Linear, quantize, quantize_rows
from steerling_min.steering import Steering

SHAPE = (ROWS + 3, 5)  # more rows than are widened at a time


@pytest.fixture(scope="module")
def weight():
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[7] = 0.0
    return weight


@pytest.fixture(scope="module")
def models():
    return load(), load(int8=True)[0]


def test_no_weight_moves_by_more_than_half_a_step_of_its_row(weight):
    int8, scale = quantize_rows(weight)
    assert int8.dtype == torch.int8 and scale.shape == (len(weight), 1)
    steps = (int8 * scale - weight).abs() / scale
    assert steps.max() <= 0.5 + 1e-5, f"off by {steps.max():.3f} steps: round, do not cut off"
    largest = weight.abs().amax(1)
    torch.testing.assert_close(scale[:, 0] * 127, largest, atol=1e-6, rtol=1e-5)
    assert (int8[7] == 0).all() and scale.isfinite().all(), "a row of zeros stays one"


def test_a_linear_layer_and_an_embedding_compute_with_the_widened_matrix(weight):
    linear, embedding = Int8Linear(weight), Int8Embedding(weight)
    x, ids = torch.randn(2, 3, 5), torch.tensor([[0, ROWS + 2], [7, 8]])
    torch.testing.assert_close(linear(x), x @ linear.weight.T)
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_every_matrix_takes_one_byte_per_weight_and_the_tied_pair_is_one(models):
    (model, _), small = models
    kept = {name: x for name, x in small.state_dict().items() if x.dtype != torch.int8}
    assert all(x.dim() == 1 or name.endswith(".scale") for name, x in kept.items())
    assert small.transformer.lm_head.int8 is small.transformer.tok_emb.int8
    size, before = (sum(x.nbytes for x in [*m.parameters(), *m.buffers()]) for m in (small, model))
    assert size < 0.3 * before, "a quarter of float32, but for the scales and the norms"


def test_the_tiny_model_in_int8_predicts_the_same_tokens(models):
    (model, tokenizer), small = models
    prompt = [tokenizer.encode("The old sailor Mara lived near the mill with a goat named Juno")]
    options = dict(align=True, repetition_penalty=1.0, temperature=0.0, entropy_sampling=False)
    noisy = generate(model, prompt, 128, **options)
    noisy[:, 16::2] = model.config.mask_token_id
    logits, rounded = model(noisy).logits, small(noisy).logits
    same = (logits.argmax(-1) == rounded.argmax(-1))[:, 16::2]
    assert same.float().mean() > 0.95, "rounding may turn a close choice, and few others"
    error = (rounded - logits).square().mean().sqrt() / logits.std()
    assert error < 0.05, f"root mean square error {error:.3f} of the logits' spread"


def test_steering_scores_and_labels_work_in_int8(models):
    (_, tokenizer), small = models
    prompt = [tokenizer.encode("The old sailor")]
    for steering in (Steering.amplify(3), Steering.unlearn(0), Steering(known=((3, 1.5),))):
        assert generate(small, prompt, 8, seed=0, steering=steering).shape[1] == len(prompt[0]) + 8
    assert log_likelihood(small, prompt[0], prompt[0]) < 0
    assert len(promoted(small, 3, 4)[0]) == 4


def test_a_quantized_model_is_not_saved(models, tmp_path):
    with pytest.raises(ValueError, match="a quantized model is not saved"):
        models[1].save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_bfloat16_scales_are_what_the_rounding_used():
    """The scale is rounded first: its error is not added to the weights' own."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    int8, scale = quantize_rows(weight)
    assert scale.dtype == torch.bfloat16
    error = (int8.double() * scale.double() - weight.double()).abs() / scale.double()
    assert error.max() <= 0.5 + 1e-6, (
        f"{error.max():.3f} steps of the stored scale: divide by the scale as it is stored")


def test_quantizing_a_model_is_loading_it_quantized(models):
    model = Steerling.from_pretrained(TINY)
    quantize(model)
    expected = models[1].state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())
