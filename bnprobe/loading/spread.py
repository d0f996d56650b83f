"""Take micro-batches from all over the data, not from its beginning.

A scan measures a part of the data. Of a loader that reads in a fixed order (folders one after the other, evaluation
data by class) the first batches are no sample: all of one class, say. The batches stay as the loader composes them;
only which of them come first is drawn at random. Evaluation data is drawn image by image: how its batches are composed
means nothing, since inference uses running statistics.
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
    """A batch sampler: runs of another sampler's batches in random order, what fills no run last.

    Args:
        sampler: Gives indices; has a length.
        size: Images in a batch.
        run: Consecutive images that stay together, a multiple of ``size``: they are regrouped to larger batches.
        seed: Of the order.
        mixed: Draw the images of a batch at random as well.
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
        """What the sampler gave for a batch of the last iteration, counted from 1."""
        return self.drawn[number - 1]

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.size)


def spread(source: BatchSource, seed: int, batch_sizes: Sequence[int] = (), mixed: bool = False) -> BatchSource:
    """The same source, read in random order where that can be done and is not so already.

    Args:
        source: A loader over an indexable data set, or for ``mixed`` a list of batches; others stay as they are.
        seed: Of the order.
        batch_sizes: Larger batches that consecutive images will be regrouped to.
        mixed: The order of images means nothing: draw them one by one.
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
