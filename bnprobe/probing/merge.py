"""What one process measured, on the host; and what all of them did, put together.

Sums are added, extremes compared, histograms added: float64 sums over micro-batches, each of which one process
measured whole. No mean and no variance is averaged, so that the result is that of one process to rounding. What
depends on order (replicates, the pool of images) was numbered as in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from bnprobe.probing.emulation import Emulation
from bnprobe.probing.evidence import CallSums, PathEvidence, Sums, Values, merge_values
from bnprobe.probing.intercept import Slot
from bnprobe.probing.output import OutputSums
from bnprobe.probing.replicates import PoolSample

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class HeldOut:
    """The evaluation data on the eval path.

    Attributes:
        kept: Micro-batches by position.
        seconds: Of the slowest process.
    """

    path: PathEvidence
    output: OutputSums
    batches: int
    seconds: float
    batch_size: int
    kept: Mapping[int, Any]


@dataclass(frozen=True)
class Part:
    """What a process measured of the micro-batches dealt to it; fields as in ``Evidence``.

    Attributes:
        steady: None where nothing was measured on it.
        channels: Of each call of the eval path.
        largest: Images of the largest physical batch.
        at_once: Micro-batches that ran at once in the end.
        kept: Micro-batches by position.
    """

    train: PathEvidence
    eval: PathEvidence
    steady: PathEvidence | None
    steady_seconds: float
    batch_sizes: Mapping[int, PathEvidence]
    pool: PoolSample
    channels: Mapping[Slot, int]
    output: OutputSums
    values: Mapping[Slot, int]
    by_batch: Mapping[str, frozenset[int]]
    entered: frozenset[int]
    functional: frozenset[str]
    batches: int
    left_out: int
    largest: int
    at_once: int
    emulation: Emulation
    kept: Mapping[int, Any]
    held_out: HeldOut | None = None


def merge(one: Part, other: Part) -> Part:
    """What two processes measured, the first one's before the other's, as one."""
    return replace(
        one,
        train=merge_paths(one.train, other.train),
        eval=merge_paths(one.eval, other.eval),
        steady=_either(one.steady, other.steady, merge_paths),
        steady_seconds=max(one.steady_seconds, other.steady_seconds),
        batch_sizes=_joined(one.batch_sizes, other.batch_sizes, merge_paths),
        pool=merge_pools(one.pool, other.pool),
        channels={**other.channels, **one.channels},
        output=one.output.merged(other.output),
        values={**other.values, **one.values},
        by_batch=_joined(one.by_batch, other.by_batch, frozenset.union),
        entered=one.entered | other.entered,
        functional=one.functional | other.functional,
        batches=one.batches + other.batches,
        left_out=max(one.left_out, other.left_out),  # a process that only skips it counts it too
        largest=max(one.largest, other.largest),
        at_once=min(one.at_once, other.at_once),
        emulation=one.emulation if other.emulation.trusted else other.emulation,
        kept={**one.kept, **other.kept},
        held_out=_either(one.held_out, other.held_out, _merge_held_out),
    )


def merge_paths(one: PathEvidence, other: PathEvidence) -> PathEvidence:
    """One path over the micro-batches of both."""
    return PathEvidence(
        batches=one.batches + other.batches,
        calls=_joined(one.calls, other.calls, _merge_calls),
        layers=_joined(one.layers, other.layers, _add_sums),
        moments=_joined(one.moments, other.moments, lambda a, b: a + b),
        image_squares=_joined(one.image_squares, other.image_squares, lambda a, b: a + b),
    )


def merge_layer_sums(one: Mapping[int, Sums], other: Mapping[int, Sums]) -> dict[int, Sums]:
    """The mismatch of each layer over the micro-batches of both, by index."""
    return _joined(one, other, _add_sums)


def merge_pools(one: PoolSample, other: PoolSample) -> PoolSample:
    """The pool of all images: of two processes that fill the same place the later image counts."""
    if not other.slots or (one.slots and one.slots != other.slots):
        return one
    if not one.slots:
        return other
    owners: dict[int, tuple[int, int]] = {}
    numbers = torch.cat([one.numbers, other.numbers])
    pairs = zip(torch.cat([one.places, other.places]).tolist(), numbers.tolist(), strict=True)
    for row, (place, number) in enumerate(pairs):
        owners[place] = max(owners.get(place, (-1, -1)), (number, row))
    places = sorted(owners)
    rows = torch.tensor([owners[place][1] for place in places], dtype=torch.int64)
    moved = (other.mean + (other.origin - one.origin)).float()
    return PoolSample(
        one.slots,
        torch.tensor(places, dtype=torch.int64),
        numbers[rows],
        torch.cat([one.replicate, other.replicate])[rows],
        one.origin,
        torch.cat([one.mean, moved])[rows],
        torch.cat([one.variance, other.variance])[rows],
    )


def _merge_calls(one: CallSums, other: CallSums) -> CallSums:
    bad = [call.first_bad for call in (one, other) if call.first_bad >= 0]
    return CallSums(
        _add_sums(one.mismatch, other.mismatch),
        _merge_values(one.r, other.r),
        _merge_values(one.d, other.d),
        min(bad, default=-1),
    )


def _merge_values(one: Values, other: Values) -> Values:
    return merge_values([one, other])


def _add_sums(one: Sums, other: Sums) -> Sums:
    return Sums(one.count + other.count, one.total + other.total, one.square + other.square)


def _merge_held_out(one: HeldOut, other: HeldOut) -> HeldOut:
    return HeldOut(
        merge_paths(one.path, other.path),
        one.output.merged(other.output),
        one.batches + other.batches,
        max(one.seconds, other.seconds),
        one.batch_size,
        {**one.kept, **other.kept},
    )


def _joined(one: Mapping[K, V], other: Mapping[K, V], add: Callable[[V, V], V]) -> dict[K, V]:
    """Two mappings in the order of the first; what both hold is added."""
    joined = dict(one)
    for key, value in other.items():
        joined[key] = add(joined[key], value) if key in joined else value
    return joined


def _either(one: V | None, other: V | None, add: Callable[[V, V], V]) -> V | None:
    return add(one, other) if one is not None and other is not None else one if other is None else other
