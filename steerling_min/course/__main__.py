"""The course: take a function out, rebuild it from its docstring until the tests are green.

    python -m steerling_min.course                   # the exercises and the modifications
    python -m steerling_min.course start mask        # blank a function; says how to check it
    python -m steerling_min.course check mask        # run its tests
    python -m steerling_min.course solution mask     # look at the original
    python -m steerling_min.course restore mask      # put it back; your attempt is kept
    python -m steerling_min.course show pre-norm     # what a modification asks for

`start` saves a copy of the whole file in the folder .course; `restore` saves your attempt there.
The course imports no file that it blanks. So it works even while an attempt is not valid Python.
For teachers there are `handout` and `grade`, in classroom.py.
"""

import argparse
import json
import shlex
import subprocess
import sys
import textwrap
from itertools import count
from pathlib import Path

from ..files.cli import Parser, one_line_errors
from .exercises import EXERCISES, HANDED_OUT, MODIFICATIONS, Exercise, Modification
from .functions import blanked, cut, exchanged, file_of, find, hole, read, write

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".course"


def kept(exercise: Exercise) -> Path:
    """The exercise's whole file as it was before `start`."""
    return KEPT / f"{exercise.name}.whole.py"


def state(exercise: Exercise) -> str:
    """Return "blank", "started", "" (neither), or the error that keeps its file from being read."""
    try:
        now = cut(exercise, read(file_of(exercise, ROOT)))
    except (ValueError, SyntaxError, OSError) as error:
        return str(error)
    if hole(exercise) in map(str.strip, now.splitlines()):
        return "blank"
    return "started" if kept(exercise).is_file() and now != original(exercise) else ""


def original(exercise: Exercise) -> str:
    """The function as it was before `start`."""
    file = kept(exercise)
    return cut(exercise, read(file if file.is_file() else file_of(exercise, ROOT)))


# ---- the commands --------------------------------------------------------------------------------


def start(exercise: Exercise) -> None:
    """Blank a function."""
    file = file_of(exercise, ROOT)
    text = read(file)
    line = find(exercise, text).lineno
    if state(exercise):
        raise ValueError(f"{exercise.name} is {state(exercise)} already: write it, or restore it")
    # the file without a blank, where another of its exercises is started already
    whole = [kept(e) for e in EXERCISES.values() if file_of(e, ROOT) == file and kept(e).is_file()]
    write(kept(exercise), read(whole[0]) if whole else text)
    write(file, blanked(exercise, text))
    name = exercise.where.split()[1]
    docstrings = "its docstring and its class's say" if "." in name else "its docstring says"
    print(f"{name} in {file.relative_to(ROOT)}, line {line}, is blank; {docstrings} what it does.\n"
          f"Read: {exercise.read}.\nCheck: python -m steerling_min.course check {exercise.name}\n"
          "(Do not look: .course/, tests/mutants.py and tests/*.json have solutions.)\n"
          f"Give up: python -m steerling_min.course restore {exercise.name}")


def check(exercise: Exercise) -> None:
    """Run its tests."""
    find(exercise, read(file_of(exercise, ROOT)))
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-rs"]
    status = subprocess.run([*pytest, "--exercise", exercise.name, *shlex.split(exercise.tests)],
                            cwd=ROOT).returncode
    blanks = [e.name for e in EXERCISES.values() if state(e) == "blank"]
    if exercise.name in blanks:
        sys.exit(f"{exercise.name} is still blank: {hole(exercise)}")
    if status == 0:
        print(f"{exercise.name}: solved. At the end of a day, run all tests: pytest")
    if blanks:
        print(f"Still blank: {', '.join(blanks)}. Work in the order of the list")
    sys.exit(status)


def solution(exercise: Exercise) -> None:
    """Look at the original."""
    print(textwrap.dedent(original(exercise)), end="")


def restore(exercise: Exercise) -> None:
    """Put the original back; your attempt is kept."""
    if not kept(exercise).is_file():
        raise ValueError(f"{exercise.name} is not started")
    file, whole = file_of(exercise, ROOT), read(kept(exercise))
    text = read(file) if file.is_file() else ""
    try:
        attempt, what = cut(exercise, text), exercise.where
        text = exchanged(exercise, text, cut(exercise, whole))
    except (ValueError, SyntaxError):  # the function cannot be found: all of the file goes back
        attempt, text, what = text, whole, f"all of {file.name}"
    free = next(path for n in count(1) if not (
        path := KEPT / f"{exercise.name}.attempt{'' if n == 1 else n}.py").exists())
    write(free, attempt)
    write(file, text)
    kept(exercise).unlink()
    print(f"{what} is as it was; your attempt is in {free.relative_to(ROOT)}")


def overview(args: argparse.Namespace) -> None:
    """The exercises and the modifications."""
    if args.json:
        exercises = [{**e._asdict(), "state": state(e)} for e in EXERCISES.values()]
        return print(json.dumps({"exercises": exercises, "modifications": [
            m._asdict() for m in MODIFICATIONS.values()]}, indent=1))
    print("Exercises (level, minutes, where): rebuild a function from its docstring and tests\n")
    for e in EXERCISES.values():
        print(f"  {e.name:17} {'*' * e.level:3} {e.minutes:3} min  {e.where}   {state(e)}".rstrip())
    print("\nModifications: change the model, and say first which tests must change\n")
    for m in MODIFICATIONS.values():
        print(f"  {m.name:17} {m.task.split('.')[0]}.")
    print("\npython -m steerling_min.course --help says what to do with them")


def show(modification: Modification) -> None:
    """What a modification asks for."""
    print(textwrap.fill(modification.task, 88))
    print(f"\nWhere: {modification.where}\nThese tests must change:",
          *([f"tests/{test}" for test in modification.changes] or ["none"]), sep="\n  ")
    print("(So may others, by how you do it, and the numbers of lines in tests/test_house.py.)\n"
          f"These must not: {modification.keeps}\nParity with the official package (pytest -k "
          f"'parity or departure'): {modification.parity}")


def main() -> None:
    p = Parser(prog="python -m steerling_min.course", description="The course.")
    p.set_defaults(run=overview, json=False)
    commands = p.add_subparsers(metavar="command")
    listing = commands.add_parser("list", help=overview.__doc__)
    listing.add_argument("--json", action="store_true", help="for programs")
    for run in (check, show) if HANDED_OUT.is_file() else (start, check, solution, restore, show):
        known = MODIFICATIONS if run is show else EXERCISES
        one = commands.add_parser(run.__name__, help=run.__doc__)
        one.add_argument("name", choices=known, metavar="NAME")
        one.set_defaults(run=lambda args, run=run, known=known: run(known[args.name]))
    if not HANDED_OUT.is_file():
        from . import classroom  # a handout has none
        classroom.add_commands(commands, ROOT)
    args = p.parse_args()
    if not (ROOT / "tests").is_dir():
        p.error("the course needs the repository, with its tests, installed by pip install -e .")
    with one_line_errors(p.prog, memory="close other programs"):
        args.run(args)


if __name__ == "__main__":
    main()
