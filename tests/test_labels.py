"""Labels: names for the concepts of both heads, searching them, and files that are not right."""

import itertools
import random
import sys
from types import SimpleNamespace

import pytest

from steerling_min import load
from steerling_min.files.cli import printable
from steerling_min.files.labels import Label, Labels, load_labels, write_labels
from steerling_min.files.loading import TINY

LABELS = Labels([Label(0, "sea", "about ships and storms", "topic"), Label(1, "storm", "", "topic"),
                 Label(2, "Deep Sea", "the sea floor", "topic"), Label(3, "happy", "", "mood"),
                 Label(4, "Happy", "shared name"), Label(5, "seaside"),
                 Label(0, "being", "what there is", head="unknown"),
                 Label(7, "sea change", head="unknown")], 9, 30)
SIZES = SimpleNamespace(n_concepts=5, n_unknown_concepts=15)  # all that a label file must fit


def known(*names) -> Labels:
    return Labels([Label(i, name) for i, name in enumerate(names)], len(names), 3)


# ---- names ---------------------------------------------------------------------------------------


def test_each_head_counts_from_0():
    assert LABELS.known[0].name == "sea" and LABELS.unknown[0].name == "being"
    assert (LABELS.name(0), LABELS.name(0, "unknown")) == ("sea", "being")
    assert (LABELS.name(8), LABELS.name(12, "unknown")) == ("concept 8", "discovered 12"), (
        "a concept without a label goes by its number")


@pytest.mark.parametrize("text, shown", [
    ("Deep Sea", "Deep Sea"), ("caf\u00e9 \u4e16", "caf\u00e9 \u4e16"), ("a\nb\r", r"a\nb\r"),
    ("\x1b[31mred", r"\x1b[31mred"), ("\u202eabc", r"\u202eabc"), ("\ud800", r"\ud800"),
    ("x" * 80, "x" * 80), ("x" * 81, "x" * 80 + "...")])
def test_a_name_from_outside_is_printed_on_one_line(text, shown):
    assert printable(text) == shown


# ---- searching -----------------------------------------------------------------------------------


def ids(labels):
    return [(label.head[0], label.id) for label in labels]


def test_a_word_weighs_3_in_the_name_and_1_in_the_description():
    assert ids(LABELS.find("SEA")) == [("k", 2), ("k", 0)], "4 and 3; seaside is another word"
    assert ids(LABELS.find("storms")) == [("k", 0)], "by its description"
    some = Labels([Label(0, "wind", "brings a storm"), Label(1, "storm", "a storm, a strong wind"),
                   Label(2, "storm"), Label(3, "gale", "storm storm storm storm")], 4, 0)
    assert ids(some.find("storm")) == [("k", 1), ("k", 3), ("k", 2), ("k", 0)], (
        "4, 4, 3 and 1: each time counts, and of equals the first comes first")
    assert ids(some.find("storm wind")) == [("k", 1), ("k", 0), ("k", 3), ("k", 2)], "any word"


def test_what_has_none_of_the_words_is_not_found():
    for query in ("", "  ", "?!", "volcano", "se", "stormy"):
        assert LABELS.find(query) == [], query


def test_a_group_is_found_by_its_name_after_what_it_describes():
    labels = Labels([Label(0, "sad", "", "mood"), Label(1, "glad"), Label(2, "mood")], 3, 0)
    assert ids(labels.find("mood")) == [("k", 2), ("k", 0)]


def test_words_of_the_group_only_decide_between_equals():
    labels = Labels([Label(0, "sad", "mood mood", "mood"), Label(1, "glad", "mood mood mood"),
                     Label(2, "calm", "mood mood", "")], 3, 0)
    assert ids(labels.find("mood")) == [("k", 1), ("k", 0), ("k", 2)], "3 in the description, 2, 2"


def test_discovered_concepts_are_searched_when_asked_for():
    assert LABELS.find("being") == [] and ids(LABELS.find("being", True)) == [("u", 0)]
    assert ids(LABELS.find("sea", discovered=True)) == [("k", 2), ("k", 0), ("u", 7)]


# ---- naming concepts -----------------------------------------------------------------------------


