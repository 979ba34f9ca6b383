"""Damage what users hand in, at random, and count what comes of it: python tests/attack.py

Each kind makes a case: a damaged folder or file, a command line, a call of the sampler. The case
runs in a process of its own (a fork, so not on Windows), and ends as one of

    ok         as if nothing had been damaged
    other      it runs, and says something else: what a format without checksums cannot show
    one line   refused, by one line on standard error or one ValueError
    traceback, crash, hang    faults, shown with the seed that makes them again

    python tests/attack.py --cases 200 --kinds config labels --seed 7
"""

import argparse
import atexit
import base64
import csv
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample  # noqa: E402
import train_tiny  # noqa: E402
from steerling_min import Config, Steering, Steerling, Tokenizer, unmask  # noqa: E402
from steerling_min.files.config_json import GENERATION, WRITING, write_generation  # noqa: E402
from steerling_min.files.labels import COLUMNS  # noqa: E402

FAULTS = ("traceback", "crash", "hang")
WRITE = ["--prompt", "ab", "--max-new-tokens", "4", "--temperature", "0", "--seed", "0",
         "--device", "cpu"]
Case = tuple[str, Callable[[], object]]  # what was damaged, and what runs on it

# ---- material ------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 0.5, 1.5, -0.0, 1e-45, 1e38, 1e308, math.inf, -math.inf, math.nan, 2**31,
           2**31 - 1, 2**63, 2**64, -2**63, 10**30, True, False]
THINGS = [*NUMBERS, None, "", "a", "1", "\x00", "\ud800", "\u00e9" * 300, "a\nb\x1b[2J", [], [1],
          [[1]], [[[1]]], {}, {"a": 1}, "x" * 100_000, (), b"a"]
VALUES = ["", "-1", "0", "1", "2", "0.5", "1e400", "nan", "inf", "-inf", "1_0", "\u0661", "0x1",
          "--", "-", " ", "a", "a=b", "=1", "1=", "sea=8", "3=nan", "3=1e300", "#3=1", "sea+ice=4",
          "99999999999999999999", "a\nb", "\x1b[2J", "\x00", "\ud800", "/", ".", "..", "/dev/null",
          "/dev/full", "/nonexistent/a", "x" * 300, "x" * 5000, "cuda", "cuda:99", "cpu", "meta",
          "int8", "float16", "bfloat16", "global", "window"]


def make_folder(folder: Path) -> Path:
    """A small model's folder, with all the files that one may have."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train("ab cd ef gh", 280)
    sizes = {"n_layers": 2, "n_embd": 32, "n_head": 4, "n_kv_heads": 2, "block_size": 64,
             "n_concepts": 8, "topk_known": 2, "topk_known_features": 2, "n_unknown_concepts": 8,
             "unknown_topk": 2, "factorize_rank": 4}
    config = Config(**{**vars(Config.tiny(tokenizer.vocab_size)), **sizes})
    Steerling(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.tiktoken")
    write_generation(folder, repetition_penalty=1.0, allow_eos=True)
    with (folder / "concept_labels.csv").open("w", newline="") as out:
        csv.writer(out).writerows([COLUMNS, *([i, f"name {i}", "words of it", "known", "group", ""]
                                              for i in range(8))])
    return folder


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, left out, put in or said twice; cut or lengthened."""
    at, n = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 8, 100])
    new = rng.choice([rng.randbytes(n), b"\x00" * n, b"\n", b",", b'"', b"\xef\xbb\xbf",
                      data[at:at + n]])
    return rng.choice([data[:at] + new + data[at + n:], data[:at] + new + data[at:],
                       data[:at] + data[at + n:], data[:at], data + new])


