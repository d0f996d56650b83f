"""The random state of everything a model or loader may draw from: random, numpy and torch (CPU and CUDA)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed random, numpy and torch (CPU and CUDA)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> object:
    """The state of random, numpy and torch (CPU and CUDA), to be compared: equal if nothing was drawn in between."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    tensors = [torch.get_rng_state(), *cuda]
    return random.getstate(), str(np.random.get_state()), [state.numpy().tobytes() for state in tensors]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the random state when the block is done."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if torch.cuda.is_available():
        torch.cuda.init()  # else a seed that the user set would still be waiting, and ours would replace it
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
