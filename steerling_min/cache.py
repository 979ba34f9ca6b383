"""The fast way to the hidden states of the masks: keep what is final.

The plain way, `model.transformer(tokens, injections)[asked]`, computes the whole sequence at every
step. The cached way computes only the blocks that are still being filled. The two agree up to
rounding.
"""

from torch import Tensor

from .attention import KVCache
from .model import Steerling


def cached_hidden(model: Steerling, tokens: Tensor, asked: Tensor, injections: dict[int, Tensor],
                  cache: KVCache) -> Tensor:
    """Hidden states (M, D) at the M positions asked for (B, T), as the plain way computes them, up
    to rounding, with far less work.

    Attention is causal across blocks, so keys and values of the blocks before the first mask are
    final. Once a pass has computed them without masks, they are read from the cache. For the same
    reason the blocks after the last position asked for cannot influence it, and are left out.
    (Injections act on masked positions, and final blocks have no masks. Under guidance the prompt
    is masked, so final blocks can have some: see `unmasking.asked_logits`.)

    With S = 4, a prompt of 6, seven new tokens and the window [6, 10) filled in the order 8, 6, 9,
    7:

        asked               computed   cache.length before and after
        6 7 8 9             0 to 11    0 -> 4    a block of the prompt is final
        6 7   9             4 to 11    4 -> 4
          7   9             4 to 11    4 -> 4
          7                 4 to  7    4 -> 4    nothing is asked of block 8 to 11
        10 11 12 (next)     4 to 12    4 -> 8    only now were 4 to 7 computed without masks

    A pass starts from the length before. After the pass, the length moves to the start of the block
    that holds the first position asked for. All before that start was computed with its final
    tokens, in this pass or an earlier one. (In the fourth row position 7 was still a mask in the
    pass.) If a token of a final block has become a mask again, the pass starts from its block.

    Args: asked (B, T), True at the positions asked for, all of them masks; the tokens before the
    first of them are final.
    """
    S = model.config.diff_block_size
    rows, positions = asked.nonzero(as_tuple=True)  # (M,) each
    numbers = positions.tolist()
    cache.length = min(cache.length, min(numbers) // S * S)
    fresh = slice(cache.length, (max(numbers) // S + 1) * S)
    injections = {layer: vectors[:, fresh] for layer, vectors in injections.items()}
    hidden = model.transformer(tokens[:, fresh], injections, cache)  # (B, computed, D)
    cache.length = min(numbers) // S * S
    return hidden[rows, positions - fresh.start]
