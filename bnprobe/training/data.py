"""The micro-batches of a run: its order of the data, which resumes where it was stopped, and its random state."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sized
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnprobe.distributed import ALONE, World
from bnprobe.errors import DataError, UsageError
from bnprobe.loading.data import BatchSource
from bnprobe.measure.batch import bytes_of
from bnprobe.measure.reader import KEPT_BYTES, lasting
from bnprobe.measure.restore import preserved_random_state, seed_everything

_AHEAD, _AHEAD_BYTES = 16, 2**24
"""So many small batches are read at once: to change the random stream may take as long as a step takes."""


class KeptEpochs:
    """The batches of epochs that one run has read, kept for the next run on the same data.

    An epoch that does not fit is read again by every run, and so is one of which a run needs more than those before. A
    loss that changes a batch must have been given a copy.

    Args:
        room: Bytes that all of them may take.
    """

    def __init__(self, room: int = KEPT_BYTES) -> None:
        self._kept: dict[int, list[Any] | None] = {}  # None: does not fit
        self._whole: set[int] = set()
        self._room = room

    def epoch(self, seed: int, read: Callable[[], Iterator[Any]]) -> Iterator[Any]:
        """The batches of an epoch.

        Args:
            seed: Seed of the data in this epoch, by which it is known.
            read: Reads it from its beginning.
        """
        known = list(self._kept.setdefault(seed, []) or ())
        yield from known
        if seed in self._whole:
            return
        for batch in itertools.islice(read(), len(known), None):
            self._keep(seed, batch)
            yield batch
        if self._kept[seed] is not None:
            self._whole.add(seed)

    def _keep(self, seed: int, batch: Any) -> None:
        kept = self._kept[seed]
        if kept is None:
            return
        size = bytes_of(batch)
        if size is not None and size <= self._room:
            kept.append(batch)
            self._room -= size
        else:
            self._room += sum(bytes_of(each) or 0 for each in kept)
            self._kept[seed] = None


class Feed:
    """Hands out the micro-batches of a source, epoch after epoch.

    The random state at the start of an epoch depends only on (seed, epoch). A position is therefore two numbers: to
    continue from it, the epoch is read again and the batches already used are skipped. All processes read the same
    order, and rank k takes the micro-batches k, k + size, ... Three kinds of batches are left out: those of an
    incomplete round at the end of an epoch, so that every process takes equally many; a partial batch, if the user's
    loader drops it; and a batch of one sample where more were requested, because BN raises on one value per channel,
    and otherwise silently normalizes the sample by itself.

    Args:
        source: Yields micro-batches on the host.
        seed: Seed of the order, of augmentations and of loader processes.
        accumulate: Micro-batches per process and optimizer step; the last step of an epoch may have fewer.
        world: The processes that train together.
        kept: What other runs on the same data have read; None: nothing is kept.

    Attributes:
        epoch: Current epoch, from 0.
        used: Batches read in this epoch, including those left out.
    """

    def __init__(
        self,
        source: BatchSource,
        seed: int,
        accumulate: int = 1,
        world: World = ALONE,
        kept: KeptEpochs | None = None,
    ) -> None:
        self.epoch, self.used = 0, 0
        self._kept = kept
        self._source, self._seed, self._accumulate, self._world = source, seed, accumulate, world
        self._samples_in = source.samples_in
        self._rounds: Generator[Any, None, None] | None = None

    def next_group(self) -> list[Any]:
        """This process's micro-batches of the next optimizer step, at least one.

        Raises:
            DataError: An epoch has no usable micro-batch: the data can be read only once, or hold too few samples.
            UserCodeError: The user's loader raised.
        """
        for _ in range(2):
            if self._rounds is None:
                self._rounds = self._open()
            group = list(itertools.islice(self._rounds, self._accumulate))
            if group:
                return group
            self.epoch, self.used, self._rounds = self.epoch + 1, 0, None
        raise DataError(self._exhausted())

    def go_to(self, epoch: int, used: int) -> None:
        """Move to a position of a feed of the same source, by reading the epoch up to there."""
        self.epoch, self.used = epoch, 0
        batches = self._batches()
        for _ in itertools.islice(batches, used):
            pass
        self._rounds = self._dealt(batches)

    def close(self) -> None:
        """Release the data and end its worker processes.

        There is a reference cycle here; if it were left to the garbage collector, the workers would not be told to end,
        and Python would wait for them.
        """
        if self._rounds is not None:
            self._rounds.close()
        dismiss_workers(self._source.batches)

    def _open(self) -> Generator[Any, None, None]:
        return self._dealt(self._batches())

    def _batches(self) -> Iterator[Any]:
        """All batches of the epoch."""
        seed = data_seed(self._seed, self.epoch)
        read = self._read(seed) if self._kept is None else self._kept.epoch(seed, lambda: self._read(seed))
        for batch in read:
            self.used += 1
            yield batch

    def _read(self, seed: int) -> Iterator[Any]:
        """The same from the loader, drawn with the random stream of the data."""
        stream = BatchStream(seed)
        rewind(self._source.batches, seed)
        iterator = itertools.islice(lasting(self._source.batches), self._source.most)
        ended = False
        while not ended:
            with stream.flowing():
                ahead, error = _some(iterator)
            yield from ahead
            if error is not None:
                raise error
            ended = not ahead

    def _dealt(self, batches: Iterator[Any]) -> Generator[Any, None, None]:
        """This process's micro-batch of every complete round."""
        usable = filter(self._is_usable, batches)
        while len(dealt := list(itertools.islice(usable, self._world.size))) == self._world.size:
            yield dealt[self._world.rank]

    def _is_usable(self, batch: Any) -> bool:
        images, size = self._samples_in(batch), self._source.batch_size
        if images is None or images >= size:
            return True
        return images > 1 and not self._source.drop_last

    def _exhausted(self) -> str:
        if self._source.images is None:
            return (
                f"{self._source.description} yielded no micro-batch when it was read again from the beginning, but"
                " training reads the data once per epoch. Give a DataLoader, a Dataset or a list, or a function"
                " load_data that makes one, instead of an iterator."
            )
        shared = f" for each of {self._world.size} processes" if self._world.size > 1 else ""
        return (
            f"{self._source.description} has no micro-batch of {self._source.batch_size} samples{shared} to train on."
            " Use a smaller batch size, or more data."
        )


