"""What concepts are called: reading a label file, and searching it.

Concepts of both heads may have labels. Known concepts were named before training. Discovered
concepts (the unknown head's) may have been named afterwards. A discovered concept without a label
goes by tokens that it raises or lowers (`views/explain.py`).

The official file is `concept_labels.parquet`. The tiny model has a CSV file with the same columns;
that is read as well. A file numbers the concepts of both heads in one sequence: discovered concept
j has the id n_known + j. In this code each head counts from 0.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..config import Config, require_concept
from .cli import printable
from .writing import replacing

LABELS = "concept_labels"            # .csv or .parquet
LABELS_REPO = "guidelabs/steerling"  # on the hub: the labels of Guide Labs' models, no weights
DOWNLOAD_LABELS = f"hf download {LABELS_REPO} {LABELS}.parquet"
GET_LABELS = (f"the 8B's come with: {DOWNLOAD_LABELS} (and --local-dir FOLDER, where the model is "
              "a folder of yours); others with --labels FILE")
COLUMNS = ("concept_id", "concept_name", "concept_description", "head", "group_name",
           "concept_type")
OTHER_NAMES = {"concept_idx": "concept_id", "name": "concept_name",  # in older files, in lists of
               "description": "concept_description"}                 # a data set's concepts
HEADS = {"known": "known", "unknown": "unknown", "discovered": "unknown", "": "known"}


class Label(NamedTuple):
    id: int                # within its head, from 0
    name: str
    description: str = ""
    group: str = ""        # concepts that belong together, such as all moods
    type: str = ""         # content, entity, tone or document, as in the data set FineWeb Atlas
    head: str = "known"    # or "unknown", which is called "discovered" wherever people read it


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


class Labels:
    """The names of a model's concepts, of both heads."""

    def __init__(self, labels: Iterable[Label], n_known: int, n_unknown: int):
        self.n_known, self.n_unknown = n_known, n_unknown
        self.known: dict[int, Label] = {}
        self.unknown: dict[int, Label] = {}
        for label in labels:
            getattr(self, label.head)[label.id] = label

    def label(self, concept: int, head: str = "known") -> Label:
        """A concept's label; one that has none is called "concept 12" or "discovered 12"."""
        kind = "concept" if head == "known" else "discovered"
        return getattr(self, head).get(concept) or Label(concept, f"{kind} {concept}", head=head)

    def name(self, concept: int, head: str = "known") -> str:
        return self.label(concept, head).name

    def all_known(self) -> list[Label]:
        """A label for each known concept; none at all if no known concept has a name."""
        return [self.label(concept) for concept in range(self.n_known)] if self.known else []

    def find(self, query: str, discovered: bool = False) -> list[Label]:
        """Search the labels for words of the query; the best hits come first.

        Only known concepts are searched, unless `discovered` is true. As in the official search, a
        word scores 3 each time it stands in the name and 1 each time it stands in the description.
        Between equal scores, words in the name of the group decide.
        """
        wanted, found = set(words_of(query)), []
        for label in [*self.known.values(), *(self.unknown.values() if discovered else ())]:
            name, text, group = (sum(word in wanted for word in words_of(part)) for part in
                                 (label.name, label.description, label.group))
            if name or text or group:
                found.append(((3 * name + text, group), label))
        return [label for _, label in sorted(found, key=lambda hit: hit[0], reverse=True)]

    def resolve(self, query: str) -> tuple[int, ...]:
        """Find the known concepts that a query means, as ids.

        A query is a concept's name, a group's name, a number, or several of these joined by "+".
        Upper and lower case are the same. If a concept and a group share a name, the concept is
        meant. "#12" is always the number 12.

        Raises ValueError for a number out of range, for a number that is also the name of other
        concepts, for a name that two concepts share, and for a name that none has. The last message
        lists the closest names.
        """
        query = query.strip()
        number = re.fullmatch("(#?)(-?[0-9]{1,18})", query)
        named = () if number and number[1] else self.named(query)
        if number:
            concept = int(number[2])
            if not named:
                require_concept("known", concept, self.n_known)
                return (concept,)
            if 0 <= concept < self.n_known and named != (concept,):
                raise ValueError(
                    f"{query} is a number and a name: say '#{concept}' for the concept of that "
                    f"number, '{'+'.join(f'#{c}' for c in named[:9])}' for what has that name")
        if named:
            return named
        if "+" in query:
            parts = [self.resolve(part) for part in query.split("+")]
            return tuple(dict.fromkeys(concept for part in parts for concept in part))
        if not query:
            raise ValueError("a concept's name is missing")
        raise ValueError(f"no concept is called '{printable(query)}'{self.hint(query)}")

    def named(self, name: str) -> tuple[int, ...]:
        """The known concept of that name, else those of the group of that name, else none."""
        wanted, labels = name.casefold(), self.known.values()
        same = tuple(x.id for x in labels if x.name.casefold() == wanted)
        if len(same) > 1:
            raise ValueError(f"concepts {', '.join(map(str, same))} are all called "
                             f"'{printable(name)}': give a number")
        return same or tuple(x.id for x in labels if x.group and x.group.casefold() == wanted)

    def hint(self, query: str) -> str:
        """What may have been meant by a name that no known concept has."""
        if not self.known:
            return f": there are no labels; {GET_LABELS}"
        wanted = query.casefold()
        for label in self.unknown.values():
            if label.name.casefold() == wanted:
                return f" but discovered concept {label.id}; only known ones can be meant here"
        names = {x.name.casefold(): x.name for x in self.known.values()}
        close = [x.name for x in self.find(query)]
        close += [names[name] for name in difflib.get_close_matches(wanted, names)]
        hint = ", ".join(map(printable, list(dict.fromkeys(close))[:5]))
        return f"; close: {hint}" if hint else "; numbers do as well"


