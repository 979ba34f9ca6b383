"""The notebook: what it shows was computed, by this code; what it names exists."""

import json
import re
from pathlib import Path

import pytest

from steerling_min.course.exercises import MODIFICATIONS, TABLES

EXERCISES = {exercise["name"] for exercise in TABLES["exercises"]}  # a handout has a few of them
ROOT = Path(__file__).parent.parent
FILE = ROOT / "walkthrough.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "".join(f"\n{''.join(cell['source'])}\n" for cell in CELLS
                if cell["cell_type"] == "markdown")
SECTIONS = re.split(r"^## ", PROSE, flags=re.M)[1:]
REFRESH = ("jupyter nbconvert --to notebook --execute --inplace walkthrough.ipynb "
           "--ExecutePreprocessor.record_timing=False")


def printed(cell):
    """What a cell printed."""
    return "".join("".join(out.get("text", "")) for out in cell["outputs"])


def test_every_cell_fits_on_a_slide():
    for cell in CODE:
        lines = "".join(cell["source"]).splitlines()
        assert len(lines) <= 15, lines[0]


def test_it_was_run_from_top_to_bottom_without_an_error():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [out for cell in CODE for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data"}
    assert all(out.get("name") != "stderr" for out in outputs), "a warning is no part of a lesson"
    assert 9 <= sum("image/png" in out.get("data", {}) for out in outputs) <= 10


def test_it_is_small_and_names_no_folder_of_the_machine_it_ran_on():
    assert FILE.stat().st_size < 1_000_000
    for cell in CODE:
        assert not re.search(r"(?<![\w.<])/\w[\w.-]*/|\b[A-Z]:\\", printed(cell))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])
def test_every_section_has_something_to_try_and_exercises_that_exist(section):
    assert "**Try it.**" in section
    (line,) = re.findall(r"\*\*Exercises?:\*\*(.*?)`python -m", section, re.S)
    assert set(re.findall(r"`([a-z-]+)`", line)) <= EXERCISES
    for command, name in re.findall(r"steerling_min\.course (\w+) ([\w-]+)", section):
        assert name in (MODIFICATIONS if command == "show" else EXERCISES)


@pytest.mark.slow
def test_it_still_prints_what_it_shows(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    pytest.importorskip("matplotlib", reason="pip install -e '.[notebook]'")
    monkeypatch.delenv("STEERLING_8B", raising=False)
    notebook = nbformat.read(FILE, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(ROOT)}}).execute()
    checked = 0
    for old, new in zip(CELLS, notebook.cells):
        if "check" in old["metadata"].get("tags", []):
            assert printed(new) == printed(old), f"stale outputs are committed; refresh: {REFRESH}"
            checked += 1
    assert checked >= 8
