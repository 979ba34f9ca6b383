"""FineWeb Atlas: shards read as a stream, whole documents, and the most frequent concepts."""

import io
import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from steerling_min.files.labels import Label
from steerling_min.training import atlas
from steerling_min.training.atlas import COLUMNS, TYPES, Atlas

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
IDS = [f"{type}_ids" for type in TYPES]
SCHEMA = pa.schema([("chunk_text", pa.string()), ("chunk_status", pa.string()),
                    ("doc_int_id", pa.int64()), *((name, pa.list_(pa.int64())) for name in IDS)])


def row(document, n, status="ok", **ids):
    """Chunk n of a document: what it is about stands in its text."""
    text = f" chunk {n} of document {document}: {' '.join(f'{k}{v}' for k, v in ids.items())}."
    return {"chunk_text": text, "chunk_status": status, "doc_int_id": document,
            **{name: ids.get(name.removesuffix("_ids"), []) for name in IDS}}


def rows_of(n=200, seed=0):
    """n documents of 1 to 6 chunks; content 7 is in half of them, 8 in a quarter, 9 in one."""
    rng = random.Random(seed)
    rows = [row(document, i, content=[7] * (document % 2) + [8] * (document % 4 == 0),
                tone=[20 + i % 3], entity=[40] if i == 2 else [])
            for document in range(n) for i in range(rng.randint(1, 6))]
    return [*rows, row(n, 0, content=[9])]


def shard(folder, rows, name="shard_0000.parquet", size=97, schema=SCHEMA):
    """A shard whose row groups end in the middle of documents."""
    parquet.write_table(pa.Table.from_pylist(rows, schema), folder / name, row_group_size=size,
                        compression="none")
    return folder / name


CONCEPTS = [(7, "War", "content"), (8, "Sea", "content"), (9, "Tea", "content"),
            *((20 + i, f"Tone {i}", "tone") for i in range(3)), (30, "Essay", "document"),
            (40, "Rome", "entity")]


def names(folder, concepts=CONCEPTS):
    ids, called, types = zip(*concepts)
    parquet.write_table(pa.table({"concept_id": ids, "name": called, "concept_type": types,
                                  "description": [f"about {x}" for x in called]}),
                        folder / "concepts.parquet")
    return folder / "concepts.parquet"


def make(folder, rows, top=64, tokenizer=None, labels=(), T=32, concepts=CONCEPTS, **how):
    return Atlas([shard(folder, rows, **how)], 0, T, 400, tokenizer, labels,
                 names(folder, concepts), top)


def documents_in(stream, tokenizer):
    """document -> its chunks in a stream, in order."""
    found = {}
    text = tokenizer.decode(stream.tokens.tolist(), specials=True)
    for document in text.split("<|endoftext|>")[:-1]:
        chunks = re.findall(r"chunk (\d+) of document (\d+)", document)
        assert document.startswith("<|bos|>") and len({d for _, d in chunks}) == 1, (
            "one document between <|bos|> and <|endoftext|>")
        found.setdefault(int(chunks[0][1]), []).append([int(n) for n, _ in chunks])
    return found


def test_documents_are_whole_and_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(atlas, "PORTION", 1000)
    rows = rows_of(600)  # more than are read at a time
    corpus = make(tmp_path, rows)
    held_out = documents_in(corpus.rest, corpus.tokenizer)
    training = documents_in(corpus.training, corpus.tokenizer)
    chunks = {d: [int(re.search(r"chunk (\d+)", x["chunk_text"])[1]) for x in rows
                  if x["doc_int_id"] == d] for d in range(601)}
    for document, found in [*held_out.items(), *training.items()]:
        assert found == [chunks[document]], "whole, though a row group, or a batch, ended in it"
    assert not held_out.keys() & training.keys()
    assert 35 <= len(held_out) <= 90, "about a tenth of 601"


def test_only_chunks_that_are_ok_are_read(tmp_path):
    rows = rows_of()
    for i, x in enumerate(rows):
        x["chunk_status"] = ("ok", "failed", None)[i % 3]
    rows += [{**row(900 + i, 0), "chunk_text": text} for i, text in enumerate(("", None))]
    corpus = make(tmp_path, rows)
    bad = {x["chunk_text"] for x in rows if x["chunk_status"] != "ok"}
    tokens = [*corpus.training.tokens.tolist(), *corpus.rest.tokens.tolist()]
    texts = corpus.tokenizer.decode(tokens)
    assert len(texts) > 1000 and not any(text in texts for text in bad)


