"""steerling_min: Steerling-8B, small enough to read."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; what runs is __getattr__
    from .config import Config
    from .diffusion import log_likelihood
    from .files.loading import load
    from .files.tokenizer import Tokenizer
    from .model import Steerling
    from .steering import Steering
    from .unmasking import generate, unmask

__all__ = ["Config", "Steering", "Steerling", "Tokenizer", "generate", "load", "log_likelihood",
           "unmask"]
_HOMES = {"Config": "config", "Steering": "steering", "Steerling": "model",
          "Tokenizer": "files.tokenizer", "generate": "unmasking", "load": "files.loading",
          "log_likelihood": "diffusion", "unmask": "unmasking"}


def __getattr__(name: str):
    """A public name, whose module is imported only now (PEP 562).

    So `python -m steerling_min.course` starts even when a file that it should repair cannot be
    imported.
    """
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
