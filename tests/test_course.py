"""The course: every exercise can be taken out, checked and put back, and nothing is lost."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steerling_min.course import __main__ as course
from steerling_min.course.__main__ import EXERCISES, MODIFICATIONS, blank, find

TESTS = Path(__file__).parent


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the package, committed, that the course works on."""
    shutil.copytree(course.ROOT / "steerling_min", tmp_path / "steerling_min",
                    ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    (tmp_path / "tests").mkdir()
    (tmp_path / ".gitignore").write_text(".course/\n")
    for command in ("init", "add .", "-c user.name=a -c user.email=b commit -m c"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "KEPT", tmp_path / ".course")
    return tmp_path


@pytest.fixture
def run(root, monkeypatch, capsys):
    """run("start", "mask") -> exit code, output and error."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["course", *args])
        code = 0
        try:
            course.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_an_exercise_keeps_signature_and_docstring_and_loses_the_rest(exercise):
    text = course.file_of(exercise).read_text(encoding="utf-8")
    whole = find(exercise, text)
    left = ast.parse("class C:\n" + blank(exercise, text) if whole.col_offset else
                     blank(exercise, text)).body[0]
    left = left.body[0] if isinstance(left, ast.ClassDef) else left
    assert ast.unparse(left.args) == ast.unparse(whole.args) and left.name == whole.name
    assert ast.get_docstring(left) == ast.get_docstring(whole), "from which it is to be rebuilt"
    assert len(left.body) == 2 and isinstance(left.body[1], ast.Raise)
    assert len(whole.body) > 1, "something is left to write"
    assert (TESTS.parent / "steerling_min" / exercise.where.split()[0]).is_file()


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_the_check_of_an_exercise_names_tests_that_exist(exercise):
    files = [x for x in shlex.split(exercise.tests) if x.startswith("tests/")]
    names = [name for file in files
             for name in re.findall(r"def (test_\w+)", (TESTS.parent / file).read_text("utf-8"))]
    assert names
    if "-k" in exercise.tests:
        for word in re.sub(r".*-k '(.*)'", r"\1", exercise.tests).split(" or "):
            assert any(word in name for name in names), f"no test of {files} has {word} in its name"


@pytest.mark.parametrize("modification", MODIFICATIONS.values(), ids=MODIFICATIONS)
def test_the_tests_that_a_modification_changes_exist(modification):
    for test in modification.changes:
        file, name = test.split("::")
        assert f"def {name}(" in (TESTS / file).read_text("utf-8"), test
    for file in re.findall(r"test_\w+\.py", modification.keeps):
        assert (TESTS / file).is_file()


def test_a_function_is_taken_out_and_put_back_to_the_byte(run, root):
    file = root / "steerling_min" / "attention.py"
    before = file.read_bytes()
    code, out, _ = run("start", "attention")
    assert code == 0 and "check attention" in out and "steerling_min/attention.py" in out
    text = file.read_text(encoding="utf-8")
    assert 'raise NotImplementedError("exercise: attention")' in text
    assert "out = F.scaled_dot_product_attention" not in text and "def rotate" in text
    file.write_text(text.replace("raise NotImplementedError", "return x  #"), encoding="utf-8")
    assert "out = F.scaled_dot_product_attention" in run("solution", "attention")[1]
    assert "started" in run()[1]
    assert run("restore", "attention")[0] == 0
    assert file.read_bytes() == before
    assert "return x  #" in (root / ".course" / "attention.attempt.py").read_text(encoding="utf-8")
    assert "not started" in run("restore", "attention")[2]


def test_work_that_is_not_committed_is_not_overwritten(run, root):
    file = root / "steerling_min" / "norm.py"
    file.write_text(file.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    code, _, error = run("start", "norm")
    assert code == 2 and "norm.py has changes that are not committed" in error
    assert "# mine" in file.read_text(encoding="utf-8") and not (root / ".course").exists()
    assert run("start", "mask")[0] == 0, "another file is free"
    assert run("start", "rotate")[0] == 2, "two exercises at a time in one file: commit the first"


def test_without_git_a_started_exercise_is_not_started_again(run, root):
    shutil.rmtree(root / ".git")
    assert run("start", "norm")[0] == 0
    code, _, error = run("start", "norm")
    assert code == 2 and "norm is started already" in error
    assert "RMSNorm" not in run("solution", "norm")[1] and "rsqrt" in run("solution", "norm")[1]


@pytest.mark.parametrize("args, message", [
    (["begin", "norm"], "invalid choice: 'begin'"), (["start"], "the names are norm, mask"),
    (["check", "nomr"], "the names are norm, mask"),
    (["show", "mask"], "the names are block-size")])
def test_a_wrong_command_is_one_line(run, args, message):
    code, out, error = run(*args)
    assert code == 2 and message in error and error.count("\n") == 1 and not out


def test_without_its_tests_there_is_no_course(run, root):
    (root / "tests").rmdir()
    code, _, error = run("start", "norm")
    assert code == 2 and "the course needs the repository" in error


def test_the_check_runs_the_exercises_tests_in_the_repository(run, root, monkeypatch):
    (root / "tests" / "test_norm.py").write_text("def test_a():\n    assert 1 == 2\n")
    assert run("check", "norm")[0] == 1
    (root / "tests" / "test_norm.py").write_text("def test_a():\n    assert 1 == 1\n")
    code, out, _ = run("check", "norm")
    assert code == 0 and "norm: solved" in out


def test_everything_is_listed(run):
    code, out, _ = run()
    assert code == 0 and all(name in out for name in [*EXERCISES, *MODIFICATIONS])
    assert len(EXERCISES) >= 25 and len(MODIFICATIONS) >= 10
    assert all(e.level in (1, 2, 3) and e.minutes > 0 and e.read for e in EXERCISES.values())
