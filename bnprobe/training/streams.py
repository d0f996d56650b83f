"""Two random streams: that of the data depends only on seed and epoch; that of the model is separate.

Every arm of a repair must see the same samples in the same order, whatever random numbers its model draws (dropout),
and a resumed run must see the samples that it would have seen without the interruption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnprobe.randomness import preserved_random_state, seed_everything

_MODEL, _DATA, _HELD = 0, 1, 2
_DEPTH = 8
"""Depth of the search for generators: loader, data set, transform, its transforms, their attributes."""

_MOST_ITEMS = 64
"""Longer lists hold samples, not transforms, and are not searched."""


def model_seed(seed: int, rank: int = 0) -> int:
    """Seed of the model's random numbers in one process."""
    return _derived(seed, _MODEL, rank)


def data_seed(seed: int, epoch: int) -> int:
    """Seed of the data's random numbers in one epoch, counted from 0: the same in every process."""
    return _derived(seed, _DATA, epoch)


def _derived(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def snapshot() -> dict[str, Any]:
    """The random state of random, numpy and torch (CPU and CUDA), as tensors and plain types that are safe to load."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = _numpy_state()
    return {
        "python": (version, words, gauss),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _numpy_state() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # as asked for
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Set a state that ``snapshot`` returned."""
    version, words, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Stream:
    """A random stream that is separate from the global one.

    Args:
        seed: Seed of the stream.
    """

    def __init__(self, seed: int) -> None:
        with preserved_random_state():
            seed_everything(seed)
            self._state = snapshot()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Make this the global random stream while the block runs."""
        with preserved_random_state():
            restore(self._state)
            try:
                yield
            finally:
                self._state = snapshot()


def rewind(data: Any, seed: int) -> None:
    """Seed the generators that a source of batches holds itself, and restart its worker processes.

    Persistent workers would otherwise continue from the previous epoch. Generators of random, numpy and torch are
    found in attributes, lists and mappings, a few levels deep, in the order of the attributes. Samplers with
    ``set_epoch`` are not touched.
    """
    dismiss_workers(data)
    for number, generator in enumerate(_held(data, _GENERATORS)):
        _reseed(generator, _derived(seed, _HELD, number))


def dismiss_workers(data: Any) -> None:
    """End the worker processes that a loader keeps between epochs."""
    for loader in _held(data, (DataLoader,)):
        loader._iterator = None


def _reseed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed)


def _held(root: Any, kinds: tuple[type, ...]) -> list[Any]:
    """All objects of some types that an object holds, directly or indirectly, once each, in a fixed order."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [(root, 0)]
    while waiting:
        value, depth = waiting.pop(0)
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            found.append(value)
        waiting += [(part, depth + 1) for part in _parts(value)]
    return found


_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (Tensor, np.ndarray, str, bytes, int, float, type, ModuleType)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (*_LEAVES, *_GENERATORS)):
        return []
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= _MOST_ITEMS else []
    if isinstance(value, list | tuple):
        return list(value) if len(value) <= _MOST_ITEMS else []
    return list(getattr(value, "__dict__", {}).values())
