"""Read batches from the user's loader, and say clearly what is wrong with them.

``Reader`` gives micro-batches once, ``RepeatedReader`` again and again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnprobe.distributed import EVERYTHING, Share
from bnprobe.errors import DataError
from bnprobe.loading.model import attribute
from bnprobe.loading.samples import SampleCount, count_samples
from bnprobe.measure.batch import MicroBatch, bytes_of, check_finite, copy_tensors, leaves_of
from bnprobe.measure.restore import seed_everything
from bnprobe.wording import option

_END, _NONE = object(), object()


class Reader:
    """Micro-batches as the loader gives them, in its order; of several processes, those of this one.

    Where all have ``batch_size`` samples, a last one that has fewer is left out, since a partial batch says nothing
    about whole ones. Where a loader varies the size, or ``any_size`` may be measured, all are given out.

    Args:
        batches: The same in all processes, or where ``dealt`` only those that this one reads.
        batch_size: Samples in a micro-batch; where they differ, of a usual one.
        keep: Keep this process's own among the first so many.
        share: Which micro-batches are its own.
        dealt: The loader gives only those that this process reads.
        most: Take at most so many, of all processes; None: as the scan decides.
        any_size: Give out a partial last batch too, and micro-batches of one size at a time. It is not kept.

    Attributes:
        samples_in: Tells how many samples a batch has; None: unknown.
        left_out: Samples of a partial last batch, which is not given out.
        exhausted: The loader has no more.
        kept: By position, for what is measured after the two paths.
        sizes: Samples of each micro-batch that was read, by position.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        batch_size: int,
        keep: int = 0,
        share: Share = EVERYTHING,
        dealt: bool = False,
        most: int | None = None,
        any_size: bool = False,
    ) -> None:
        self.batch_size, self.share, self.most, self.any_size = batch_size, share, most, any_size
        self.kept: dict[int, MicroBatch] = {}
        self.sizes: dict[int, int] = {}
        self.left_out = 0
        self.exhausted = False
        self._keep, self._dealt = keep, dealt
        self._next_position = 0
        self._indices = getattr(batches, "indices", None)
        self.samples_in = getattr(batches, "samples_in", None) or SampleCount(asked=batch_size)
        self._batches = batches
        self._iterator: Iterator[Any] | None = None  # a loader starts its workers when it is first asked
        self._drawn: Any = _NONE
        self._ahead: list[tuple[int, Any]] = []
        self._partial: int | None = None

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` micro-batches of this process; fewer only at the end of the data.

        Raises:
            DataError: The loader is empty, or its batches hold NaN or Inf.
            UserCodeError: The loader raised.
        """
        taken: list[Any] = []
        size: int | None = None
        while len(taken) < count:
            read = self._own()
            if read is None:
                break
            position, batch = read
            if self.any_size and size not in (None, self.sizes[position]):
                self._ahead.insert(0, read)
                break
            size = self.sizes[position]
            taken.append(batch)
        return taken

    @property
    def varies(self) -> bool:
        """Whether micro-batches of another size than ``batch_size`` were given out."""
        return any(size != self.batch_size for size in self.sizes.values())

    def own_sizes(self, batches: int) -> dict[int, int]:
        """Samples of this process's first micro-batches, by position; empty if all have ``batch_size``."""
        own = {position: self.sizes[position] for position in map(self.share.position, range(batches))}
        return {} if set(own.values()) <= {self.batch_size} else own

    def look_ahead(self, count: int) -> list[Any]:
        """The first micro-batches of the data, of all processes; ``take`` still yields those of this process."""
        while len(self._ahead) < count:
            read = self._read()
            if read is None:
                break
            self._ahead.append(read)
        return [batch for _, batch in self._ahead[:count]]

    def look_ahead_own(self, count: int) -> list[Any]:
        """The next micro-batches of this process, as ``take`` will yield them; of others none is held but the first."""
        while len(own := [batch for position, batch in self._ahead if self.share.owns(position)]) < count:
            read = self._read()
            if read is None:
                break
            if self.share.reads(read[0]):
                self._ahead.append(read)
        return own[:count]

    def fill(self) -> None:
        """Read on until the requested number of micro-batches is kept, or the data ends."""
        while len(self.kept) < self.share.count(self._keep) and self._own() is not None:
            pass

    def _own(self) -> tuple[int, Any] | None:
        """The next micro-batch of this process, and its position; None at the end."""
        while (read := self._ahead.pop(0) if self._ahead else self._read()) is not None:
            position, batch = read
            if self.share.owns(position):
                if position < self._keep and position != self._partial:
                    self.kept[position] = MicroBatch(batch, self.sizes[position])
                return read
        return None

    def _read(self) -> tuple[int, Any] | None:
        """The next micro-batch that there is, and its position; None at the end."""
        if self.exhausted:
            return None
        position, samples = self._next_position, 0
        while samples == 0:  # a collate function that leaves samples out may leave none
            batch = self._next()
            if batch is _END:
                self._end()
                return None
            counted = self.samples_in(batch)
            samples = self.batch_size if counted is None else counted
        if samples < self.batch_size and position and not self.varies and self._is_last():
            if not self.any_size:
                self.left_out = samples
                self._end()
                return None
            self._partial = position
        self.sizes[position] = samples
        if self.share.reads(position):
            check_finite(batch, position + 1, self._indices)
        self._next_position = position + 1
        while self._dealt and not self.share.reads(self._next_position):
            self._next_position += 1  # the loader gives only the batches of this share
        return position, batch

    def _next(self) -> Any:
        if self._iterator is None:
            self._iterator = lasting(self._batches)
        batch, self._drawn = self._drawn, _NONE
        return next(self._iterator, _END) if batch is _NONE else batch

    def _is_last(self) -> bool:
        """Whether the batch just read is the last one; draws the next one if it is not."""
        self._drawn = self._next()
        return self._drawn is _END

    def _end(self) -> None:
        self.exhausted = True
        if self._next_position == 0 and self.left_out == 0:
            raise DataError("The data contains no batch: the loader or data set is empty.")


_WATCHED = 8
"""Batches by which a loader is recognised that fills the same memory again, with up to as many buffers in turn: those
that decode into a ring, as FFCV does, have some five."""


def lasting(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches that stay as they are when the next one is read: copies, where a loader fills the same memory again.

    A scan keeps batches: several run at once, some are measured again, and the last one is only known by the next. To
    copy all of them would double the memory of data that is held as a list, and cost a pass over memory for each. So
    only the first few are copied; meanwhile they are held as they were given, so that their memory is given to no other
    batch. Where a later one comes in the same memory, or as the same object, the loader reuses it, and all that follow
    are copied too.
    """
    held: list[Any] = []
    known: set[int] = set()
    reused = False
    for batch in batches:
        marks = set(_marks(batch))
        reused = reused or not known.isdisjoint(marks)
        watching = len(held) < _WATCHED
        yield copy_tensors(batch) if reused or watching else batch
        if reused:
            held = []
        elif watching:
            held.append(batch)
            known |= marks
        else:
            held, known = [None] * _WATCHED, set()


def _marks(batch: Any) -> Iterator[int]:
    """What tells the memory of a batch from that of another: the addresses of its tensors and arrays, and of objects
    that hold others.
    """
    if isinstance(batch, dict | list):
        yield id(batch)
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor):
            yield from [leaf.data_ptr()] if leaf.layout is torch.strided and leaf.numel() else [id(leaf)]
        elif isinstance(leaf, np.ndarray) and leaf.size:
            yield int(leaf.__array_interface__["data"][0])
        elif callable(attribute(leaf, "clone")):  # a batch object of another library
            yield id(leaf)


KEPT_BYTES = 2**30
"""Data up to this size stays in host memory from one pass to the next; larger data is read again."""


class RepeatedReader:
    """Batches of any size that can be read several times; empty ones are left out.

    Data that is not kept is read again from the same seed: a loader that shuffles or augments by the global random
    state gives the same batches again. The random state is the caller's to preserve.

    Args:
        batches: The user's, on the host.
        most: Draw at most so many; None: all.
        seed: Seed of torch, numpy and random at the start of every reading.

    Attributes:
        batches: Drawn in the last complete reading.
        images: Samples in them; a batch without tensors counts as one.
        samples_in: Tells how many samples a batch has.
    """

    def __init__(self, batches: Iterable[Any], most: int | None, seed: int) -> None:
        self._source = batches
        self._most = most
        self._seed = seed
        self._kept: list[MicroBatch] | None = None
        self.samples_in: Callable[[Any], int | None] = getattr(batches, "samples_in", count_samples)
        self._opened: Iterator[MicroBatch] | None = None
        self.batches = 0
        self.images = 0

    @property
    def kept(self) -> bool:
        """Whether all batches are in memory, so that they are not read again."""
        return self._kept is not None

    def look_ahead(self) -> list[Any]:
        """The first batch; the next reading goes on from there. The random state is not to change in between."""
        if self._kept is not None:
            return [batch.data for batch in self._kept[:1]]
        reading = self._read()
        first = list(itertools.islice(reading, 1))
        self._opened = itertools.chain(first, reading)
        return [batch.data for batch in first]

    def __iter__(self) -> Iterator[MicroBatch]:
        """The batches, in their order.

        Raises:
            DataError: There are none, they hold NaN or Inf, or another reading gave others.
            UserCodeError: The loader raised.
        """
        if self._kept is not None:
            return iter(self._kept)
        opened, self._opened = self._opened, None
        return self._read() if opened is None else opened

    def _read(self) -> Iterator[MicroBatch]:
        seed_everything(self._seed)
        keeping: list[MicroBatch] | None = []
        kept_bytes = batches = samples = 0
        indices = getattr(self._source, "indices", None)
        numbered = enumerate(lasting(self._source), 1)
        counted = ((number, batch, self.samples_in(batch)) for number, batch in numbered)
        filled = (each for each in counted if each[2] != 0)
        for position, batch, size in itertools.islice(filled, self._most):
            read = MicroBatch(batch, size or 1)
            batches += 1
            samples += read.samples
            check_finite(batch, position, indices)
            kept_bytes += bytes_of(batch) or 0
            if kept_bytes > KEPT_BYTES:
                keeping = None
            elif keeping is not None:
                keeping.append(read)
            yield read
        self._finish(batches, samples)
        self._kept = keeping

    def _finish(self, batches: int, samples: int) -> None:
        """Check that a complete reading matches the one before."""
        if batches == 0 and not self.batches:
            raise DataError("The data contains no non-empty batch: the loader or data set is empty.")
        if self.batches and (batches, samples) != (self.batches, self.images):
            raise DataError(
                f"The data gave {self.images} samples in {self.batches} batches, and {samples} in {batches} when it was"
                f" read again. With {option('--path', 'eval')} the data is read once per layer and must be the"
                " same every"
                " time. Give a DataLoader or a list, use fewer batches (which are then kept in memory), or use"
                f" {option('--path', 'train')}."
            )
        self.batches, self.images = batches, samples
