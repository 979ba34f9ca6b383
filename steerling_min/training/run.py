"""A training run and its folder: options, data, state and model.

The folder holds a model that loads, from the first step on and after every save, and beside it:

    run.json              what the model is trained on, and how: options and the data's fingerprint
    training.safetensors  how far it is: the weights and AdamW's two moments of each; as metadata
                          the step, the seconds and the curve so far
    run.lock              locked while a process trains here, so that no second one does

Every file appears whole or not at all. A run that was killed ends as an uninterrupted one would.
There is no generator to save: what a step draws follows from the seed, the step and the progress.
(--minutes makes progress a matter of the clock: such a run goes on, but not to the same weights.)
"""

import json
import math
import os
import shutil
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch depends on it
from safetensors import safe_open
from safetensors.torch import save_file

from ..config import Config
from ..files.checkpoint import INDEX, read_header, require_file
from ..files.config_json import read_config, write_config
from ..files.labels import GET_LABELS, LABELS, Label, Labels, load_labels, write_labels
from ..files.loading import find_checkpoint, find_labels, load_tokenizer
from ..files.tokenizer import RANK_FILE, Tokenizer
from ..files.writing import replacing
from ..model import Steerling
from .distributed import RANK, WORLD

RUN, STATE, LOCK = "run.json", "training.safetensors", "run.lock"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
NOT_KEPT = ("out", "resume", "evaluate")     # options that are about a folder, not about its run
FREE = ("steps", "minutes", "text", "device", "compile")  # they may change when a run goes on
PARENT = os.getppid()
SIGPIPE = 13  # as in `signal`, but on Windows


def read_run(folder: Path) -> tuple[dict, str]:
    """The options of the run in a folder, by name, and its data's fingerprint."""
    if not (folder / RUN).is_file():
        raise FileNotFoundError(f"--resume: {folder} has no {RUN}; leave --resume out to start")
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return {**run["options"]}, run["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / RUN} does not describe a run") from None


def parse_options(parser: ArgumentParser) -> Namespace:
    """Parse the command line. With --resume, options that it lacks are those of the run in --out.

    Raises ValueError with the options that a run cannot change.
    """
    given = parser.parse_args()
    if not given.resume:
        return given
    options, _ = read_run(given.out)
    if given.steps or given.minutes:  # one of them stands for both
        options |= {"steps": None, "minutes": None}
    words = []  # the options as on a command line, so that the parser checks them
    for name, value in options.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value not in (None, False):
            words.append(f"--{name}" if value is True else f"--{name}={value}")
    was, now = (vars(parser.parse_args(words + more)) for more in ([], sys.argv[1:]))
    other = [f"{name} = {was[name]}, not {now[name]}" for name in was
             if name not in NOT_KEPT + FREE and was[name] != now[name]]
    if other:
        raise ValueError(f"--resume: the run in {given.out} has {'; '.join(other)}")
    return Namespace(**now)


