"""What the scripts share: wrong arguments get one line, not a page."""

import argparse


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, and exits with 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")
