"""The course as two tables: functions to rebuild, and changes to make to the model.

They stand in `exercises.json`. The exercises have an order in which each can be checked while all
that follow are blank.
"""

import json
from pathlib import Path
from typing import NamedTuple

HANDED_OUT = Path(__file__).with_name("handed_out.txt")  # only in a handout: names of its exercises
TABLES = json.loads(Path(__file__).with_name("exercises.json").read_text(encoding="utf-8"))


class Exercise(NamedTuple):
    name: str
    where: str    # file in steerling_min/ and function: "block.py MLP.forward"
    level: int    # 1 easy, 2 middling, 3 hard
    minutes: int  # for somebody who knows PyTorch
    read: str     # besides the docstring
    tests: str    # arguments of pytest


class Modification(NamedTuple):
    name: str
    task: str
    where: str
    changes: list[str]   # tests that must change
    parity: str          # with the weights and texts of the official package: what becomes of it
    keeps: str           # tests that must not change


EXERCISES = {e["name"]: Exercise(**e) for e in TABLES["exercises"]}
if HANDED_OUT.is_file():
    EXERCISES = {name: EXERCISES[name] for name in HANDED_OUT.read_text("utf-8").split()}
MODIFICATIONS = {m["name"]: Modification(**m) for m in TABLES["modifications"]}
