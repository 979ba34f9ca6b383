"""Attribution: contributions of concepts and epsilon add up to the logit."""

import torch
from conftest import close

from steerling_min.attribution import contributions


def test_contributions_and_epsilon_sum_to_the_logit(model, golden):
    tokens = golden["input_ids"].long()
    out = model(tokens)
    at = tokens == model.config.mask_token_id
    targets = torch.arange(int(at.sum())) % model.config.vocab_size
    known, unknown, epsilon = contributions(model, out, at, targets)
    assert known.shape[1] == 4 and unknown.shape[1] == 8, "one contribution per selected concept"
    logits = out.logits[at].gather(1, targets[:, None])[:, 0]
    close(known.sum(1) + unknown.sum(1) + epsilon, logits, "the logit is a sum of contributions")


def test_a_contribution_is_weight_times_alignment(model, golden):
    out = model(golden["input_ids"].long()[:1])
    at = torch.zeros(1, 40, dtype=torch.bool)
    at[0, 7] = True
    known, unknown, _ = contributions(model, out, at, torch.tensor([5]))
    y = model.transformer.tok_emb.weight[5]
    c, u = out.known_ids[0, 7, 2], out.unknown_ids[0, 7, 3]
    row = model.known_head.concept_embedding.weight[c]
    close(known[0, 2], out.known_logits[0, 7, 2].sigmoid() * row @ y, "weight * alignment")
    row = model.unknown_head.embedding_basis(model.unknown_head.embedding_coef.weight[u])
    close(unknown[0, 3], out.unknown_logits[0, 7, 3].sigmoid() * row @ y, "the same, factorised")
