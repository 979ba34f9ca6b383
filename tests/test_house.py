"""The house: the core is small, flat, and imports nothing that stands above it."""

import ast
import subprocess
import sys

import pytest
from lines import CORE, ROOT, SCRIPTS, SHELVES, lines_of_code

import steerling_min

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
    assert everything <= 4460, f"{everything} lines of code: a feature pays for its lines"


def test_no_two_modules_have_one_name():
    names = [file.name for file in [*CORE, *SHELVES, *SCRIPTS] if file.name != "__init__.py"]
    assert len(names) == len(set(names)), "tests/test_X.py is for X.py, in whatever folder"


def test_every_folder_is_installed():
    folders = {f"steerling_min.{file.parent.name}" for file in SHELVES}
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{folder}"' in listed for folder in folders), "packages in pyproject.toml"


# ---- what `from steerling_min import ...` offers -------------------------------------------------


def test_the_package_imports_nothing_before_a_name_is_used():
    """So the course starts when a file of the core does not."""
    code = "import sys, steerling_min; print([name for name in sys.modules if name.startswith(" \
           "('torch', 'steerling_min'))])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "['steerling_min']", run.stdout + run.stderr


def test_its_public_names_are_those_that_editors_see():
    tree = ast.parse((ROOT / "steerling_min" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == steerling_min._HOMES and sorted(seen) == sorted(steerling_min.__all__)
    for name, module in seen.items():
        public = getattr(steerling_min, name)
        assert public.__module__ == f"steerling_min.{module}" and public.__name__ == name


def test_they_are_completed_imported_and_missed_as_usual():
    assert set(steerling_min.__all__) <= set(dir(steerling_min))
    names = {}
    exec("from steerling_min import *", names)
    assert set(steerling_min.__all__) <= set(names)
    with pytest.raises(AttributeError, match="module 'steerling_min' has no attribute 'lod'"):
        steerling_min.lod  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'lod'"):
        exec("from steerling_min import lod")


@pytest.mark.parametrize("file", [x for x in SHELVES if x.parent.name == "course"
                                  or x.name == "cli.py"], ids=lambda file: file.name)
def test_the_course_imports_only_itself_and_how_commands_end(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(x.name.split(".")[0] in sys.stdlib_module_names for x in node.names)
        if isinstance(node, ast.ImportFrom):
            own = node.level == 1 and (node.module or node.names[0].name) in (
                "exercises", "functions", "classroom")
            ends = node.level == 2 and node.module == "files.cli" or node.module == "safetensors"
            assert own or ends or node.module.split(".")[0] in sys.stdlib_module_names, (
                f"{file.name} imports {node.module}: it must start when an attempt does not")
