"""Attribution: how much each concept added to the logit of a token."""

import torch
from torch import Tensor

from .iguide import Decomposition
from .model import Steerling


def contributions(model: Steerling, parts: Decomposition, at: Tensor, targets: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Split the logits of chosen tokens at chosen positions into concepts and epsilon.

    A concept adds weight * (embedding . tok_emb[target]), with weight = sigmoid(its logit);
    epsilon adds the rest. The three sum to the logit.

    Args: parts, what the model made of (B, T) tokens; at (B, T) bool, the M positions; targets
    (M,) int64, the token asked about at each.
    Returns known (M, k) and unknown (M, k'), in the order of parts.known_ids and
    parts.unknown_ids, and epsilon (M,), all in logits.
    """
    y = model.transformer.tok_emb(targets)  # (M, D)
    E = model.known_head.concept_embedding(parts.known_ids[at])  # (M, k, D)
    known = parts.known_logits[at].sigmoid() * torch.einsum("mkd,md->mk", E, y)
    coef = model.unknown_head.embedding_coef(parts.unknown_ids[at])  # (M, k', r)
    z = y @ model.unknown_head.embedding_basis.weight  # (M, r)
    unknown = parts.unknown_logits[at].sigmoid() * torch.einsum("mkr,mr->mk", coef, z)
    return known, unknown, (parts.epsilon[at] * y).sum(-1)
