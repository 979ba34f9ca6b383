"""steerling_min: Steerling-8B, small enough to read."""

from .config import Config
from .diffusion import log_likelihood
from .model import Steerling, load
from .steering import Steering
from .tokenizer import Tokenizer
from .unmasking import generate, unmask

__all__ = ["Config", "Steering", "Steerling", "Tokenizer", "generate", "load", "log_likelihood",
           "unmask"]
