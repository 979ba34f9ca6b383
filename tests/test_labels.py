"""Labels: names for concepts, searching them, and label files that are not right."""

import sys

import pytest

from steerling_min import load
from steerling_min.files.loading import TINY
from steerling_min.files.labels import Label, Labels, labels_beside, load_labels, write_labels

LABELS = Labels([Label(0, "sea", "about ships and storms", "topic"), Label(1, "storm", "", "topic"),
                 Label(2, "Deep Sea", "the sea floor", "topic"), Label(3, "happy", "", "mood"),
                 Label(4, "Happy", "shared name"), Label(5, "seaside")], 9)


def test_names_come_before_descriptions_and_words_are_whole():
    assert [x.id for x in LABELS.find("sea")] == [0, 2], "seaside is another word"
    assert [x.id for x in LABELS.find("STORM")] == [1]
    assert [x.id for x in LABELS.find("storms")] == [0], "by its description"
    assert [x.id for x in LABELS.find("sea floor")] == [2], "every word, in any order"
    assert LABELS.find("") == LABELS.find("volcano") == []
    both = Labels([Label(0, "wind", "brings a storm"), Label(1, "storm")], 2)
    assert [x.id for x in both.find("storm")] == [1, 0], "a hit in the name comes first"


def test_a_concept_is_found_by_number_or_by_name():
    found = [LABELS.resolve(query) for query in ("7", "SEA", "deep sea")]
    assert found == [(7,), (0,), (2,)]


@pytest.mark.parametrize("query, message", [
    ("9", "concept 9 does not exist; ids are 0 to 8"), ("-1", "concept -1 does not exist"),
    ("happy", "concepts 3, 4 are all called 'happy': give a number"),
    ("strom", "no concept is called 'strom'; close: storm"),
    ("floor", "no concept is called 'floor'; close: Deep Sea"),
    ("xyzzy", "no concept is called 'xyzzy'; numbers do as well"),
    ("", "name is missing"), ("7+", "name is missing")])
def test_what_is_no_concept_is_said_with_what_may_be_meant(query, message):
    with pytest.raises(ValueError, match=message):
        LABELS.resolve(query)


def test_several_concepts_are_named_by_their_group_or_joined_by_plus():
    assert LABELS.resolve("Topic") == (0, 1, 2), "the name of a group"
    assert LABELS.resolve("storm+7+sea") == (1, 7, 0), "in the order given: the first leads"
    assert LABELS.resolve("storm+topic") == (1, 0, 2), "each once"
    with pytest.raises(ValueError, match="no concept is called 'strom'; close: storm"):
        LABELS.resolve("sea+strom")
    odd = Labels([Label(0, "C++"), Label(1, "mood", "", "x"), Label(2, "sad", "", "mood")], 3)
    assert odd.resolve("C++") == (0,), "a name may have a plus in it"
    assert odd.resolve("mood") == (1,), "a concept's name comes before a group's"


def test_a_concept_without_a_label_goes_by_its_number():
    assert LABELS.name(1) == "storm" and LABELS.name(7) == "concept 7"


def test_what_is_written_is_read_back(tmp_path):
    labels = [Label(1, "sea, deep", 'called "sea"', "topic"), Label(0, "\u00e9\u4e16", type="tone")]
    write_labels(labels, tmp_path)
    found = labels_beside(tmp_path, 2)
    assert list(found.by_id.values()) == labels
    head = (tmp_path / "concept_labels.csv").read_text(encoding="utf-8").splitlines()[0]
    assert head.startswith("concept_id,concept_name,concept_description,head,group_name,"), (
        "the official columns, then one of ours: the type")


def test_no_file_is_no_labels(tmp_path):
    assert labels_beside(tmp_path, 5).by_id == {}


def test_the_bundled_model_names_its_concepts():
    labels = labels_beside(TINY, load()[0].config.n_concepts)
    assert len(labels.by_id) == 24 and labels.resolve("sea") == (0,)
    assert labels.resolve("topic") == tuple(range(8))


HEAD = "concept_id,concept_name\n"


@pytest.mark.parametrize("content, message", [
    ("", "lacks the column concept_id"),
    ("concept_id,name\n1,a\n", "lacks the column concept_name"),
    (HEAD + "x,a\n", "row 2: concept_id = 'x' is not a number"),
    (HEAD + "1,a\n,b\n", "row 3: concept_id = '' is not a number"),
    (HEAD + "5,a\n", "row 2: concept 5 does not exist; this model has 5, 0 to 4"),
    (HEAD + "1,a\n1,b\n", "row 3: concept 1 has a label already"),
    (HEAD + '1,"a\n2,b\n', "not CSV"),
    (b"concept_id,concept_name\n1,\xff\n", "not CSV in UTF-8")])
def test_a_label_file_that_is_not_right_is_named(tmp_path, content, message):
    file = tmp_path / "labels.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"labels.csv.*{message}"):
        load_labels(file, 5)


def test_only_the_known_heads_concepts_are_named(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("concept_id,concept_name,head\n1,a,Known\n1,b,unknown\n2,c,\n")
    assert [x.name for x in load_labels(file, 5).by_id.values()] == ["a", "c"]


def test_a_concept_without_a_name_goes_by_its_number(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text(HEAD + "0,sea\n1,\n2\n")
    assert [load_labels(file, 3).name(i) for i in range(3)] == ["sea", "concept 1", "concept 2"]


def test_parquet_is_read_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[hub]'")
    from pyarrow import parquet
    file = tmp_path / "concept_labels.parquet"
    parquet.write_table(pyarrow.table({
        "concept_id": [1, 0], "concept_name": ["storm", "sea"], "concept_description": ["", "wet"],
        "head": ["known", "known"], "public_group_id": [7, 7], "group_name": ["topic", "topic"],
        "is_steerable": [True, True]}), file)
    labels = labels_beside(tmp_path, 2)
    assert labels.resolve("sea") == (0,) and labels.by_id[1].group == labels.by_id[0].group
    file.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match="is not a parquet file"):
        load_labels(file, 2)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install -e '\.\[hub\]'"):
        load_labels(tmp_path / "concept_labels.parquet", 2)
