"""Damage at random, a little of each kind: refused in one line, or harmless, but never a fault.

`python tests/attack.py` tries as much as there is time for.
"""

import os

import pytest
from attack import FAULTS, KINDS, attack, outcome

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forks")


SLOW = ("training", "trainings")  # by hand; tests/test_run.py has the trainer's cases


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SLOW])
def test_whatever_is_handed_in_there_is_no_fault(kind):
    counts = attack(kind, cases=6, seed=1)
    assert not any(counts[name] for name in FAULTS), f"{counts}: shown above, with the seed"
    assert counts["one line"], "nothing was refused: does the damage arrive?"


def fault():
    raise KeyError("a bug")


def refused():
    raise ValueError("in one line")


def in_two_lines():
    raise ValueError("in two\nlines")


@pytest.mark.parametrize("call, expected, ended", [
    (lambda: "a", "a", "ok"), (lambda: "a", None, "ok"), (lambda: "b", "a", "other"),
    (refused, None, "one line"), (in_two_lines, None, "traceback"), (fault, None, "traceback"),
    (lambda: os.kill(os.getpid(), 9), None, "crash"),
    (lambda: os.read(os.pipe()[0], 1), None, "hang")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_a_fault_is_seen_as_one(call, expected, ended, tmp_path):
    assert outcome(call, expected, 1.0 if ended == "hang" else 60.0, tmp_path / "log") == ended
