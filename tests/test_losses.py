"""The concept layer's losses: brute-force twins in float64, and who gets gradients."""

import math

import pytest
import torch
from conftest import close

from steerling_min.training.losses import (alignment_loss, compose, express_loss,
                                           independence_loss, known_forcing, lift_weights,
                                           log_absent, presence_loss, reconstruction_loss,
                                           respond_loss, unknown_forcing)

B, T, D, C, V = 2, 6, 5, 4, 7
# Two windows; -1 are special tokens. Chunk 2 is cut by its window's edge.
CHUNKS = torch.tensor([[-1, 0, 0, -1, 1, 1], [2, 2, 2, -1, 3, -1]])
LABELS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- presence ------------------------------------------------------------------------------------


def test_a_chunk_lacks_a_concept_only_if_every_token_says_no():
    logits = normal(B, T, C)
    found = log_absent(logits, CHUNKS, 4)
    for chunk in range(4):
        product = torch.ones(C, dtype=torch.float64)
        for b in range(B):
            for i in range(T):
                if CHUNKS[b, i] == chunk:
                    product *= 1 - logits[b, i].sigmoid()
        close(found[chunk], product.log(), "log(1 - P) = sum of -softplus(logit) over the chunk")


def test_special_tokens_take_no_part_in_presence():
    logits = normal(B, T, C).requires_grad_()
    presence_loss(logits, CHUNKS, LABELS).backward()
    assert (logits.grad[CHUNKS < 0] == 0).all(), "chunk -1 is no chunk"
    assert (logits.grad[CHUNKS >= 0] != 0).all(), "every token of a chunk has its say"


def test_presence_is_cross_entropy_with_positives_and_negatives_averaged_apart():
    logits = normal(B, T, C)
    positives, negatives = [], []
    for chunk in range(4):
        inside = CHUNKS == chunk
        for c in range(C):
            P = 1 - torch.prod(1 - logits[inside][:, c].sigmoid()).item()
            if LABELS[chunk, c]:
                positives.append(-math.log(P))
            else:
                negatives.append(-math.log(1 - P))
    present, absent = sum(positives) / len(positives), sum(negatives) / len(negatives)
    for absence in (1.0, 8.0):
        found = presence_loss(logits, CHUNKS, LABELS, absence).item()
        assert found == pytest.approx(present + absence * absent, abs=1e-9)
    assert presence_loss(logits, CHUNKS, LABELS).item() == found, "by default negatives count 8"


def test_presence_survives_long_chunks_and_sure_tokens():
    """A product of 4096 factors underflows, and 1 - p of a sure token is 0 in float32."""
    for tokens, logit in ((4096, 15.0), (4096, -15.0), (1, 15.0), (1, -15.0)):
        chunks = torch.zeros(1, tokens, dtype=torch.int64)
        logits = torch.full((1, tokens, 2), logit, requires_grad=True)
        loss = presence_loss(logits, chunks, torch.tensor([[True, False]]), absence=1.0)
        loss.backward()
        assert math.isfinite(loss.item()) and logits.grad.isfinite().all()
        absent = -tokens * math.log1p(math.exp(logit))  # in float64
        expected = -math.log(-math.expm1(absent)) - absent
        assert loss.item() == pytest.approx(expected, rel=1e-5), "log P by expm1: 1 - P rounds"


def test_without_labels_only_the_negatives_cost():
    logits = normal(B, T, C)
    loss = presence_loss(logits, CHUNKS, LABELS & False, absence=1.0)
    close(loss, -log_absent(logits, CHUNKS, 4).mean(),
          "all pairs are negative, and the mean of no positives is 0")


# ---- reconstruction and independence -------------------------------------------------------------


def test_the_unknown_head_is_to_supply_what_the_known_side_leaves_over():
    unknown, hidden, known = (normal(T, D, seed=i) for i in range(3))
    expected = sum((unknown[i, d] - (hidden[i, d] - known[i, d])).item() ** 2
                   for i in range(T) for d in range(D)) / (T * D)
    assert reconstruction_loss(unknown, hidden, known).item() == pytest.approx(expected)


def test_reconstruction_sends_gradient_to_the_unknown_side_only():
    parts = [normal(B, T, D, seed=i).requires_grad_() for i in range(3)]
    reconstruction_loss(*parts).backward()
    unknown, hidden, known = parts
    assert (unknown.grad != 0).all()
    assert hidden.grad is None and known.grad is None, "the target is a constant"


