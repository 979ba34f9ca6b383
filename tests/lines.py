"""Lines of code, without blank lines, comments and docstrings: python tests/lines.py"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = sorted(file for file in (ROOT / "steerling_min").glob("*.py") if file.name != "__init__.py")
SHELVES = sorted((ROOT / "steerling_min").glob("*/*.py"))
SCRIPTS = [ROOT / "sample.py", ROOT / "train_tiny.py"]


def lines_of_code(file: Path) -> int:
    """How many lines of a Python file do something."""
    text, documented = file.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if (isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
                and ast.get_docstring(node)):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(number not in documented and bool(line.strip()) and not line.strip().startswith("#")
               for number, line in enumerate(text.splitlines(), start=1))


def main() -> None:
    for title, files in (("the core", CORE), ("the shelves", SHELVES), ("the scripts", SCRIPTS)):
        for file in files:
            if lines_of_code(file):
                print(f"{lines_of_code(file):6}  {file.relative_to(ROOT)}")
        print(f"{sum(map(lines_of_code, files)):6}  {title}\n")


if __name__ == "__main__":
    main()
