"""What the scripts share: what a user can put right gets one line, not a page."""

import argparse


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, and exits with 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: torch's allocators have no type in common."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate" in str(error))
