"""The three README pages keep their word: files, lengths, commands and numbers are true."""

import io
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout

import pytest
from lines import CORE, ROOT, SHELVES, lines_of_code

from steerling_min.course.exercises import EXERCISES, MODIFICATIONS
from steerling_min.files.loading import find_checkpoint
from steerling_min.training.evaluate import MEASURES
from steerling_min.training.objective import PARTS

PAGES = {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in
         ("README.md", "tests/README.md", "steerling_min/training/README.md")}
README = "\n".join(PAGES.values())
COMMANDS = sorted({line.split("  #")[0].strip() for line in README.splitlines()
                   if re.match(r"    (python|torchrun|pip|echo) ", line)}
                  | set(re.findall(r"`((?:python|torchrun) [^`]+)`", README)))


def rows(heading):
    """The cells of the README's tables whose first row begins with the heading."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table[1].splitlines()]


def near(said, file):
    """Roughly: whoever solves an exercise has other lines."""
    return abs(int(said) - lines_of_code(file)) <= 8


def test_the_core_is_in_the_reading_order_with_its_lines_of_code():
    listed = {ROOT / name.strip("`"): said for name, said, _ in rows("file")}
    assert set(listed) == set(CORE), "a row for each file of the core"
    for file, said in listed.items():
        assert near(said, file), f"the table says {said}; see python tests/lines.py"


def test_every_other_file_stands_on_a_shelf():
    for names, said, about in rows("shelf"):
        paths = [ROOT / name for name in re.findall(r"`([^`]+)`", names)]
        for path, n in zip(paths, said.split(", ")):
            if path.is_file():
                assert near(n, path), f"the table says {n}; see python tests/lines.py"
            elif path.name != "tests":
                files = [file for file in SHELVES if file.parent == path]
                total = sum(map(lines_of_code, files))
                assert abs(int(n) - total) <= 15, f"the table says {n}; {path.name} has {total}"
                missing = {file.stem for file in files if "__" not in file.stem} - set(
                    re.findall(r"`(\w+)`", about))
                assert path.name == "course" or not missing, f"{path.name}/ has {missing}, too"


def test_every_path_it_names_exists():
    for path in re.findall(r"`((?:steerling_min|tests)/[\w./]+|\w+\.(?:py|svg|ipynb))`", README):
        assert "X.py" in path or (ROOT / path).exists() or any(ROOT.glob(f"*/**/{path}")), path


def test_every_function_it_names_exists():
    modules = {file.stem: file.read_text("utf-8") for file in [*CORE, *SHELVES]}
    for module, name in re.findall(r"`(\w+)\.(\w+)`", README):
        if module in modules and name not in ("py", "json", "safetensors"):
            assert re.search(rf"(def|class) {name}\b", modules[module]), f"{module}.{name}"


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
        if "steerling_min.course" in words[:-2] and "grade" not in words and "list" not in words:
            names = words[5:] if "handout" in words else words[4:]
            assert names and all(name in {**EXERCISES, **MODIFICATIONS} for name in names), command


def test_its_links_lead_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
            link = "".join(link)
            assert link.startswith("https://") or (page.parent / link).is_file(), link


def test_its_download_is_the_one_that_the_program_asks_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # then no cache is looked at
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint("guidelabs/steerling-8b")
    command = str(error.value).split("to download it: ")[1]
    assert f"\n    {command}\n" in PAGES[ROOT / "README.md"]


def test_the_first_page_is_read_at_one_sitting():
    n = len(PAGES[ROOT / "README.md"].split())
    assert n <= 1800, f"{n} words: what belongs on the page of the tests, or of the training?"


def test_its_table_has_every_measure_its_target_and_the_8bs_value():
    said = {name: (target, paper) for name, target, paper, *_ in rows("measure")}
    assert said == {name: (target, paper) for name, (_, target, paper) in MEASURES.items()}


def test_its_ablations_leave_out_parts_that_exist():
    head = re.search(r"^\| measure \| base \|(.*)\|$", README, re.M)[1]
    assert {part.strip() for part in head.split("|")} <= set(PARTS), "see objective.PARTS"


def test_its_counts_are_right():
    assert f"# {len(EXERCISES)} exercises, {len(MODIFICATIONS)} modifications" in README
    mistakes = json.loads((ROOT / "tests" / "mistakes.json").read_text(encoding="utf-8"))
    assert f"| {sum(map(len, mistakes.values()))}, most of them" in README


def test_its_sessions_have_the_minutes_of_their_exercises():
    sessions = rows("session")
    assert len(sessions) == 4
    for _, _, names, minutes, homework in sessions:
        assert sum(EXERCISES[name].minutes for name in names.split(", ")) == int(minutes), names
        assert homework in MODIFICATIONS