def test_independence_is_the_squared_norm_of_the_cross_covariance():
    k, u = known, unknown = normal(B * T, D, seed=1), normal(B * T, D, seed=2)
    M, expected = B * T, 0.0
    for i in range(D):
        for j in range(D):
            entry = sum((k[m, i] - k[:, i].mean()) * (u[m, j] - u[:, j].mean()) for m in range(M))
            expected += entry.item() ** 2
    expected /= D**2 * (M - 1)
    assert independence_loss(known, unknown).item() == pytest.approx(expected)
    shifted = independence_loss(known + 3, unknown - 2).item()
    assert shifted == pytest.approx(expected), "a constant is not a dependence: columns are centred"
    difference = (known[0] - known[1])[:, None] * (unknown[0] - unknown[1]) / 2
    assert independence_loss(known[:2], unknown[:2]).item() == pytest.approx(
        difference.square().sum().item() / D**2), "of two positions"
    assert independence_loss(known[:1], unknown[:1]).item() == 0.0, "and of one"


def test_independence_moves_the_unknown_side_only():
    known, unknown = (normal(B * T, D, seed=i).requires_grad_() for i in (1, 2))
    independence_loss(known, unknown).backward()
    assert known.grad is None and (unknown.grad != 0).all()


# ---- what concepts say ---------------------------------------------------------------------------


def test_lift_compares_a_tokens_share_in_a_concepts_chunks_with_its_share_in_all():
    counts = torch.tensor([[8.0, 1, 1], [75, 10, 15], [30, 30, 40], [20, 1, 79]])
    # Shares in all chunks: 0.2, 0.01, 0.79. Lifts of the first: 4, 10, 0.1; of the last: 1.5, ...
    a, b = 0.8 * math.log(4 / 2) ** 3, 0.1 * math.log(10 / 2) ** 3
    close(lift_weights(counts)[0], torch.tensor([a, b, 0.0]) / (a + b),
          "share times the cubed log of lift over 2; what is lifted less than twice counts 0")
    assert (lift_weights(torch.tensor([[3, 3, 4], [30, 30, 40]])) == 0).all(), "nothing is lifted"
    assert lift_weights(torch.tensor([[1, 0, 0], [30, 30, 40]])).tolist() == [[1, 0, 0]], (
        "a chunk of one token")


def test_alignment_is_the_cross_entropy_of_what_the_embedding_alone_promotes():
    embedding, tok_emb = normal(2, D).requires_grad_(), normal(V, D).requires_grad_()
    lift = torch.zeros(2, V, dtype=torch.float64)
    lift[0, 3], lift[0, 5] = 0.25, 0.75  # the second concept lifts nothing
    p = [math.exp(sum(embedding[0, d].item() * tok_emb[v, d].item() for d in range(D)) / 2)
         for v in range(V)]
    expected = -0.25 * math.log(p[3] / sum(p)) - 0.75 * math.log(p[5] / sum(p))
    loss = alignment_loss(embedding, tok_emb, lift, length=0.0)
    assert loss.item() == pytest.approx(expected / 2), "the mean over concepts"
    loss.backward()
    assert tok_emb.grad is None, "the vocabulary is to serve the language"
    assert (embedding.grad[0] != 0).all() and (embedding.grad[1] == 0).all()


def test_an_embedding_is_no_longer_than_what_it_promotes_takes():
    embedding, tok_emb = normal(2, D).requires_grad_(), torch.zeros(V, D, dtype=torch.float64)
    loss = alignment_loss(embedding, tok_emb, torch.zeros(2, V, dtype=torch.float64), length=0.1)
    assert loss.item() == pytest.approx(0.1 * embedding.square().sum().item() / 2), (
        "squared lengths, the mean over concepts")
    loss.backward()
    close(embedding.grad, 0.1 * embedding, "what serves no token's logit shrinks")
    price = alignment_loss(embedding, tok_emb, torch.zeros(2, V, dtype=torch.float64)) / loss
    assert price.item() == pytest.approx(0.015), "0.0015, unless another price is given"


# ---- the two devices -----------------------------------------------------------------------------


def test_the_known_side_is_forced_fully_then_by_a_tenth():
    assert known_forcing(0.0) == known_forcing(0.15) == 1.0
    assert known_forcing(0.425) == pytest.approx(0.55), "half-way down the cosine"
    assert 1.0 - known_forcing(0.2) < (1.0 - known_forcing(0.4)) / 4, "a cosine starts slowly"
    assert known_forcing(0.7) == known_forcing(1.0) == pytest.approx(0.1)