def _some(batches: Iterator[Any]) -> tuple[list[Any], Exception | None]:
    """The next batches, at least one if there is one; and what reading one more has raised, which may not be needed."""
    found: list[Any] = []
    read = 0
    try:
        for batch in batches:
            found.append(batch)
            read += bytes_of(batch) or 0
            if len(found) == _AHEAD or read >= _AHEAD_BYTES:
                break
    except Exception as error:
        return found, error
    return found, None


def steps_per_epoch(source: BatchSource, accumulate: int, world: World = ALONE) -> int:
    """Optimizer steps in one pass over the data, as ``Feed`` hands it out.

    Raises:
        UsageError: The length of the data is unknown, or too small for one micro-batch per process.
    """
    batches = _micro_batches(source)
    if batches is None:
        raise UsageError(
            f"--epochs (train.epochs) needs data of known length, but the length of {source.description} is unknown."
            " Give --steps (train.steps) instead."
        )
    rounds = (batches if source.most is None else min(batches, source.most)) // world.size
    if not rounds:
        raise UsageError(
            f"{source.description} has too few samples for a micro-batch of {source.batch_size} in each of"
            f" {world.size} processes. Use a smaller batch size, or fewer processes."
        )
    return -(-rounds // accumulate)


def _micro_batches(source: BatchSource) -> int | None:
    if source.images is not None:
        whole, rest = divmod(source.images, source.batch_size)
        return whole + int(rest > 1 and not source.drop_last)
    wrapped = getattr(source.batches, "wrapped", source.batches)
    if not isinstance(wrapped, Sized):
        return None
    try:
        return len(wrapped)
    except TypeError:  # a loader over an iterable data set without a length
        return None


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


def random_snapshot() -> dict[str, Any]:
    """The random state of random, numpy and torch (CPU and CUDA), as tensors and plain types that are safe to load."""
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)  # as asked for
    kind, keys, position, has_gauss, cached = state
    return {
        "python": (version, words, gauss),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: Mapping[str, Any]) -> None:
    """Set a state that ``snapshot`` returned."""
    version, words, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class BatchStream:
    """A random stream that is separate from the global one.

    Args:
        seed: Seed of the stream.
    """

    def __init__(self, seed: int) -> None:
        with preserved_random_state():
            seed_everything(seed)
            self._state = random_snapshot()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        """Make this the global random stream while the block runs."""
        with preserved_random_state():
            restore(self._state)
            try:
                yield
            finally:
                self._state = random_snapshot()


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
