"""Attribution: contributions of concepts and epsilon add up to the logit of the token committed."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, close
from safetensors.torch import load_file

from steerling_min import load, unmask
from steerling_min.training import world
from steerling_min.attribution import (Attribution, activations, attribute, attribute_text,
                                       average_inputs, chunk_attribution, embed_chunks,
                                       input_attribution, nearest, present, promoted, resembling)
from steerling_min.training.evaluate import tokens_of
from steerling_min.steering import Steerer, Steering

PROMPT = [[24, 31, 236, 254, 154, 21, 87, 89], [169, 99, 5, 171, 158, 246, 105, 9]]


def total(found):
    return found.known.sum(1) + found.unknown.sum(1) + found.epsilon


# ---- concepts -> token ---------------------------------------------------------------------------


def test_contributions_and_epsilon_sum_to_the_logit(model, golden):
    tokens = golden["input_ids"].long()
    out = model(tokens)
    targets = torch.arange(80) % model.config.vocab_size
    found = attribute(model, out.hidden.flatten(0, 1), targets)
    assert found.known.shape == (80, 4) and found.unknown.shape == (80, 8)
    logits = out.logits.flatten(0, 1).gather(1, targets[:, None])[:, 0]
    close(total(found), logits, "the logit is a sum of contributions")


def test_a_contribution_is_weight_times_alignment(model, golden):
    out = model(golden["input_ids"].long()[:1])
    found = attribute(model, out.hidden[0, 7:8], torch.tensor([5]))
    y = model.transformer.tok_emb.weight[5]
    c, u = out.known_ids[0, 7, 2], out.unknown_ids[0, 7, 3]
    assert found.known_ids[0, 2] == c and found.unknown_ids[0, 3] == u
    row = model.known_head.concept_embedding.weight[c]
    close(found.known[0, 2], out.known_logits[0, 7, 2].sigmoid() * row @ y, "weight * alignment")
    row = model.unknown_head.embedding_basis(model.unknown_head.embedding_coef.weight[u])
    close(found.unknown[0, 3], out.unknown_logits[0, 7, 3].sigmoid() * row @ y, "factorised")


@pytest.mark.parametrize("epsilon", ["drop", "keep"])
def test_interventions_count_as_they_did(model, golden, epsilon):
    steering = Steering(known=((3, 1.5), (7, 0.0)), unknown=((5, 2.0),), epsilon=epsilon)
    tokens = golden["input_ids"].long()[:1]
    out = model(tokens, known={3: 1.5, 7: 0.0}, unknown={5: 2.0}, epsilon=epsilon)
    targets = torch.arange(40)
    found = attribute(model, out.hidden[0], targets, steering)
    close(total(found), out.logits[0].gather(1, targets[:, None])[:, 0],
          "edited weights, and the epsilon under the edit")
    assert (found.epsilon == 0).all() == (epsilon == "drop")


@pytest.mark.parametrize("options", [
    {}, {"use_cache": False}, {"steps": 4}, {"steering": Steering.amplify(3)}, {"cfg_scale": 1.0},
    {"steering": Steering(known=((3, 1.5),))}])
def test_every_committed_token_is_explained_by_the_step_that_committed_it(model, options):
    steps = list(unmask(model, PROMPT, 20, seed=1, **options))
    for row in range(2):
        positions, found = attribute_text(model, steps, row, options.get("steering"))
        assert positions.tolist() == list(range(8, 28)), "in the order of the text"
        assert found.tokens.tolist() == steps[-1].tokens[row, 8:].tolist()
        hidden = torch.cat([step.hidden[row] for step in steps])
        order = torch.cat([step.positions[row] for step in steps]).argsort()
        composed = Steerer(options.get("steering", Steering()), model).compose(hidden[order])
        logits = model.transformer.lm_head(composed).gather(1, found.tokens[:, None])[:, 0]
        close(total(found), logits, f"row {row}: the logit under the steering's edits")
    if "cfg_scale" in options or "steering" in options:
        return
    # the first commit of row 0 once more, from the sequence as it stood: prompt and masks
    first = steps[0].positions[0][0].item()
    masks = torch.full((1, 20), model.config.mask_token_id)
    out = model(torch.cat([torch.tensor(PROMPT[:1]), masks], dim=1))
    _, found = attribute_text(model, steps)
    at = first - 8
    close(total(found)[at], out.logits[0, first, found.tokens[at]],
          "the state at the step of the commit, not that of the finished text")


def test_what_an_end_of_turn_overwrote_is_not_explained(model, monkeypatch):
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, eot_id=50))
    steps = list(unmask(model, PROMPT[:1], 4, seed=1))
    places = [step.positions[0].item() for step in steps]
    last = steps[-1].tokens.clone()
    last[0, places[1]] = model.config.eos_token_id
    positions, found = attribute_text(model, [*steps[:-1], dataclasses.replace(
        steps[-1], tokens=last)])
    assert positions.tolist() == sorted({*places} - {places[1]})
    assert found.tokens.tolist() == last[0, positions].tolist(), "what stands in the text"


def test_what_an_end_overwrote_in_another_row_is_not_explained(model):
    steps = list(unmask(model, PROMPT, 4, seed=1))
    second = [step.positions[1].item() for step in steps]
    last = steps[-1].tokens.clone()
    last[1, second[0]] = model.config.eos_token_id  # in the first row nothing was overwritten
    ended = [*steps[:-1], dataclasses.replace(steps[-1], tokens=last)]
    assert attribute_text(model, ended, 1)[0].tolist() == sorted(second[1:])
    assert len(attribute_text(model, ended, 0)[0]) == 4


def test_under_guidance_the_states_are_those_that_saw_the_prompt(model):
    step = next(iter(unmask(model, PROMPT[:1], 12, steps=4, seed=1, cfg_scale=1.0)))
    masks = torch.full((1, 12), model.config.mask_token_id)
    hidden = model(torch.cat([torch.tensor(PROMPT[:1]), masks], dim=1)).hidden
    close(step.hidden[0], hidden[0, step.positions[0]], "not those of the run without the prompt")


SMALL = Attribution(  # two tokens, of which the first has contributions of both signs
    tokens=torch.tensor([7, 8]),
    known_ids=torch.tensor([[1, 2], [2, 3]]), known=torch.tensor([[1.0, -3.0], [0.0, 1.0]]),
    unknown_ids=torch.tensor([[5], [5]]), unknown=torch.tensor([[-4.0], [1.0]]),
    epsilon=torch.tensor([2.0, -2.0]))


def test_each_part_is_summed_before_its_size_is_taken():
    close(SMALL.parts(), torch.tensor([[-2.0, -4.0, 2.0], [1.0, 1.0, -2.0]]), "known: 1 - 3 = -2")
    close(SMALL.shares(), torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]),
          "the report's Eq. 22: |2|, |-4| and |2| of 8")
    assert torch.equal(SMALL[1:].tokens, torch.tensor([8]))


def test_a_chunks_mass_is_that_of_single_contributions():
    chunk = chunk_attribution(SMALL)  # masses 3 + 1 + 4 + 2 = 10, and 0 + 1 + 1 + 2 = 4
    assert chunk.known == pytest.approx({2: -0.15, 3: 0.125, 1: 0.05}) and [*chunk.known] == [
        2, 3, 1], "signed, the largest size first: -3/10 over two tokens"
    assert chunk.unknown == pytest.approx({5: (-0.4 + 0.25) / 2})
    assert chunk.epsilon == pytest.approx((0.2 + 0.5) / 2), "not the 0.25 and 0.5 of its shares"


RUNS = json.loads((GOLDEN / "attribution" / "attribution.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "attribution" / "attribution.safetensors")


def by_concept(ids, values, C):
    """(n, k) -> (n, C): the order of equals does not matter."""
    return torch.zeros(len(ids), C).scatter(1, ids, values)


@pytest.mark.parametrize("name", RUNS)
def test_parity_of_attributions_with_the_official_package(model, recorded, name):
    run, config = RUNS[name], model.config
    steps = list(unmask(model, [run["prompt"]], run["max_new_tokens"], steps=run["steps"],
                        seed=run["seed"]))
    positions, found = attribute_text(model, steps)
    assert positions.tolist() == recorded[f"{name}.positions"].tolist()
    for head, C in (("known", config.n_concepts), ("unknown", config.n_unknown_concepts)):
        ours = by_concept(getattr(found, head + "_ids"), getattr(found, head), C)
        theirs = by_concept(recorded[f"{name}.{head}_ids"], recorded[f"{name}.{head}"], C)
        close(ours, theirs, f"contributions of {head} concepts at the step of the commit")
    close(found.epsilon, recorded[f"{name}.epsilon"], "what they leave unexplained")

    chunk = chunk_attribution(found)
    for ours, theirs in ((chunk.known, "known"), (chunk.unknown, "discovered")):
        assert {str(c): share for c, share in ours.items()} == pytest.approx(
            run["chunk"][theirs], abs=1e-5), f"the chunk's {theirs} concepts"
    assert 100 * chunk.epsilon == pytest.approx(run["chunk_epsilon_percent"], abs=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_parity_of_input_attributions_with_the_official_package(model, recorded, name):
    run = RUNS[name]
    T = len(run["prompt"]) + run["max_new_tokens"]
    tokens = torch.tensor(run["prompt"] + [model.config.mask_token_id] * run["max_new_tokens"])
    found = torch.zeros(T, T)  # a row for each new position
    for step in unmask(model, [run["prompt"]], run["max_new_tokens"], steps=run["steps"],
                       seed=run["seed"]):
        for position, token in zip(step.positions[0].tolist(), step.ids[0].tolist()):
            found[position] = input_attribution(model, tokens, position, token)
        tokens = step.tokens[0]
    close(found[recorded[f"{name}.ig_positions"]], recorded[f"{name}.ig"],
          "integrated gradients on the text as it stood when the token was committed")
    together = average_inputs(found[len(run["prompt"]):], torch.ones(T, dtype=torch.bool))
    theirs = torch.zeros(T)
    for position, score in run["inputs_of_all"].items():
        theirs[int(position)] = score
    close(together, theirs, "each token's attributions over their absolute sum, then averaged")


def test_inputs_out_of_scope_have_no_part():
    found = torch.tensor([[1.0, -3.0, 4.0], [2.0, 0.0, 9.0]])
    prompt = torch.tensor([True, True, False])
    for size in (1.0, 0.01):  # a share does not depend on how large the attributions are
        close(average_inputs(size * found, prompt), torch.tensor([0.625, -0.375, 0.0]),
              "(1/4 + 2/2) / 2, (-3/4 + 0) / 2")


# ---- input tokens -> token -----------------------------------------------------------------------


def test_integrated_gradients_are_complete_and_masks_get_nothing():
    """On the bundled model: the attributions add up to logit(input) - logit(all masks)."""
    model, tokenizer = load()
    model.requires_grad_(False)
    mask, rng, errors, coarse = model.config.mask_token_id, random.Random(1), [], []
    for _ in range(3):
        story = tokens_of(world.write_story(rng), tokenizer)
        L = rng.randint(20, 90)
        tokens, target = torch.tensor(story[:L] + [mask] * 6), story[L]
        found = input_attribution(model, tokens, L, target)
        logit = model(tokens[None]).logits[0, L, target]
        blind = model(torch.full_like(tokens, mask)[None]).logits[0, L, target]
        errors.append(abs(found.sum() / (logit - blind) - 1).item())
        found = input_attribution(model, tokens, L, target, steps=4)
        coarse.append(abs(found.sum() / (logit - blind) - 1).item())
        assert (found[L:] == 0).all() and (found[:L] != 0).all(), "exactly 0 at masks"
    assert max(errors) < 0.08, (
        f"off by {max(errors):.1%} of the logit's change, not within 8 %, with 32 steps")
    assert sum(errors) < 0.5 * sum(coarse), "a Riemann sum: the finer the steps, the nearer"


def test_asking_for_gradients_leaves_none_in_the_model(model):
    model.zero_grad()
    input_attribution(model, torch.tensor(PROMPT[0]), 5, 3, steps=4)
    assert all(p.grad is None for p in model.parameters()), (
        "they would take as much memory as the weights, and add to the next training step's")


def test_a_single_step_is_the_gradient_at_the_input_itself(model):
    tokens, weight = torch.tensor(PROMPT[0]), model.transformer.tok_emb.weight.detach()
    x = weight[tokens].requires_grad_()
    (model.transformer.from_embeddings(x[None])[0, 3] @ weight[5]).backward()
    expected = ((x - weight[model.config.mask_token_id]) * x.grad).sum(-1)
    close(input_attribution(model, tokens, 3, 5, steps=1), expected,
          "a right Riemann sum: the path's first end, the mask, is no part of it")


def test_later_blocks_have_no_part_in_a_token(model):
    tokens = torch.tensor(PROMPT[0] + PROMPT[1])
    found = input_attribution(model, tokens, 3, 5, steps=4)
    assert (found[8:] == 0).all() and (found[:8] != 0).all(), "attention is block-causal"


# ---- what a concept does -------------------------------------------------------------------------


def test_a_concept_promotes_the_tokens_that_its_embedding_points_to(model):
    top, bottom = promoted(model, 3, 4)
    alignment = model.transformer.tok_emb.weight @ model.known_head.concept_embedding.weight[3]
    assert top.tolist() == alignment.argsort(descending=True)[:4].tolist()
    assert bottom.tolist() == alignment.argsort()[:4].tolist()
    top, _ = promoted(model, 3, 4, head="unknown")
    row = model.unknown_head.embedding_basis(model.unknown_head.embedding_coef.weight[3])
    alignment = model.transformer.tok_emb.weight @ row
    assert top.tolist() == alignment.argsort(descending=True)[:4].tolist(), "of either head"
    assert len(promoted(model, 3, 10**6)[0]) == model.config.vocab_size, "no more than there are"
    with pytest.raises(ValueError, match="head = 'Known' is not supported"):
        promoted(model, 3, 4, head="Known")  # else the other head would answer


def test_an_attribution_is_numbers_without_a_graph(model):
    hidden = model(torch.tensor(PROMPT)).hidden[0]
    found = attribute(model, hidden, torch.tensor(PROMPT[0]))
    assert not any(x.requires_grad for x in vars(found).values()), ".numpy() would fail"


def test_the_nearest_concepts_exclude_itself_and_padding():
    E = torch.tensor([[0.3, 0.4], [0.0, 9.0], [0.1, 0.0], [-5.0, 0.0], [3.0, 4.0], [0.6, 0.8]])
    model = SimpleNamespace(config=SimpleNamespace(n_concepts=4), known_head=SimpleNamespace(
        concept_embedding=SimpleNamespace(weight=E)))  # rows 4 and 5 are padding
    ids, cosine = nearest(model, 0, 2)
    assert ids.tolist() == [1, 2], "those that point most nearly the same way, itself left out"
    close(cosine, torch.tensor([0.8, 0.6]), "an embedding's length does not matter")
    assert nearest(model, 0, 9)[0].tolist() == [1, 2, 3], "no more than there are"
    E[1:4] = E[0]
    for concept in range(4):
        assert concept not in nearest(model, concept, 3)[0], "others may be as near as it is itself"


def test_activations_are_the_known_heads_probabilities(model):
    tokens = torch.tensor(PROMPT)
    logits = model.known_head.logits(model(tokens).hidden)  # (2, 8, C)
    close(activations(model, tokens, 3), logits[..., 3].sigmoid(), "sigmoid(logit)")


@pytest.mark.parametrize("concept", [-1, 32])
def test_a_concept_that_there_is_not_is_named(model, concept):
    """Behind the last one the tables have rows of padding, which are no concepts."""
    for ask in (promoted, nearest, lambda model, c: activations(model, torch.tensor(PROMPT), c)):
        with pytest.raises(ValueError, match=f"known concept {concept} does not exist"):
            ask(model, concept)


def test_by_default_ten_tokens_are_found_and_five_similar_chunks_or_concepts(model):
    E = model.known_head.concept_embedding.weight
    assert len(promoted(model, 3)[0]) == 10
    assert len(nearest(model, 3)[0]) == len(resembling(E[3], E)[0]) == 5


# ---- the training data that a text resembles -----------------------------------------------------


def test_a_chunk_is_embedded_by_its_own_tokens_whatever_stands_beside_it(model):
    chunks = [PROMPT[0], PROMPT[1][:3], PROMPT[1], [5]]
    together = embed_chunks(model, chunks)
    many = embed_chunks(model, 70 * chunks[:1])
    close(many, together[:1].expand(70, -1), "more than are embedded at a time")
    for chunk, embedding in zip(chunks, together):
        known = model(torch.tensor([chunk])).known[0].mean(0)
        close(embedding, known / known.norm(), "the mean of its known features, of length 1")


def test_the_nearest_chunks_come_first():
    corpus = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
    ids, cosine = resembling(torch.tensor([0.8, 0.6]), corpus, 3)
    assert ids.tolist() == [2, 0, 1]
    close(cosine, torch.tensor([0.96, 0.8, 0.6]), "cosines of unit vectors are products")
    assert len(resembling(corpus[0], corpus, 9)[0]) == 4, "no more than there are"


def test_a_chunk_resembles_itself_most(model):
    corpus = embed_chunks(model, [[7, i, 9, 3] for i in range(20)])
    for i in range(20):
        ids, cosine = resembling(corpus[i], corpus, 1)
        assert ids.tolist() == [i] and cosine.item() == pytest.approx(1.0, abs=1e-5)


def test_a_concept_is_present_where_it_is_likelier_than_not():
    def model(tokens):
        assert tokens.tolist() == [[4, 5]]
        return SimpleNamespace(known_ids=torch.tensor([[[3, 1, 7], [1, 2, 3]]]),
                               known_logits=torch.tensor([[[9.0, 0.1, -0.1], [-0.1, -3.0, -5.0]]]))
    model.device = torch.device("cpu")
    assert present(model, [4, 5]) == {1, 3}, "a logit above 0, more than 1/2, at any token"