def test_a_concept_is_meant_by_number_or_by_name():
    found = [LABELS.resolve(query) for query in ("7", "#7", "SEA", " deep sea ")]
    assert found == [(7,), (7,), (0,), (2,)]


@pytest.mark.parametrize("query, message", [
    ("9", "concept 9 does not exist; ids are 0 to 8"), ("-1", "concept -1 does not exist"),
    ("#9", "concept 9 does not exist"), ("9" * 5000, "no concept is called '9+...'"),
    ("happy", "concepts 3, 4 are all called 'happy': give a number"),
    ("strom", "no concept is called 'strom'; close: storm"),
    ("floor", "no concept is called 'floor'; close: Deep Sea"),
    ("xyzzy", "no concept is called 'xyzzy'; numbers do as well"),
    ("Being", "'Being' but discovered concept 0; only known ones can be meant here"),
    ("", "name is missing"), ("7+", "name is missing")])
def test_what_is_no_concept_is_said_with_what_may_be_meant(query, message):
    with pytest.raises(ValueError, match=message):
        LABELS.resolve(query)


def test_five_of_the_close_names_are_given():
    with pytest.raises(ValueError, match="; close: sea 0, sea 1, sea 2, sea 3, sea 4$"):
        known(*(f"sea {i}" for i in range(9))).resolve("sea")


def test_without_labels_a_name_says_where_to_get_them():
    with pytest.raises(ValueError, match="'sea': there are no labels; .*hf download guidelabs/ste"):
        Labels([], 9, 30).resolve("sea")


def test_several_concepts_are_named_by_their_group_or_joined_by_plus():
    assert LABELS.resolve("Topic") == (0, 1, 2), "the name of a group"
    assert LABELS.resolve("storm+7+sea") == (1, 7, 0), "in the order given: the first leads"
    assert LABELS.resolve("storm+topic") == (1, 0, 2), "each once"
    with pytest.raises(ValueError, match="no concept is called 'strom'; close: storm"):
        LABELS.resolve("sea+strom")
    odd = Labels([Label(0, "C++"), Label(1, "mood", "", "x"), Label(2, "sad", "", "mood")], 3, 0)
    assert odd.resolve("C++") == (0,), "a name may have a plus in it"
    assert odd.resolve("mood") == (1,), "a concept's name comes before a group's"


def test_a_number_that_is_a_name_as_well_is_refused():
    labels = known("1", "2", "4", "3")
    assert labels.resolve("4") == (2,), "no concept has that number"
    assert labels.resolve("3") == (3,), "both say the same"
    assert labels.resolve("0") == (0,), "no concept has that name"
    for query in ("1", "4+1"):
        with pytest.raises(ValueError, match="^1 is a number and a name: say '#1' for the concept "
                                             "of that number, '#0' for what has that name$"):
            labels.resolve(query)
    assert labels.resolve("#1") == (1,) and labels.resolve("#0+#1") == (0, 1)


def test_whatever_the_names_a_query_means_what_it_says():
    """Every answer is the concept of that name or that number, and never one of two."""
    for names in itertools.product(("0", "1", "2", "a", "A"), repeat=3):
        labels = known(*names)
        for query in ("0", "1", "2", "a"):
            meant = {i for i, name in enumerate(names) if name.lower() == query}
            meant |= {int(query)} if query != "a" else set()
            try:
                assert {*labels.resolve(query)} == meant and len(meant) == 1
            except ValueError:
                assert len(meant) != 1, (names, query)


# ---- files ---------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    labels = Labels([
        Label(1, "sea, deep", 'called "sea"', "topic"), Label(0, "\u00e9\u4e16", type="tone"),
        Label(14, "being", "two\nlines", "deep", head="unknown")], 5, 15)
    write_labels(labels, tmp_path)
    found = load_labels(tmp_path / "concept_labels.csv", SIZES)
    assert (found.known, found.unknown) == (labels.known, labels.unknown)
    assert (found.n_known, found.n_unknown) == (5, 15)
    text = (tmp_path / "concept_labels.csv").read_text(encoding="utf-8")
    assert text.startswith("concept_id,concept_name,concept_description,head,group_name,"), (
        "the official columns, then one of ours: the type")
    assert '\n19,being,"two\nlines",unknown,deep,\n' in text, "ids count through both heads"


