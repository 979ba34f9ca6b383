"""The house: the core is small, flat, and imports nothing that stands above it."""

import ast

import pytest
from lines import CORE, ROOT, SCRIPTS, SHELVES, lines_of_code

NAMES = {file.stem for file in CORE}
# Two methods hand files on to the shelf that reads and writes them.
HANDED_ON = {"from_pretrained", "save_pretrained"}


def imports_of(file):
    """The modules of this package that a file imports, but for those in HANDED_ON."""
    waiting = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if getattr(node, "name", "") in HANDED_ON:
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module.split(".")[0]] if node.module else [x.name for x in node.names]
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.name)
def test_the_core_imports_only_the_core(file):
    above = [name for name in imports_of(file) if name not in NAMES]
    assert not above, (
        f"{file.name} imports {above[0]}, which is no file of the core. Viewers, trainer, files "
        "and course import the core, never the reverse: so the model can be read alone")


@pytest.mark.parametrize("file", CORE, ids=lambda file: file.name)
def test_a_file_of_the_core_is_read_in_one_sitting(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250, f"{file.name} is too long: what in it is another idea?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            n = node.end_lineno - node.lineno + 1
            assert n <= 60, f"{file.name}: {node.name} has {n} lines; name its parts"


def test_the_whole_stays_small():
    core = sum(map(lines_of_code, CORE))
    everything = core + sum(map(lines_of_code, [*SHELVES, *SCRIPTS]))
    assert len(CORE) <= 15 and core <= 950, f"the core: {len(CORE)} files, {core} lines of code"
    assert everything <= 3900, f"{everything} lines of code: a feature pays for its lines"


def test_no_two_modules_have_one_name():
    names = [file.name for file in [*CORE, *SHELVES, *SCRIPTS] if file.name != "__init__.py"]
    assert len(names) == len(set(names)), "tests/test_X.py is for X.py, in whatever folder"


def test_every_folder_is_installed():
    folders = {f"steerling_min.{file.parent.name}" for file in SHELVES}
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{folder}"' in listed for folder in folders), "packages in pyproject.toml"
