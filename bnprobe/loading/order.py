"""Which batches are read, in which order, and by which process."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
)

from bnprobe.distributed import Share, World
from bnprobe.errors import DataError
from bnprobe.loading.data import BatchSource, GuardedBatches, rebuilt, why_fixed
from bnprobe.loading.samples import named_leaves

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
        mixed = mixed and batches.collate_fn is default_collate  # another one may pad samples to the longest of a batch
        run = math.lcm(size, *batch_sizes)
        order = SpreadBatches(batches.sampler, size, run, seed, mixed)
        again: Any = guarded.over(rebuilt(batches, size, order), order.indices)
    elif mixed and isinstance(batches, Sequence) and batches:
        drawn = [*random.Random(seed).sample(batches[:-1], len(batches) - 1), batches[-1]]
        again = guarded.over(drawn)
    else:
        return source
    return replace(source, batches=again)


def is_random(source: BatchSource) -> bool:
    """Whether the loader itself draws the samples of each batch at random."""
    loader = getattr(source.batches, "wrapped", None)
    return isinstance(loader, DataLoader) and why_fixed(loader) is None and isinstance(loader.sampler, _RANDOM)


def drawn_at_random(source: BatchSource, seed: int) -> BatchSource | None:
    """The same samples in batches of the same size, each drawn at random; None where the loader does not allow it."""
    guarded = source.batches
    if not isinstance(guarded, GuardedBatches) or not isinstance(guarded.wrapped, DataLoader):
        return None
    loader = guarded.wrapped
    own_way = type(loader).__iter__ is not DataLoader.__iter__ or loader.batch_sampler is None
    if own_way or isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        return None
    batches = loader.batch_sampler
    samples: Any = range(len(loader.dataset))
    if isinstance(batches, SpreadBatches) or type(batches) is BatchSampler:
        samples = batches.sampler
    order = SpreadBatches(samples, source.batch_size, source.batch_size, seed, mixed=True)
    return replace(source, batches=guarded.over(rebuilt(loader, source.batch_size, order), order.indices))


def require_same_data(source: BatchSource, held_out: BatchSource | None, world: World) -> None:
    """Refuse processes whose data differ in size; all of them must call this.

    Raises:
        DataError: They do: a process has data of its own, or a part of them already.
    """
    sizes = world.gather(tuple(None if each is None else (each.images, each.batch_size) for each in (source, held_out)))
    for rank, other in enumerate(sizes):
        for mine, theirs, kind in zip(sizes[0], other, ("", "held-out "), strict=True):
            if mine != theirs:
                raise DataError(
                    f"The processes do not have the same {kind}data: process 0 has {_in_words(mine)}, process {rank}"
                    f" has {_in_words(theirs)}. bnprobe itself distributes the micro-batches over the processes: give"
                    " each of them all the data, without a part for each rank."
                )


def _in_words(size: tuple[int | None, int] | None) -> str:
    if size is None:
        return "none"
    images = "samples" if size[0] is None else f"{size[0]} samples"
    return f"{images} in batches of {size[1]}"


def other_samples(opening: Iterable[Any], world: World) -> str | None:
    """A sentence where processes do not read the same first micro-batch; all of them must call this.

    Args:
        opening: The first micro-batches of all processes, as this one has read them.
        world: The launch.
    """
    if world.size == 1:
        return None
    digests = world.gather(_digest(opening))
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return None
    who = f"process {others[0]} is" if len(others) == 1 else f"processes {', '.join(map(str, others))} is"
    return (
        f"The first micro-batch of {who} not that of process 0, although all have the same seed: if each process has"
        " data of its own, figures are of a mixture of them; give each all the data. Random numbers of a generator"
        " that nobody seeded may be the reason, too."
    )


def _digest(batches: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for _, leaf in itertools.chain.from_iterable(map(named_leaves, batches)):
        if isinstance(leaf, Tensor):
            plain = leaf.detach().cpu().contiguous()
            digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


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
    if share.size == 1 or not isinstance(guarded, GuardedBatches) or not isinstance(guarded.wrapped, DataLoader):
        return source
    loader = guarded.wrapped
    _refuse_dealt(loader, guarded.origin)
    by_index = loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset)
    if not by_index or type(loader).__iter__ is not DataLoader.__iter__:
        return source
    order = DealtBatches(loader.batch_sampler, share)
    again = guarded.over(rebuilt(loader, source.batch_size, order), guarded.indices)
    return replace(source, batches=again, dealt=True)


def _refuse_dealt(loader: DataLoader[Any], origin: str) -> None:
    """A DistributedSampler repeats samples that do not divide evenly, and its part would be divided a second time."""
    if isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), DistributedSampler):
        raise DataError(
            f"{origin} has a DistributedSampler, but bnprobe itself distributes the micro-batches over the processes."
            " Give a loader without it, as for one process: shuffle=True, or a sampler over all samples."
        )
