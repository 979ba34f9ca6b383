"""steerling_min: Steerling-8B, small enough to read."""

from .config import Config
from .diffusion import generate, unmask
from .model import Steerling, load
from .tokenizer import Tokenizer

__all__ = ["Config", "Steerling", "Tokenizer", "generate", "load", "unmask"]
