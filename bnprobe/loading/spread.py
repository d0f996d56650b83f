"""Draw micro-batches from the whole data set, not only from its beginning.

A scan measures only a part of the data. If a loader reads in a fixed order (one folder after another, held-out data
sorted by class), its first batches are not representative; they may all be of one class. The batches stay as the
loader composes them, but are read in random order. Held-out data is drawn sample by sample: inference uses running
statistics, so the composition of held-out batches does not matter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from bnprobe.loading.data import BatchSource
from bnprobe.loading.inspection import GuardedBatches
from bnprobe.loading.rebuild import rebuilt, why_fixed

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class SpreadBatches:
    """A batch sampler: runs of another sampler's batches in random order; an incomplete run comes last.

    Args:
        sampler: Yields indices; has a length.
        size: Samples in a batch.
        run: Consecutive samples that stay together, a multiple of ``size``, so that larger batches can be formed.
        seed: Seed of the order.
        mixed: Whether to draw the samples of a batch at random too.
    """

    def __init__(self, sampler: Any, size: int, run: int, seed: int, mixed: bool) -> None:
        self.sampler, self.size, self.run, self.seed, self.mixed = sampler, size, run, seed, mixed
        self.drawn: list[list[Any]] = []

    def __iter__(self) -> Iterator[list[Any]]:
        chance, indices = random.Random(self.seed), list(self.sampler)
        if self.mixed:
            chance.shuffle(indices)
        whole = len(indices) // self.run * self.run
        runs = [indices[start : start + self.run] for start in range(0, whole, self.run)]
        chance.shuffle(runs)
        ordered = [index for run in [*runs, indices[whole:]] for index in run]
        self.drawn = []
        for start in range(0, len(ordered), self.size):
            self.drawn.append(ordered[start : start + self.size])
            yield self.drawn[-1]

    def indices(self, number: int) -> list[Any]:
        """The indices in a batch of the last iteration; batches are counted from 1."""
        return self.drawn[number - 1]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size)


def spread(source: BatchSource, seed: int, batch_sizes: Sequence[int] = (), mixed: bool = False) -> BatchSource:
    """The same source, read in random order if that is possible and it is not shuffled already.

    Args:
        source: A loader over an indexable data set, or for ``mixed`` a list of batches; others are returned unchanged.
        seed: Seed of the order.
        batch_sizes: Larger batch sizes that consecutive samples will be regrouped to.
        mixed: Whether the order of samples does not matter, so that they may be drawn one by one.
    """
    guarded = source.batches
    if not isinstance(guarded, GuardedBatches):
        return source
    batches, size = guarded.wrapped, source.batch_size
    if isinstance(batches, DataLoader):
        if why_fixed(batches) or isinstance(batches.sampler, _RANDOM) or not isinstance(batches.sampler, Sized):
            return source
        run = math.lcm(size, *batch_sizes)
        order = SpreadBatches(batches.sampler, size, run, seed, mixed)
        again: Any = GuardedBatches(rebuilt(batches, size, order), guarded.origin, order.indices)
    elif mixed and isinstance(batches, Sequence) and batches:
        drawn = [*random.Random(seed).sample(batches[:-1], len(batches) - 1), batches[-1]]
        again = GuardedBatches(drawn, guarded.origin)
    else:
        return source
    return replace(source, batches=again)
