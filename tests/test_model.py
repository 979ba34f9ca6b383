"""The assembled model against the official package, and where it departs on purpose."""

import dataclasses
import math

import pytest
import torch
from conftest import CONFIG, close

from steerling_min import Steerling
from steerling_min.norm import RMSNorm

TOLERANCE = 1e-5  # float32, absolute


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def check(actual, expected, what):
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE, f"{what} departs from the official package by {error:.2e}"


def test_parity_of_the_plain_forward_pass(model, golden):
    """In the order of computation: the first name that fails is where to look."""
    out = run(model, golden["input_ids"])
    check(out.hidden, golden["hidden"], "hidden")
    assert torch.equal(out.known_ids, golden["known_topk_indices"])
    check(out.known_logits, golden["known_topk_logits"], "known_logits")
    check(out.known, golden["known_features"], "known")
    assert torch.equal(out.unknown_ids, golden["unknown_topk_indices"])
    check(out.unknown_logits, golden["unknown_topk_logits"], "unknown_logits")
    check(out.unknown, golden["unk_hat"], "unknown")
    check(out.epsilon, golden["epsilon"], "epsilon")
    check(out.composed, golden["composed"], "composed")
    check(out.logits, golden["logits"], "logits")


def test_parity_of_an_odd_length(model, golden):
    out = run(model, golden["odd.input_ids"])
    check(out.logits[:, -8:], golden["odd.logits_last8"], "logits")
    assert torch.equal(out.known_ids, golden["odd.known_topk_indices"])


def test_parity_of_known_and_joint_interventions(model, golden):
    tokens, at = golden["input_ids"], golden["variant_positions"]
    out = run(model, tokens, known={3: 1.5, 7: 0.0})
    check(out.known, golden["int_known.known_features"], "known, edited")
    check(out.composed, golden["int_known.composed"], "composed, epsilon dropped")
    check(out.logits, golden["int_known.logits"], "logits")
    out = run(model, tokens, known={3: 1.5, 7: 0.0}, unknown={5: 2.0})
    check(out.composed, golden["int_both.composed"], "composed of a joint edit")
    check(out.logits[:, at], golden["int_both.logits"], "logits of a joint edit")


def test_departure_an_intervention_acts_at_chosen_positions_and_nowhere_else(model, golden):
    tokens, at = golden["input_ids"], golden["variant_positions"]
    masked = tokens == model.config.mask_token_id
    plain, out = run(model, tokens), run(model, tokens, known={3: 1.5}, positions=masked)
    check(out.composed[masked], golden["int_known_masked_positions.composed"][masked], "composed")
    expected = golden["int_known_masked_positions.logits"]
    check(out.logits[:, at][masked[:, at]], expected[masked[:, at]], "logits")
    assert torch.equal(out.logits[~masked], plain.logits[~masked]), (
        "departure: the official package drops epsilon at positions nobody edited, too")


def test_departure_an_unknown_edit_acts(model, golden):
    tokens, at = golden["input_ids"], golden["variant_positions"]
    out = run(model, tokens, unknown={5: 2.0})
    check(out.unknown, golden["int_unknown.unk_hat"], "unknown, edited")
    official = golden["int_unknown.logits"]
    check(run(model, tokens).logits[:, at], official, "the official logits are the unedited ones")
    assert (out.logits[:, at] - official).abs().max() > 0.1, (
        "the official package keeps epsilon here and cancels the edit; ours has an effect")


def test_departure_the_weight_of_an_unselected_unknown_concept_is_set(model, golden):
    tokens, at = golden["input_ids"], golden["variant_positions"]
    out = run(model, tokens, known={3: 1.5, 7: 0.0}, unknown={5: 2.0})
    selected = (out.unknown_ids[:, at] == 5).any(-1)
    difference = (out.unknown[:, at] - golden["int_both_sparse_unknown.unk_hat"]).abs().amax(-1)
    assert (difference[selected] <= TOLERANCE).all(), "selected before: both set it"
    assert (difference[~selected] > 1e-4).all(), (
        "not selected: the official sparse path subtracts a weight that was never added")


def test_a_later_call_leaves_the_result_of_an_earlier_one_alone(model, golden):
    tokens = golden["input_ids"]
    first = run(model, tokens)
    before = {name: x.clone() for name, x in vars(first).items()}
    run(model, tokens.flip(0), known={3: 1.5})
    for name, x in vars(first).items():
        assert torch.equal(x, before[name]), f"{name}: two results may not share memory"