def test_the_most_frequent_concepts_of_each_type_are_the_models(tmp_path):
    corpus = make(tmp_path, rows_of(), top=2)
    found = [(x.id, x.name, x.type, x.description) for x in corpus.labels]
    assert [(x[1], x[2]) for x in found] == [
        ("War", "content"), ("Sea", "content"), ("Tone 0", "tone"), ("Tone 1", "tone"),
        ("Rome", "entity")], "no document concept occurs"
    assert found[0] == (0, "War", "content", "about War")
    assert len(make(tmp_path, rows_of()).labels) == 7, "fewer than 64 of each type are all"
    more = make(tmp_path, rows_of(), labels=[Label(0, "Own"), Label(1, "Tea", type="content")])
    assert len(more.labels) == 8 and sorted(more.ids) == [1, 2, 3, 4, 5, 6, 7], (
        "those that the shard names, among them the model's Tea: wherever they occur")


def test_a_chunk_has_its_labels_and_no_others(tmp_path):
    corpus = make(tmp_path, rows_of(), top=2)
    for stream in (corpus.training, corpus.rest):
        for chunk, ids in enumerate(stream.labels.tolist()):
            text = corpus.tokenizer.decode(stream.tokens[stream.chunks == chunk].tolist())
            found = {corpus.labels[i].name for i in ids if i >= 0}
            said = {"War": "content[7" in text, "Sea": "content[8]" in text,
                    "Tone 0": "tone[20]" in text, "Tone 1": "tone[21]" in text,
                    "Rome": "entity[40]" in text}
            assert found == {name for name, there in said.items() if there}, text


def test_one_id_may_be_of_two_types(tmp_path):
    rows = [row(d, 0, content=[1], tone=[1] * (d % 2)) for d in range(200)]
    corpus = make(tmp_path, rows, concepts=[(1, "War", "content"), (1, "Sad", "tone")])
    assert [x.name for x in corpus.labels] == ["War", "Sad"]
    assert sorted(map(tuple, corpus.training.labels.unique(dim=0).tolist())) == [(0, -1), (0, 1)]


def test_a_models_concepts_keep_their_ids_and_new_ones_follow(tmp_path):
    old = [Label(0, "Sea", "", "", "content"), Label(1, "War", "", "", "tone")]
    first = make(tmp_path, rows_of())
    corpus = make(tmp_path, rows_of(), tokenizer=first.tokenizer, labels=old)
    assert corpus.tokenizer is first.tokenizer and corpus.labels[:2] == old
    assert [x.name for x in corpus.labels[2:4]] == ["War", "Tea"], "another type, another concept"
    assert [x.id for x in corpus.labels] == list(range(8))


