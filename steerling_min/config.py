"""Every number that shapes the model, under the names the official checkpoints use.

The letters that stand for these numbers in the shapes of every file:

    B  sequences in a batch    V  vocabulary              C  concepts of a head
    T  tokens of a sequence    H  query heads             k  concepts kept per token
    L  tokens of a prompt      G  key/value heads         r  rank of the unknown head
    S  diffusion block         d  head size, D / H        M  masked positions
    D  width                   F  hidden width of the MLP

k' is the unknown head's k. The word block has three uses, all official: `block_size` is the context
length, `diff_block_size` is S, and `transformer.blocks` are the layers.
How these numbers are read from a checkpoint's `config.json` is in `files/config_json.py`.
"""

import dataclasses
from dataclasses import dataclass

REAL = ("mlp_ratio", "norm_eps", "rope_base", "clip_qkv")  # the others are whole numbers
TOKEN_IDS = ("eos_token_id", "pad_token_id", "bos_token_id", "endofchunk_token_id",
             "mask_token_id", "start_header_id", "end_header_id", "eot_id")
OPTIONAL = ("n_kv_heads", "intermediate_size", "clip_qkv", "topk_known_features",
            "start_header_id", "end_header_id", "eot_id")  # these may be null


@dataclass(frozen=True)
class Config:
    """The model's hyperparameters; the defaults are Steerling-8B's.

    Raises ValueError, naming the field and its value, when the numbers do not fit together.
    """

    # backbone
    n_layers: int = 32               # transformer blocks
    n_head: int = 32                 # H, query heads
    n_kv_heads: int | None = 4       # G, key/value heads, each shared by H/G query heads; None: H
    n_embd: int = 4096               # D, width of the residual stream
    block_size: int = 4096           # context length, in tokens
    diff_block_size: int = 64        # S, tokens of a diffusion block: bidirectional inside
    mlp_ratio: float = 4             # F = mlp_ratio * D ...
    intermediate_size: int | None = None  # ... unless the hidden width F is given here
    norm_eps: float = 1e-5           # added to the mean square in every RMSNorm
    rope_base: float = 500_000.0     # rotary wavelengths rise from 2 pi toward 2 pi * rope_base
    clip_qkv: float | None = 10.0    # q, k, v are clamped to +- this; None: no clamp
    # concept layer
    n_concepts: int = 33_732         # C, known (named) concepts
    topk_known: int = 32             # used only when topk_known_features is None
    topk_known_features: int | None = 32  # k, known concepts kept per token
    n_unknown_concepts: int = 101_196  # concepts found without labels
    unknown_topk: int = 128          # k', unknown concepts kept per token
    factorize_rank: int = 256        # r, rank of the unknown head
    pad_multiple: int = 16           # stored rows of both heads are rounded up to a multiple
    # tokens
    vocab_size: int = 100_281        # V
    eos_token_id: int = 100_257      # <|endoftext|>
    pad_token_id: int = 100_277      # <|pad|>
    bos_token_id: int = 100_278      # <|bos|>
    endofchunk_token_id: int = 100_279  # <|endofchunk|>
    mask_token_id: int = 100_280     # <|mask|>
    start_header_id: int | None = None  # the instruct variant's three; None in the base model
    end_header_id: int | None = None
    eot_id: int | None = None        # <|eot_id|>, ends a turn

    @classmethod
    def steerling_8b(cls) -> "Config":
        """The published 8.4-billion-parameter model."""
        return cls()

    @classmethod
    def tiny(cls, vocab_size: int = 795) -> "Config":
        """The bundled model: the same architecture, small enough to train on a laptop.

        The five special tokens are the last of the vocabulary, in `Tokenizer`'s order.
        """
        return cls(
            n_layers=4, n_head=4, n_kv_heads=2, n_embd=128, block_size=256, diff_block_size=16,
            n_concepts=294, topk_known=24, topk_known_features=24,
            n_unknown_concepts=882, unknown_topk=128, factorize_rank=128,
            vocab_size=vocab_size, eos_token_id=vocab_size - 5, pad_token_id=vocab_size - 4,
            bos_token_id=vocab_size - 3, endofchunk_token_id=vocab_size - 2,
            mask_token_id=vocab_size - 1,
        )

    @property
    def head_dim(self) -> int:
        """d = D / H."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.n_kv_heads or self.n_head

    @property
    def mlp_hidden(self) -> int:
        """F, the SwiGLU's hidden width."""
        return self.intermediate_size or int(self.mlp_ratio * self.n_embd)

    @property
    def known_topk(self) -> int:
        """k, how many known concepts make up a token's known features."""
        return self.topk_known_features or self.topk_known

    @property
    def token_ids(self) -> dict[str, int]:
        """The special tokens' ids by field name; the instruct ones only where they exist."""
        return {name: getattr(self, name) for name in TOKEN_IDS if getattr(self, name) is not None}

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and name in OPTIONAL:
                continue
            whole = type(value) is int  # a bool is not a number here
            if name in REAL:
                require((whole or type(value) is float) and 0 < value < 2**31, name, value,
                        "a positive number")
            elif name in TOKEN_IDS:
                require(whole and 0 <= value < self.vocab_size, name, value,
                        f"a token id below vocab_size = {self.vocab_size}")
                require(name == "mask_token_id" or value != self.mask_token_id, name, value,
                        "another id than mask_token_id")
            else:
                require(whole and 0 < value < 2**31, name, value, "a positive whole number")
        require(self.n_embd % (2 * self.n_head) == 0, "n_head", self.n_head,
                f"a divisor of n_embd = {self.n_embd} with an even quotient (rotary pairs)")
        require(self.n_head % self.kv_heads == 0, "n_kv_heads", self.kv_heads,
                f"a divisor of n_head = {self.n_head}")
        for name in ("start_header_id", "end_header_id"):
            require(getattr(self, name) is None or self.eot_id is not None, name,
                    getattr(self, name), "null where eot_id is null")
        require(self.known_topk <= self.n_concepts, "topk_known_features or topk_known",
                self.known_topk, f"at most n_concepts = {self.n_concepts}")
        require(self.unknown_topk <= self.n_unknown_concepts, "unknown_topk", self.unknown_topk,
                f"at most n_unknown_concepts = {self.n_unknown_concepts}")


def require(ok: bool, name: str, value, supported: str) -> None:
    """Raise ValueError unless ok: with the field, its value and what is supported."""
    if not ok:
        raise ValueError(f"{name} = {value!r:.80} is not supported; supported: {supported}")


def require_concept(kind: str, concept: int, n: int) -> None:
    """Raise ValueError unless the concept, a "known" or "unknown" one, is one of n."""
    if concept not in range(n):
        raise ValueError(f"{kind} concept {concept!r:.80} does not exist; ids are 0 to {n - 1}")
