"""Distribute the micro-batches of a source over the processes of a launch, if possible before loading samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from bnprobe.distributed import Share
from bnprobe.errors import DataError
from bnprobe.loading.data import BatchSource
from bnprobe.loading.inspection import GuardedBatches
from bnprobe.loading.rebuild import rebuilt


class DealtBatches:
    """A batch sampler that keeps only the batches of another sampler that this process reads, in the same order.

    Args:
        batches: Yields the sample indices of each batch, the same in all processes.
        share: The share of this process.
    """

    def __init__(self, batches: Any, share: Share) -> None:
        self.batches, self.share = batches, share

    def __iter__(self) -> Iterator[list[Any]]:
        return (batch for position, batch in enumerate(self.batches) if self.share.reads(position))

    def __len__(self) -> int:
        return sum(map(self.share.reads, range(len(self.batches))))


def deal(source: BatchSource, share: Share) -> BatchSource:
    """The same source, loading only this process's samples where the loader allows; else unchanged, read and skipped.

    Args:
        source: The same in every process: one loader, shuffled alike because all processes have the same seed.
        share: The share of this process.

    Raises:
        DataError: The loader has a DistributedSampler.
    """
    guarded = source.batches
    loader = guarded.wrapped if isinstance(guarded, GuardedBatches) else None
    if share.size == 1 or not isinstance(guarded, GuardedBatches) or not isinstance(loader, DataLoader):
        return source
    _refuse_dealt(loader, guarded.origin)
    by_index = loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
    if not by_index or type(loader).__iter__ is not DataLoader.__iter__:
        return source
    order = DealtBatches(loader.batch_sampler, share)
    again = GuardedBatches(rebuilt(loader, source.batch_size, order), guarded.origin, guarded.indices)
    return replace(source, batches=again, dealt=True)


def _refuse_dealt(loader: DataLoader[Any], origin: str) -> None:
    """A DistributedSampler repeats samples that do not divide evenly, and its part would be divided a second time."""
    if isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), DistributedSampler):
        raise DataError(
            f"{origin} has a DistributedSampler, but bnprobe itself distributes the micro-batches over the processes."
            " Give a loader without it, as for one process: shuffle=True, or a sampler over all samples."
        )
