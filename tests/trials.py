"""Trials whose outcomes stand in the notebook and in the documentation. Run by hand.

    python tests/trials.py steps    # fewer steps for a text: what it costs in quality
    python tests/trials.py blocks   # the same model with blocks of 1 (left to right), 4, 16, 64
    python tests/trials.py scales   # three sizes of model, three lengths of training

Each writes its table into tests/trials.json and prints it. Models are trained into runs/trials, one
after the other by one process; a model that is there is not trained again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from steerling_min import generate, load, unmask
from steerling_min.training import evaluate

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_tiny  # noqa: E402

RUNS, RESULTS = Path("runs/trials"), Path(__file__).with_name("trials.json")
BLOCKS = (1, 4, 16, 64)
BLOCK_STEPS = 800
WIDTHS = {48: {"n_layers": 3, "n_embd": 48}, 80: {"n_layers": 4, "n_embd": 80}, 128: {}}
MEASURES = ("likelihood bound / entropy", "detection: macro AUC", "... half of the tokens masked",
            "separation: cross-covariance", "contribution: known + discovered (Eq. 22)",
            "... known", "alignment: words' concepts that promote their word most",
            "... topics, moods, forms: promoted tokens that fit")
SCALE_STEPS = (150, 450, 1350)
WAYS = {"1 token a step": {}, **{f"{n} tokens a step": {"steps": 128 // n} for n in (2, 4, 8, 16)},
        **{f"all at least {p:.0%} sure": {"confidence_threshold": p} for p in (0.95, 0.8, 0.5)}}


def trained(name: str, size: dict, steps: int) -> Path:
    """A model of the tiny world, in a configuration that differs from the bundled one's by size."""
    folder = RUNS / name
    if not (folder / "done").exists():
        train_tiny.SIZES["trial"] = size
        sys.argv = ["train_tiny.py", "--size", "trial", "--steps", str(steps), "--out", str(folder)]
        train_tiny.main()
        (folder / "done").touch()
    return folder


def steps() -> list[dict]:
    """The bundled model writes 100 texts of 128 tokens in each way."""
    model, tokenizer = load()
    rows = []
    for name, options in WAYS.items():
        passes = []

        def counted(model, prompts, n, options=options, passes=passes, **more):
            for step in unmask(model, prompts, n, **options, **more):
                passes.append(1)
            return step.tokens
        evaluate.generate = counted
        found = evaluate.language(model, tokenizer, 100)
        rows.append({"way": name, "tokens a step": 100 * 128 / len(passes), **found})
    evaluate.generate = generate
    return rows


def blocks() -> list[dict]:
    rows = []
    for S in BLOCKS:
        model, tokenizer = load(trained(f"block{S}", {"diff_block_size": S}, BLOCK_STEPS))
        rows.append({"block": S, **evaluate.likelihood(model, tokenizer, 60),
                     **evaluate.language(model, tokenizer, 60)})
    return rows


def scales() -> list[dict]:
    rows = []
    for width, size in WIDTHS.items():
        for steps in SCALE_STEPS:
            model, tokenizer = load(trained(f"width{width}-{steps}", size, steps))
            found = (evaluate.likelihood(model, tokenizer, 60)
                     | evaluate.concepts(model, tokenizer, 64, 200_000))
            rows.append({"parameters": sum(p.numel() for p in model.parameters()),
                         "tokens": steps * 8 * model.config.block_size,
                         **{name: found[name] for name in MEASURES}})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = {f.__name__: f for f in (steps, blocks, scales)}
    p.add_argument("trial", choices=trials)
    name = p.parse_args().trial
    torch.set_num_threads(1)
    rows = trials[name]()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {name: rows}, indent=1) + "\n")
    print("|", " | ".join(rows[0]), "|\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("|", " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x)
                              for x in row.values()), "|")


if __name__ == "__main__":
    main()