def test_the_unknown_side_is_forced_fully_then_linearly_by_half():
    assert unknown_forcing(0.0) == unknown_forcing(0.25) == 1.0
    assert unknown_forcing(0.4) == pytest.approx(0.9) and unknown_forcing(0.7) == pytest.approx(0.7)
    assert unknown_forcing(1.0) == 0.5, "it falls until the end"


def parts_for_compose():
    hidden, known, unknown, labelled = (normal(B, T, D, seed=i) for i in range(4))
    return [x.requires_grad_() for x in (hidden, known, unknown, labelled)]


def test_with_epsilon_no_gradient_reaches_the_heads():
    """The gradient question: composed = hidden, whatever known and unknown are."""
    hidden, known, unknown, labelled = parts = parts_for_compose()
    kept = torch.zeros(B, 1, dtype=torch.bool)
    composed = compose(*parts, kept, 0.5)
    assert torch.equal(composed, hidden), (
        "where epsilon is kept, hidden itself: a sum whose terms cancel is only close to it")
    (composed * normal(B, T, D, seed=9)).sum().backward()
    assert (hidden.grad != 0).all()
    for name, x in (("known", known), ("unknown", unknown), ("labelled", labelled)):
        assert x.grad is None or (x.grad == 0).all(), f"gradient at {name}, although epsilon is in"


def test_without_epsilon_the_heads_carry_the_prediction():
    hidden, known, unknown, labelled = parts = parts_for_compose()
    dropped = torch.tensor([[True], [False]])
    composed = compose(*parts, dropped, 0.25)
    close(composed[0], (0.25 * labelled + 0.75 * known + unknown)[0], "labels stand in by 0.25")
    close(composed[1], hidden[1], "epsilon is dropped for whole sequences, this one keeps it")
    (composed * normal(B, T, D, seed=9)).sum().backward()
    for name, x in (("known", known), ("unknown", unknown), ("labelled", labelled)):
        assert (x.grad[0] != 0).all(), f"no gradient at {name}, although epsilon is dropped"
        assert (x.grad[1] == 0).all(), f"gradient at {name} of the sequence with epsilon"


def test_the_trap_both_sides_forced_is_hidden_again():
    hidden, known, unknown, labelled = parts = parts_for_compose()
    composed = compose(*parts, torch.ones(B, 1, dtype=torch.bool), 1.0, 1.0)
    close(composed, hidden, "labelled + (hidden - labelled) = hidden, although epsilon is dropped")
    (composed * normal(B, T, D, seed=9)).sum().backward()
    assert (known.grad == 0).all() and (unknown.grad == 0).all(), "and no gradient flows"


# ---- the steering losses -------------------------------------------------------------------------


def test_respond_is_the_surprise_of_the_injected_concept_where_it_is_injected():
    logits = normal(B, T, C).requires_grad_()
    injected = torch.tensor([[3, -1, 0, -1, -1, -1], [-1, -1, -1, -1, -1, 1]])
    at = [(0, 0, 3), (0, 2, 0), (1, 5, 1)]
    expected = sum(-math.log(logits[i].sigmoid().item()) for i in at) / 3
    loss = respond_loss(logits, injected)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert int((logits.grad != 0).sum()) == 3
    assert respond_loss(logits, torch.full_like(injected, -1)).item() == 0.0


def test_express_averages_the_lifted_mass_of_a_chunk_before_the_logarithm():
    logits, chunks = normal(4, V), torch.tensor([3, 3, 3, 5])
    concept, lifted = torch.tensor([2, 2, 2, 0]), normal(C, V) > 0
    p = logits.softmax(-1)
    mass = [sum(p[m, v].item() for v in range(V) if lifted[concept[m], v]) for m in range(4)]
    expected = (-math.log(sum(mass[:3]) / 3) - math.log(mass[3])) / 2
    found = express_loss(logits, chunks, concept, lifted).item()
    assert found == pytest.approx(expected, abs=1e-4)
    half = express_loss(logits.bfloat16(), chunks, concept, lifted)
    exact = express_loss(logits.bfloat16().double(), chunks, concept, lifted)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-5), (
        "half precision has two digits: the softmax is one of float32 numbers")
    nowhere = express_loss(logits[:0], chunks[:0], concept[:0], lifted)
    assert nowhere.item() == 0.0, "nothing is injected anywhere"
    never = express_loss(logits, chunks, concept, lifted & False)
    assert never.item() == pytest.approx(-math.log(1e-6)), "a mass of 0 costs much, not infinity"
