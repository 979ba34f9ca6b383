"""Text to token ids and back: byte-pair encoding by tiktoken, and the model's special tokens.

The 8B uses tiktoken's `cl100k_base`. Smaller models use the same class with a rank file of their
own. A rank file lists byte strings, each with its rank; the rank is the token's id.

To encode a text, it is first cut into words. A word in the list is one token. Any other word is cut
into bytes, and neighbours are merged into listed tokens, the pair of lowest rank first. At the end
of this file, `byte_pairs` learns such ranks.
"""

import base64
import codecs
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex  # comes with tiktoken, which needs it too: `re` has no \p{L}, a letter of any script
import tiktoken

from .writing import replacing

RANK_FILE = "tokenizer.tiktoken"  # beside a checkpoint that has a vocabulary of its own
SPECIALS = ("<|pad|>", "<|bos|>", "<|endofchunk|>", "<|mask|>")  # appended in this order
INSTRUCT_SPECIALS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
# Cuts a text into words; no token is longer than one of these. A word is letters with their
# accents, up to three digits, or punctuation with the line breaks after it. Each takes the space
# before it along. White space that no word takes is cut into words of its own. Every run has a
# greatest length, because tiktoken gives up on endless white space.
PATTERN = (r" ?[\p{L}\p{M}]{1,64}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,16}\n{0,2}"
           r"|\s{1,16}(?!\S)|\s")