def test_no_file_is_no_labels():
    labels = load_labels(None, SIZES)
    assert labels.known == labels.unknown == {} and labels.name(1) == "concept 1"


def test_the_bundled_model_names_its_concepts():
    labels = load_labels(TINY / "concept_labels.csv", load()[0].config)
    assert sorted(labels.known) == list(range(labels.n_known)) and labels.resolve("sea") == (0,)
    assert len(labels.resolve("topic")) >= 8


def read(tmp_path, content) -> Labels:
    file = tmp_path / "labels.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_labels(file, SIZES)


HEAD = "concept_id,concept_name\n"
HEADS = "concept_id,concept_name,head\n"


@pytest.mark.parametrize("content, message", [
    ("", "lacks the column concept_id"),
    ("concept_id,note\n1,a\n", "lacks the column concept_name; it has: concept_id, note"),
    ("concept_id,concept_name,concept_id\n", "has the column concept_id twice"),
    ("concept_idx,concept_name,concept_idx\n", "has the column concept_id twice"),
    (HEAD + "1,a,b\n", "row 2: 3 fields for 2 columns; the first too many is 'b'"),
    (HEAD + "x,a\n", "row 2: concept_id = 'x' is not a whole number"),
    (HEAD + "1,a\n\n,b\n", "row 4: concept_id = '' is not a whole number"),
    (HEAD + "1_0,a\n", "row 2: concept_id = '1_0' is not"),
    (HEAD + "1.5,a\n", "row 2: concept_id = '1.5' is not"),
    (HEAD + "1e0,a\n", "row 2: concept_id = '1e0' is not"),
    (HEAD + "\u0661,a\n", "row 2: concept_id = '\u0661' is not"),
    (HEAD + "5,a\n", "row 2: concept_id = 5 is outside the head known, whose ids are 0 to 4"),
    (HEAD + "-1,a\n", "row 2: concept_id = -1 is outside"),
    (HEADS + "4,a,unknown\n", "row 2: concept_id = 4 is outside the head unknown, whose ids are 5 "
                              "to 19 in this model"),
    (HEADS + "20,a,discovered\n", "row 2: concept_id = 20 is outside the head unknown"),
    (HEADS + "1,a,known\n1,b,knwon\n", "row 3: head = 'knwon' is neither known nor unknown"),
    (HEAD + "1,a\n2,b\n1.0,c\n", "row 4: concept_id = 1.0 has a label already, in row 2"),
    (HEADS + "6,a,unknown\n6,,discovered\n", "row 3: concept_id = 6 has a label already"),
    (HEAD + '1,"a\n2,b\n', "not CSV"),
    (b"concept_id,concept_name\n1,\xff\n", "not CSV in UTF-8")])
def test_a_label_file_that_is_not_right_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"labels.csv.*{message}") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_row_that_is_not_right_does_not_break_the_line(tmp_path):
    for content in (HEAD + '"1\n\x1b[31m",a\n', HEADS + f"1,a,{'k' * 5000}\n", HEAD + '1,a,"\n"\n',
                    "concept_id," + ",".join(map(str, range(5000)))):
        with pytest.raises(ValueError) as error:
            read(tmp_path, content)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
        assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_names_of_both_heads_are_read(tmp_path):
    labels = read(tmp_path, HEADS + "1,a,Known\n6,b,unknown\n5,c,discovered\n2,d,\n")
    assert [label.name for label in labels.known.values()] == ["a", "d"]
    assert labels.unknown == {1: Label(1, "b", head="unknown"), 0: Label(0, "c", head="unknown")}


def test_blanks_around_a_cell_are_no_part_of_it(tmp_path):
    labels = read(tmp_path, ' concept_id , concept_name, head \n 1.0 , "Deep, Sea ", known \n'
                            " 6, being, unknown \n  ,  ,\n")
    assert labels.known == {1: Label(1, "Deep, Sea")} and labels.name(1, "unknown") == "being"


