"""An exercise's function in the text of its file: found by name, cut out, exchanged, blanked."""

import ast
import os
from pathlib import Path

from .exercises import Exercise


def file_of(exercise: Exercise, root: Path) -> Path:
    return root / "steerling_min" / exercise.where.split()[0]


def read(file: Path) -> str:
    """A file's text; bytes that are no UTF-8 survive being written again."""
    return file.read_text(encoding="utf-8-sig", errors="surrogateescape")


def write(file: Path, text: str) -> None:
    """Write all of the text, or nothing. Make the file's folder if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(partial, file)


def find(exercise: Exercise, text: str) -> ast.FunctionDef:
    """Find the function in its file's text. Of several with its name the last counts, as in Python.

    Raises ValueError when there is none, and SyntaxError when the text is not valid Python.
    """
    file, function = exercise.where.split()
    found: list = [ast.parse(text, file)]
    for name in function.split("."):
        found = [x for x in found[-1].body if getattr(x, "name", None) == name]
        if not found:
            raise ValueError(f"{file} has no {function}")
    return found[-1]


def lines_of(node: ast.FunctionDef) -> slice:
    """Which lines of the file hold the function, decorators included."""
    return slice(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno)


def cut(exercise: Exercise, text: str) -> str:
    """The function, out of its file's text."""
    return "".join(text.splitlines(keepends=True)[lines_of(find(exercise, text))])


def exchanged(exercise: Exercise, text: str, new: str) -> str:
    """The file's text with `new` in the place of the function."""
    lines = text.splitlines(keepends=True)
    lines[lines_of(find(exercise, text))] = [new]
    return "".join(lines)


def hole(exercise: Exercise) -> str:
    """The line that stands for what is to be written."""
    return f'raise NotImplementedError("exercise: {exercise.name}")'


def blanked(exercise: Exercise, text: str) -> str:
    """The file's text with the function's body gone, except for its docstring."""
    node, lines = find(exercise, text), text.splitlines(keepends=True)
    docstring = node.body[0]
    margin = " " * docstring.col_offset
    lines[docstring.end_lineno:node.end_lineno] = [margin + hole(exercise) + "\n"]
    return "".join(lines)
