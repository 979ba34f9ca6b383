"""Training data: labelled documents, packed into one stream of tokens and cut into windows.

A document is a list of chunks; a chunk is a text and the ids of the known concepts that it has.
Documents become `<|bos|> chunk <|endofchunk|> chunk ... <|endoftext|>`, one after the other, and
windows of the context length are cut from that stream, without padding and without a mask between
documents. Labels belong to whole chunks; no token has one of its own. A chunk has few of the many
concepts, so its labels are a short list of ids, not a yes or no for each concept. A conversation is
a chunk, too: of its tokens only the assistant's are learnt, the others are only read.

Letters, besides `config.py`'s: N chunks, n tokens of a stream, K the most labels that a chunk has.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain, count, groupby, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.cli import printable
from ..files.config_json import unique_keys
from ..files.labels import Label
from ..files.tokenizer import Tokenizer
from . import world
from .world import Chunk

WORD = r" ?[A-Za-z]+| ?[^A-Za-z ]"  # of the stories: 534 of them, each a token


class Stream(NamedTuple):
    tokens: Tensor  # (n,) int64
    chunks: Tensor  # (n,) int64, the chunk that a token stands in; -1 for special tokens
    labels: Tensor  # (N, K) int64, the ids of each chunk's concepts, filled up with -1
    learnt: Tensor = torch.tensor(True)  # (n,) bool, the tokens that may be masked; by default all


class Batch(Stream):
    """B windows of a stream: the same fields, with (B, T) in the place of (n,). A chunk that is cut
    by a window's edge is a chunk in both windows."""


