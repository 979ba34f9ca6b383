"""Handing exercises out, and grading what comes back."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from steerling_min.course import __main__ as course
from steerling_min.course.classroom import STOPS, TEACHERS, grade, run_tests
from steerling_min.course.exercises import EXERCISES
from steerling_min.course.functions import cut, exchanged, file_of, find, hole, read, write

REPOSITORY = course.ROOT
FEW = ["norm", "mask", "rotate", "block"]


def repository(folder):
    """Make a folder a git repository, as far as the course asks."""
    for command in ("init --quiet", "add --all"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A copy of this repository, as a teacher has it."""
    folder = tmp_path_factory.mktemp("teacher") / "steerling_min"
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(
        ".git", ".course", ".*_cache", "__pycache__", "*.egg-info", "build", "runs", ".venv"))
    return repository(folder)


@pytest.fixture
def run(monkeypatch, capfd):
    """run(root, "handout", ...) -> exit code, output and error of the course in that repository."""
    def run(root, *args):
        monkeypatch.setattr(course, "ROOT", root)
        monkeypatch.setattr(course, "KEPT", root / ".course")
        monkeypatch.setattr(sys, "argv", ["course", *map(str, args)])
        code = 0
        try:
            course.main()
        except SystemExit as stop:
            code = stop.code
        out, error = capfd.readouterr()
        return code, out, error
    return run


def in_a_process(root, *args):
    """The course as it is documented, in a handout."""
    return subprocess.run([sys.executable, "-m", "steerling_min.course", *args], cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True,
                          text=True)


def log(folder, *args):
    return subprocess.run(["git", "log", *args], cwd=folder, check=True, capture_output=True,
                          text=True).stdout


# ---- handing out ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def handed_out(original, tmp_path_factory):
    """FEW, handed out."""
    folder = tmp_path_factory.mktemp("handout") / "few"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "ROOT", original)
        patch.setattr(sys, "argv", ["course", "handout", str(folder), *reversed(FEW)])
        course.main()
    return folder


def test_a_handout_is_one_commit_with_the_functions_blank(handed_out):
    assert log(handed_out, "--oneline").count("\n") == 1, "a history would show the solutions"
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=handed_out, check=True,
                              capture_output=True).stdout, "all of it is committed"
    for e in EXERCISES.values():
        blank = hole(e) in read(file_of(e, handed_out))
        assert blank == (e.name in FEW), e.name
    for name in TEACHERS:
        assert (REPOSITORY / name).exists() and not (handed_out / name).exists()
    for file in (handed_out / "tests").glob("*.py"):
        assert not re.search("(from|import) mutants", read(file)), f"{file.name} could not run"
    for name in ("tests/mutants.py", "tests/mistakes.json", "tests/equivalent.json", ".ci"):
        assert not (handed_out / name).exists(), f"{name} quotes solutions, or is not for students"


def test_a_handout_has_the_exercises_that_are_named_in_it_wherever_it_is_run(handed_out, tmp_path):
    course_files = handed_out / "steerling_min" / "course"
    for name in ("exercises.py", "exercises.json"):
        shutil.copy(course_files / name, tmp_path / name)
    for names in (["decompose"], ["norm", "mask"]):  # compose is another exercise
        (tmp_path / "handed_out.txt").write_text("\n".join(names))
        found = subprocess.run([sys.executable, "-c", "import runpy, sys; print(*runpy.run_path("
                                "sys.argv[1])['EXERCISES'])", str(tmp_path / "exercises.py")],
                               capture_output=True, text=True, check=True, cwd=REPOSITORY)
        assert found.stdout.split() == names


def test_the_same_exercises_give_the_same_handout_byte_for_byte(
        original, handed_out, run, tmp_path, monkeypatch):
    """Whoever makes it: the commit's id is the same, too."""
    (tmp_path / ".gitconfig").write_text("[user]\nname = Somebody\n[core]\nautocrlf = true\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2001-01-01T00:00:00Z")
    (original / "notes.txt").write_text("lies about by chance")
    code, out, _ = run(original, "handout", tmp_path / "again", *FEW)
    head = log(handed_out, "--format=%H")
    assert code == 0 and "4 exercises, 45 minutes" in out and head[:12] in out
    assert log(tmp_path / "again", "--format=%H") == head
    assert log(handed_out, "--format=%an %at %ct") == "steerling_min 1767225600 1767225600\n", (
        "1 January 2026, whenever it is made")


