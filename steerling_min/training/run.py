"""A training run and its folder: options, data, state and model.

The folder holds a model that can be loaded, even before the first step. Beside the model is what
the run needs to go on:

    run.json              what the model is trained on, and how: options and the data's fingerprint
    training.safetensors  how far it is: the weights and the optimizer's moments of each; as
                          metadata the step, the seconds and the curve so far
    run.lock              locked while a process trains here, so that no second one does

Every file appears whole or not at all. A run that was killed and resumed ends as an uninterrupted
one. There is no generator to save: what a step draws follows from the seed, the step and the
progress. (With --minutes, progress depends on the clock: such a run can go on, but its weights
differ.)
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
from itertools import chain
from pathlib import Path

import torch
from filelock import FileLock, Timeout  # torch depends on it
from safetensors import safe_open
from torch import Tensor
from torch.optim import AdamW

from ..config import Config
from ..files.checkpoint import (INDEX, LM_HEAD, empty_model, match_tensors, read_header,
                                save_tensors, weight_files)
from ..files.config_json import write_generation
from ..files.labels import GET_LABELS, LABELS, Label, Labels, load_labels, write_labels
from ..files.loading import find_checkpoint, find_labels, load_tokenizer
from ..files.tokenizer import RANK_FILE, Tokenizer
from ..files.writing import replacing, stream_tensors
from ..model import Steerling
from .data import Stories, Texts
from .distributed import RANK, WORLD, put, whole

RUN, STATE, LOCK = "run.json", "training.safetensors", "run.lock"
NOT_KEPT = ("out", "resume", "evaluate")  # options that are about a folder, not about its run
# options that may change when a run goes on
FREE = ("steps", "minutes", "text", "concepts", "device", "compile", "recompute")
PARENT = os.getppid()


def read_run(folder: Path) -> dict:
    """What run.json says: {"options": {name: value}, "data": fingerprint}."""
    if not (folder / RUN).is_file():
        raise FileNotFoundError(f"--resume: {folder} has no {RUN}; leave --resume out to start")
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        return {"options": {**run["options"]}, "data": run["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{folder / RUN} does not describe a run") from None


def parse_options(parser: ArgumentParser) -> Namespace:
    """Parse the command line. With --resume, options that it lacks are those of the run in --out.

    Raises ValueError with the options that a run cannot change.
    """
    given = parser.parse_args()
    if not given.resume:
        return given
    options = read_run(given.out)["options"]
    if given.steps or given.minutes:  # one of them stands for both
        options |= {"steps": None, "minutes": None}
    words = []  # the options as on a command line, so that the parser checks them
    for name, value in options.items():
        if value not in (None, False, []):
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name}", *map(str, values)]
    was, now = (vars(parser.parse_args(words + more)) for more in ([], sys.argv[1:]))
    other = [f"{name} = {was[name]}, not {now[name]}" for name in was
             if name not in NOT_KEPT + FREE and was[name] != now[name]]
    if other:
        raise ValueError(f"--resume: the run in {given.out} has {'; '.join(other)}")
    return Namespace(**now)


class Run:
    """A run in progress. As a context manager, it gives up the lock on its folder at the end."""

    def __init__(self, args: Namespace):
        """Raises ValueError or OSError where this run would overwrite another, or a model."""
        self.folder, self.resumed = args.out, args.resume
        self.options = {name: x for name, x in vars(args).items() if name not in NOT_KEPT}
        self.labels = Labels([], 0, 0)  # of the model that the run starts from
        self.step, self.seconds = 0, 0.0
        self.history: list[dict] = []
        self.signals: list[int] = []  # that asked it to stop
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.lock = FileLock(self.folder / LOCK, timeout=0)
        if RANK > 0:
            return
        held = [x for x in (RUN, INDEX, "model.safetensors") if (self.folder / x).exists()]
        if held and not self.resumed:
            raise ValueError(f"{self.folder} holds a run already: --resume goes on with it, "
                             "another --out starts a new one" if held[0] == RUN else
                             f"{self.folder} holds a model ({held[0]}), and no run that could go "
                             "on: train into another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"another process trains in {self.folder}") from None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        self.lock.release()

    # ---- how it begins ---------------------------------------------------------------------------

    def start_from(self, name: str | None
                   ) -> tuple[Steerling | None, Tokenizer | None, list[Label]]:
        """Find what this run starts from: its own folder if it is resumed, else the checkpoint that
        `name` means. With neither, returns None, None and no labels.

        Returns a model that has no numbers yet (`stored_weight` reads them), its tokenizer, and a
        label for each of its known concepts. There are no labels if no known concept has a name.
        """
        if not (self.resumed or name):
            return None, None, []
        folder = self.folder if self.resumed else find_checkpoint(name)
        model, tokenizer = empty_model(folder), load_tokenizer(folder)
        self.n_stored = model.config.n_concepts
        self.stored = match_tensors(model, weight_files(folder))
        own = self.folder / (LABELS + ".csv") if self.resumed else None
        self.labels = load_labels(own or find_labels(name), model.config)
        return model, tokenizer, self.labels.all_known()

    def stored_weight(self, name: str, shape: torch.Size, config: Config) -> Tensor:
        """Read a parameter of the checkpoint that the run starts from.

        It is mapped from the file, so only what is used is read. If concepts were added, a
        parameter of the known head gets rows for them. Each new row is the mean of the old
        concepts' rows, whether or not the checkpoint has padding in its place.
        """
        stored = name if name in self.stored else LM_HEAD  # of the tied pair either is there
        with safe_open(self.stored[stored], framework="pt") as f:
            weight = f.get_tensor(stored)
        if name.startswith("known_head.") and config.n_concepts > self.n_stored:
            known = weight[: self.n_stored]
            weight = torch.cat([known, known.mean(0).expand(shape[0] - len(known), -1)])
        return weight

    def begin(self, model: Steerling, optimizer: AdamW, corpus: Stories | Texts) -> None:
        """Load the state of a resumed run into model and optimizer, or save that of a new run.

        The save comes before the first step, so that a folder that cannot be written is noticed at
        once. Raises ValueError when a resumed run has other data than it began with. Also raises it
        when the data have concepts and the model's concepts have no names: these cannot be matched.
        """
        if self.resumed:
            if corpus.fingerprint != read_run(self.folder)["data"]:
                raise ValueError("--resume: the text, or its concepts' names, are not those that "
                                 f"the run in {self.folder} began with")
            self.load(model, optimizer)
            if self.done() >= 1:
                raise ValueError(f"--resume: the run in {self.folder} is over, at step "
                                 f"{self.step}: give more --steps or --minutes")
        elif corpus.labels and self.labels.n_known > 1 and not self.labels.known:
            raise ValueError("the text has concepts, and the model that the run starts from has "
                             f"none with a name, so they cannot be matched; {GET_LABELS}")
        else:
            if RANK == 0:
                self.write_beside(model, corpus)
            self.save(model, optimizer)
        if RANK == 0:
            run = {"options": self.options, "data": corpus.fingerprint}
            with replacing(self.folder / RUN) as partial:
                partial.write_text(json.dumps(run, indent=2, default=lambda x: str(x.absolute())))

    def write_beside(self, model: Steerling, corpus: Stories | Texts) -> None:
        """Write what the folder of a new run has besides model and state."""
        if not corpus.tokenizer.encoding.name.startswith("cl100k"):  # tiktoken has that one
            corpus.tokenizer.save(self.folder / RANK_FILE)
        write_labels(Labels([*corpus.labels, *self.labels.unknown.values()],
                            model.config.n_concepts, model.config.n_unknown_concepts),
                     self.folder)
        if isinstance(corpus, Stories):  # they repeat names on purpose, and end
            write_generation(self.folder, max_new_tokens=250, repetition_penalty=1.0,
                             allow_eos=True)

    def save(self, model: Steerling, optimizer: AdamW) -> None:
        """Write model and state; those before them stay until these are complete. Every process
        gives its part of each tensor, the first one writes."""
        state = tensors_of(model, optimizer)
        weights, tensors = ((whole(x.detach()).cpu() for x in xs)
                            for xs in (model.parameters(), state.values()))
        if RANK > 0:
            for _ in chain(weights, tensors):
                pass
            return
        save_tensors(model, weights, self.folder)
        progress = {"step": self.step, "seconds": self.seconds, "history": self.history}
        with replacing(self.folder / STATE) as partial:
            stream_tensors(partial, {name: x.shape for name, x in state.items()}, tensors,
                           {"run": json.dumps(progress)})

    def load(self, model: Steerling, optimizer: AdamW) -> None:
        """Put a state back. Raises ValueError when it is damaged, or not of this model."""
        file, tensors = self.folder / STATE, tensors_of(model, optimizer)
        expected = {name: ("F32", list(x.shape)) for name, x in tensors.items()}
        found = read_header(file)
        for name in expected | found:
            if found.get(name) != expected.get(name):
                raise ValueError(f"{file}: {name} is {found.get(name)}; this run's model has "
                                 f"{expected.get(name)}")
        with safe_open(file, framework="pt") as f:
            self.step, self.seconds, self.history = read_progress(f.metadata(), file)
            for name, x in tensors.items():
                put(x, f.get_tensor(name))

    # ---- while it trains -------------------------------------------------------------------------

    def done(self) -> float:
        """The share of its steps, or of its minutes, that is done."""
        steps, minutes = (self.options[name] or math.inf for name in ("steps", "minutes"))
        return max(self.step / steps, self.seconds / 60 / minutes)

    def stopped(self) -> int:
        """The signal that has asked this process to stop, or 0. One of several processes also stops
        when torchrun, which started it, is gone."""
        orphaned = WORLD > 1 and os.getppid() != PARENT
        return (self.signals or [signal.SIGTERM * orphaned])[0]

    @contextmanager
    def stopping_between_steps(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP end the run after its step; the third one ends it at once."""
        def ask(number, frame):
            self.signals.append(number)
            if len(self.signals) > 2:
                raise KeyboardInterrupt
        ends = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            ends.append(signal.SIGHUP)  # the terminal is gone; nohup ignores that
        handlers = {n: signal.signal(n, ask) for n in ends}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def say(self, line: str, passing: bool = False) -> None:
        """Print a line. On a terminal, the next line is printed over a `passing` one.

        If the reader of the output is gone (`| head`), the run is asked to stop.
        """
        over = passing and self.terminal
        if over:  # a line that wraps could not be printed over
            line = line[: shutil.get_terminal_size().columns - 1]
        try:
            print("\x1b[K" * self.terminal + line, end="\r" if over else "\n", flush=True)
        except OSError:
            self.signals.append(13)  # SIGPIPE's number, which Windows lacks
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # nothing more to flush to


def tensors_of(model: Steerling, optimizer: AdamW) -> dict[str, Tensor]:
    """A state's tensors by name, not copied: weights, and what the optimizer keeps of each."""
    return {f"{part}.{name}": x for name, p in model.named_parameters()  # a tied one comes once
            for part, x in {"weights": p.detach(), **optimizer.state[p]}.items()}


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
