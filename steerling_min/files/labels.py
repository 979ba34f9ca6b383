"""What the known concepts are called: the label file beside a checkpoint, and searching it.

The official file is `concept_labels.parquet`; its columns (`concept_id`, `concept_name`,
`concept_description`, `head`, `group_name`, ...) are read from CSV as well, which is what the tiny
model has. Concepts of the unknown head have no names.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import require_concept
from .writing import replacing

LABELS = "concept_labels"  # .csv or .parquet, beside a checkpoint
COLUMNS = ("concept_id", "concept_name", "concept_description", "head", "group_name",
           "concept_type")


class Label(NamedTuple):
    id: int
    name: str
    description: str = ""
    group: str = ""  # concepts that belong together, such as all moods
    type: str = ""   # content, entity, tone or document, as in the data set FineWeb Atlas
    head: str = "known"


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


class Labels:
    """The names of a model's known concepts; a concept without a label goes by its number."""

    def __init__(self, labels: Iterable[Label], n_concepts: int):
        self.known, self.unknown = {}, {}
        for label in labels:
            getattr(self, label.head)[label.id] = label
        self.by_id = self.known
        self.n_concepts = n_concepts

    def name(self, concept: int, head: str = "known") -> str:
        """A concept's name, or "concept 123" ("discovered 123") where it has none."""
        if concept in getattr(self, head):
            return getattr(self, head)[concept].name
        return f"{'concept' if head == 'known' else 'discovered'} {concept}"

    def find(self, query: str) -> list[Label]:
        """Labels with every word of the query in name or description, those by name first."""
        wanted = words_of(query)
        by_name = [x for x in self.by_id.values() if wanted and wanted <= words_of(x.name)]
        by_text = [x for x in self.by_id.values() if wanted and x not in by_name
                   and wanted <= words_of(f"{x.name} {x.description}")]
        return by_name + by_text

    def resolve(self, query: str) -> tuple[int, ...]:
        """The ids that a query names: a number, a name or a group's name (in any case), or several
        of these joined by "+". A name comes before a group.

        Raises ValueError for a number out of range, a name that two concepts share, or a name that
        none has: with the closest ones.
        """
        query = query.strip()
        wanted = query.casefold()
        if re.fullmatch(r"-?\d+", query):
            require_concept("known", int(query), self.n_concepts)
            return (int(query),)
        same = tuple(x.id for x in self.by_id.values() if x.name.casefold() == wanted)
        if len(same) > 1:
            raise ValueError(f"concepts {', '.join(map(str, same))} are all called {query!r}: "
                             "give a number")
        group = tuple(x.id for x in self.by_id.values() if x.group and x.group.casefold() == wanted)
        if same or group:
            return same or group
        if "+" in query:
            parts = [self.resolve(part) for part in query.split("+")]
            return tuple(dict.fromkeys(concept for part in parts for concept in part))
        if not query:
            raise ValueError("a concept's name is missing")
        names = {x.name.casefold(): x.name for x in self.by_id.values()}
        close = [x.name for x in self.find(query)]
        close += [names[n] for n in difflib.get_close_matches(wanted, names, 5)]
        hint = ", ".join(list(dict.fromkeys(close))[:5])
        raise ValueError(f"no concept is called {query!r}" + (
            f"; close: {hint}" if hint else "; numbers do as well"))


def load_labels(file: Path, n_concepts: int) -> Labels:
    """Read a label file; n_concepts is the model's number of known concepts.

    Raises OSError, ValueError or ImportError, in one line that names the file and what is wrong.
    """
    rows = read_parquet(file) if file.suffix == ".parquet" else read_csv(file)
    labels, seen = [], set()
    for number, row in enumerate(rows, start=2):  # line 1 has the columns' names
        if (row.get("head") or "known").casefold() != "known" or not row["concept_name"]:
            continue  # without a name a concept goes by its number
        try:
            concept = int(row["concept_id"])
        except (TypeError, ValueError):
            raise ValueError(f"{file}, row {number}: concept_id = {row['concept_id']!r} is not a "
                             "number") from None
        if not 0 <= concept < n_concepts:
            raise ValueError(f"{file}, row {number}: concept {concept} does not exist; this model "
                             f"has {n_concepts}, 0 to {n_concepts - 1}")
        if concept in seen:
            raise ValueError(f"{file}, row {number}: concept {concept} has a label already")
        seen.add(concept)
        labels.append(Label(concept, str(row["concept_name"]),
                            str(row.get("concept_description") or ""),
                            str(row.get("group_name") or ""), str(row.get("concept_type") or "")))
    return Labels(labels, n_concepts)


def labels_beside(folder: Path, n_concepts: int) -> Labels:
    """The labels that lie beside a checkpoint; none where it has no such file."""
    for suffix in (".csv", ".parquet"):
        file = folder / (LABELS + suffix)
        if file.is_file():
            return load_labels(file, n_concepts)
    return Labels([], n_concepts)


def require_columns(file: Path, columns: Sequence[str]) -> None:
    for column in ("concept_id", "concept_name"):
        if column not in columns:
            raise ValueError(f"{file} lacks the column {column}; it has: {', '.join(columns)}")


def read_csv(file: Path) -> list[dict]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, strict=True)
            require_columns(file, rows.fieldnames or [])
            return list(rows)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not CSV in UTF-8: {error}") from None


def read_parquet(file: Path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ImportError(f"reading {file} needs pyarrow: pip install -e '.[hub]'") from None
    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from None
    require_columns(file, table.column_names)
    return table.select([c for c in COLUMNS if c in table.column_names]).to_pylist()


def write_labels(labels: Iterable[Label], folder: Path) -> None:
    """Write a label file beside a checkpoint, as CSV."""
    file = folder / (LABELS + ".csv")
    with replacing(file) as partial, partial.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(COLUMNS)
        rows.writerows([x.id, x.name, x.description, "known", x.group, x.type]
                       for x in labels)
