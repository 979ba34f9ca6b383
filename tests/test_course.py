"""The course: every exercise can be taken out, checked and put back, and nothing is lost."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import FORKS
from mutants import make_copy, pytest_in

from steerling_min.course import __main__ as course
from steerling_min.course.exercises import EXERCISES, MODIFICATIONS
from steerling_min.course.functions import blanked, cut, exchanged, file_of, find, read, write
from steerling_min.files.cli import one_line_errors

TESTS = Path(__file__).parent
REPOSITORY = course.ROOT


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of the package that the course works on."""
    shutil.copytree(REPOSITORY / "steerling_min", tmp_path / "steerling_min",
                    ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "KEPT", tmp_path / ".course")
    return tmp_path


@pytest.fixture
def attempt(root):
    """attempt("norm.py", old, new): a student's edit of a file, which says what was there."""
    def attempt(name, old, new):
        file = root / "steerling_min" / name
        before = file.read_text(encoding="utf-8")
        assert old in before
        file.write_text(before.replace(old, new), encoding="utf-8")
        return before
    return attempt


@pytest.fixture
def run(root, monkeypatch, capfd):
    """run("start", "mask") -> exit code, output and error."""
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["course", *args])
        code = 0
        try:
            course.main()
        except SystemExit as stop:
            code = stop.code
        out, error = capfd.readouterr()
        return code, out, error
    return run


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_an_exercise_keeps_signature_and_docstring_and_loses_the_rest(exercise):
    text = file_of(exercise, REPOSITORY).read_text(encoding="utf-8")
    whole = find(exercise, text)
    left = find(exercise, blanked(exercise, text))
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


