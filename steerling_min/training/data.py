"""Training data: labelled documents, packed into one stream of tokens and cut into windows.

A document is a list of chunks; a chunk is a text and the ids of the known concepts that it has.
Documents become `<|bos|> chunk <|endofchunk|> chunk ... <|endoftext|>`, one after the other, and
windows of the context length are cut from that stream, without padding and without a mask between
documents. Labels belong to whole chunks; no token has one of its own. A chunk has few of the many
concepts, so its labels are a short list of ids, not a yes or no for each concept.

Letters, besides `config.py`'s: N chunks, n tokens of a stream, K the most labels that a chunk has.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.labels import Label
from ..files.tokenizer import Tokenizer
from . import world
from .world import Chunk

VOCAB_SIZE = 1024  # at most; the stories' words make 795


class Stream(NamedTuple):
    tokens: Tensor  # (n,) int64
    chunks: Tensor  # (n,) int64, the chunk that a token stands in; -1 for special tokens
    labels: Tensor  # (N, K) int64, the ids of each chunk's concepts, filled up with -1


class Batch(NamedTuple):
    """B windows of a stream. A chunk that is cut by a window's edge is a chunk in both windows."""

    tokens: Tensor  # (B, T) int64
    chunks: Tensor  # (B, T) int64, 0 to N - 1; -1 for special tokens
    labels: Tensor  # (N, K) int64, as in Stream


def pack(documents: Iterable[Sequence[Chunk]], tokenizer: Tokenizer, *,
         enough: float = float("inf")) -> Stream:
    """Put documents into one stream, until it holds `enough` tokens (which may be endless)."""
    tokens, chunks, labels = [], [], []
    for document in documents:
        tokens.append(tokenizer.bos_token_id)
        chunks.append(-1)
        for chunk in document:
            ids = tokenizer.encode(chunk.text)
            tokens += ids + [tokenizer.endofchunk_token_id]
            chunks += [len(labels)] * len(ids) + [-1]
            labels.append(chunk.concepts)
        tokens[-1] = tokenizer.eos_token_id  # in place of the last <|endofchunk|>
        if len(tokens) >= enough:
            break
    K = max(map(len, labels), default=0)
    filled = torch.tensor([(*ids, *[-1] * (K - len(ids))) for ids in labels], dtype=torch.int64)
    return Stream(torch.tensor(tokens), torch.tensor(chunks), filled.view(len(labels), K))


def cut(stream: Stream, starts: Tensor, T: int) -> Batch:
    """The windows of T tokens that begin at starts (B,) of a stream."""
    at = starts[:, None] + torch.arange(T)  # (B, T)
    chunks, N = stream.chunks[at], len(stream.labels)
    # Number the chunks of all windows anew, so that no two windows share one.
    apart = torch.where(chunks >= 0, chunks + N * torch.arange(len(starts))[:, None], -1)
    kept = apart[apart >= 0].unique()  # sorted
    renumbered = torch.searchsorted(kept, apart).masked_fill(apart < 0, -1)
    return Batch(stream.tokens[at], renumbered, stream.labels[kept % max(1, N)])


def has_concepts(labels: Tensor, C: int) -> Tensor:
    """Labels (N, K) as a yes or no for each of C concepts: (N, C) bool."""
    found = torch.zeros(len(labels), C + 1, dtype=torch.bool, device=labels.device)
    return found.scatter(1, labels.where(labels >= 0, C), True)[:, :C]  # column C is for the -1


def count_tokens(stream: Stream, C: int, V: int) -> Tensor:
    """How often each token stands in chunks with each concept and, last, in all: (C + 1, V) int32.

    One label of every chunk at a time: nothing of tokens times concepts is ever held.
    """
    inside = stream.chunks >= 0
    tokens, chunks = stream.tokens[inside], stream.chunks[inside]  # (n,)
    counts = torch.zeros((C + 1) * V, dtype=torch.int32)
    for ids in [*stream.labels.T, torch.full((len(stream.labels),), C)]:  # (N,) each
        concept = ids[chunks]  # (n,)
        at = (concept * V + tokens)[concept >= 0]
        counts.index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
    return counts.view(C + 1, V)


# ---- where documents come from -------------------------------------------------------------------


def endless_stories(seed: str) -> Iterator[Sequence[Chunk]]:
    """Stories of the tiny world, one after the other, without end."""
    rng = random.Random(seed)
    while True:
        yield world.write_story(rng).chunks


def fingerprint(stream: Stream, labels: Sequence[Label]) -> str:
    """Tell what was read by 16 letters: another text, other labels or names give others."""
    read = hashlib.sha256("\n".join(label.name for label in labels).encode())
    for tensor in stream:
        read.update(tensor.numpy().tobytes())
    return read.hexdigest()[:16]


def with_new(labels: Sequence[Label], more: Iterable[Label]) -> list[Label]:
    """A model's labels, and after them those of `more` that have other names."""
    names = {label.name for label in labels}
    new = [label for label in more if label.name not in names]
    return [*labels, *(label._replace(id=i) for i, label in enumerate(new, start=len(labels)))]