def damaged_json(rng: random.Random, text: str) -> str:
    """A value changed, left out, or said twice; or the bytes of the text damaged."""
    data, way = json.loads(text), rng.randrange(4)
    key = rng.choice(sorted(data))
    if way == 0:
        return damaged_bytes(rng, text.encode()).decode(errors="surrogateescape")
    if way == 1:
        del data[key]
    if way == 2:
        return text.rstrip()[:-1].rstrip() + f', "{key}": {json.dumps(data[key])}}}'
    if way == 3:
        data[key] = rng.choice([x for x in THINGS if not isinstance(x, bytes)])
    return json.dumps(data)


def command(*args: object, script: ModuleType = sample) -> Callable[[], object]:
    """A script with these arguments: what it prints, but for the figures; JSON if it is."""
    def call():
        sys.argv, out = [Path(script.__file__).name, *map(str, args)], io.StringIO()
        with redirect_stdout(out):
            script.main()
        return out.getvalue()
    return call


# ---- kinds: (rng, a folder of their own) -> a case -----------------------------------------------


def checkpoint(rng: random.Random, folder: Path) -> Case:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, body = data[8:8 + size], data[8 + size:]
    way = rng.randrange(4)
    if way == 0:
        data = damaged_bytes(rng, data[:8]) + head + body
    elif way == 1:
        head = damaged_bytes(rng, head)
        data = len(head).to_bytes(8, "little") + head + body
    elif way == 2:
        header = json.loads(head)
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        header[name][rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(
            ["F16", "I32", "F8", [], [0], [32], [2**62, 4], [0, 4], [-1, 3], "x", None])
        head = json.dumps(header).encode()
        data = len(head).to_bytes(8, "little") + head + body
    else:
        n, at = rng.choice([1, 2, 4]), 4 * rng.randrange(len(body) // 4)
        new = rng.choice([rng.randbytes(n), b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"])  # NaN; huge
        data = data[:8] + head + body[:at] + new + body[at + len(new):]
    file.write_bytes(data)
    return f"safetensors, way {way}", command("--model", folder, *WRITE, "--json")


def config(rng: random.Random, folder: Path) -> Case:
    file = folder / "config.json"
    text = damaged_json(rng, file.read_text())
    file.write_text(text, errors="surrogateescape")
    return text, command("--model", folder, *WRITE, "--json")


def generation(rng: random.Random, folder: Path) -> Case:
    file = folder / GENERATION
    right = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 1, "repetition_penalty": 1.0,
             "allow_eos": True, "align": False}
    file.write_text(json.dumps({name: right[name] for name in rng.sample(WRITING, 3)}))
    text = damaged_json(rng, file.read_text())
    file.write_text(text, errors="surrogateescape")
    return text, command("--model", folder, "--prompt", "ab", "--seed", "0")


def labels(rng: random.Random, folder: Path) -> Case:
    file = folder / "concept_labels.csv"
    rows = list(csv.reader(file.open(newline="")))
    way = rng.randrange(3)
    if way == 0:
        row = rng.choice(rows)
        row[rng.randrange(len(row))] = rng.choice([str(x) for x in THINGS if x != "\ud800"])
    elif way == 1:
        rng.choice(rows).append("more") if rng.random() < 0.5 else rng.choice(rows).pop()
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    data = out.getvalue().encode()
    file.write_bytes(damaged_bytes(rng, data) if way == 2 else data)
    return f"labels, way {way}", command("--model", folder, *WRITE, "--json", "--steer", "#3=1")


def ranks(rng: random.Random, folder: Path) -> Case:
    file = folder / "tokenizer.tiktoken"
    lines = file.read_text().splitlines()
    if rng.random() < 0.5:
        lines[rng.randrange(len(lines))] = rng.choice([
            "", "YQ==", "YQ== 1", "!!!! 3", "YWI= 1_0", "YWI= -1", "= 3", "YWI= 99999999999",
            base64.b64encode(b"").decode() + " 5", "YWI= 1 2"])
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    return "ranks", command("--model", folder, *WRITE, "--json")


def commands(rng: random.Random, folder: Path) -> Case:
    """Command lines of sample.py: options at random, each with a value that may not fit it."""
    actions = [x for x in sample.parser()._actions if x.option_strings
               and x.dest not in ("help", "compile", "threads")]
    args = []
    for action in rng.sample(actions, rng.randint(1, 4)):
        flag = rng.choice(action.option_strings)
        value = rng.choice(rng.choice([VALUES, ["1", "2", "0.5", "3=1", "out"]]))
        if action.nargs == 0:
            args.append(flag)
        else:
            args += rng.choice([[flag, value], [f"{flag}={value}"]])
    short = ["--model", str(folder), "--prompt", "ab", "--max-new-tokens", "3", "--device", "cpu"]
    os.chdir(folder)
    return " ".join(map(repr, args)), command(*short, *args)


def sampler(rng: random.Random, folder: Path) -> Case:
    """Calls of `unmask`, four arguments in five right."""
    model = Steerling.from_pretrained(folder)
    right = {"steps": [None, 1, 3], "confidence_threshold": [None, 0.5], "top_p": [0, 0.5, 1],
             "temperature": [0, 1.0], "entropy_sampling": [True, False], "align": [True, False],
             "repetition_penalty": [1, 1.5], "cfg_scale": [0, 2.0], "order": ["window", "global"],
             "allow_eos": [True, False], "stop_tokens": [(), [5, 6]], "seed": [None, 7],
             "use_cache": [True, False], "max_new_tokens": [1, 9, None],
             "steering": [None, Steering.amplify(3), Steering.unlearn(2, (1,))],
             "prompt_tokens": [[[1, 2]], [[], []], torch.tensor([[3]])]}
    wrong = [*THINGS, [1.5], [[1.7]], iter([1]), torch.tensor(1.0), torch.tensor([[1.0]]),
             Steering.amplify(99), Steering.amplify("a"), Steering.amplify(3, "a"), [[10**6]],
             Steering.amplify(1, math.nan), Steering(suppressions=((1, math.inf),)), range(3)]
    names = ["prompt_tokens", *rng.sample(sorted(right.keys() - {"prompt_tokens"}), 3)]
    arguments = {name: rng.choice(right[name] if rng.random() < 0.8 else wrong) for name in names}
    arguments.setdefault("max_new_tokens", 9)

    def call():
        before = repr(arguments)
        for step in unmask(model, **arguments):
            assert (step.tokens >= 0).all() and (step.tokens < model.config.vocab_size).all()
        assert before == repr(arguments), "an argument was changed"
    return repr(arguments)[:300], call


@cache
def run_of_two_steps() -> Path:
    """A run's folder, and beside it the text that it was trained on."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "a.txt").write_text("Some words, and then some more of them. " * 300)
    subprocess.run([sys.executable, train_tiny.__file__, "--text", folder / "a.txt",
                    "--vocab", "270", "--steps", "2", "--batch", "1", "--device", "cpu",
                    "--out", folder / "run"], check=True, stdout=subprocess.DEVNULL)
    return folder / "run"


def training(rng: random.Random, folder: Path) -> Case:
    """A damaged run that is to go on."""
    run = Path(shutil.copytree(run_of_two_steps(), folder / "run"))
    file = run / rng.choice(["training.safetensors", "run.json", "config.json"])
    data = file.read_bytes()
    if file.suffix == ".json":
        text = damaged_json(rng, data.decode())
        file.write_text(text, errors="surrogateescape")
    else:  # in the header: what the weights say has no checksum
        head = damaged_bytes(rng, data[:6000])
        file.write_bytes(head + data[6000:])
        text = repr(head)
    return f"{file.name}: {text}", command("--resume", "--out", run, "--steps", "3",
                                           script=train_tiny)


def trainings(rng: random.Random, folder: Path) -> Case:
    """Command lines of train_tiny.py that are to start a run of one step."""
    flags = ["--minutes", "--steps", "--batch", "--lr", "--seed", "--size", "--text", "--vocab",
             "--concepts", "--top", "--without", "--init", "--device", "--dtype", "--out"]
    args = [x for flag in rng.sample(flags, rng.randint(1, 3)) for x in (flag, rng.choice(VALUES))]
    os.chdir(folder)
    return " ".join(map(repr, args)), command("--out", folder / "run", "--batch", "1", "--steps",
                                              "1", *args, script=train_tiny)


KINDS = {kind.__name__: kind for kind in (checkpoint, config, generation, labels, ranks, commands,
                                          sampler, training, trainings)}
# What the undamaged folder says to the same call, where a case can be compared with it.
COMPARED = {"checkpoint": [*WRITE, "--json"], "config": [*WRITE, "--json"],
            "ranks": [*WRITE, "--json"], "labels": [*WRITE, "--json", "--steer", "#3=1"]}

# ---- running -------------------------------------------------------------------------------------


def outcome(call: Callable[[], object], expected: object, seconds: float, log: Path) -> str:
    """Run a call in a fork; what came of it. Its words, and those of an error, are left in log."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            sys.stdin = open(os.devnull)
            resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
            with log.open("w", errors="backslashreplace") as errors, redirect_stderr(errors):
                try:
                    found = call()
                    code = 0 if expected is None or found == expected else 10
                except SystemExit as stop:
                    code = 11 if stop.code == 2 else 0 if not stop.code else 99
                except ValueError as error:
                    print(error, file=errors)
                    code = 11
                except BaseException:
                    import traceback
                    traceback.print_exc(file=errors)
        finally:
            os._exit(code)
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        time.sleep(0.005)
    if os.WIFSIGNALED(status):
        return "crash"
    said = log.read_text(errors="replace")
    name = {0: "ok", 10: "other", 11: "one line"}.get(os.WEXITSTATUS(status), "traceback")
    if said.startswith("model "):  # the heading, which --json puts there
        said = said.partition("\n")[2]
    if name == "one line" and (said.count("\n") != 1 or len(said) > 2000 or "\x1b" in said):
        return "traceback"  # refused, but not in one line
    return name


def attack(kind: str, cases: int, seed: int, seconds: float = 20.0, show: bool = True) -> Counter:
    """So many cases of a kind: how many ended in which way. Faults are shown."""
    torch.set_num_threads(1)
    here, counts = os.getcwd(), Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole = make_folder(Path(scratch) / "whole")
        with redirect_stderr(io.StringIO()):  # what is loaded on first use is loaded here, once
            expected = command("--model", whole, *COMPARED.get(kind, WRITE))()
        expected = expected if kind in COMPARED else None
        for number in range(cases):
            rng = random.Random(f"{kind} {seed} {number}")
            folder = Path(shutil.copytree(whole, Path(scratch) / "case"))
            what, call = KINDS[kind](rng, folder)
            log = Path(scratch) / "log"
            ended = outcome(call, expected, seconds, log)
            os.chdir(here)
            counts[ended] += 1
            if show and ended in FAULTS:
                words = log.read_text(errors="replace").strip().splitlines()[-3:]
                print(f"{kind}, seed {seed}, case {number}: {ended}: {ascii(what)[:300]}\n    "
                      + "\n    ".join(ascii(word)[:300] for word in words), flush=True)
            shutil.rmtree(folder)
    return counts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=100, help="of each kind")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=20.0, help="after which a case hangs")
    args = p.parse_args()
    columns = ("ok", "other", "one line", *FAULTS)
    print(f"{'':12}" + "".join(f"{name:>11}" for name in columns), flush=True)
    faults = 0
    for kind in args.kinds:
        counts = attack(kind, args.cases, args.seed, args.seconds)
        faults += sum(counts[name] for name in FAULTS)
        print(f"{kind:12}" + "".join(f"{counts[name]:11}" for name in columns), flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
