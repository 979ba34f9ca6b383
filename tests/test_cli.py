"""Whatever a user can put right ends a command with one line: seen from outside, by a shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from steerling_min.files.cli import Parser, printable

ROOT = Path(__file__).parent.parent
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="pipes and /dev/full are POSIX's")


def shell(body, command):
    """Run `body` under one_line_errors in a process of its own, which `command` starts as $P."""
    code = ("import sys; from steerling_min.files.cli import one_line_errors\n"
            f"with one_line_errors('x.py', 'take less'):\n    {body}\n")
    return subprocess.run(["bash", "-c", command], text=True, capture_output=True, cwd=ROOT,
                          env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "CODE": code,
                               "P": sys.executable})


def test_only_what_is_left_out_becomes_dots():
    assert printable("a" * 80) == "a" * 80 and printable("a" * 81) == "a" * 80 + "..."
    assert printable("ab\n", 2) == "ab..." and printable("a\n", 2) == "a\\n"


def test_a_value_may_begin_with_dashes(capsys):
    parser = Parser()
    parser.add_argument("--prompt")
    assert parser.parse_args(["--prompt=--hello"]).prompt == "--hello"
    with pytest.raises(SystemExit):
        parser.parse_args(["--prompt=--"])
    assert "-- is no value" in capsys.readouterr().err


@POSIX
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_one_line():
    found = shell("print('text')", '"$P" -c "$CODE" > /dev/full')
    assert found.returncode == 2 and found.stderr == "x.py: No space left on device\n", (
        "flushed inside, where an error is still one line, and not once more at the end")


@POSIX
def test_a_file_that_is_wrong_leaves_the_output_as_it_is():
    found = shell("print('text'); open('/nowhere/x')", '"$P" -c "$CODE"')
    assert found.returncode == 2 and found.stdout == "text\n", "what was printed is not lost"
    assert found.stderr == "x.py: No such file or directory: '/nowhere/x'\n"


@POSIX
@pytest.mark.parametrize("body, kind", [("{}['x']", "KeyError"), ("[][1]", "IndexError"),
                                        ("1 / 0", "ZeroDivisionError"), ("None.x", "AttributeE")])
def test_a_bug_keeps_its_traceback(body, kind):
    found = shell(body, '"$P" -c "$CODE"')
    assert found.returncode == 1 and "Traceback" in found.stderr and kind in found.stderr, (
        "one line is for what a user can put right")


@POSIX
def test_a_reader_that_has_had_enough_ends_it_silently():
    found = shell("for i in range(10**5): print(i)", '"$P" -c "$CODE" | head -n 1; '
                  'echo "${PIPESTATUS[0]}"')
    assert found.stdout == "0\n141\n" and found.stderr == "", "as a process that SIGPIPE ends"


@POSIX
@pytest.mark.parametrize("stream, body", [("2", "raise ValueError('wrong')"), ("1", "print(1)")])
def test_a_closed_stream_is_no_error_of_its_own(stream, body):
    found = shell(body, f'"$P" -c "$CODE" {stream}>&-; echo "status $?"')
    assert found.stdout == f"status {2 if stream == '2' else 0}\n" and found.stderr == ""