def test_portions_follow_each_other_and_begin_again(tmp_path, monkeypatch):
    """A step says which portion it reads: going on from a step reads what was read there before."""
    monkeypatch.setattr(atlas, "PORTION", 32)
    monkeypatch.setattr(atlas, "DOCUMENT_TOKENS", 50)  # a portion serves 1600 / (5 * 32) = 10 steps
    corpus, again = make(tmp_path, rows_of()), make(tmp_path, rows_of())
    read = [corpus.windows(step, 5, 32) for step in range(80)]
    at_40 = again.windows(40, 5, 32)
    assert torch.equal(at_40[0].tokens, read[40][0].tokens) and torch.equal(at_40[1], read[40][1])
    assert torch.equal(again.windows(3, 5, 32)[0].tokens, read[3][0].tokens), "back, too"
    assert torch.equal(again.windows("counted", 5, 32)[0].tokens, read[0][0].tokens)
    seen = [documents_in(read[step][0], corpus.tokenizer) for step in range(0, 80, 10)]
    assert all(read[step][0] is read[step // 10 * 10][0] for step in range(80))
    order = [document for portion in seen for document in portion]
    n = len(set(order))
    assert order[:n] == sorted(set(order)) and order[n:] == order[: len(order) - n], (
        "the files' order, and after the last document the first")
    assert 150 < n < 201 and not set(order) & documents_in(corpus.rest, corpus.tokenizer).keys()
    assert not torch.equal(read[0][1], read[1][1]), "windows are drawn anew at every step"


def test_several_shards_are_read_in_turn(tmp_path):
    files = [shard(tmp_path, [row(d, 0, content=[7]) for d in range(start, start + 100)], name)
             for start, name in ((0, "a.parquet"), (100, "b.parquet"))]
    corpus = Atlas(files, 0, 32, 400, None, (), names(tmp_path), 64)
    found = {*documents_in(corpus.training, corpus.tokenizer),
             *documents_in(corpus.rest, corpus.tokenizer)}
    assert found == set(range(200))


def test_other_columns_and_fewer_bits_do_no_harm(tmp_path):
    schema = pa.schema([("extra", pa.string()), *(
        (field.name, pa.list_(pa.int32()) if "ids" in field.name else field.type)
        for field in reversed(SCHEMA))])
    rows = [{**x, "tone_ids": x["tone_ids"] or None, "entity_ids": None} for x in rows_of()]
    assert len(make(tmp_path, rows, schema=schema).labels) == 6


def test_a_fingerprint_is_of_the_texts_and_the_names(tmp_path):
    marks = [make(tmp_path, rows).fingerprint for rows in (rows_of(), rows_of(), rows_of(seed=1))]
    called = [(i, name + "!", type) for i, name, type in CONCEPTS]
    marks.append(make(tmp_path, rows_of(), concepts=called).fingerprint)
    assert marks[0] == marks[1] and len(set(marks)) == 3


@pytest.mark.parametrize("column", COLUMNS)
def test_a_shard_without_a_column_is_named(tmp_path, column):
    schema = pa.schema([field for field in SCHEMA if field.name != column])
    with pytest.raises(ValueError, match=f"shard_0000.parquet lacks the column {column}"):
        make(tmp_path, rows_of(), schema=schema)


@pytest.mark.parametrize("rows", [[], rows_of(3), [row(d, 0, "failed") for d in range(99)]],
                         ids=["empty", "three documents", "none is ok"])
def test_too_few_documents_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match="shard_0000.parquet: too few documents"):
        make(tmp_path, rows, T=256)


def test_each_chunk_counts_in_how_frequent_a_concept_is(tmp_path):
    """Concept 7 is in many chunks of one batch, 8 in one chunk of every batch."""
    rows = [row(d, 0, content=[8] if d % 1000 == 0 else [7] * (d < 500)) for d in range(3000)]
    assert atlas.most_frequent([shard(tmp_path, rows, size=1000)], 1) == [("content", 7)]
    rows = [row(0, i, content=[9, 7, 8]) for i in range(3)]
    assert atlas.most_frequent([shard(tmp_path, rows)], 2) == [("content", 7), ("content", 8)], (
        "of equally frequent ones those with the smaller ids, in whatever order they come")


def test_the_documents_to_learn_from_must_fill_a_window_too(tmp_path):
    held_out = [d for d in range(3000) if zlib.crc32(str(d).encode()) % 10 == 0]
    with pytest.raises(ValueError, match="too few documents"):
        make(tmp_path, [row(d, 0) for d in sorted([*held_out, 1, 2])], T=256)


def test_every_process_holds_out_the_same_documents(tmp_path):
    """Python's own hashes have a seed that is another in each process."""
    here, other = make(tmp_path, rows_of()).rest.tokens.tolist(), "1"
    if os.environ.get("PYTHONHASHSEED") == other:
        other = "2"
    code = ("import sys; from pathlib import Path; from steerling_min.training.atlas import Atlas; "
            "f = Path(sys.argv[1]); print(Atlas([f / 'shard_0000.parquet'], 0, 32, 400, None, (), "
            "f / 'concepts.parquet', 64).rest.tokens.tolist())")
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, text=True,
                           capture_output=True, cwd=Path(__file__).parent.parent,
                           env={**os.environ, "PYTHONHASHSEED": other}).stdout
    assert there == f"{here}\n" and len(here) > 20


def test_a_concept_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="concepts.parquet lacks the tone concept 20, .*shard_00"):
        make(tmp_path, rows_of(), concepts=CONCEPTS[:3])


def test_what_is_no_parquet_and_a_missing_pyarrow_are_said(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="a.parquet is not a parquet file"):
        Atlas([file], 0, 32, 400, None, (), names(tmp_path), 64)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "c.csv").write_text("concept_id,concept_name\n1,a\n")
    with pytest.raises(ImportError, match="reading .*a.parquet needs pyarrow: pip install"):
        Atlas([file], 0, 32, 400, None, (), tmp_path / "c.csv", 64)


def test_a_shard_is_read_a_little_at_a_time(tmp_path, monkeypatch):
    """One row group of 12 MB: read whole, as pyarrow does by itself, a shard's 500 MB would be."""
    text, reads = "".join(random.Random(0).choices("abcdefgh  ", k=3000)), []
    rows = [{**row(n // 4, n % 4, content=[7]), "chunk_text": text[n % 3000:] + text[: n % 3000]}
            for n in range(4_000)]
    file = shard(tmp_path, rows, size=10**6)

    class Recorded(io.FileIO):
        def read(self, n=-1):
            reads.append(n)
            return super().read(n)
    monkeypatch.setattr(Path, "open", lambda self, mode: Recorded(self, mode))
    documents = Atlas.documents(SimpleNamespace(files=[file], concepts=lambda row: ()), False)
    n = sum(len(chunk.text) for document in documents for chunk in document)
    assert n > 9 * 10**6 and max(reads) <= 2**21, f"{max(reads)} bytes at once"
