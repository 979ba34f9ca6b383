"""Steering: its directions and strengths, its presets, where it acts, and what it refuses."""

import copy
import dataclasses

import pytest
import torch
from conftest import close
from torch.nn.functional import normalize

from steerling_min import Steerling, generate, load
from steerling_min.attribution import promoted
from steerling_min.iguide import decompose
from steerling_min.steering import (SUPPRESS, UNLEARN, Injection, Steerer, Steering,
                                    Suppression, alpha_of)
from steerling_min.unmasking import asked_logits

PROMPT = [[24, 31, 236, 254, 154, 21, 87, 89]]


def test_parity_of_direction_strength_and_suppression(model, golden):
    embedding = model.known_head.concept_embedding.weight[3]
    direction = normalize(embedding, dim=0)
    close(direction, golden["steer.direction_c3"], "the embedding divided by its L2 norm")
    alpha = alpha_of(8.0, direction, model.transformer.tok_emb.weight)
    close(alpha, golden["steer.alpha_c3_normalized"].view(()), "8 / max_v(tok_emb_v . direction)")
    steerer = Steerer(Steering(suppressions=((3, 20.0),)), model)
    close(steerer.suppression, golden["steer.relu_suppression_c3"], "20 relu(tok_emb . embedding)")


def test_amplify_raises_the_tokens_that_the_concept_promotes(model):
    vectors = Steerer(Steering.amplify(3, 5.0), model).vectors(
        torch.tensor([[True]]), torch.tensor([0]))
    logits = model.transformer.tok_emb.weight @ vectors[1][0, 0]
    assert logits.max().item() == pytest.approx(5.0, abs=1e-4), "strength is in logits"


