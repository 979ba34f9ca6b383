"""For the teacher: hand exercises out as a repository of their own, and grade what comes back.

    python -m steerling_min.course handout FOLDER mask rotate   # or --level 1, or --all
    python -m steerling_min.course grade FOLDER [FOLDER ...] --csv marks.csv

Grading takes the exercises' functions out of each submission, and nothing else. Each is put into a
fresh copy of this repository, alone, and its tests run there in a process with a time limit.

That is not a sandbox. A submission's code runs as you, can read your files and use your network,
and it can forge its mark. Grade people whom you do not trust in a container.
"""

import ast
import csv
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from textwrap import indent
from xml.etree import ElementTree

from .exercises import EXERCISES, HANDED_OUT, Exercise
from .functions import blanked, exchanged, file_of, find, read, write

# A handout lacks these files: they quote solutions, grade submissions, or only look after this
# repository. The numbers of the official package stay, because tests of exercises read them.
TEACHERS = [".ci", ".github/workflows/test.yml", "tests/mutants.py", "tests/mistakes.json",
            "tests/equivalent.json", "tests/test_course.py", "tests/test_classroom.py",
            "tests/test_house.py", "tests/test_readme.py", *(f"steerling_min/course/{name}" for name
            in ("classroom.py", "classroom.yml", "handout.md", "answers.md"))]
RUNNING: set[subprocess.Popen] = set()  # submissions under test
ENDED = threading.Event()               # grading is over: no more of them
STOPS = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
SECTIONS = ("The idea", "On the command", "From Python", "Reading order")
# The same author and date make the same commit; nobody's own configuration of git is read.
WHO = {"NAME": "steerling_min", "EMAIL": "course@localhost", "DATE": "2026-01-01T00:00:00Z"}
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1",
       **{f"GIT_{role}_{key}": WHO[key] for role in ("AUTHOR", "COMMITTER") for key in WHO}}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **GIT}, check=True,
                          stdout=subprocess.PIPE, text=True).stdout


# ---- handing out ---------------------------------------------------------------------------------


def handout(root: Path, args: Namespace) -> None:
    """Write a repository of one commit, with the exercises' functions blank."""
    chosen = [e for e in EXERCISES.values() if args.all or e.level == args.level or e in args.names]
    if not chosen:
        raise ValueError("name exercises, or give --level or --all")
    folder, names = args.folder, [e.name for e in chosen]
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    # the files as they were committed: no attempts and no stray files
    git(root, "checkout-index", "--all", f"--prefix={folder.resolve()}/")
    for path in (folder / name for name in TEACHERS):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for e in chosen:
        write(file_of(e, folder), blanked(e, read(file_of(e, folder))))
    write(folder / ".github" / "workflows" / "classroom.yml", workflow(names))
    write(folder / "README.md", readme(chosen, read(folder / "README.md")))
    write(folder / "steerling_min" / "course" / HANDED_OUT.name, "\n".join(names) + "\n")
    git(folder, "init", "--quiet", "--template=", "--initial-branch=main")
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "Exercises: " + ", ".join(names))
    print(f"{folder}: {len(chosen)} exercises, {sum(e.minutes for e in chosen)} minutes, "
          f"commit {git(folder, 'rev-parse', 'HEAD')[:12]}")


def readme(chosen: list[Exercise], ours: str) -> str:
    """What students do, and then those sections of our README that they read."""
    rows = (f"| {e.name} | {'*' * e.level} | {e.minutes} | `{e.where.replace(' ', '`, `')}` | "
            f"{e.read} |" for e in chosen)
    sections = [part for part in ours.split("\n## ") if part.startswith(SECTIONS)]
    text = read(Path(__file__).with_name("handout.md")).format(
        first=chosen[0].name, table="\n".join(rows), sections="\n## ".join(sections))
    return "".join(line for line in text.splitlines(True) if "mutants.py" not in line)