def test_of_several_functions_of_a_name_the_last_counts_with_its_decorators():
    first, last = "def f():\n    return 1\n", "@cache\n@other(\n    2)\ndef f():\n    return 2\n"
    text = f"import x\n{first}\n{last}y = 3\n"
    exercise = EXERCISES["norm"]._replace(where="norm.py f")
    assert cut(exercise, text) == last, "as Python takes it"
    assert exchanged(exercise, text, "def f(): ...\n") == (
        f"import x\n{first}\ndef f(): ...\ny = 3\n"), "nothing else is touched"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "work.py"
    write(file, "an hour's work")
    assert [x.name for x in tmp_path.iterdir()] == ["work.py"], "and nothing lies beside it"
    monkeypatch.setattr(Path, "write_text", lambda self, *args, **options: (
        self.write_bytes(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write(file, "the next one's")
    assert file.read_bytes() == b"an hour's work", "it is replaced when all is written"


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
    assert "Attention.forward   started" in run()[1]
    assert run("restore", "attention")[0] == 0
    assert file.read_bytes() == before
    assert "return x  #" in (root / ".course" / "attention.attempt.py").read_text(encoding="utf-8")
    assert "not started" in run("restore", "attention")[2]


BLANK = 'raise NotImplementedError("exercise: mask")'


def test_an_attempt_that_is_no_python_is_seen_checked_and_put_back(run, root, attempt):
    before = (root / "steerling_min" / "attention.py").read_bytes()
    run("start", "mask")
    attempt("attention.py", BLANK, "return query[:, None] >= key[None, :")
    assert "'[' was never closed (attention.py" in run()[1], "the overview goes on"
    code, out, error = run("check", "mask")
    assert code == 2 and "was never closed (attention.py, line" in error and not out
    assert "query[:, None] // S" in run("solution", "mask")[1]
    assert run("start", "norm")[0] == 0, "another file is free"
    assert "all of attention.py is as it was" in run("restore", "mask")[1]
    assert (root / "steerling_min" / "attention.py").read_bytes() == before
    assert "never closed" not in run()[1]
    kept = (root / ".course" / "mask.attempt.py").read_text(encoding="utf-8")
    assert "return query[:, None] >= key[None, :\n" in kept, "the attempt is what must not be lost"


def test_a_file_that_is_put_back_has_no_blank_of_another_exercise(run, root):
    file = root / "steerling_min" / "attention.py"
    before = file.read_bytes()
    for command, name in (("start", "mask"), ("start", "rotate"), ("restore", "mask")):
        assert run(command, name)[0] == 0
    file.write_bytes(file.read_bytes().replace(b"def rotate(", b"def rotat("))
    assert "all of attention.py is as it was" in run("restore", "rotate")[1]
    assert file.read_bytes() == before, "mask was blank when rotate was started"


def test_a_file_that_windows_has_marked_can_be_read(run, root):
    file = root / "steerling_min" / "norm.py"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert run("start", "norm")[0] == 0 and "rsqrt" in run("solution", "norm")[1]


@pytest.mark.parametrize("harm", ["def block_causal_mask -> def my_mask", "deleted", "no UTF-8"])
def test_a_function_that_is_gone_is_put_back_with_its_file(run, root, harm):
    file = root / "steerling_min" / "attention.py"
    before = file.read_bytes()
    run("start", "mask")
    blanked = file.read_bytes()
    harmed = blanked.replace(*map(str.encode, harm.split(" -> "))) if "->" in harm else b"\xff\n"
    file.unlink() if harm == "deleted" else file.write_bytes(harmed)
    code, out, _ = run("restore", "mask")
    assert code == 0 and file.read_bytes() == before, out
    attempt = (root / ".course" / "mask.attempt.py").read_bytes()
    assert attempt == (b"" if harm == "deleted" else harmed)


def test_no_start_replaces_the_original_that_is_kept(run, root, attempt):
    run("start", "norm")
    assert "norm is blank already" in run("start", "norm")[2]
    attempt("norm.py", 'raise NotImplementedError("exercise: norm")', "return x")
    code, _, error = run("start", "norm")
    assert code == 2 and "norm is started already: write it, or restore it" in error
    assert "rsqrt" in run("solution", "norm")[1] and "return x" not in run("solution", "norm")[1]
    shutil.rmtree(root / ".course")
    attempt("norm.py", "return x", 'raise NotImplementedError("exercise: norm")')
    assert "norm is blank already" in run("start", "norm")[2], "a blank is nobody's original"


def test_every_attempt_is_kept(run, root, attempt):
    for answer in ("return 1", "return 2", "return 3"):
        assert run("start", "norm")[0] == 0
        attempt("norm.py", 'raise NotImplementedError("exercise: norm")', answer)
        assert run("restore", "norm")[0] == 0
    for name, answer in zip(("", "2", "3"), ("return 1", "return 2", "return 3")):
        kept = (root / ".course" / f"norm.attempt{name}.py").read_text(encoding="utf-8")
        assert answer in kept


def test_an_attempt_is_safe_before_it_is_replaced(run, root, attempt, monkeypatch):
    run("start", "norm")
    attempt("norm.py", 'raise NotImplementedError("exercise: norm")', "return 7")
    def full(file, text):
        raise OSError("No space left on device")
    monkeypatch.setattr(course, "write", full)
    assert "No space left" in run("restore", "norm")[2]
    assert "return 7" in (root / "steerling_min" / "norm.py").read_text(encoding="utf-8")
    monkeypatch.undo()


@pytest.mark.parametrize("name, docstring", [
    ("norm", "its docstring and its class's say"), ("mask", "its docstring says")])
def test_a_blank_is_announced_with_its_place_and_what_to_read(run, root, name, docstring):
    out, exercise = run("start", name)[1], EXERCISES[name]
    where, function = exercise.where.split()
    said = re.match(rf"{function} in steerling_min/{where}, line (\d+), is blank; {docstring} what",
                    out)
    text = (root / "steerling_min" / where).read_text(encoding="utf-8").splitlines()
    assert said, f"where it is, and what to read: {out}"
    assert f"def {function.split('.')[-1]}(" in text[int(said[1]) - 1], "the function's own line"
    assert exercise.read in out


def test_exercises_of_one_file_are_open_side_by_side(run, root, attempt):
    before = (root / "steerling_min" / "attention.py").read_bytes()
    for name in ("mask", "rotate", "attention"):
        assert run("start", name)[0] == 0, "neither a commit nor git is needed"
    attempt("attention.py", 'raise NotImplementedError("exercise: rotate")', "return x")
    assert "block_causal_mask   blank" in run()[1] and "attention.py rotate   started" in run()[1]
    for name in ("rotate", "mask", "attention"):
        assert f"attention.py {EXERCISES[name].where.split()[1]} is as it was" in run(
            "restore", name)[1]
    assert (root / "steerling_min" / "attention.py").read_bytes() == before


def test_work_of_ones_own_in_the_file_stays(run, root):
    file = root / "steerling_min" / "norm.py"
    file.write_text(file.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")
    run("start", "norm")
    assert file.read_text(encoding="utf-8").endswith("# mine\n")
    run("restore", "norm")
    assert file.read_text(encoding="utf-8").endswith("# mine\n")


def in_a_process(root, *args):
    """The course as it is documented, in the copy, with an import of torch that would fail."""
    (root / "torch.py").write_text("raise ImportError('the course needs no torch')")
    return subprocess.run([sys.executable, "-m", "steerling_min.course", *args], cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root), "PATH": ""}, text=True,
                          capture_output=True)


def test_the_course_imports_nothing_that_it_repairs(root):
    """... and finds no git on the PATH."""
    assert in_a_process(root, "start", "mask").returncode == 0
    for name in {e.where.split()[0] for e in EXERCISES.values()} | {"model.py", "config.py"}:
        (root / "steerling_min" / name).write_text("def broken(:\n")
    for command in (["solution", "mask"], ["restore", "mask"], ["list", "--json"], []):
        run = in_a_process(root, *command)
        assert run.returncode == 0 and not run.stderr, command


def test_a_reader_who_has_had_enough_sees_no_traceback(root):
    """python -m steerling_min.course | head -1"""
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([sys.executable, "-m", "steerling_min.course"], cwd=root, stdout=writer,
                         stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})
    os.close(writer)
    assert run.returncode == 141 and not run.stderr


@pytest.mark.parametrize("args, message", [
    (["begin", "norm"], "invalid choice: 'begin'"), (["start"], "required: NAME"),
    (["check", "nomr"], "choose from 'merge', 'byte-pairs'"),
    (["show", "mask"], "choose from 'block-size'")])
def test_a_wrong_command_is_one_line(run, args, message):
    code, out, error = run(*args)
    assert code == 2 and message in error and error.count("\n") == 1 and not out


def test_without_its_tests_there_is_no_course(run, root):
    (root / "tests").rmdir()
    code, _, error = run("start", "norm")
    assert code == 2 and "the course needs the repository" in error


@pytest.fixture
def little(root, tmp_path, monkeypatch):
    """The copy, with this repository's conftest.py and tests of our own.

    `check` starts pytest: here in a fork of a process that has imported PyTorch."""
    def run(command, cwd):
        assert command[:3] == [sys.executable, "-m", "pytest"]
        report = tmp_path / "report.txt"
        process = FORKS.Process(target=pytest_in, args=(cwd, command[3:], report, 600))
        process.start()
        process.join()
        assert report.exists(), f"pytest did not begin: exit code {process.exitcode}"
        print(report.read_text("utf-8"))
        return SimpleNamespace(returncode=process.exitcode)
    monkeypatch.setattr(course, "subprocess", SimpleNamespace(
        run=run, CalledProcessError=subprocess.CalledProcessError))

    def little(tests):
        shutil.copy(TESTS / "conftest.py", root / "tests")
        shutil.copytree(TESTS / "golden", root / "tests" / "golden")
        head = "from steerling_min.attention import *\nfrom steerling_min.norm import *\n"
        (root / "tests" / "test_norm.py").write_text(head + tests)
    return little


def test_a_check_says_what_is_solved(run, little):
    little("def test_a():\n    assert 1 == 1\n")
    code, out, _ = run("check", "norm")
    assert code == 0 and "norm: solved" in out and "lank" not in out


def test_a_check_fails_when_a_test_does(run, little):
    little("def test_a():\n    assert 1 == 2, 'the lesson'\n")
    code, out, _ = run("check", "norm")
    assert code == 1 and "solved" not in out and "the lesson" in out


def test_a_blank_function_is_not_solved_whatever_its_tests_say(run, little):
    little("def test_a():\n    pass\n")
    run("start", "norm")
    assert "norm is still blank" in run("check", "norm")[0]


def test_the_original_is_saved_before_its_file_is_blanked(run, root, monkeypatch):
    file, calls, real = root / "steerling_min" / "norm.py", [], course.write

    def full(path, text):
        calls.append(path)
        if len(calls) > 1:
            raise OSError("no space left")
        real(path, text)
    monkeypatch.setattr(course, "write", full)
    before = file.read_text(encoding="utf-8")
    assert run("start", "norm")[0] == 2
    assert file.read_text(encoding="utf-8") == before, "the function must not be lost"


def test_a_blanks_line_that_stays_as_a_comment_is_no_blank(run, root, attempt):
    run("start", "norm")
    line = 'raise NotImplementedError("exercise: norm")'
    attempt("norm.py", line, f"return x  # {line}")
    assert course.state(EXERCISES["norm"]) == "started", "something is written there"


def test_a_test_waits_for_a_blank_that_comes_later(run, little):
    little("""
def test_mine():
    pass
def test_needs_more():
    block_causal_mask(torch.arange(2), torch.arange(2), 1)
""")
    run("start", "mask")
    code, out, _ = run("check", "norm")
    assert code == 0 and "norm: solved" in out and "Still blank: mask. Work in the order" in out
    assert "1 passed, 1 skipped" in out and "waits for the exercise mask" in out


def test_a_test_does_not_wait_for_a_blank_that_comes_before(run, root, little):
    little("")
    (root / "tests" / "test_attention.py").write_text(
        "from steerling_min.norm import *\ndef test_a_mask_or_block():\n"
        "    RMSNorm(2, 0.1)(torch.ones(2))\n")
    run("start", "norm")
    code, out, _ = run("check", "mask")
    assert code == 1 and "Still blank: norm" in out
    assert "exercise: norm" in out, "which says what to write first"


def test_everything_is_listed(run):
    code, out, _ = run()
    assert code == 0 and all(name in out for name in [*EXERCISES, *MODIFICATIONS])
    assert len(EXERCISES) >= 25 and len(MODIFICATIONS) >= 10
    assert all(e.level in (1, 2, 3) and e.minutes > 0 and e.read for e in EXERCISES.values())
    assert run("list")[1] == out


def test_the_list_for_programs_says_all_that_the_tables_say(run):
    run("start", "mask")
    listed = json.loads(run("list", "--json")[1])
    states = {e["name"]: e.pop("state") for e in listed["exercises"]}
    assert states == {name: "blank" if name == "mask" else "" for name in EXERCISES}
    assert listed["exercises"] == [e._asdict() for e in EXERCISES.values()]
    assert [m["name"] for m in listed["modifications"]] == list(MODIFICATIONS)
    assert listed["modifications"][1]["changes"] == list(MODIFICATIONS["pre-norm"].changes)


def test_a_modification_says_which_tests_must_change_or_that_none_must(run):
    for name, first in (("pre-norm", MODIFICATIONS["pre-norm"].changes[0]), ("infill", "none")):
        said = run("show", name)[1]
        assert re.search(rf"must change:\n  (tests/)?{re.escape(first)}\n", said)


def test_the_teachers_page_answers_each_section_of_the_notebook_and_each_modification():
    cells = json.loads((REPOSITORY / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    asked = [line[3:] for text in texts for line in text.splitlines() if line.startswith("## ")]
    answers = (REPOSITORY / "steerling_min" / "course" / "answers.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.*)$", answers, re.M) == [*asked, *MODIFICATIONS]


def test_a_command_that_meets_a_blank_says_which_and_what_to_do(capfd):
    """Training and sampling while an exercise is open."""
    with pytest.raises(SystemExit) as stop, one_line_errors("sample.py", "less"):
        raise NotImplementedError("exercise: mask")
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "the exercise mask is not written yet" in error and "restore mask" in error
    with pytest.raises(NotImplementedError), one_line_errors("sample.py", "less"):
        raise NotImplementedError("what a subclass was to write")


# ---- several blanks at once ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_in_order_each_exercise_turns_green_when_it_is_solved(exercise, tmp_path):
    """All that follow are blank: tests that fail without the function pass with it."""
    copy, names = make_copy(tmp_path / "copy"), list(EXERCISES)
    after = names[names.index(exercise.name) + 1:]
    file, original = file_of(exercise, copy), read(file_of(exercise, REPOSITORY))
    for name in [exercise.name, *after]:
        other = file_of(EXERCISES[name], copy)
        write(other, blanked(EXERCISES[name], read(other)))

    def results():
        report = tmp_path / "report.txt"
        process = FORKS.Process(target=pytest_in, args=(copy, [
            "-q", "-rA", "--tb=no", "-p", "no:cacheprovider", "--exercise", exercise.name,
            *shlex.split(exercise.tests)], report, 600))
        process.start()
        process.join()
        said = report.read_text(encoding="utf-8")
        return [set(re.findall(rf"^{word} (\S+)", said, re.M)) for word in ("PASSED", "FAILED")]
    _, wrong = results()
    write(file, exchanged(exercise, read(file), cut(exercise, original)))
    right, still_wrong = results()
    assert not still_wrong, "what is solved is green, though others are blank"
    assert wrong & right, "and its own tests run before the next exercise is begun"