class Tokenizer:
    """Byte-pair encoding with special tokens that only ids can produce, never text.

    Attributes: vocab_size, and the ids that Config names: eos_token_id, pad_token_id,
    bos_token_id, endofchunk_token_id, mask_token_id (instruct: start_header_id, end_header_id,
    eot_id).
    """

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special: dict[str, int],
                 instruct: bool = False):
        """Append the special tokens to an encoding's own, which have <|endoftext|> already.

        The first four arguments are those of `tiktoken.Encoding`: ranks are ids by a token's bytes,
        special ids by a token's name.
        """
        ids = {*ranks.values(), *special.values()}
        n = max(ids) + 1
        # cl100k_base leaves 16 ids without a token; a model can still write them
        unused = {f"<|unused_{i}|>": i for i in range(n) if i not in ids}
        names = SPECIALS + (INSTRUCT_SPECIALS if instruct else ())
        added = {token: n + i for i, token in enumerate(names)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens={**special, **unused, **added})
        self.vocab_size = self.encoding.n_vocab
        self.eos_token_id = self.encoding.eot_token
        self.pad_token_id, self.bos_token_id, self.endofchunk_token_id, self.mask_token_id = (
            added[token] for token in SPECIALS)
        if instruct:
            self.start_header_id, self.end_header_id, self.eot_id = (
                added[token] for token in INSTRUCT_SPECIALS)
        self.special_ids = set(self.encoding._special_tokens.values())

    @classmethod
    def cl100k(cls, instruct: bool = False) -> "Tokenizer":
        """The 8B's tokenizer. tiktoken downloads the rank file once and caches it.

        Raises FileNotFoundError, with what to do, when there is neither network nor cache.
        """
        try:
            base = tiktoken.get_encoding("cl100k_base")
        except OSError as error:  # requests' errors are OSErrors
            raise FileNotFoundError(
                "tiktoken could not download cl100k_base "
                f"({type(error).__name__}); on a machine with network run python -c \"import "
                "tiktoken; tiktoken.get_encoding('cl100k_base')\" with TIKTOKEN_CACHE_DIR set to a "
                "folder, copy that folder here and set TIKTOKEN_CACHE_DIR to it") from None
        return cls(f"{base.name}_steerling", base._pat_str, base._mergeable_ranks,
                   base._special_tokens, instruct)

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], instruct: bool = False) -> "Tokenizer":
        """A tokenizer on ranks of one's own; <|endoftext|> follows the last rank."""
        return cls("tiny", PATTERN, ranks, {"<|endoftext|>": len(ranks)}, instruct)

    @classmethod
    def from_file(cls, path: str | Path, instruct: bool = False) -> "Tokenizer":
        """Read a rank file: a line per token, its bytes in base64, a space, its rank."""
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
            ranks = {base64.b64decode(token, validate=True): int(rank)
                     for token, rank in map(str.split, lines)}
        except ValueError as error:
            raise ValueError(f"{path} is not a tiktoken rank file: {error}") from None
        if sorted(ranks.values()) != list(range(len(lines))) or b"" in ranks:
            raise ValueError(f"{path} is not a tiktoken rank file: its ranks are not 0, 1, 2, ..., "
                             "or a token has no bytes")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError(f"{path} lacks some of the 256 bytes, and could not encode any text")
        return cls.from_ranks(ranks, instruct)

    def save(self, path: str | Path) -> None:
        """Write the ranks so that from_file reads them back."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks]
        with replacing(Path(path)) as partial:
            partial.write_text("".join(lines))

    @classmethod
    def train(cls, text: str, vocab_size: int, instruct: bool = False) -> "Tokenizer":
        """A vocabulary of at most vocab_size, learnt from a text by `byte_pairs`.

        It is smaller where the text repeats too little. Raises ValueError, naming the least, for a
        vocab_size that does not hold the 256 bytes and the special tokens.
        """
        room = vocab_size - 1 - len(SPECIALS + (INSTRUCT_SPECIALS if instruct else ()))
        if room < 256:  # <|endoftext|> was the 1
            raise ValueError(f"a vocabulary of {vocab_size} is too small: the 256 bytes and the "
                             f"special tokens are {vocab_size - room + 256}")
        words = Counter(word.encode(errors="replace") for word in regex.findall(PATTERN, text))
        return cls.from_ranks(byte_pairs(words, room), instruct)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. What looks like a special token in it is ordinary text."""
        return self.encoding.encode_ordinary(text)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The instruct model's template: (role, content) pairs, then the assistant's turn begins.

        <|start_header_id|> role <|end_header_id|> two newlines, content, <|endofchunk|> <|eot_id|>
        for each message. Raises ValueError for a tokenizer without these tokens.
        """
        if not hasattr(self, "eot_id"):
            raise ValueError("a chat needs an instruct model; this one has no <|eot_id|>")
        ids = []
        for role, content in [*messages, ("assistant", None)]:
            ids += [self.start_header_id, *self.encode(role), self.end_header_id,
                    *self.encode("\n\n")]
            if content is not None:
                ids += [*self.encode(content), self.endofchunk_token_id, self.eot_id]
        return ids

    def decode(self, ids: Iterable[int], specials: bool = False) -> str:
        """Turn token ids into text.

        Between pieces of text, <|endofchunk|> becomes a line break, and <|endoftext|> or <|bos|> a
        blank line. A base model's text ends at the first <|mask|>: what stands behind a hole does
        not go on from what stands before it. (In an instruct model's turn, masks may stay before
        <|eot_id|>.) Other special tokens are left out. With `specials` all tokens are written as
        they are.

        Raises ValueError for an id that is not in the vocabulary.
        """
        ids = list(map(int, ids))  # those of a tensor's row, too
        wrong = [i for i in ids if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is not in the vocabulary of {self.vocab_size}")
        if specials:
            return self.encoding.decode(ids)
        if self.mask_token_id in ids and not hasattr(self, "eot_id"):
            ids = ids[:ids.index(self.mask_token_id)]
        text: list[bytes] = []
        gap = set()  # the special tokens since the last of the text
        for i in ids:
            if i in self.special_ids:
                gap.add(i)
                continue
            if text and gap:
                ends = gap & {self.eos_token_id, self.bos_token_id}
                text.append(b"\n\n" if ends else b"\n" if self.endofchunk_token_id in gap else b"")
            text.append(self.encoding.decode_single_token_bytes(i))
            gap.clear()
        return b"".join(text).decode(errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text: joined, they are `decode(ids, specials=True)`.

        Some characters take several tokens. Such a character stands with the last of its tokens,
        the others get "". Bytes that are part of no character are "\ufffd".
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        found: list[str] = []
        for i in ids:
            begun = decoder.getstate()[0]
            text = decoder.decode(self.encoding.decode_single_token_bytes(i))
            if begun and text.startswith("\ufffd"):  # no character came of it
                found[-1], text = found[-1] + "\ufffd", text[1:]
            found.append(text)
        return found[:-1] + [found[-1] + decoder.decode(b"", final=True)] if found else []

    def quoted(self, token: int) -> str:
        """One token as Python writes it: ' sea', or b'\\xe2' where it is part of a character.

        Special tokens stand without quotes.
        """
        raw = self.encoding.decode_single_token_bytes(token)
        try:
            return raw.decode() if token in self.special_ids else repr(raw.decode())
        except UnicodeDecodeError:
            return repr(raw)


# ---- byte-pair encoding --------------------------------------------------------------------------


def merge(pieces: list[bytes], token: bytes) -> list[bytes]:
    """Join two neighbouring pieces of a word wherever together they are the token.

    Go from left to right. Each piece is joined at most once: merge([a, a, a], aa) is [aa, a].
    """
    merged: list[bytes] = []
    for piece in pieces:
        if merged and merged[-1] + piece == token:
            merged[-1] = token
        else:
            merged.append(piece)
    return merged


def byte_pairs(words: dict[bytes, int], n: int) -> dict[bytes, int]:
    """Learn at most n tokens by byte-pair encoding (Sennrich et al., arXiv 1508.07909).

    words: {word: how often it occurs}. Returns {token: rank}, with ranks from 0 to at most n - 1.

    The first 256 tokens are the bytes. At first a word's pieces are its bytes. Then these steps
    repeat. Find the pair of neighbouring pieces that is most frequent in all words; of equally
    frequent pairs, take the one that came up first. The pair becomes the next token, and is merged
    in every word. Stop at n tokens, or earlier when no pair occurs twice.

    A pair is identified by its joined bytes: (a, bc) and (ab, c) are the same pair. tiktoken does
    so, too, because it knows only the ranks. After a merge, only the words with the merged pair are
    counted anew. So a megabyte takes a second.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    spelt, times = [[bytes([b]) for b in word] for word in words], list(words.values())
    counts, where = Counter[bytes](), defaultdict(set)  # of a pair: how often, and in which words

    def count(word: int, sign: int) -> None:
        for left, right in pairwise(spelt[word]):
            counts[left + right] += sign * times[word]
            where[left + right].add(word)
    for word in range(len(spelt)):
        count(word, +1)
    while len(ranks) < n and counts:
        token, most = counts.most_common(1)[0]
        if most < 2:
            break
        ranks.setdefault(token, len(ranks))
        for word in sorted(where.pop(token)):
            count(word, -1)
            spelt[word] = merge(spelt[word], token)
            count(word, +1)
    return ranks
