"""The course: take a function out, rebuild it from its docstring until the tests are green.

    python -m steerling_min.course                   # the exercises and the modifications
    python -m steerling_min.course start mask        # blank a function; says how to check it
    python -m steerling_min.course check mask        # run its tests
    python -m steerling_min.course solution mask     # look at the original
    python -m steerling_min.course restore mask      # put it back; your attempt is kept
    python -m steerling_min.course show pre-norm     # what a modification asks for

What `start` takes out is kept in the folder .course, and so is what `restore` takes out.
"""

import ast
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from ..files.cli import Parser
from ..files.writing import replacing
from .exercises import EXERCISES, MODIFICATIONS, Exercise, Modification

ROOT = Path(__file__).parents[2]
KEPT = ROOT / ".course"


# ---- a function in its file ----------------------------------------------------------------------


def file_of(exercise: Exercise) -> Path:
    return ROOT / "steerling_min" / exercise.where.split()[0]


def find(exercise: Exercise, text: str) -> ast.FunctionDef:
    """The exercise's function in its file's text. Raises ValueError when it is not there."""
    node = ast.parse(text)
    for name in exercise.where.split()[1].split("."):
        inside = [x for x in node.body if getattr(x, "name", None) == name]
        if not inside:
            raise ValueError(f"{file_of(exercise)} has no {exercise.where.split()[1]}")
        node = inside[0]
    return node


def lines_of(node: ast.FunctionDef) -> slice:
    """Which lines of the file hold the function, decorators included."""
    return slice(min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno)


def replace(exercise: Exercise, new: str) -> str:
    """Put `new` in the place of the function in its file; returns what was there."""
    file = file_of(exercise)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    where = lines_of(find(exercise, "".join(lines)))
    old = "".join(lines[where])
    lines[where] = [new]
    with replacing(file) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return old


def blank(exercise: Exercise, text: str) -> str:
    """The exercise's function out of its file's text, with its body below the docstring gone."""
    node = find(exercise, text)
    body, lines = node.body[0], text.splitlines(keepends=True)
    kept = lines[lines_of(node).start:body.end_lineno]
    return "".join(kept) + " " * body.col_offset + (
        f'raise NotImplementedError("exercise: {exercise.name}")\n')


# ---- the commands --------------------------------------------------------------------------------


def start(exercise: Exercise) -> None:
    file = file_of(exercise)
    text = file.read_text(encoding="utf-8")
    git = subprocess.run(["git", "status", "--porcelain", "--", file], cwd=ROOT,
                         capture_output=True, text=True)
    if git.returncode == 0 and git.stdout:
        raise ValueError(f"{file.relative_to(ROOT)} has changes that are not committed: commit "
                         "them, or restore the exercise that you have started there")
    if f'"exercise: {exercise.name}"' in text:
        raise ValueError(f"{exercise.name} is started already: write it, or restore it")
    KEPT.mkdir(exist_ok=True)
    with replacing(KEPT / f"{exercise.name}.py") as kept:
        kept.write_text(current(exercise), encoding="utf-8")
    replace(exercise, blank(exercise, text))
    name, docstrings = exercise.where.split()[1], "its docstring says"
    if "." in name:
        docstrings = "its docstring and its class's say"
    print(f"{name} in {file.relative_to(ROOT)}, line {find(exercise, text).lineno}, is blank; "
          f"{docstrings} what it does.\nRead: {exercise.read}.\n"
          f"Check: python -m steerling_min.course check {exercise.name}\n"
          "(tests/mutants.py quotes solutions.)\n"
          f"Give up: python -m steerling_min.course restore {exercise.name}")


def check(exercise: Exercise) -> None:
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short"]
    status = subprocess.run([*pytest, *shlex.split(exercise.tests)], cwd=ROOT).returncode
    if status == 0:
        print(f"{exercise.name}: solved. At the end of a day, run all tests: pytest")
    sys.exit(status)


def solution(exercise: Exercise) -> None:
    print(textwrap.dedent(original(exercise)), end="")


def restore(exercise: Exercise) -> None:
    kept = KEPT / f"{exercise.name}.py"
    if not kept.is_file():
        raise ValueError(f"{exercise.name} is not started")
    attempt = KEPT / f"{exercise.name}.attempt.py"
    old = replace(exercise, kept.read_text(encoding="utf-8"))
    attempt.write_text(old, encoding="utf-8")
    kept.unlink()
    print(f"{exercise.where} is as it was; your attempt is in {attempt.relative_to(ROOT)}")


def original(exercise: Exercise) -> str:
    """The function as it was before `start`."""
    kept = KEPT / f"{exercise.name}.py"
    return kept.read_text(encoding="utf-8") if kept.is_file() else current(exercise)


def current(exercise: Exercise) -> str:
    """The function as it is."""
    text = file_of(exercise).read_text(encoding="utf-8")
    return "".join(text.splitlines(keepends=True)[lines_of(find(exercise, text))])


def overview() -> None:
    print("Exercises (level, minutes, where): rebuild a function from its docstring and tests\n")
    for e in EXERCISES.values():
        started = "   started" if current(e) != original(e) else ""
        print(f"  {e.name:17} {'*' * e.level:3} {e.minutes:3} min  {e.where}{started}")
    print("\nModifications: change the model, and say first which tests must change\n")
    for m in MODIFICATIONS.values():
        print(f"  {m.name:17} {m.task.split('.')[0]}.")
    print("\npython -m steerling_min.course start NAME, check, solution, restore; show NAME for a "
          "modification")


def show(modification: Modification) -> None:
    print(textwrap.fill(modification.task, 88))
    print(f"\nWhere: {modification.where}\nThese tests must change:")
    for test in modification.changes:
        print(f"  {test}")
    print("And parity with the official weights is lost, as it should be (pytest -k 'parity or "
          "departure');\nso is what the bundled model has learnt, until it is trained anew."
          if modification.breaks_parity else "Parity must stay (pytest -k parity).")
    print(f"These must not: {modification.keeps}")


def main() -> None:
    p = Parser(prog="python -m steerling_min.course", description="The course.")
    commands = {"start": start, "check": check, "solution": solution, "restore": restore,
                "show": show}
    p.add_argument("command", nargs="?", choices=commands)
    p.add_argument("name", nargs="?", help="of an exercise; of a modification for show")
    args = p.parse_args()
    if args.command is None:
        overview()
        return
    known = MODIFICATIONS if args.command == "show" else EXERCISES
    if args.name not in known:
        p.error(f"{args.command} {args.name or ''}: the names are {', '.join(known)}")
    if not (ROOT / "tests").is_dir():
        p.error("the course needs the repository, with its tests, installed by pip install -e .")
    try:
        commands[args.command](known[args.name])
    except (ValueError, OSError, SyntaxError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