def pack(documents: Iterable[Sequence[Chunk]], tokenizer: Tokenizer, *,
         enough: float = float("inf")) -> Stream:
    """Put documents into one stream.

    Stop after the document with which the stream has at least `enough` tokens. So `documents` may
    be endless.
    """
    tokens, chunks, learnt = [], [], []
    labels: list[tuple[int, ...]] = []
    for document in documents:
        tokens.append(tokenizer.bos_token_id)
        chunks.append(-1)
        learnt.append(not document[0].turns)
        for chunk in document:
            ids, own = encode_chunk(chunk, tokenizer)
            tokens += [*ids, tokenizer.endofchunk_token_id]
            chunks += [-1 if i in tokenizer.special_ids else len(labels) for i in ids] + [-1]
            learnt += [*own, not chunk.turns]
            labels.append(chunk.concepts)
        tokens[-1] = tokenizer.eos_token_id  # in place of the last <|endofchunk|>
        if len(tokens) >= enough:
            break
    K = max(map(len, labels), default=0)
    filled = torch.tensor([(*ids, *[-1] * (K - len(ids))) for ids in labels], dtype=torch.int64)
    return Stream(torch.tensor(tokens), torch.tensor(chunks), filled.view(len(labels), K),
                  torch.tensor(learnt))


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Encode a chunk: its token ids, and for each of them whether it is learnt.

    Of a plain chunk all tokens are learnt. Of a conversation only the assistant's turns are learnt:
    what stands after a turn's header, including the special tokens that end the turn.
    """
    if not chunk.turns:
        ids = tokenizer.encode(chunk.text)
        return ids, [True] * len(ids)
    ids, learnt, header = [], [], len(tokenizer.encode_chat([]))
    for role, content in chunk.turns:
        turn = tokenizer.encode_chat([(role, content)])[:-header]
        given = header if role == "assistant" else len(turn)
        ids += turn
        learnt += [False] * given + [True] * (len(turn) - given)
    return ids, learnt


def cut(stream: Stream, starts: Tensor, T: int) -> Batch:
    """The windows of T tokens that begin at starts (B,) of a stream."""
    at = starts[:, None] + torch.arange(T)  # (B, T)
    chunks, N = stream.chunks[at], len(stream.labels)
    # Number the chunks of all windows anew, so that no two windows share one.
    apart = torch.where(chunks >= 0, chunks + N * torch.arange(len(starts))[:, None], -1)
    kept = apart[apart >= 0].unique()  # sorted
    renumbered = torch.searchsorted(kept, apart).masked_fill(apart < 0, -1)
    return Batch(stream.tokens[at], renumbered, stream.labels[kept % max(1, N)],
                 stream.learnt.expand_as(stream.tokens)[at])


def spread(stream: Stream, n: int, T: int) -> Tensor:
    """The starts (n,) of n windows of T tokens, spread evenly over a stream. Each has a token that
    is learnt, its last one (or an earlier one in the stream's first window)."""
    ends = stream.learnt.expand_as(stream.tokens).nonzero()[:, 0]
    starts = (ends + 1 - T).clamp(min=0).unique_consecutive()  # they ascend
    return starts[torch.linspace(0, len(starts) - 1, n, dtype=torch.float64).long()]


def has_concepts(labels: Tensor, C: int) -> Tensor:
    """Labels (N, K) as a yes or no for each of C concepts: (N, C) bool."""
    found = torch.zeros(len(labels), C + 1, dtype=torch.bool, device=labels.device)
    return found.scatter(1, labels.where(labels >= 0, C), True)[:, :C]  # column C is for the -1


def places(concepts: Tensor, C: int) -> Tensor:
    """For each of C concepts, its place among `concepts` (P,), or -1 if it is not there.

    Returns (C + 1,) int64. The last entry is always -1. A label of -1 means no concept, and as an
    index it selects this entry.
    """
    place = torch.full((C + 1,), -1, device=concepts.device)
    place[concepts] = torch.arange(len(concepts), device=concepts.device)
    return place


def count_tokens(stream: Stream, C: int, V: int) -> Tensor:
    """Count how often each token stands in chunks with each concept: (C + 1, V) int32.

    The last row counts all chunks. The loop takes one label of every chunk at a time. So it never
    needs a tensor of n tokens times C concepts.
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


def first_stories(steps: int = 30) -> Iterator[Sequence[Chunk]]:
    """Eight stories from each of a run's first steps: `train_tiny.py`, seed 0."""
    for step in range(steps):
        yield from islice(endless_stories(f"0 {step}"), 8)


@cache
def vocabulary() -> Tokenizer:
    """The tiny world's tokenizer, the same for every seed, and made once: bytes, then the words of
    a thousand stories, the most frequent first."""
    rng = random.Random(0)
    words = Counter(word for _ in range(1000) for chunk in world.write_story(rng).chunks
                    for word in re.findall(WORD, chunk.text) if len(word) > 1)
    pieces = [*map(bytes, zip(range(256))), *(word.encode() for word, _ in words.most_common())]
    return Tokenizer.from_ranks({piece: i for i, piece in enumerate(pieces)})


def fingerprint(tensors: Iterable[Tensor], labels: Sequence[Label]) -> str:
    """Return 16 letters that identify the data: another text or other label names give others."""
    read = hashlib.sha256("\n".join(label.name for label in labels).encode())
    for tensor in tensors:
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

    def __init__(self, seed: int, tokenizer: Tokenizer | None = None, labels: Sequence[Label] = ()):
        """A model that is trained further brings its tokenizer and labels, as in `Texts`."""
        self.seed, self.labels = seed, with_new(labels, world.CONCEPTS)
        ids = {label.name: label.id for label in self.labels}
        self.ids = [ids[label.name] for label in world.CONCEPTS]  # of the world's concepts
        # How readily each concept of a chunk is injected (`objective.draw_injections`): a topic, a
        # mood or a form is in many words, and takes more practice than a single word.
        self.injected = torch.ones(len(self.labels))
        self.injected[[ids[x.name] for x in world.CONCEPTS if x.id not in world.WORDS]] = 5.0
        self.tokenizer = vocabulary() if tokenizer is None else tokenizer
        self.fingerprint = fingerprint(self.stream("fingerprint", 1000), self.labels)

    def stream(self, step: int | str, n: int) -> Stream:
        """At least n tokens of stories, different ones at every step."""
        stories = ([chunk._replace(concepts=tuple(self.ids[c] for c in chunk.concepts))
                    for chunk in story] for story in endless_stories(f"{self.seed} {step}"))
        return pack(stories, self.tokenizer, enough=n)

    def windows(self, step: int | str, B: int, T: int) -> tuple[Stream, Tensor]:
        """What a training step reads: a stream, and where its B windows of T tokens start."""
        return self.stream(step, B * T), torch.arange(B) * T

    def held_out(self, B: int, T: int) -> Batch:
        """B windows that training never reads."""
        return cut(self.stream("held out", B * T), torch.arange(B) * T, T)


class Texts:
    """Anyone's own files.

    A plain text file is one document of one chunk. Its line breaks stay, and it has no labels.

    In a .jsonl file every line is a chunk: {"text": "...", "concepts": ["name", ...]}. The concepts
    may be left out. The file is one document, unless its lines have the field "document": where its
    value changes from one line to the next, a new document begins.

    A line may be a conversation instead: {"messages": [{"role": "user", "content": "..."},
    {"role": "assistant", "content": "..."}]}. It is a document of its own. The vocabulary then has
    the chat's special tokens, and only the assistant's words are learnt.

    Without labels, the last tenth of the tokens is held out. Labelled lines are often sorted by
    their concepts. So with labels, the text is cut into up to a thousand parts, and a tenth of
    these, drawn at random, is held out.
    """

    def __init__(self, files: Sequence[Path], seed: int, T: int, vocab: int = 1024,
                 tokenizer: Tokenizer | None = None, labels: Sequence[Label] = ()):
        """Read the files, encode them, and hold a tenth out.

        T: length of a window in tokens; the held-out tenth and the rest must each fill one. vocab:
        most tokens of a new vocabulary. tokenizer, labels: given if a model is trained further.
        They are its own tokenizer and the labels of all its known concepts; new concepts come after
        these.

        Raises ValueError or OSError with one line that names the file (and line) and what is wrong.
        """
        self.seed = seed
        read = [document for file in files for document in read_documents(file)]
        names = {name for chunk in chain(*read) for name in chunk["concepts"]}
        self.labels = with_new(labels, (Label(0, name) for name in sorted(names)))
        self.injected = torch.ones(len(self.labels))
        ids = {label.name: label.id for label in self.labels}
        self.ids = [ids[name] for name in names]  # of the text's concepts
        documents = [[Chunk(chunk["text"], tuple(sorted({ids[name] for name in chunk["concepts"]})),
                            chunk["messages"]) for chunk in document] for document in read]
        self.tokenizer = tokenizer or Tokenizer.train(
            "\n".join(chunk.text for chunk in chain(*documents)), vocab,
            instruct=any(chunk.turns for chunk in chain(*documents)))
        tokens, chunks, concepts, learnt = stream = pack(documents, self.tokenizer)
        self.fingerprint = fingerprint(stream, self.labels)
        n = len(tokens)
        part, chosen = torch.arange(n) * 10 // n, torch.tensor(9)
        if concepts.shape[1]:  # a token's part is its chunk's
            N, parts = len(concepts), min(1000, len(concepts))
            part = chunks.cummax(0).values.clamp(min=0) * parts // N
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(parts, generator=generator)[: max(1, parts // 10)]
        held_out = torch.isin(part, chosen)  # (n,)
        self.training, self.rest = (Stream(tokens[part], chunks[part], concepts, learnt[part])
                                    for part in (~held_out, held_out))
        for side in (self.training, self.rest):
            if len(side.tokens) < T or not side.learnt.any():
                raise ValueError(f"{', '.join(map(str, files))}: {n} tokens are too few; the tenth "
                                 "of them that is held out, and the rest, must each fill a window "
                                 f"of {T} and have something to learn")

    def windows(self, step: int | str, B: int, T: int) -> tuple[Stream, Tensor]:
        rng, last = random.Random(f"{self.seed} {step}"), len(self.training.tokens) - T
        drawn = (rng.randint(0, last) for _ in count())
        some = (start for start in drawn if self.training.learnt[start : start + T].any())
        return self.training, torch.tensor([*islice(some, B)])

    def held_out(self, B: int, T: int) -> Batch:
        return cut(self.rest, spread(self.rest, B, T), T)


FIELDS = {"text", "concepts", "document", "messages"}
LINE = ('{"text": "...", "concepts": ["name", ...]}, with a text that is not empty and names of '
        '1 to 200 letters; or {"messages": [{"role": "user", "content": "..."}, ...]} with some of '
        'the role assistant')


def read_documents(file: Path) -> list[list[dict]]:
    """The documents of a file, each a list of chunks with text, concepts and messages."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start}, in line {line}, is "
                         f"{data[error.start]:#04x}") from None
    if "\0" in text:
        raise ValueError(f"{file} has bytes that are 0: it is no text, or it is not UTF-8")
    if not text.strip():
        raise ValueError(f"{file} has no text")
    if file.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        return [[{"text": text, "concepts": [], "messages": []}]]
    lines = [read_line(line, f"{file}, line {number}")
             for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [list(chunks) for _, chunks in groupby(
        lines, key=lambda line: id(line) if line["messages"] else line["document"])]


def read_line(line: str, where: str) -> dict:
    """A line of a .jsonl file, checked: a field that is not known may be one that is misspelt."""
    unknown, fine = [], False
    try:
        chunk = json.loads(line, object_pairs_hook=unique_keys)
        unknown = sorted(chunk.keys() - FIELDS)
        names = chunk.setdefault("concepts", [])
        turns = [(turn["role"], turn["content"]) for turn in chunk.get("messages", [])]
        text = "\n".join(chain(*turns)) if "assistant" in dict(turns) else chunk["text"]
        fine = (bool(text.encode()) and ("text" in chunk) != bool(turns) and isinstance(names, list)
                and all(0 < len(name.strip()) <= 200 and name.isprintable() for name in names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    if unknown:
        raise ValueError(f"{where}: there is no field '{printable(unknown[0])}', only "
                         f"{', '.join(sorted(FIELDS))}")
    if not fine:
        raise ValueError(f"{where}: expected {LINE}")
    return {"text": text, "concepts": [name.strip() for name in names], "messages": turns,
            "document": chunk.get("document")}
