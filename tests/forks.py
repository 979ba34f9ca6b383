"""FORKS.Process starts a fresh process at once: it is forked from one that has imported PyTorch,
which takes a second, and has done nothing else. (Not on Windows.)"""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "tiktoken", "safetensors.torch"])