def workflow(names: list[str]) -> str:
    """Fill in the template classroom.yml for these exercises.

    Marker comments cut the template into parts. Every second part is repeated for each exercise.
    """
    parts = read(Path(__file__).with_name("classroom.yml")).split("# for each exercise\n")
    parts[1::2] = ["".join(part.replace("NAME", name).replace("UPPER", name.upper())
                           for name in names) for part in parts[1::2]]
    return "".join(parts).replace("ALL", ",".join(names))


# ---- grading -------------------------------------------------------------------------------------


def grade(root: Path, folders: list[Path], chosen: list[Exercise], limit: float
          ) -> Generator[dict, None, None]:
    """A row for each exercise of each submission."""
    pool = ThreadPoolExecutor(os.cpu_count())
    with tempfile.TemporaryDirectory() as clean, ending(pool):
        git(root, "checkout-index", "--all", f"--prefix={clean}/")
        original = Path(clean)
        run = cache(partial(run_tests, original, limit))  # equal functions are run once
        right = {e: pool.submit(run, e, function_of(e, original)) for e in chosen}
        yield from pool.map(lambda folder, e: row(original, folder, e, right[e], run),
                            [folder for folder in folders for _ in chosen], chosen * len(folders))


@contextmanager
def ending(pool: ThreadPoolExecutor) -> Iterator[None]:
    """At the end, that by Ctrl-C included, nothing goes on: no waiting exercise, no submission."""
    try:
        yield
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        ENDED.set()
        for child in list(RUNNING):
            kill(child)
        pool.shutdown()
        ENDED.clear()


def row(original: Path, folder: Path, exercise: Exercise, right: Future, run: Callable) -> dict:
    """Mark one exercise of one submission: a row with passed, reason, failed tests and seconds.

    The function passes if it passes every test that the original function passes. `right` holds
    what `run` returned for the original. Raises ValueError if the original passes no test.
    """
    expected, why, _ = right.result()
    must = [test for test, line in expected.items() if not line]
    if not must:
        raise ValueError(f"the original of {exercise.name} passes no test here: {why}")
    outcomes, seconds = {}, 0.0
    try:
        function, reason = function_of(exercise, folder), "not written"
        if function != function_of(exercise, original, blanked):
            outcomes, reason, seconds = run(exercise, function)
    except (ValueError, SyntaxError, OSError, RecursionError, MemoryError) as error:
        reason = ("its file is not UTF-8 text" if isinstance(error, UnicodeError)
                  else printable(str(error)))
    failed = {} if reason else {test: outcomes.get(test, "did not run") for test in must
                                if outcomes.get(test) != ""}
    reason = reason or (f"failed {len(failed)} of {len(must)} tests" if failed else "")
    return {"student": str(folder), "exercise": exercise.name, "passed": not reason,
            "reason": reason, "failed": failed, "seconds": round(seconds, 1)}


def function_of(exercise: Exercise, folder: Path, change=lambda exercise, text: text) -> str:
    """The function's code in a folder's file, whose text may be changed first."""
    file = file_of(exercise, folder)
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    return ast.unparse(find(exercise, change(exercise, read(file))))


def run_tests(original: Path, limit: float, exercise: Exercise,
              function: str) -> tuple[dict[str, str], str, float]:
    """Run an exercise's tests on a copy of the repository with this function in its place.

    Returns {test: its first line of complaint, or "" if it passed}; the reason why there is no
    report, or "" if there is one; and the seconds that it took.
    """
    began, outcomes, nowhere = time.monotonic(), {}, subprocess.DEVNULL
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder, report = Path(temporary, "repository"), Path(temporary, "report.xml")
        shutil.copytree(original, folder)
        file, margin = file_of(exercise, folder), "    " * (exercise.where.count(".") - 1)
        write(file, exchanged(exercise, read(file), indent(function, margin) + "\n"))
        with subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider",
                 f"--junitxml={report}", *shlex.split(exercise.tests)],
                cwd=folder, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=nowhere, stdout=nowhere, stderr=nowhere) as child:
            RUNNING.add(child)
            if ENDED.is_set():
                kill(child)
            try:
                code = child.wait(limit)
                reason = (f"{file.name} cannot be imported with it" if code == 4 else
                          f"its tests ended early, with exit code {code}")
            except subprocess.TimeoutExpired:
                reason = f"still running after {limit:g} s"
            kill(child)
            RUNNING.discard(child)
        with suppress(OSError, ElementTree.ParseError):  # pytest may have come to no report
            outcomes, reason = read_report(report), ""
    return outcomes, reason, time.monotonic() - began


