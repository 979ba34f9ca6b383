"""steerling_min: Steerling-8B, small enough to read."""

from .config import Config
from .diffusion import log_likelihood
from .files.loading import load
from .model import Steerling
from .steering import Steering
from .files.tokenizer import Tokenizer
from .unmasking import generate, unmask

__all__ = ["Config", "Steering", "Steerling", "Tokenizer", "generate", "load", "log_likelihood",
           "unmask"]
