"""The README keeps its word: its files, lengths, commands and numbers are the repository's own."""

import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from steerling_min.course.exercises import EXERCISES, MODIFICATIONS
from steerling_min.training.evaluate import MEASURES
from steerling_min.training.objective import PARTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({line.split("  #")[0].strip() for line in README.splitlines()
                   if re.match(r"    (python|torchrun|pip|echo) ", line)}
                  | set(re.findall(r"`((?:python|torchrun) [^`]+)`", README)))


def rows(heading):
    """The cells of the README's tables whose first row begins with the heading."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table[1].splitlines()]


def test_every_file_is_in_the_reading_order_with_its_length():
    listed = {}
    for files, lines, _ in rows("file"):
        for file, n in zip(re.findall(r"`([^`]+)`", files), lines.split(", ")):
            listed[file] = int(n)
    expected = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines())
                for file in [*ROOT.glob("steerling_min/*.py"), ROOT / "train_tiny.py",
                             ROOT / "sample.py"] if file.name != "__init__.py"}
    assert listed.keys() == expected.keys(), "a row of the table names its files"
    for file, n in expected.items():  # roughly: whoever solves an exercise has other lines
        assert abs(listed[file] - n) <= 10, f"the table says {listed[file]}; {file} has {n} lines"


def test_every_path_it_names_exists():
    for path in re.findall(r"`((?:steerling_min|tests)/[\w./]+|\w+\.(?:py|svg|ipynb))`", README):
        places = [ROOT / path, ROOT / "steerling_min" / path, ROOT / "tests" / path]
        assert "X.py" in path or any(place.exists() for place in places), path


def test_every_function_it_names_exists():
    code = "\n".join(file.read_text("utf-8") for file in ROOT.glob("steerling_min/*.py"))
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        is_file_name = name in ("py", "json", "safetensors")
        if (ROOT / "steerling_min" / f"{module}.py").is_file() and not is_file_name:
            assert re.search(rf"(def|class) {name}\b", code), f"{module}.{name}"


@pytest.fixture(scope="module")
def helps():
    """What --help prints, by script."""
    found = {}
    for script in ("sample.py", "train_tiny.py", "tests/bench.py"):
        with (pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out,
              pytest.raises(SystemExit)):
            patch.setattr(sys, "argv", [script, "--help"])
            runpy.run_path(str(ROOT / script), run_name="__main__")
        found[script] = out.getvalue()
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_exists(command, helps):
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part)
        script = next((word for word in words if word in helps), None)
        if script:
            for word in words[words.index(script):]:
                if word.startswith("--"):
                    assert re.search(rf"(^|[\s,\[]){word}\b", helps[script]), f"{script} {word}"
        if "steerling_min.course" in words and len(words) > 3:
            assert words[-1] in {**EXERCISES, **MODIFICATIONS}, command


def test_its_links_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.+)$", README, re.M)}
    for link in re.findall(r"\]\(#([^)]+)\)", README):
        assert link in anchors, link
    for file in re.findall(r'src="([^"]+)"', README):
        assert (ROOT / file).is_file()


def test_its_table_has_every_measure_and_its_target():
    assert {name: target for name, target, *_ in rows("measure")} == MEASURES


def test_its_ablations_leave_out_parts_that_exist():
    head = re.search(r"^\| measure \| base \|(.*)\|$", README, re.M)[1]
    assert {part.strip() for part in head.split("|")} <= set(PARTS), "see objective.PARTS"


def test_its_counts_are_right():
    assert f"# {len(EXERCISES)} exercises, {len(MODIFICATIONS)} modifications" in README
