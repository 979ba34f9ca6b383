"""A training run's state in one file, so that a run that was killed ends as if it had not been.

`training.safetensors` holds the weights and AdamW's two moments of each; its metadata, as JSON, the
settings, the step, the seconds and the curve so far. It appears whole or not at all. There is no
generator to save: what a step draws follows from the seed, the step and the progress. (--minutes
makes progress a matter of the clock: such a run goes on, but not to the very same weights.)
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files.checkpoint import read_header
from ..files.writing import replacing
from ..model import Steerling

STATE = "training.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def save_state(folder: Path, model: Steerling, optimizer: torch.optim.AdamW, settings: dict,
               step: int, seconds: float, history: list[dict]) -> None:
    """Write the state; the one before it stays until this one is complete."""
    tensors = {}
    for name, p in model.named_parameters():  # a tied parameter comes once
        tensors[f"weights.{name}"] = p.detach().cpu()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[p][moment].cpu()
    run = {"settings": settings, "step": step, "seconds": seconds, "history": history}
    with replacing(folder / STATE) as partial:
        save_file(tensors, partial, metadata={"run": json.dumps(run)})


def load_state(folder: Path, model: Steerling, optimizer: torch.optim.AdamW, settings: dict
               ) -> tuple[int, float, list[dict]]:
    """Put a state back; returns its step, seconds and history.

    Raises FileNotFoundError when there is none, ValueError when it cannot be read or belongs to a
    run with other settings.
    """
    file = folder / STATE
    if not file.is_file():
        raise FileNotFoundError(f"--resume: {folder} has no {STATE}; leave --resume out to start")
    read_header(file)  # names the file when it is damaged
    with safe_open(file, framework="pt") as f:
        run = json.loads((f.metadata() or {}).get("run", "{}"))
        for name, value in settings.items():
            if run.get("settings", {}).get(name) != value:
                raise ValueError(f"--resume: the run in {folder} has {name} = "
                                 f"{run.get('settings', {}).get(name)}, not {value}")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(f.get_tensor(f"weights.{name}"))
                for moment in MOMENTS:
                    optimizer.state[p][moment] = f.get_tensor(f"{moment}.{name}").to(p.device)
    return run["step"], run["seconds"], run["history"]