def kill(child: subprocess.Popen) -> None:
    """End a process, and what it started."""
    child.kill()
    with suppress(OSError, AttributeError):  # Windows has no such groups
        os.killpg(child.pid, signal.SIGKILL)


def read_report(report: Path) -> dict[str, str]:
    """pytest's report of a run: of each test, nothing or the first line that it says."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [x for x in case if x.tag in ("failure", "error", "skipped")]
        lines = [line[1:].strip() for x in bad for line in (x.text or "").splitlines()
                 if line.startswith("E ")]
        test = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        outcomes[test] = printable([*lines, *(x.tag for x in bad), ""][0])
    return outcomes


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


# ---- the commands --------------------------------------------------------------------------------


def exercise(name: str) -> Exercise:
    if name not in EXERCISES:
        raise ValueError(f"no exercise is called {name}")
    return EXERCISES[name]


def add_commands(commands, root: Path) -> None:
    p = commands.add_parser("handout", help="For teachers: a repository with exercises blank.")
    p.add_argument("folder", type=Path)
    p.add_argument("names", nargs="*", type=exercise, help="of exercises")
    p.add_argument("--level", type=int, choices=(1, 2, 3), help="all of a level")
    p.add_argument("--all", action="store_true")
    p.set_defaults(run=partial(handout, root))
    p = commands.add_parser("grade", help="For teachers: marks for submissions.")
    p.add_argument("folders", type=Path, nargs="+", help="a submission each")
    p.add_argument("--exercises", dest="names", nargs="+", type=exercise, metavar="NAME",
                   help="grade these exercises, whatever the folders say was handed out")
    p.add_argument("--seconds", type=float, default=60, help="for an exercise's tests (60)")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the marks as JSON")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the marks as a table")
    p.set_defaults(run=partial(mark, root))


def mark(root: Path, args: Namespace) -> None:
    lists = [folder / "steerling_min" / "course" / HANDED_OUT.name for folder in args.folders]
    given = {x for y in lists if y.is_file() for x in read(y).split()}
    chosen = [e for e in EXERCISES.values() if (e in args.names if args.names else e.name in given)]
    if none := [folder for folder in args.folders if not folder.is_dir()]:
        raise ValueError(f"{none[0]} is no folder: unpack what was handed in")
    if not chosen:
        raise ValueError("no folder says what was handed out: give --exercises NAME ...")
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds {args.seconds}: above 0")
    if args.csv and args.csv == args.json:
        raise ValueError(f"--csv and --json would both write {args.csv}: give two files")
    for file in filter(None, (args.csv, args.json)):
        open(file, "a").close()  # if it cannot be written, say so now
    before = {n: signal.signal(n, lambda n, _: sys.exit(128 + n)) for n in STOPS
              if signal.getsignal(n) != signal.SIG_IGN}
    rows = []
    try:
        with closing(grade(root, args.folders, chosen, args.seconds)) as graded:
            for row in graded:
                rows.append(row)
                said = [row["reason"] or "passed", *map(": ".join, row["failed"].items())]
                print(f"{row['student']:24} {row['exercise']:17} {'; '.join(said[:2])}", flush=True)
    finally:  # if the teacher presses Ctrl-C, the marks so far are written
        if rows:
            save_marks(rows, args)
        for n, handler in before.items():
            signal.signal(n, handler)
    for folder in args.folders:
        marks = [row["passed"] for row in rows if row["student"] == str(folder)]
        print(f"{str(folder):24} {sum(marks)} of {len(marks)} passed")


def save_marks(rows: list[dict], args: Namespace) -> None:
    if args.json:
        write(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv:
        with open(args.csv, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows({**row, "failed": "; ".join(map(": ".join, row["failed"].items()))}
                            for row in rows)
