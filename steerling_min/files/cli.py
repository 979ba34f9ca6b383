"""What the commands share: errors that a user can put right are printed as one line of text."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CalledProcessError

from safetensors import SafetensorError


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, and exits with 2."""

    def parse_known_args(self, args=None, namespace=None):
        for arg in sys.argv[1:] if args is None else args:
            if re.fullmatch("--[a-z-]+=--", arg):  # argparse would take it for no value at all
                self.error(f"{arg}: -- is no value")
        return super().parse_known_args(args, namespace)

    def given(self, args: argparse.Namespace) -> dict:
        """The options whose values are not the defaults."""
        return {name: x for name, x in vars(args).items() if x != self.get_default(name)}

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message, 1000)} (--help lists the options)\n")


def printable(text: str, most: int = 80) -> str:
    """Make text from outside, such as a name, safe to print as part of one line.

    Characters that would break the line or steer the terminal become escapes (\\n, \\x1b). Of a
    text with more than `most` characters the first `most` are shown, then "...".
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                    for c in text[:most])
    return shown + "..." * (len(text) > most)


@contextmanager
def one_line_errors(prog: str, memory: str) -> Iterator[None]:
    """End the program with one line and status 2 when the user can put the error right.

    Such errors are: wrong values, wrong files, missing extras, an exercise of the course that is
    still blank or no valid Python, another program that failed, and too little memory (`memory`
    says what needs less). Any other error keeps its traceback.
    Ctrl-C ends the program with status 130. If the reader of its output goes away (`| head`), it
    ends with 141, the status of a process that SIGPIPE ends.
    """
    def nowhere():
        return open(os.devnull, "w", encoding="utf-8")

    def end(message):
        message = re.sub(r"\[Errno \d+\] ", "", str(message))
        print(f"{prog}: {printable(message, 1000)}", file=sys.stderr)
        sys.exit(2)
    sys.stdout, sys.stderr = sys.stdout or nowhere(), sys.stderr or nowhere()  # None: it is closed
    try:
        yield
        sys.stdout.flush()  # here, where an error is still one line
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stdout = nowhere()  # nothing more to flush to
        sys.exit(141)
    except (ValueError, OSError, ImportError, SyntaxError, SafetensorError,
            CalledProcessError) as error:
        if isinstance(error, OSError) and error.filename is None:  # of no file: the output is full
            sys.stdout = nowhere()
        end(error)
    except NotImplementedError as error:
        kind, _, name = str(error).partition(": ")
        if "aten::" in kind:  # PyTorch's name of an operator
            end("this device lacks something that the model needs; --device cpu has it ("
                + kind.partition(". ")[0] + ")")
        if kind != "exercise":
            raise
        end(f"the exercise {name} is not written yet: write it, or (not in a handout) put the "
            f"original back by python -m steerling_min.course restore {name}")
    except (MemoryError, RuntimeError) as error:  # torch's allocators have no type in common
        if "BackendCompilerFailed" in [kind.__name__ for kind in type(error).__mro__]:
            end("--compile needs a C++ compiler that works: " + str(error).partition("\n")[0])
        if re.search("gloo|NCCL", str(error)):  # what connects the processes of a training run
            end("another process of this run has ended, so this one does; what was saved is "
                "intact: --resume goes on")
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        end(f"not enough memory: {memory}")