def test_nothing_in_a_handout_quotes_a_solution(original, run, tmp_path):
    """Neither the package, nor a test, nor the notebook has a line of one (from 40 characters)."""
    folder = tmp_path / "all"
    assert run(original, "handout", folder, "--all")[0] == 0
    texts = {path: path.read_text("utf-8") for path in folder.rglob("*") if path.is_file()
             and ".git" not in path.parts and path.suffix in (".py", ".md", ".ipynb", ".yml")}
    assert len(texts) > 80
    for e in EXERCISES.values():
        function = find(e, read(file_of(e, original)))
        lines = {line.strip() for statement in function.body[1:]
                 for line in read(file_of(e, original)).splitlines()[
                     statement.lineno - 1:statement.end_lineno]}
        for path, text in texts.items():
            for line in lines:
                assert len(line) < 40 or line not in text, (e.name, path, line)


def test_a_handout_checks_itself(handed_out, original, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(handed_out, folder)
    listed = in_a_process(folder)
    assert listed.stdout.count(" blank\n") == 4 and "rotary_tables" not in listed.stdout
    write(file_of(EXERCISES["norm"], folder), read(file_of(EXERCISES["norm"], original)))
    checked = in_a_process(folder, "check", "norm")
    assert checked.returncode == 0 and "norm: solved" in checked.stdout
    assert "Still blank: mask, rotate, block." in checked.stdout


def test_a_handout_has_neither_solutions_nor_a_grader(handed_out):
    for command in ("solution", "restore", "start", "handout", "grade"):
        run = in_a_process(handed_out, command, "norm")
        assert run.returncode == 2 and f"invalid choice: '{command}'" in run.stderr
    assert in_a_process(handed_out, "show", "pre-norm").returncode == 0, "homework"


def test_a_handout_says_what_to_do(handed_out):
    text = (handed_out / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| \*+ \| (\d+) \| `([\w.]+)`, `([\w.]+)` \|", text, re.M)
    assert [row[0] for row in rows] == FEW, "in the order in which they can be checked"
    assert all(EXERCISES[name].minutes == int(minutes) and EXERCISES[name].where == f"{a} {b}"
               for name, minutes, a, b in rows)
    for name in FEW:
        points = re.findall(r"points? (\d)", EXERCISES[name].read)
        assert all(re.search(rf"^{n}\. \*\*", text, re.M) for n in points), "is here to be read"
    assert "check norm" in text and "git commit" in text and "solution norm" not in text


def test_on_github_each_exercise_is_checked_on_every_push(handed_out):
    text = (handed_out / ".github" / "workflows" / "classroom.yml").read_text("utf-8")
    assert text.count("steerling_min.course check") == len(FEW)
    workflows = (handed_out / ".github" / "workflows").iterdir()
    assert [file.name for file in workflows] == ["classroom.yml"], (
        "this repository's own workflow would be red until every blank is written")
    yaml = pytest.importorskip("yaml")
    job = yaml.load(text, yaml.BaseLoader)["jobs"]["run-autograding-tests"]
    steps = {step["id"]: step["with"] for step in job["steps"] if "id" in step}
    assert list(steps) == FEW
    assert all(step["command"] == f"python -m steerling_min.course check {name}"
               for name, step in steps.items())
    reporter = job["steps"][-1]
    assert reporter["with"]["runners"] == ",".join(FEW)
    assert reporter["env"] == {
        f"{name.upper()}_RESULTS": f"${{{{steps.{name}.outputs.result}}}}" for name in FEW}


@pytest.mark.parametrize("arguments, message", [
    (["FULL", "norm"], "is not empty"), (["NEW"], "name exercises, or give --level or --all"),
    (["NEW", "nomr"], "invalid exercise value: 'nomr'"),
    (["NEW", "--level", "4"], "invalid choice: 4")])
def test_a_wrong_handout_is_one_line(original, run, tmp_path, arguments, message):
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "mine.txt").touch()
    code, out, error = run(original, "handout", tmp_path / arguments[0], *arguments[1:])
    assert code == 2 and message in error and error.count("\n") == 1 and not out
    assert not (tmp_path / "NEW").exists()


def test_what_git_refuses_is_no_handout(run, tmp_path):
    (tmp_path / "no repository" / "tests").mkdir(parents=True)
    code, out, error = run(tmp_path / "no repository", "handout", tmp_path / "new", "norm")
    assert code == 2 and "checkout-index" in error.splitlines()[-1] and not out


def test_a_level_is_handed_out(original, run, tmp_path):
    code, out, _ = run(original, "handout", tmp_path / "hard", "--level", "3")
    commit = log(tmp_path / "hard", "--format=%H").strip()
    assert code == 0 and f"commit {commit[:12]}" in out
    listed = (tmp_path / "hard" / "steerling_min" / "course" / "handed_out.txt").read_text()
    assert listed.split() == [e.name for e in EXERCISES.values() if e.level == 3]


# ---- grading, in a repository of two functions ---------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A repository whose RMSNorm.forward doubles, and whose alpha_of adds one."""
    folder = tmp_path_factory.mktemp("small")
    for name, text in {
        "steerling_min/__init__.py": "",
        "steerling_min/norm.py": "class RMSNorm:\n    def forward(self, x):\n        'Twice x.'\n"
                                 "        return 2 * x\n",
        "steerling_min/steering.py": "def alpha_of(x):\n    'One more.'\n    return x + 1\n",
        "tests/conftest.py": "import steerling_min.norm, steerling_min.steering\n",
        "tests/test_norm.py": "import pytest\nfrom steerling_min.norm import RMSNorm\n"
            "@pytest.mark.skip\ndef test_on_a_gpu(): assert False\n"  # not in anybody's mark
            "def test_three():\n    assert RMSNorm().forward(3) == 6, 'twice three is six'\n"
            "def test_two():\n    assert RMSNorm().forward(2) == 4, 'twice two is four'\n",
        "tests/test_steering.py": "from steerling_min.steering import alpha_of\n"
            "def test_one():\n    assert alpha_of(1) == 2\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return repository(folder)


# What a student wrote for RMSNorm.forward: the reason that the row gives, and its failed tests.
ATTEMPTS = {
    "right": ("return x + x", "", {}),
    "prints megabytes": ("import sys\nfor _ in range(300):\n    print('x' * 10**5)\n"
                         "    print('x' * 10**5, file=sys.stderr)\nreturn 2 * x", "", {}),
    "blank": (hole(EXERCISES["norm"]), "not written", {}),
    "wrong once": ("return x * x", "failed 1 of 2 tests", {
        "test_norm::test_three": "AssertionError: twice three is six"}),
    "needs a helper": ("return twice(x)", "failed 2 of 2 tests", {
        "test_norm::test_three": "NameError: name 'twice' is not defined",
        "test_norm::test_two": "NameError: name 'twice' is not defined"}),
    "for ever": ("import time\nwhile True:\n    time.sleep(1)", "still running after 4 s", {}),
    "os._exit": ("import os\nos._exit(0)", "its tests ended early, with exit code 0", {}),
    "exit": ("exit(0)", "failed 2 of 2 tests", {
        "test_norm::test_three": "SystemExit: 0", "test_norm::test_two": "SystemExit: 0"}),
    "stops pytest": ("import pytest\npytest.exit('done', 0)", "failed 2 of 2 tests", {
        "test_norm::test_three": "did not run", "test_norm::test_two": "did not run"}),
    "skips": ("import pytest\npytest.skip('no need')", "failed 2 of 2 tests", {
        "test_norm::test_three": "skipped", "test_norm::test_two": "skipped"}),
    "deletes files": ("import os\nos.remove('steerling_min/norm.py')\nreturn x",
                      "failed 2 of 2 tests", {
        "test_norm::test_three": "AssertionError: twice three is six",
        "test_norm::test_two": "FileNotFoundError: [Errno 2] No such file or directory"}),
    "no Python": ("return 2 * (x", "'(' was never closed (norm.py, line 4)", {}),
    "cannot be compiled": ("break", "norm.py cannot be imported with it", {}),
}
FILES = {  # all of norm.py, and the reason
    "renamed": ("class RMSNorm:\n    def my_forward(self, x):\n        return 2 * x\n",
                "norm.py has no RMSNorm.forward"),
    "pasted below": ("class RMSNorm:\n    def forward(self, x):\n        raise ValueError\n"
                     "    def forward(self, x):\n        return 2 * x\n", ""),
    "class twice": ("class RMSNorm:\n    def forward(self, x):\n        raise ValueError\n"
                    "class RMSNorm:\n    def forward(self, x):\n        return x * 2\n", ""),
    "other margins": ("class RMSNorm:\n  def forward(self, x):\n   if x:\n        return 2 * x\n"
                      "   return 0\n", ""),
    "undefined name": ("class RMSNorm:\n    def forward(self, x: Vector):\n        return 2 * x\n",
                       "norm.py cannot be imported with it"),
    "nothing": ("", "norm.py has no RMSNorm"),
    "Latin-1": (b"class RMSNorm:\n    x = '\xe9'\n    def forward(self, x): pass\n",
                "its file is not UTF-8 text"),
    "null bytes": ("\0", "source code string cannot contain null bytes"),
    "deleted": (None, "norm.py is missing"),
}


@pytest.fixture(scope="module")
def submissions(small, tmp_path_factory):
    """A folder for each of the above: of a student who has changed the tests, too."""
    folder = tmp_path_factory.mktemp("submissions")
    before = read(small / "steerling_min" / "norm.py")
    files = {name: before.replace("return 2 * x", attempt.replace("\n", "\n        "))
             for name, (attempt, *_) in ATTEMPTS.items()}
    for name, text in {**files, **{name: text for name, (text, _) in FILES.items()}}.items():
        shutil.copytree(small, folder / name, ignore=shutil.ignore_patterns(".git"))
        (folder / name / "tests" / "test_norm.py").write_text("def test_all_is_well(): pass\n")
        (folder / name / "tests" / "conftest.py").unlink()
        file = folder / name / "steerling_min" / "norm.py"
        if text is None:
            file.unlink()
        else:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.fixture(scope="module")
def rows(small, submissions):
    """The rows of all of them, by student and exercise."""
    folders = sorted(submissions.iterdir())
    found = list(grade(small, folders, [EXERCISES["norm"], EXERCISES["alpha"]], 4))
    assert len(found) == 2 * len(folders)
    return {(Path(row["student"]).name, row["exercise"]): row for row in found}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_a_submission_is_a_row_with_a_reason(rows, name):
    _, reason, failed = ATTEMPTS[name]
    row = rows[name, "norm"]
    assert row["passed"] == (not reason) and row["reason"] == reason
    assert row["failed"].keys() == failed.keys()
    assert all(row["failed"][test].startswith(line) for test, line in failed.items())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes")
def test_what_a_submission_starts_ends_with_it(small, tmp_path, monkeypatch):
    monkeypatch.setenv("BEATS", str(tmp_path / "beats"))
    child = "import os, time\nfor i in range(999):\n    open(os.environ['BEATS'], 'a').write('x')\n"
    function = ("def forward(self, x):\n    import os, subprocess, sys\n"
                f"    subprocess.Popen([sys.executable, '-c', {child + '    time.sleep(.02)'!r}])\n"
                "    while not os.path.exists(os.environ['BEATS']): pass\n    return 2 * x\n")
    outcomes, reason, _ = run_tests(small, 30.0, EXERCISES["norm"], function)
    assert not reason and set(outcomes.values()) == {"", "skipped"}
    time.sleep(0.2)  # until the signal has arrived
    beats = (tmp_path / "beats").stat().st_size
    time.sleep(0.3)
    assert (tmp_path / "beats").stat().st_size == beats, "what it started still runs"


@pytest.mark.parametrize("name", FILES)
def test_of_a_submission_the_function_counts_and_nothing_else(rows, name):
    row = rows[name, "norm"]
    assert row["passed"] == (FILES[name][1] == "") and FILES[name][1] in row["reason"]


def test_what_is_not_run_takes_no_time(rows):
    assert rows["blank", "norm"]["seconds"] == 0.0 < rows["right", "norm"]["seconds"]


def test_another_exercise_of_the_same_student_is_graded_by_itself(rows):
    assert all(row["passed"] for (_, exercise), row in rows.items() if exercise == "alpha")


def test_grading_leaves_the_submissions_and_the_original_as_they_are(small, submissions, rows):
    assert (submissions / "deletes files" / "steerling_min" / "norm.py").is_file()
    assert not subprocess.run(["git", "diff", "--name-only"], cwd=small, check=True,
                              capture_output=True).stdout


@pytest.fixture
def two(small, submissions):
    """Two students who have shortened the list of what was handed out, each in a way of his own."""
    folders = [submissions / "right", submissions / "right of another"]
    shutil.copytree(submissions / "wrong once", folders[1], dirs_exist_ok=True)
    for folder, names in zip(folders, ("norm\n", "alpha\nanything\n")):
        (folder / "steerling_min" / "course").mkdir(exist_ok=True)
        (folder / "steerling_min" / "course" / "handed_out.txt").write_text(names)
    return folders


def test_marks_are_a_table_json_and_csv(small, two, run, tmp_path):
    code, out, _ = run(small, "grade", *two, "--json", tmp_path / "marks.json", "--csv",
                       tmp_path / "marks.csv")
    assert code == 0 and f"{two[0]} 2 of 2 passed" in re.sub(" +", " ", out)
    assert "failed 1 of 2 tests; test_norm::test_three: AssertionError: twice three is six" in out
    marks = json.loads((tmp_path / "marks.json").read_text("utf-8"))
    assert [(row["exercise"], row["passed"]) for row in marks] == [
        ("norm", True), ("alpha", True), ("norm", False), ("alpha", True)], "of any student's list"
    assert marks[2]["failed"] == {"test_norm::test_three": "AssertionError: twice three is six"}
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["passed"] for row in table] == ["True", "True", "False", "True"]
    assert table[2]["failed"] == "test_norm::test_three: AssertionError: twice three is six"
    assert list(table[0]) == ["student", "exercise", "passed", "reason", "failed", "seconds"]


@pytest.mark.parametrize("flags, message", [
    (["--csv", "."], "Is a directory: '.'"),
    (["--csv", "x", "--json", "x"], "--csv and --json would both write x: give two files"),
    (["--seconds", "nan"], "--seconds nan: above 0"), (["--seconds", 0], "--seconds 0.0: above 0"),
    (["FOLDER/pyproject.toml"], "pyproject.toml is no folder: unpack what was handed in")])
def test_what_would_fail_after_an_hour_of_grading_fails_at_once(small, two, run, monkeypatch, flags,
                                                               message):
    monkeypatch.setattr("steerling_min.course.classroom.grade", None)
    folder = two[0] if "FOLDER" not in str(flags[0]) else Path(__file__).parent.parent
    flags = [str(flag).replace("FOLDER", str(folder)) for flag in flags]
    code, _, error = run(small, "grade", two[0], *flags, "--exercises", "norm")
    assert code == 2 and error.strip().endswith(message) and "Traceback" not in error


def until(happened, seconds=30):
    """Wait for something, but not for ever."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, *STOPS])
def test_ctrl_c_ends_a_grading_at_once_and_keeps_the_marks_so_far(small, submissions, run, tmp_path,
                                                                  monkeypatch, number):
    started = tmp_path / "started"
    endless = tmp_path / "endless"
    shutil.copytree(submissions / "right", endless)
    file = endless / "steerling_min" / "norm.py"
    file.write_text(file.read_text().replace(
        "return x + x", f"import os, time\n        open({str(started)!r}, 'w').write("
        "str(os.getpid()))\n        time.sleep(99)\n        os.getpid()"))
    assert "sleep(99)" in file.read_text()

    def interrupt():
        until(lambda: started.exists() and started.read_text())
        signal.raise_signal(number)
    printed = []

    def first(*said, **options):  # Ctrl-C comes after the first student's mark
        printed.append(said)
        if len(printed) == 1:
            interrupt()
    monkeypatch.setattr("builtins.print", first)
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)  # a shell's `&`, or nohup, may have it ignored
    try:
        code, *_ = run(small, "grade", submissions / "right", endless, "--exercises", "norm",
                       "--csv", tmp_path / "marks.csv")
        assert signal.getsignal(number) == usual
    finally:
        signal.signal(number, before)
    assert code == 128 + number
    with open(tmp_path / "marks.csv", newline="", encoding="utf-8") as table:
        assert [Path(row["student"]).name for row in csv.DictReader(table)] == ["right"]
    until(lambda: not alive(int(started.read_text())))


def test_marks_that_were_there_stay_until_there_are_new_ones(small, two, run, tmp_path):
    (tmp_path / "marks.csv").write_text("old marks")
    code, *_ = run(small, "grade", two[0], "--seconds", "0.01", "--exercises", "norm", "--csv",
                   tmp_path / "marks.csv")
    assert code == 2 and (tmp_path / "marks.csv").read_text() == "old marks"


def test_a_submission_that_starts_after_the_end_is_killed(small, monkeypatch):
    ended = SimpleNamespace(is_set=lambda: True)
    monkeypatch.setattr("steerling_min.course.classroom.ENDED", ended)
    began = time.monotonic()
    function = "def forward(self, x):\n    import time\n    time.sleep(60)\n"
    outcomes, reason, _ = run_tests(small, 60.0, EXERCISES["norm"], function)
    assert not outcomes and "ended early" in reason and time.monotonic() - began < 50


def test_the_teacher_may_name_the_exercises(small, two, run):
    assert "norm" not in run(small, "grade", two[1], "--exercises", "alpha")[1]
    for folder in two:
        shutil.rmtree(folder / "steerling_min" / "course")
    assert "give --exercises" in run(small, "grade", *two)[2]


def test_equal_functions_are_run_once(small, two, monkeypatch):
    """Sixty students write few different functions."""
    calls = []
    monkeypatch.setattr("steerling_min.course.classroom.run_tests", lambda *args: (
        calls.append(args), ({"test": ""}, "", 1.0))[1])
    assert all(row["passed"] for row in grade(small, two * 3, [EXERCISES["alpha"]], 9))
    assert len(calls) == 1, "nor is the original run again, which is equal, too"


def test_an_original_that_passes_nothing_gives_no_marks(small, two, run):
    """Else everybody would pass all of no tests."""
    code, out, error = run(small, "grade", two[0], "--seconds", "0.01", "--exercises", "norm")
    assert code == 2 and "the original of norm passes no test here: still running" in error


# ---- a dry run -----------------------------------------------------------------------------------

TWELVE = ["norm", "mask", "angles", "rotate", "attention", "swiglu", "block", "backbone",
          "known-logits", "noise", "nucleus", "alpha"]


@pytest.mark.slow
def test_a_dry_run_of_twelve_exercises_and_eight_submissions(original, run, tmp_path):
    """Each row is right."""
    handout = tmp_path / "handout"
    assert run(original, "handout", handout, *TWELVE)[0] == 0
    assert set(in_a_process(handout).stdout.split()) >= set(TWELVE)

    def submission(name, solved=TWELVE, **instead):
        """A copy of the handout, with these solved, but for a line or a change instead."""
        folder = tmp_path / name
        shutil.copytree(handout, folder)
        for e in sorted(map(EXERCISES.get, solved), key=lambda e: e.name in instead):
            file, change = file_of(e, folder), instead.get(e.name, lambda right: right)
            text, right = read(file), cut(e, read(file_of(e, original)))
            write(file, text.replace(hole(e), change) if isinstance(change, str) else
                  exchanged(e, text, change(right)))
        return folder

    half = TWELVE[:6]
    changed = submission("changed-tests", half)
    for file in (changed / "tests").glob("test_*.py"):
        file.write_text("def test_mask_angle_turn_noise():\n    pass\n")
    folders = [
        submission("all-right"), submission("half-done", half),
        submission("syntax-error", mask="return ("),
        submission("loop", rotate="while True: pass"),
        submission("wrong-mask", mask=lambda x: x.replace(">=", ">")),
        submission("other-names", block=lambda x: x.replace("def forward", "def my_block"),
                   alpha=lambda x: x.replace("def alpha_of", "def solution")),
        changed, submission("os-exit", norm="import os; os._exit(0)")]
    code, out, error = run(original, "grade", *folders, "--seconds", "60", "--json",
                           tmp_path / "marks.json")
    assert code == 0, error
    print(out)
    rows = json.loads((tmp_path / "marks.json").read_text("utf-8"))
    assert len(rows) == 8 * 12
    found = {(Path(row["student"]).name, row["exercise"]): row for row in rows}
    not_passed = {key: row["reason"] for key, row in found.items() if not row["passed"]}
    expected = {
        **{("half-done", name): "not written" for name in TWELVE[6:]},
        **{("changed-tests", name): "not written" for name in TWELVE[6:]},
        **{("syntax-error", name): "never closed (attention.py, line" for name in
           ("mask", "angles", "rotate", "attention")},
        ("loop", "rotate"): "still running after 60 s",
        ("wrong-mask", "mask"): " tests",
        ("other-names", "block"): "block.py has no Block.forward",
        ("other-names", "alpha"): "steering.py has no alpha_of",
        ("os-exit", "norm"): "its tests ended early, with exit code 0"}
    assert not_passed.keys() == expected.keys()
    assert all(expected[key] in reason for key, reason in not_passed.items())
    lines = " ".join(found["wrong-mask", "mask"]["failed"].values())
    assert "AssertionError" in lines, "the first lines teach"


@pytest.mark.slow
def test_a_handout_that_is_solved_passes_all_of_its_tests(original, run, tmp_path):
    handout = tmp_path / "handout"
    assert run(original, "handout", handout, *FEW)[0] == 0
    for name in FEW:
        e = EXERCISES[name]
        write(file_of(e, handout), read(file_of(e, original)))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider"],
        cwd=handout, env={**os.environ, "PYTHONPATH": str(handout), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