def test_every_direction_has_an_alpha_of_its_own():
    tok_emb = torch.tensor([[1.0, 0.0], [0.0, 4.0], [-9.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    close(alpha_of(8.0, directions, tok_emb), torch.tensor([8.0, 2.0]),
          "strength over the largest product of that direction with a token, not the largest size")


def test_the_presets_are_the_official_ones():
    amplify, unlearn = Steering.amplify(3), Steering.unlearn(3, (5, 3), -7.0, 20.0)
    assert amplify.injections == (Injection((3,), 8.0, None, True, 32),)
    assert amplify.suppressions == ()
    assert unlearn.injections == (Injection((3, 5), -7.0, None, False, None),)
    assert unlearn.suppressions == ((3, 20.0, False),), "suppression takes the focal concept only"


def test_unlearning_by_default_is_measured_in_logits_and_so_suits_any_model(model):
    """Embeddings ten times as large make raw numbers ten times as strong, and logits as strong."""
    E, concepts = model.transformer.tok_emb.weight, model.known_head.concept_embedding.weight
    larger = copy.deepcopy(model)
    larger.known_head.concept_embedding.weight.data *= 10
    for some in (model, larger):
        steerer = Steerer(Steering.unlearn(3), some)
        assert steerer.suppression.max().item() == pytest.approx(SUPPRESS, abs=1e-5), (
            "so many logits off the token that the concept promotes most")
        (layer, cutoff, vector), = steerer.injections
        assert (E @ -vector).max().item() == pytest.approx(-UNLEARN, abs=1e-4)
        assert (layer, cutoff) == (1, None), "from the middle on, to the end"
    close(steerer.suppression, SUPPRESS * (E @ concepts[3]).relu() / (E @ concepts[3]).max(),
          "what the concept lowers is left alone")


def test_the_defaults_of_unlearning_are_four_logits_away_and_two_off(model):
    assert (UNLEARN, SUPPRESS) == (-4.0, 2.0)
    assert Injection((3,), 1.0).logit_units and not Suppression(3, 1.0).logit_units
    faint = copy.deepcopy(model)
    faint.known_head.concept_embedding.weight.data *= 1e-3
    assert Steerer(Steering.unlearn(3), faint).suppression.max().item() == pytest.approx(2.0), (
        "logits, however small the embedding is")


def test_a_given_strength_is_raw_unless_logit_units_are_asked_for(model):
    vectors = [Steerer(steering, model).injections[0][2] for steering in (
        Steering.unlearn(3, strength=UNLEARN, logit_units=True), Steering.unlearn(3))]
    close(*vectors, "the default is UNLEARN logits")


def test_a_raw_strength_is_the_length_of_the_step(model):
    raw = Steerer(Steering.unlearn(3, (4, 9), strength=-7.0), model).injections[0][2]
    assert raw.norm().item() == pytest.approx(7.0, abs=1e-4), "alpha times a unit direction"
    summed = model.known_head.concept_embedding.weight[[3, 4, 9]].sum(0)
    close(raw, -7 * normalize(summed, dim=0), "away from the sum of the group's embeddings")


@pytest.mark.parametrize("n_layers, early, middle", [(1, 1, 1), (4, 1, 2), (16, 4, 8),
                                                     (32, 8, 16), (64, 8, 32)])
def test_layers_not_given_depend_on_depth(n_layers, early, middle, model):
    config = dataclasses.replace(model.config, n_layers=n_layers)
    with torch.device("meta"):
        deep = Steerling(config).to_empty(device="cpu")
    found = Steerer(Steering.amplify(0) + Steering.unlearn(1), deep).injections
    assert [layer for layer, _, _ in found] == [early, middle]
    assert Steerer(Steering.amplify(0, 0.5), deep).injections[0][0] == early, "however weak"


def test_only_masked_positions_are_injected_and_only_until_the_cutoff(model):
    steerer = Steerer(Steering.amplify(3, cutoff_tokens=4), model)
    masked = torch.tensor([[False, True, True], [False, False, True]])
    vectors = steerer.vectors(masked, torch.tensor([3, 4]))[1]
    assert torch.equal(vectors.any(-1), torch.tensor([[False, True, True], [False] * 3])), (
        "row 1 has 4 committed tokens, which is the cutoff; committed tokens are left alone")
    forever = Steerer(Steering.amplify(3, cutoff_tokens=None), model)
    assert forever.vectors(masked, torch.tensor([3, 10**6]))[1].any(-1).equal(masked)


def test_no_strength_is_no_steering_bit_for_bit(model):
    nothing = Steering.amplify(3, 0.0) + Steering.unlearn(5, strength=0.0, suppression=0.0)
    assert torch.equal(generate(model, PROMPT, 20, seed=4, steering=nothing),
                       generate(model, PROMPT, 20, seed=4))


def test_both_is_the_sum(model):
    both = Steering.amplify(3, layer=2) + Steering.amplify(5, 4.0, layer=2)
    at = torch.tensor([[True]]), torch.tensor([0])
    parts = [Steerer(s, model).vectors(*at)[2]
             for s in (Steering.amplify(3, layer=2), Steering.amplify(5, 4.0, layer=2))]
    close(Steerer(both, model).vectors(*at)[2], sum(parts), "injections at one layer add up")
    both = Steering.amplify(3, layer=1) + Steering.amplify(5, 4.0, layer=2, cutoff_tokens=None)
    vectors = Steerer(both, model).vectors(at[0], torch.tensor([40]))
    assert list(vectors) == [1, 2] and not vectors[1].any(), "the first ended after 32 tokens"
    close(vectors[2], parts[1], "each has its own layer, strength and cutoff")


def test_two_suppressions_are_both_subtracted(model):
    E, concepts = model.transformer.tok_emb.weight, model.known_head.concept_embedding.weight
    both = Steering(suppressions=((3, 2.0),)) + Steering(suppressions=((5, 1.0, True),))
    found = -Steerer(both, model).suppress(torch.zeros(1, len(E)))[0]
    three, five = (E @ concepts[3]).relu(), (E @ concepts[5]).relu()
    close(found, 2 * three + five / five.max(), "2 relu(..), and 1 logit off the most promoted")


def test_a_sum_has_all_that_either_has():
    a, b = (Steering((Injection((i,), 1.0),), ((i, 9.0),), ((i, 2.0),), ((i + 1, 3.0),), "keep")
            for i in (4, 6))
    for name in ("injections", "suppressions", "known", "unknown"):
        assert getattr(a + b, name) == getattr(a, name) + getattr(b, name), f"{name} of both"
    assert (Steering.amplify(1) + a).epsilon == (a + Steering.amplify(1)).epsilon == "keep", (
        "whichever side has the interventions")


def test_every_injection_that_ends_in_any_row_is_noticed_once(model):
    steerer = Steerer(Steering.amplify(3, cutoff_tokens=None) + Steering.amplify(4, cutoff_tokens=4)
                      + Steering.amplify(5, cutoff_tokens=2), model)
    calls = [((0, 0), True), ((1, 1), False), ((2, 1), True), ((3, 1), False), ((3, 2), True),
             ((4, 3), True), ((5, 4), True), ((9, 9), False)]
    for committed, switched in calls:
        assert steerer.switched(torch.tensor(committed)) == switched, (
            f"with {committed} tokens in the two rows: cutoffs are 4 and 2; the first call counts")


def test_what_is_injected_has_the_models_dtype(model):
    half = copy.deepcopy(model).bfloat16()
    for steering in (Steering.amplify(3), Steering(suppressions=((5, 2.0),))):  # each alone
        assert generate(half, PROMPT, 4, seed=0, steering=steering).shape == (1, 12), (
            "directions are computed in float32, and cast when they are added")


def test_an_edit_with_epsilon_kept_moves_logits_along_the_embedding(model):
    """The logits change by exactly (new weight - old weight) * embedding . tok_emb."""
    tokens = torch.tensor([PROMPT[0] + [model.config.mask_token_id] * 4])
    plain = model(tokens)
    steerer = Steerer(Steering(known=((3, 2.5),), epsilon="keep"), model)
    edited = model.transformer.lm_head(steerer.compose(plain.hidden[0]))
    old = torch.where(plain.known_ids[0] == 3, plain.known_logits[0].sigmoid(), 0.0).sum(-1)
    promoted = model.transformer.tok_emb.weight @ model.known_head.concept_embedding.weight[3]
    close(edited - plain.logits[0], (2.5 - old)[:, None] * promoted, "and nothing else", 5e-5)


def test_an_edit_of_unknown_concepts_alone_reaches_what_is_composed(model):
    steerer = Steerer(Steering(unknown=((5, 0.0), (7, 3.0))), model)
    hidden = torch.randn(4, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    expected = decompose(hidden[None], model.known_head, model.unknown_head,
                         unknown={5: 0.0, 7: 3.0}).composed[0]
    close(steerer.compose(hidden), expected, "both edits, epsilon dropped")
    assert not torch.allclose(expected, hidden), "the case needs an edit that is seen"


def test_the_bundled_models_concepts_can_be_brought_out_and_kept_out():
    """The mass of the ten tokens that a concept promotes, over the masks after a short prompt."""
    model, tokenizer = load()
    prompt = tokenizer.encode("The old sailor Mara lived near the harbour with a dog named Biscuit "
                              "and a tin box.")
    tokens = torch.tensor([prompt + [model.config.mask_token_id] * 24])
    masked = tokens == model.config.mask_token_id

    @torch.no_grad()
    def probabilities(steering):
        return asked_logits(model, tokens, masked, len(prompt), 0.0, Steerer(steering, model),
                            None)[0].softmax(-1)
    unsteered, weak = probabilities(Steering()), []
    for concept in range(model.config.n_concepts):
        best = promoted(model, concept, 10)[0]
        out, plain, kept = (p[:, best].sum().item() for p in (
            probabilities(Steering.amplify(concept)), unsteered,
            probabilities(Steering.unlearn(concept))))
        assert kept < plain, f"concept {concept}: kept out {kept:.3f}, unsteered {plain:.3f}"
        weak += [concept] * (out <= plain)
    assert len(weak) <= 0.03 * model.config.n_concepts, f"not brought out: {weak}"


def test_a_strength_beyond_the_numbers_of_the_dtype_is_refused(model):
    with pytest.raises(ValueError, match="float32: the steering is too strong"):
        generate(model, PROMPT, 4, seed=0, steering=Steering.amplify(3, 1e38))


def test_steerings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="one steering keeps epsilon"):
        Steering(known=((3, 1.0),)) + Steering(known=((4, 2.0),), epsilon="keep")
    kept = Steering.amplify(1) + Steering(unknown=((4, 2.0),), epsilon="keep")
    assert kept.epsilon == "keep", "a steering without interventions has no say"


def test_a_known_and_a_discovered_concept_of_one_number_are_two(model):
    both = Steerer(Steering(known=((5, 2.0),), unknown=((5, 3.0),)), model)
    hidden = torch.randn(2, model.config.n_embd, generator=torch.Generator().manual_seed(0))
    close(both.compose(hidden)[None], decompose(hidden[None], model.known_head, model.unknown_head,
                                                {5: 2.0}, {5: 3.0}).composed, "each has its weight")


@pytest.mark.parametrize("steering, message", [
    (Steering.amplify(32), "known concept 32 does not exist; ids are 0 to 31"),
    (Steering.amplify(-1), "known concept -1 does not exist"),
    (Steering.unlearn(3, (99,)), "known concept 99"),
    (Steering(suppressions=((40, 1.0),)), "known concept 40"),
    (Steering(known=((32, 1.0),)), "known concept 32"),
    (Steering(unknown=((64, 1.0),)), "unknown concept 64 does not exist; ids are 0 to 63"),
    (Steering.amplify(()), "at least one concept"),
    (Steering.amplify(3, layer=0), "^layer = 0 is not supported; supported: 1 to 2"),
    (Steering.amplify(3, layer=3), "^layer = 3 is not supported"),
    (Steering.amplify(3, float("nan")), "strength = nan is not supported; supported: finite"),
    (Steering(known=((3, float("inf")),)), "strength = inf is not supported"),
    (Steering(unknown=((3, float("nan")),)), "strength = nan is not supported"),
    (Steering(suppressions=((3, float("inf")),)), "strength = inf is not supported"),
    (Steering(injections=(Injection((3, 32), 1.0),)), "known concept 32"),
    (Steering(known=((3, 1.0),)) + Steering(known=((3, 9.0),)), "concept 3 is given two weights"),
    (Steering(unknown=((3, 1.0), (3, 9.0))), "unknown concept 3 is given two weights"),
    (Steering(epsilon="kep"), "epsilon = 'kep' is not supported")])
def test_what_the_model_does_not_have_is_refused(model, steering, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPT, 4, steering=steering)