def test_old_files_and_files_with_more_columns_are_read(tmp_path):
    labels = read(tmp_path, "concept_idx,is_steerable,concept_name,concept_type\n1,yes,a,tone\n")
    assert labels.known == {1: Label(1, "a", type="tone")}
    labels = read(tmp_path, "\ufeffconcept_id,concept_idx,concept_name,note,note\n1,9,a,x,y\n")
    assert labels.known == {1: Label(1, "a")}, "today's column counts, where there are both"


def test_a_concept_without_a_name_goes_by_its_number(tmp_path):
    labels = read(tmp_path, HEAD + "0,sea\n1,\n2\n")
    assert [labels.name(i) for i in range(3)] == ["sea", "concept 1", "concept 2"]


def test_a_damaged_file_is_one_line_or_right(tmp_path):
    """Cut, doubled or changed anywhere, a file is read or refused with its name."""
    rng, file = random.Random(0), tmp_path / "concept_labels.csv"
    write_labels(Labels([*LABELS.known.values()][:5] + [Label(3, "being", head="unknown")], 5, 15),
                 tmp_path)
    whole = file.read_bytes()
    for _ in range(300):
        a, b = sorted(rng.choices(range(len(whole)), k=2))
        file.write_bytes(whole[:a] + rng.choice([b"", whole[a:b] * 2, b'"', b",", b"\n", b"\xff"])
                         + whole[b:])
        try:
            labels = load_labels(file, SIZES)
            assert {*labels.known} <= {*range(5)} and {*labels.unknown} <= {*range(15)}
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)


@pytest.fixture
def parquet(tmp_path):
    """Write columns as concept_labels.parquet: parquet(columns) -> the file."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install -e '.[hub]'")
    from pyarrow.parquet import write_table

    def write(columns):
        names, arrays = zip(*columns.items())
        write_table(pyarrow.table([pyarrow.array(x) for x in arrays],
                                  [name.split("#")[0] for name in names]), file)
        return file
    file = tmp_path / "concept_labels.parquet"
    return write


def test_parquet_is_read_with_pyarrow(parquet):
    file = parquet({
        "concept_id": [1, 0, 8], "concept_name": ["storm", "sea", "being"],
        "concept_description": ["", "wet", None], "head": ["known", "known", "unknown"],
        "public_group_id": [7, 7, None], "group_name": ["topic", "topic", None],
        "is_steerable": [True, True, False]})
    labels = load_labels(file, SIZES)
    assert labels.known == {1: Label(1, "storm", "", "topic"), 0: Label(0, "sea", "wet", "topic")}
    assert labels.unknown == {3: Label(3, "being", head="unknown")}


def test_an_old_parquet_file_is_read(parquet):
    labels = load_labels(parquet({"concept_idx": [1.0], "note": ["x"], " concept_name": [" a "]}),
                         SIZES)
    assert labels.known == {1: Label(1, "a")}


@pytest.mark.parametrize("columns, message", [
    ({"concept_id": [1.0, 1.5], "concept_name": ["a", "b"]}, "row 2: concept_id = '1.5' is not"),
    ({"concept_id": [1, None], "concept_name": ["a", "b"]}, "row 2: concept_id = '' is not"),
    ({"concept_id": [1, 1], "concept_name": ["a", "b"]}, "row 2: .* already, in row 1"),
    ({"concept_id": [1], "concept_name": ["a"], "concept_name#2": ["b"]}, "concept_name twice"),
    ({"concept_id": [1], "note": ["a"]}, "lacks the column concept_name; it has: concept_id, note"),
])
def test_a_parquet_file_that_is_not_right_is_named(parquet, columns, message):
    with pytest.raises(ValueError, match=f"concept_labels.parquet.*{message}"):
        load_labels(parquet(columns), SIZES)


def test_a_damaged_parquet_file_is_named(parquet):
    file = parquet({"concept_id": [1], "concept_name": ["a"]})
    whole = file.read_bytes()
    for content in (b"", b"PAR1 nothing", whole[:-20], whole[:40] + b"\0" * 40 + whole[80:]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="concept_labels.parquet is not a parquet file") as e:
            load_labels(file, SIZES)
        assert str(file) in str(e.value)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install -e '\.\[hub\]'"):
        load_labels(tmp_path / "concept_labels.parquet", SIZES)