def test_departure_an_edit_keeps_topk_known_features_concepts(model, golden):
    other = Steerling(dataclasses.replace(model.config, topk_known=2, topk_known_features=4))
    other.load_state_dict(model.state_dict())
    out = run(other, golden["input_ids"], known={3: 1.5, 7: 0.0})
    assert out.known_ids.shape[-1] == 4, "the official package would switch to topk_known here"
    check(out.known, golden["int_known.known_features"], "known, edited")


@pytest.mark.parametrize("kind", ["hidden", "composed", "known", "unknown"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_parity_of_embeddings(model, golden, kind, pooling):
    tokens = golden["emb.input_ids"].long()[None]
    close(model.embed(tokens, kind, pooling)[0], golden[f"emb.{kind}.{pooling}"], "pooled states")


def test_an_embedding_may_stay_unpooled(model, golden):
    tokens = golden["emb.input_ids"].long()[None]
    states = model.embed(tokens, "known", "none")
    assert states.shape == (1, 13, model.config.n_embd)
    close(states.mean(1), model.embed(tokens, "known"), "the mean over tokens is the default")


@pytest.mark.parametrize("arguments, message", [
    (("epsilon",), "kind = 'epsilon' is not supported; supported: hidden"),
    (("known", "max"), "pooling = 'max' is not supported; supported: mean, last, first, none")])
def test_another_kind_or_pooling_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.embed(torch.zeros(1, 3, dtype=torch.int64), *arguments)
    with pytest.raises(ValueError, match="tokens must be .* T >= 1; got"):
        model.embed(torch.zeros(1, 0, dtype=torch.int64))


def test_parity_of_injection(model, golden):
    tokens, at = golden["input_ids"], golden["variant_positions"]
    masked = (tokens == model.config.mask_token_id)[..., None]
    vector = 2.0 * golden["inject.direction"] * masked  # (B, T, D)
    out = run(model, tokens, injection=vector, inject_layer=1)
    check(out.hidden, golden["inject.hidden"], "hidden")
    check(run(model, tokens, injection=vector).hidden, out.hidden, "hidden, from layer 1")
    check(out.logits, golden["inject.logits"], "logits")
    out = run(model, tokens, injection=vector, inject_layer=model.config.n_layers)
    check(out.hidden[:, at], golden["inject_last.hidden"], "hidden, injected after the last block")


def test_logits_are_read_off_the_composed_state(model, golden):
    out = run(model, golden["input_ids"], known={3: 5.0})
    torch.testing.assert_close(out.logits, out.composed @ model.transformer.tok_emb.weight.T)
    close(out.hidden, golden["hidden"], "hidden is what is taken apart, whatever is put together")


def test_every_number_of_the_config_reaches_the_model():
    config = dataclasses.replace(CONFIG, norm_eps=0.5, clip_qkv=0.25, mlp_ratio=2, pad_multiple=5,
                                 n_kv_heads=None, topk_known_features=None, topk_known=3)
    torch.manual_seed(0)
    model = Steerling(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # large: some values are clipped
    block, tokens = model.transformer.blocks[0], torch.arange(8)[None]
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 5 and {norm.eps for norm in norms} == {0.5}
    assert block.mlp.c_fc.weight.shape == (2 * 64, 32), "F = mlp_ratio D"
    assert block.attn.c_attn.weight.shape == (3 * 32, 32), "without n_kv_heads no heads are shared"
    assert len(model.known_head.concept_embedding.weight) == 10, "8 concepts, padded to fives"
    assert model(tokens).known_ids.shape[-1] == 3, "topk_known stands in for topk_known_features"
    for name, value in (("clip_qkv", None), ("rope_base", 7.0), ("norm_eps", 1e-5)):
        other = Steerling(dataclasses.replace(config, **{name: value}))
        other.load_state_dict(model.state_dict())
        difference = (run(other, tokens).hidden - run(model, tokens).hidden).abs().max()
        assert difference > 1e-3, f"{name} changes nothing"


def test_initialisation_scales_what_ends_a_branch():
    torch.manual_seed(0)
    model = Steerling(dataclasses.replace(CONFIG, n_layers=8, n_embd=128))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), f"{name}: norms start at 1"
        elif parameter.numel() > 2000:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
