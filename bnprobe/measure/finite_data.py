"""Whether a scan can read all of the data there is: the number of samples of a data set that is always the same."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from bnprobe.loading.data import BatchSource, GuardedBatches
from bnprobe.loading.order import DealtBatches, SpreadBatches
from bnprobe.measure.batch import tensors_of
from bnprobe.measure.restore import preserved_random_state

PART_THAT_MATTERS = 0.05
"""Below this part of the data, intervals are the same to 3% whether the data ends or not."""

_COMPARED = 8
"""Samples that are loaded twice, to see whether they are augmented at random."""


def data_set_size(source: BatchSource, measured: int) -> int | None:
    """Samples of a finite data set of which ``measured`` were read, none of them twice; None: endless or unknown.

    Augmented data is endless: another reading gives other samples. So is what a sampler draws with replacement.

    Args:
        source: After it was read.
        measured: Samples of it that were measured.
    """
    guarded = source.batches
    loader = guarded.wrapped if isinstance(guarded, GuardedBatches) else None
    if source.images is None or not isinstance(loader, DataLoader) or measured < PART_THAT_MATTERS * source.images:
        return None
    fixed = False
    with suppress(Exception), preserved_random_state():  # a data set may be readable in the loader's workers only
        fixed = _draws_once(loader) and _is_fixed(loader, source.images)
    return source.images if fixed else None


def _draws_once(loader: DataLoader[Any]) -> bool:
    order = loader.batch_sampler
    order = order.batches if isinstance(order, DealtBatches) else order
    if isinstance(order, SpreadBatches):
        indices = [index for batch in order.drawn for index in batch]
        return len(set(indices)) == len(indices)
    sampler = loader.sampler
    return not (isinstance(sampler, RandomSampler | WeightedRandomSampler) and sampler.replacement)


def _is_fixed(loader: DataLoader[Any], samples: int) -> bool:
    """Whether the same samples, loaded and collated twice, are the same."""
    indices = range(min(_COMPARED, samples))
    one, other = (tensors_of(loader.collate_fn([loader.dataset[index] for index in indices])) for _ in range(2))
    return bool(one) and len(one) == len(other) and all(map(torch.equal, one, other))
