"""What makes the concept layer mean something: four losses, residual dropout and teacher forcing,
and two losses for steering.

    total = token + presence + reconstruction + independence    (the first: `diffusion.token_loss`)
            + alignment                                         (ours)
            + respond + express                                 (once injections have begun)

presence teaches the known head, and the backbone below it, which concepts a chunk of text has.
Reconstruction teaches the unknown head to supply what the known concepts leave over of the hidden
state. Independence teaches it not to repeat the known head. For these two the trainer computes the
unknown features from a detached hidden state: they shape that head alone, not the language below.

**The gradient question.** While epsilon is present, composed = known + unknown + epsilon is the
hidden state itself: whatever the heads add, epsilon takes away. The token loss then sends no
gradient at all to them, and nothing would make predictions *go through* concepts. Residual
dropout does: it leaves epsilon out of some windows. Teacher forcing keeps predictions sensible
there while the known head still has to learn: the true labels' features stand in for the predicted
ones. Both are in `compose`.

Sources: Guide Labs, "Scaling Interpretable Language Models to 8 Billion Parameters" (2025) and the
technical report, arXiv 2608.07594. The official weights of the losses are not published; here they
are 1, except for four of them (`objective.py`). Letters: B windows (stretches of T tokens of the
stream of stories; not those that the sampler fills), D width, C known concepts, N chunks, V
vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import mean, total

# ---- the losses of the concept layer -------------------------------------------------------------


def log_absent(logits: Tensor, chunks: Tensor, N: int) -> Tensor:
    """log(1 - P), where P is the probability that a chunk has a concept: (N, C), in logits' dtype.

    Labels belong to chunks, predictions to tokens. Noisy-OR joins them: a chunk has the concept
    unless every token says no, 1 - P = prod_t (1 - p_t) with p_t = sigmoid(logit_t). The product
    underflows on long chunks, so it is a sum of log(1 - p_t) = -softplus(logit_t).

    Args: logits (B, T, C) of the known head, float32; chunks (B, T) int64, each token's chunk, 0 to
    N - 1 over the whole batch (none is empty), or -1 for special tokens, which take no part.
    """
    inside = chunks >= 0
    log_no = -F.softplus(logits[inside])  # (tokens, C)
    return log_no.new_zeros(N, logits.shape[-1]).index_add(0, chunks[inside], log_no)


def presence_loss(logits: Tensor, chunks: Tensor, labels: Tensor, absence: float = 8.0) -> Tensor:
    """Binary cross-entropy of the chunks' probabilities against their labels, in nats, a scalar.

    The loss is the mean of -log P over the labelled pairs of chunk and concept, plus `absence`
    times the mean of -log(1 - P) over all other pairs. In a single mean, the many negatives would
    drown the few positives. But with equal weights the head says "present" too easily. In the tiny
    world negatives are 29 times as many. Where any of its eight places would do, each of them got a
    weight of 0.7. Together they gave 28 logits to a token that has 9, and the unknown head and
    epsilon had to cancel 19. With 8, known concepts seldom give too much. (The weight is ours; the
    official one is not published.)

    Both averages are those of all processes, 0 where there is nothing to average
    (`distributed.mean`). `log_absent` gives a = log(1 - P), so log P = log(-expm1(a)): expm1 is
    exact where P is tiny. P is never 0, because logits are within +-15.

    Args: logits (B, T, C), chunks (B, T) as in `log_absent`; labels (N, C) bool. (Labels are
    positive only: False means not labelled, which is taken for absent here.)
    """
    absent = log_absent(logits, chunks, len(labels))  # (N, C), log(1 - P)
    present = torch.log(-torch.expm1(absent))  # (N, C), log P
    return mean(-present[labels]) + absence * mean(-absent[~labels])


def reconstruction_loss(unknown: Tensor, hidden: Tensor, known: Tensor) -> Tensor:
    """Make the unknown head supply what the known side leaves over of the hidden state. The loss is
    the mean square of unknown - (hidden - known), all (M, D), over D and the tokens of all
    processes.

    Only the M masked positions count, since only they become tokens. The target, hidden - known, is
    detached. Otherwise the hidden state or the known embeddings could move toward what the unknown
    head already supplies.

    known: what stands on the known side of `compose`, the labels' features first and later the
    predicted ones. (The official target is said to be hidden - labelled to the end. But of a
    chunk's ten or so labels, most do not matter at any one token. What the predicted features lack
    of the labels' sum was then left to epsilon. After 1.2 M tokens epsilon's share was 41% with
    that target and forcing to the end. It was 27% with this target and forcing that ends.)
    """
    return mean((unknown - (hidden - known).detach()).square())


def independence_loss(known: Tensor, unknown: Tensor) -> Tensor:
    """Keep the unknown head from repeating the known one: penalise the cross-covariance of their
    features (M, D).

    K and U are the known and unknown features, less their columns' means over all M masked tokens.
    The loss is the sum of (K^T U)^2 over its D^2 entries, divided by D^2 max(1, M - 1). (K^T U is a
    sum over tokens, not a mean.) Three sums go through `total`, so that they are those of all
    processes: of the columns, of M, and K^T U. The known side is detached: only the unknown
    features should move away.
    """
    K, U, D = known.detach(), unknown, known.shape[1]
    M = total(K.new_tensor(float(len(K))))
    K = K - total(K.sum(0)) / M
    U = U - total(U.sum(0)) / M
    return total(K.T @ U).square().sum() / (D**2 * (M - 1).clamp(min=1))


# ---- what concepts say ---------------------------------------------------------------------------


def lift_weights(counts: Tensor, threshold: float = 2.0) -> Tensor:
    """Find the tokens that each concept *lifts*, that is, makes likelier. Returns weights (C, V);
    each row sums to 1, or is all 0.

    lift(w, c) = P(w | chunks with c) / P(w). A token's weight is P(w | chunks with c) times the
    cube of log(lift / threshold), or 0 if its lift is below the threshold. The cube tells a word
    from its neighbours. Most chunks with "trees" also have "past the", and "past" is lifted, too,
    but far less than "trees". (Without it, one word's concept in 20 promoted such a neighbour
    most.)
    Args: counts (C + 1, V), how often each token stands in chunks with each concept, and, in the
    last row, in all chunks.
    """
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (C + 1, V), P(w | .)
    lift = shares[:-1] / shares[-1].clamp(min=1e-9)
    weights = shares[:-1] * (lift / threshold).clamp(min=1).log() ** 3
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-9)


def alignment_loss(embedding: Tensor, tok_emb: Tensor, lift: Tensor, temperature: float = 2.0,
                   length: float = 0.0015) -> Tensor:
    """Make each concept's embedding, by itself, promote the tokens that the concept lifts, and be
    no longer than that takes. The loss is a cross-entropy plus `length` times the embedding's
    squared length, averaged over concepts.

    Chunks have labels, tokens do not. From the other losses alone, an embedding could just as well
    learn to promote the words beside its own word, or whatever else stands in such chunks. So the
    tokens' distribution under the embedding alone, softmax(tok_emb . embedding / temperature), is
    compared with the lift's weights. A concept's weight is at most 1, so a short embedding cannot
    give many logits. At temperature 1 a word's concept stopped at 7 logits, while a token that the
    model is sure of has 18. At temperature 2 it gives twice as much. Without a price on length,
    embeddings grew to 2 to 3 times what their logits need (cosine with their word's embedding: 0.4,
    not 0.8), and the unknown head had to cancel the rest. This loss is ours, the official ones have
    none of the kind. tok_emb gets no gradient.

    Args: embedding (C, D); tok_emb (V, D); lift (C, V), as `lift_weights` gives it.
    """
    logits = embedding @ tok_emb.detach().T  # (C, V)
    likely = (lift * (logits / temperature).log_softmax(-1)).sum(-1)  # (C,)
    return (length * embedding.square().sum(-1) - likely).mean()


# ---- residual dropout and teacher forcing --------------------------------------------------------


def compose(hidden: Tensor, known: Tensor, unknown: Tensor, labelled: Tensor, dropped: Tensor,
            force_known: float, force_unknown: float = 0.0) -> Tensor:
    """Build the composed state that a training step predicts tokens from: the token loss goes
    through it.

    Where epsilon is kept, the composed state equals `hidden` exactly, whatever the heads predict.
    Where it is dropped:

        composed =   force_known * labelled              + (1 - force_known) * known
                 + force_unknown * (hidden - labelled)   + (1 - force_unknown) * unknown

    There is a trap. With both sides forced fully, the sum is labelled + (hidden - labelled):
    `hidden` again. Epsilon is gone, but no gradient reaches the heads until one of the two weights
    falls. So force_unknown is 0 by default, and the unknown side is the predicted one. Nothing is
    detached.

    Args: hidden, known, unknown (features of the heads' top-k) and labelled (the true labels'
    embeddings, summed), (..., D); dropped (...) bool, where epsilon is left out, or a shape that
    broadcasts to it; force_known and force_unknown, 0 to 1 (`known_forcing`, `unknown_forcing`).
    """
    forced_known = torch.lerp(known, labelled, force_known)
    forced_unknown = torch.lerp(unknown, hidden - labelled, force_unknown)
    return torch.where(dropped[..., None], forced_known + forced_unknown, hidden)


def known_forcing(progress: float) -> float:
    """Weight of the labels' features on the known side: 1 for the first 15% of training, then half
    a cosine down to 0.1 at 70%, where it stays. progress is 0 at the start and 1 at the end.

    (The 8B is said to stop at 0.5, at 50%. Here it goes lower, because what is measured and shown
    are the predicted concepts, without labels.)
    """
    x = min(1.0, max(0.0, (progress - 0.15) / 0.55))
    return 0.55 + 0.45 * math.cos(math.pi * x)


def unknown_forcing(progress: float) -> float:
    """The same for the unknown side: 1 for the first 25% of training, then linearly down to 0.5 at
    the end.

    See `compose` for why the trainer does not use it unless asked to.
    """
    return 1.0 - 0.5 * min(1.0, max(0.0, (progress - 0.25) / 0.75))


# ---- the steering losses -------------------------------------------------------------------------


def respond_loss(logits: Tensor, injected: Tensor) -> Tensor:
    """Where a concept's direction is injected, the known head must see it: mean of -log p_c.

    Args: logits (B, T, C) of the known head; injected (B, T) int64, the concept injected at each
    token, or -1 for none.
    """
    at = injected >= 0
    return mean(-F.logsigmoid(logits[at].gather(1, injected[at][:, None])))


def express_loss(token_logits: Tensor, chunks: Tensor, concept: Tensor, lifted: Tensor) -> Tensor:
    """Where a concept is injected, the text must show it: -log of the lifted tokens' probability.

    The probability is averaged over each chunk's injected positions before the logarithm is taken:
    some of a text's words are to show the concept, not every one. (This average is ours; the
    report's loss is said to be per position.) 1e-6 is added to it, so that the logarithm is finite.

    Args: token_logits (M, V) at the injected positions of all chunks; chunks (M,) int64, the chunk
    of each; concept (M,) int64, what was injected; lifted (C, V) bool.
    """
    mass = (token_logits.float().softmax(-1) * lifted[concept]).sum(-1)  # (M,)
    _, group, n = chunks.unique(return_inverse=True, return_counts=True)
    return mean(-torch.log(mass.new_zeros(len(n)).index_add(0, group, mass) / n + 1e-6))