class Run:
    """A run in progress. A context: inside it the folder is this process's alone."""

    def __init__(self, args: Namespace):
        self.folder, self.resumed = args.out, args.resume
        self.options = {name: x for name, x in vars(args).items() if name not in NOT_KEPT}
        self.labels, self.n_known = Labels([], 0, 0), 0  # of the model that the run starts from
        self.step, self.seconds, self.history = 0, 0.0, []
        self.signals = []               # that asked it to stop
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.lock = FileLock(self.folder / LOCK, timeout=0)

    def __enter__(self) -> "Run":
        """Raise ValueError or OSError where this run would overwrite another, or a model."""
        if RANK == 0:
            begun = (self.folder / STATE).exists()
            models = [x for x in ("model.safetensors", INDEX) if (self.folder / x).exists()]
            if INDEX in models or models and not begun:
                raise ValueError(f"{self.folder} holds a model ({models[-1]}), and no run that "
                                 "could go on: train into another --out")
            if begun and not self.resumed:
                raise ValueError(f"{self.folder} holds a run already: --resume goes on with it, "
                                 "another --out starts a new one")
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire()
            except Timeout:
                raise ValueError(f"another process trains in {self.folder}") from None
            for rest in self.folder.glob(".tmp??????"):  # safetensors' half-written files
                rest.unlink()
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()

    def start_from(self, name: str | None, device: torch.device
                   ) -> tuple[Steerling, Tokenizer, list[Label]]:
        """What this run goes on from, its own folder or else the checkpoint that `name` means: the
        model, its tokenizer, and a label for each of its concepts (none if none has a name).

        A run's own model comes without weights, which `load` fills in.
        """
        folder = self.folder if self.resumed else find_checkpoint(name)
        config = read_config(require_file(folder, "config.json"))
        tokenizer = load_tokenizer(folder, config)
        self.labels = load_labels(folder / (LABELS + ".csv") if self.resumed else find_labels(name),
                                  config)
        model = (Steerling(config).to(device) if self.resumed else
                 Steerling.from_pretrained(folder, device))
        self.n_known = config.n_concepts if self.labels.known else 0
        return model, tokenizer, [self.labels.label(concept) for concept in range(self.n_known)]

    def begin(self, config: Config, corpus) -> None:
        """Check the data, and write down all of the run that training does not change.

        Raises ValueError where they are not the data that the run began with, or have concepts that
        cannot be told from the model's own.
        """
        if self.resumed and corpus.fingerprint != read_run(self.folder)[1]:
            raise ValueError(f"--resume: the text, or its concepts' names, are not those that the "
                             f"run in {self.folder} began with")
        if corpus.labels and self.labels.n_known > 1 and not self.labels.known:
            raise ValueError("the text has concepts, and the model that the run starts from has "
                             f"none with a name, so they cannot be matched; {GET_LABELS}")
        if RANK == 0:
            run = {"options": self.options, "data": corpus.fingerprint}
            with replacing(self.folder / RUN) as partial:
                partial.write_text(json.dumps(run, indent=2, default=lambda x: str(x.absolute())))
            if not corpus.tokenizer.encoding.name.startswith("cl100k"):  # tiktoken has that one
                corpus.tokenizer.save(self.folder / RANK_FILE)
            labels = Labels([*corpus.labels, *self.labels.unknown.values()], config.n_concepts,
                            config.n_unknown_concepts)
            write_labels(labels, self.folder)
            write_config(config, self.folder)

    # ---- its state -------------------------------------------------------------------------------

    def save(self, model: Steerling, optimizer: torch.optim.AdamW) -> None:
        """Write state and model; those before them stay until these are complete."""
        tensors = {}
        for name, p in model.named_parameters():  # a tied parameter comes once
            tensors[f"weights.{name}"] = p.detach().cpu()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = optimizer.state[p][moment].cpu()
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        with replacing(self.folder / STATE) as partial:
            save_file(tensors, partial, metadata={"run": json.dumps(progress)})
        model.save_pretrained(self.folder)

    def load(self, model: Steerling, optimizer: torch.optim.AdamW) -> None:
        """Put a state back into model and optimizer. Raises FileNotFoundError when there is none,
        ValueError when it is damaged, or not that of this model."""
        if not (self.folder / STATE).is_file():
            raise FileNotFoundError(f"--resume: {self.folder} has no {STATE}; leave --resume out "
                                    "to start")
        expected = {f"{part}.{name}": ("F32", [] if part == "step" else list(p.shape))
                    for name, p in model.named_parameters() for part in ("weights", *MOMENTS)}
        found = {name: (stored["dtype"], stored["shape"])
                 for name, stored in read_header(self.folder / STATE).items()}
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise ValueError(f"{self.folder / STATE}: {name} is {found.get(name)}; this run's "
                                 f"model has {expected.get(name)}")
        with safe_open(self.folder / STATE, framework="pt") as f, torch.no_grad():
            self.step, self.seconds, self.history = read_progress(f.metadata(), self.folder / STATE)
            for name, p in model.named_parameters():
                p.copy_(f.get_tensor(f"weights.{name}"))
                for moment in MOMENTS:
                    optimizer.state[p][moment] = f.get_tensor(f"{moment}.{name}").to(p.device)

    # ---- while it trains -------------------------------------------------------------------------

    def stopped(self) -> int:
        """The signal that has asked this process to stop, or 0. One that torchrun started stops
        when torchrun is gone, too."""
        orphaned = WORLD > 1 and os.getppid() != PARENT
        return next(iter(self.signals), signal.SIGTERM if orphaned else 0)

    @contextmanager
    def stopping_between_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for `stopped` to be asked; the third of them waits no longer."""
        def ask(number, frame):
            self.signals.append(number)
            if len(self.signals) > 2:
                raise KeyboardInterrupt
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in handlers.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def say(self, line: str, passing: bool = False) -> None:
        """Print a line; on a terminal the next one is printed over a passing one. A reader who has
        had enough (`| head`) asks the run to stop."""
        over = passing and self.terminal
        if over:  # a line that wraps could not be printed over
            line = line[: shutil.get_terminal_size().columns - 1]
        try:
            print("\x1b[K" * self.terminal + line, end="\r" if over else "\n", flush=True)
        except OSError:
            self.signals.append(SIGPIPE)


def read_progress(metadata: dict | None, file: Path) -> tuple[int, float, list[dict]]:
    """Step, seconds and history of a state; ValueError where they are none."""
    try:
        step, seconds, history = json.loads((metadata or {})["run"]).values()
        numbers = [seconds, *(x for row in history for x in row.values())]
        fine = (type(step) is int and step >= 0 and seconds >= 0
                and all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
                and all({"step", "held out"} <= row.keys() for row in history))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise ValueError(f"{file} has no step, seconds and loss curve that could be")
    return step, seconds, history
