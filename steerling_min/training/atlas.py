"""FineWeb Atlas: real text whose chunks have concepts, in files that are larger than memory.

    python train_tiny.py --text shard_0000.parquet --concepts concepts.parquet --top 64

A row of a shard is a chunk: its text, the number of its document, and four lists of concept ids,
one for each type of concept. Another file says what the concepts are called. Both are on the hub,
as guidelabs/fineweb-atlas (ODC-BY): 10 billion tokens, with 14.7 labels to a chunk.

A shard is gigabytes, so it is never held as a whole. One pass over the ids counts the concepts, and
the most frequent of each type become the model's. Then the documents are read as a stream, one
portion after the other. A portion fits into memory and serves as many steps as it has tokens for;
their windows are drawn from all of it. After the last document comes the first again.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from ..files.labels import Label, open_parquet, read_rows
from ..files.tokenizer import Tokenizer
from .data import Stream, Texts, fingerprint, pack
from .world import Chunk

TYPES = ("content", "tone", "document", "entity")
COLUMNS = ["chunk_status", "doc_int_id", "chunk_text", *(f"{type}_ids" for type in TYPES)]
PORTION = 250            # documents of a portion
DOCUMENT_TOKENS = 2_000  # about as many tokens a document has, where the vocabulary is small


def batches(files: Sequence[Path], columns: list[str]) -> Iterator:
    """Columns of the usable chunks, a thousand or fewer at a time: pyarrow.RecordBatch.

    Raises ValueError for a file that is no parquet or lacks a column, ImportError without pyarrow.
    """
    for file in files:
        with open_parquet(file) as stored:
            from pyarrow.compute import equal
            for name in COLUMNS:
                if name not in stored.schema_arrow.names:
                    raise ValueError(f"{file} lacks the column {name}; a shard of FineWeb Atlas "
                                     f"has {', '.join(COLUMNS)}")
            for batch in stored.iter_batches(1_000, columns=columns):
                yield batch.filter(equal(batch["chunk_status"], "ok"))


def most_frequent(files: Sequence[Path], top: int) -> list[tuple[str, int]]:
    """Type and id of the concepts that most usable chunks have, `top` of each type."""
    counts: dict[str, Counter[int]] = {type: Counter() for type in TYPES}
    for batch in batches(files, COLUMNS[:1] + COLUMNS[3:]):
        for type in TYPES:
            counts[type].update(batch[f"{type}_ids"].flatten().to_pylist())
    return [(type, concept) for type in TYPES for concept, _ in
            sorted(counts[type].items(), key=lambda x: (-x[1], x[0]))[:top]]


class Atlas(Texts):
    """A corpus like Texts, of which a tenth of the documents is held out."""

    def __init__(self, files: Sequence[Path], seed: int, T: int, vocab: int,
                 tokenizer: Tokenizer | None, labels: Sequence[Label], concepts: Path, top: int):
        """Learn the `top` most frequent concepts of each type. The file `concepts` has their names.
        The other arguments, and the errors, are those of Texts."""
        self.files, self.seed, self.labels = files, seed, list(labels)
        self.numbered: dict[tuple[str, int], int] = {}  # type and Atlas's id -> the label's id
        rows = {(row.get("concept_type"), row["concept_id"]): row for _, row in read_rows(concepts)}
        known = {(label.name, label.type): label.id for label in labels}
        for type, concept in most_frequent(files, top):
            row = rows.get((type, str(concept)))
            if row is None:
                raise ValueError(f"{concepts} lacks the {type} concept {concept}, which chunks of "
                                 f"{files[0]} have")
            new = Label(len(self.labels), row["concept_name"], row.get("concept_description", ""),
                        "", type)
            self.numbered[type, concept] = known.get((new.name, type), new.id)
            if self.numbered[type, concept] == new.id:
                self.labels.append(new)
        self.ids = [*self.numbered.values()]
        self.injected = torch.ones(len(self.labels))

        first, rest = (list(islice(self.documents(side), PORTION)) for side in (False, True))
        self.tokenizer = tokenizer or Tokenizer.train(
            "\n".join(chunk.text for document in first for chunk in document), vocab)
        self.rest = pack(rest, self.tokenizer)
        self.training = pack(first, self.tokenizer)
        if min(len(self.rest.tokens), len(self.training.tokens)) < T:
            raise ValueError(f"{', '.join(map(str, files))}: too few documents with chunks of the "
                             f"status ok; the tenth that is held out must fill a window of {T}")
        self.at = float("inf")  # the portion that was read last, beyond any that may come
        self.fingerprint = fingerprint([*self.training, *self.rest], self.labels)

    def documents(self, held_out: bool) -> Iterator[list[Chunk]]:
        """The documents that are held out, or the others, in the files' order."""
        rows = (row for batch in batches(self.files, COLUMNS) for row in batch.to_pylist()
                if row["chunk_text"])
        for number, chunks in groupby(rows, key=lambda row: row["doc_int_id"]):
            if (zlib.crc32(str(number).encode()) % 10 == 0) == held_out:
                yield [Chunk(row["chunk_text"], self.concepts(row)) for row in chunks]

    def concepts(self, row: dict) -> tuple[int, ...]:
        """The labels' ids of a chunk's concepts, as far as they are among the most frequent."""
        found = {self.numbered[type, concept] for type in TYPES
                 for concept in row[f"{type}_ids"] or () if (type, concept) in self.numbered}
        return tuple(sorted(found))

    def windows(self, step: int | str, B: int, T: int) -> tuple[Stream, Tensor]:
        """A step's portion follows from its number alone, so that a run can go on from any step."""
        portion = 0 if isinstance(step, str) else step * B * T // (PORTION * DOCUMENT_TOKENS)
        if portion < self.at:
            self.reader, self.at = (x for _ in count() for x in self.documents(held_out=False)), -1
        if portion > self.at:
            skipped = int(portion - self.at - 1) * PORTION
            documents = islice(self.reader, skipped, skipped + PORTION)
            self.training, self.at = pack(documents, self.tokenizer), portion
        return super().windows(step, B, T)