class Stories:
    """The tiny world's stories: endless, all labelled, the truth known.

    Every draw follows from the seed and the step, so a run can go on from any step.
    """

    def __init__(self, seed: int, tokenizer: Tokenizer | None = None,
                 labels: Sequence[Label] = ()):
        """A model that is trained further brings its tokenizer and labels, as in `Texts`."""
        self.seed, self.tokenizer = seed, tokenizer
        self.labels = with_new(labels, world.CONCEPTS)
        ids = {label.name: label.id for label in self.labels}
        self.ids = [ids[label.name] for label in world.CONCEPTS]  # of the world's concepts
        # How readily each concept of a chunk is injected (`objective.draw_injections`): a topic, a
        # mood or a form is in many words, and takes more practice than a single word.
        self.injected = torch.ones(len(self.labels))
        self.injected[[ids[x.name] for x in world.CONCEPTS if x.id not in world.WORDS]] = 5.0
        if tokenizer is None:
            rng = random.Random(0)  # one vocabulary, whatever the seed
            texts = [chunk.text for _ in range(1000) for chunk in world.write_story(rng).chunks]
            self.tokenizer = Tokenizer.train("\n".join(texts), VOCAB_SIZE)
        self.fingerprint = fingerprint(self.stream("fingerprint", 1000), self.labels)

    def stream(self, step: int | str, n: int) -> Stream:
        """At least n tokens of stories, other ones at every step."""
        stories = ([Chunk(text, tuple(self.ids[c] for c in concepts)) for text, concepts in story]
                   for story in endless_stories(f"{self.seed} {step}"))
        return pack(stories, self.tokenizer, enough=n)

    def windows(self, step: int | str, B: int, T: int) -> tuple[Stream, Tensor]:
        """What a training step reads: a stream, and where its B windows of T tokens start."""
        return self.stream(step, B * T), torch.arange(B) * T

    def held_out(self, B: int, T: int) -> Batch:
        """B windows that training never reads."""
        return cut(self.stream("held out", B * T), torch.arange(B) * T, T)


class Texts:
    """Anyone's own files. The last tenth of all tokens is held out.

    A .jsonl file has a chunk per line, {"text": "...", "concepts": ["name", ...]}; the concepts may
    be left out. Any other file is plain UTF-8 text whose paragraphs are its chunks, without labels.
    A file is one document.
    """

    def __init__(self, files: Sequence[Path], seed: int, T: int,
                 tokenizer: Tokenizer | None = None, labels: Sequence[Label] = ()):
        """T is the window's length, below which no text is enough. A model that is trained further
        brings its tokenizer, and the labels of all its known concepts; new concepts come after
        them.

        Raises ValueError or OSError with one line that names the file (and line) and what is wrong.
        """
        self.seed = seed
        documents = read_documents(files)
        names = {name for document in documents for _, concepts in document for name in concepts}
        self.labels = with_new(labels, (Label(0, name) for name in sorted(names)))
        self.injected = torch.ones(len(self.labels))
        ids = {label.name: label.id for label in self.labels}
        documents = [[Chunk(text, tuple(ids[name] for name in concepts))
                      for text, concepts in document] for document in documents]
        self.tokenizer = tokenizer or Tokenizer.train(
            "\n".join(c.text for c in chain(*documents)), VOCAB_SIZE)
        tokens, chunks, labels = stream = pack(documents, self.tokenizer)
        self.fingerprint = fingerprint(stream, self.labels)
        n = len(tokens) * 9 // 10
        self.training = Stream(tokens[:n], chunks[:n], labels)
        self.rest = Stream(tokens[n:], chunks[n:], labels)
        if len(self.rest.tokens) < T:
            raise ValueError(f"{', '.join(map(str, files))}: {len(tokens)} tokens are too few; the "
                             f"tenth of them that is held out must fill a window of {T}")

    def windows(self, step: int | str, B: int, T: int) -> tuple[Stream, Tensor]:
        rng, last = random.Random(f"{self.seed} {step}"), len(self.training.tokens) - T
        return self.training, torch.tensor([rng.randint(0, last) for _ in range(B)])

    def held_out(self, B: int, T: int) -> Batch:
        starts = torch.linspace(0, len(self.rest.tokens) - T, B).long()
        return cut(self.rest, starts, T)


def read_documents(files: Sequence[Path]) -> list[list[tuple[str, list[str]]]]:
    """A document for each file: its chunks, each a text and the names of its concepts."""
    return [read_jsonl(file) if file.suffix == ".jsonl" else read_text(file) for file in files]


def read_text(file: Path) -> list[tuple[str, list[str]]]:
    """The paragraphs of a text file, none of them labelled."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} is "
                         f"{error.object[error.start]:#04x}") from None
    paragraphs = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    return at_least_one(file, [(part, []) for part in paragraphs if part])


def read_jsonl(file: Path) -> list[tuple[str, list[str]]]:
    """The chunks of a .jsonl file and the names of their concepts."""
    chunks = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            chunk = json.loads(line)
            text, concepts = chunk["text"], chunk.get("concepts", [])
            fine = isinstance(text, str) and text and isinstance(concepts, list)
            fine = fine and all(isinstance(name, str) and name for name in concepts)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fine = False
        if not fine:
            raise ValueError(f'{file}, line {number}: expected {{"text": "...", '
                             '"concepts": ["name", ...]}, with a text that is not empty')
        chunks.append((text, concepts))
    return at_least_one(file, chunks)


def at_least_one(file: Path, chunks: list) -> list:
    if not chunks:
        raise ValueError(f"{file} has no text")
    return chunks