def load_labels(file: Path | None, config: Config) -> Labels:
    """Read the label file of a model; without a file no concept has a label.

    Raises OSError, ValueError or ImportError, in one line that names the file, the row and what is
    wrong there.
    """
    labels = []
    seen: dict[tuple[str, int], int] = {}  # (head, id) -> row
    for number, row in read_rows(file) if file else ():
        try:
            label = read_label(row, config)
            if (label.head, label.id) in seen:
                raise ValueError(f"concept_id = {row['concept_id']} has a label already, in row "
                                 f"{seen[label.head, label.id]}")
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}") from None
        seen[label.head, label.id] = number
        if label.name:
            labels.append(label)
    return Labels(labels, config.n_concepts, config.n_unknown_concepts)


def read_label(row: dict[str, str], config: Config) -> Label:
    """A row of a label file as a Label; ValueError says what is wrong with it."""
    written, head = row["concept_id"], HEADS.get(row.get("head", "").casefold())
    if head is None:
        raise ValueError(f"head = '{printable(row['head'])}' is neither known nor unknown")
    if not re.fullmatch(r"-?[0-9]+(\.0+)?", written):
        raise ValueError(f"concept_id = '{printable(written)}' is not a whole number")
    n = config.n_concepts
    first, last = (0, n - 1) if head == "known" else (n, n + config.n_unknown_concepts - 1)
    concept = int(written.split(".")[0])
    if not first <= concept <= last:
        raise ValueError(f"concept_id = {printable(written)} is outside the head {head}, whose ids "
                         f"are {first} to {last} in this model")
    return Label(concept - first, row["concept_name"], row.get("concept_description", ""),
                 row.get("group_name", ""), row.get("concept_type", ""), head)


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a label file, and their numbers. Blanks around a cell are no part of it."""
    parquet = file.suffix.lower() == ".parquet"
    columns, rows = read_parquet(file) if parquet else read_csv(file)
    for number, cells in enumerate(rows, start=1 if parquet else 2):  # row 1 of CSV: the columns
        if len(cells) > len(columns):
            raise ValueError(f"{file}, row {number}: {len(cells)} fields for {len(columns)} "
                             f"columns; the first too many is '{printable(cells[len(columns)])}'")
        cells = ["" if cell is None else str(cell).strip() for cell in cells]
        if any(cells):
            yield number, {**dict.fromkeys(columns, ""), **dict(zip(columns, cells))}


def columns_of(file: Path, written: list[str]) -> list[str]:
    """Replace older column names by today's. ValueError when a column is missing or comes twice."""
    columns = [name.strip() for name in written]
    for other, today in OTHER_NAMES.items():
        if today not in columns:
            columns = [today if name == other else name for name in columns]
    for name in COLUMNS:
        if columns.count(name) > 1:
            raise ValueError(f"{file} has the column {name} twice")
        if name in ("concept_id", "concept_name") and name not in columns:
            raise ValueError(f"{file} lacks the column {name}; it has: "
                             f"{printable(', '.join(columns), 200)}")
    return columns


def read_csv(file: Path) -> tuple[list[str], list]:
    """The columns' names and the rows of a CSV file."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            first, *rows = list(csv.reader(lines, strict=True, skipinitialspace=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not CSV in UTF-8: {error}") from None
    return columns_of(file, first), rows


def read_parquet(file: Path) -> tuple[list[str], list]:
    """The same of a parquet file, without the columns that have no use here."""
    with open_parquet(file) as stored:
        written = stored.schema_arrow.names
        used = {old: new for old, new in zip(written, columns_of(file, written)) if new in COLUMNS}
        columns = stored.read(list(used)).columns
    return list(used.values()), list(zip(*(column.to_pylist() for column in columns)))


@contextmanager
def open_parquet(file: Path) -> Iterator:
    """Open a file as a pyarrow.parquet.ParquetFile that reads one megabyte at a time.

    By default pyarrow would read a whole row group. Raises ImportError without pyarrow, and
    ValueError when the file is not a parquet file; both messages are one line.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"reading {file} needs pyarrow: pip install -e '.[hub]'") from None
    with file.open("rb") as data:
        try:
            yield parquet.ParquetFile(data, pre_buffer=False, buffer_size=2**20)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a parquet file: {error}") from None


def write_labels(labels: Labels, folder: Path) -> None:
    """Write a label file beside a checkpoint, as CSV."""
    file = folder / (LABELS + ".csv")
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(COLUMNS)
        for first, head in ((0, labels.known), (labels.n_known, labels.unknown)):
            rows.writerows([first + x.id, x.name, x.description, x.head, x.group, x.type]
                           for x in head.values())
