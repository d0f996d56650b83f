"""What probing hands on: the sums of both paths, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bnprobe.errors import BnprobeError
from bnprobe.probing.accumulate import Path, ValueSums
from bnprobe.probing.intercept import Slot
from bnprobe.probing.layers import LayerSet
from bnprobe.records import Output, SelfCheck, StopReason


@dataclass(frozen=True)
class Sums:
    """Micro-batches, and sum and sum of squares of their D (mean over channels)."""

    count: int
    total: float
    square: float

    @property
    def mean(self) -> float:
        return self.total / self.count


@dataclass(frozen=True)
class Values:
    """Sums over the values of r or d."""

    count: float
    total: float
    square: float
    clipped: float
    low: float
    high: float
    histogram: NDArray[np.int64]


@dataclass(frozen=True)
class CallSums:
    """One call of one layer.

    Attributes:
        first_bad: Step in which a non-finite value was first seen, or -1.
    """

    mismatch: Sums
    r: Values
    d: Values
    first_bad: int


@dataclass(frozen=True)
class PathEvidence:
    """One path at one batch size.

    Attributes:
        calls: In call order.
        layers: By index of the layer, calls of one micro-batch averaged.
    """

    batches: int
    calls: Mapping[Slot, CallSums]
    layers: Mapping[int, Sums]


@dataclass(frozen=True)
class Evidence:
    """All that a scan measured.

    Attributes:
        train, eval: The two paths at the batch size asked for.
        batch_sizes: The eval path at further batch sizes.
        values: Values per channel in one micro-batch, by call.
        by_batch: For each path, the layers that normalized with batch statistics there.
        entered: Indices of the layers whose forward was called.
        failure: The error that ended the scan after something was measured.
        functional: Places in the user's code that call batch_norm outside any layer.
    """

    layers: LayerSet
    train: PathEvidence
    eval: PathEvidence
    batch_sizes: Mapping[int, PathEvidence]
    values: Mapping[Slot, int]
    by_batch: Mapping[str, frozenset[int]]
    entered: frozenset[int]
    functional: frozenset[str]
    output: Output
    batch_size: int
    batches: int
    left_out: int
    physical_batch: int
    emulated: bool
    emulation: str
    self_check: SelfCheck | None
    stopped: StopReason
    failure: BnprobeError | None
    seconds: float


def path_evidence(path: Path) -> PathEvidence:
    """Transfer the sums of a path to the host."""
    mismatch = _host_sums(path.count, path.total, path.square)
    parts = zip(mismatch, _host_values(path.r), _host_values(path.d), path.first_bad.tolist(), strict=True)
    calls = {slot: CallSums(*part) for slot, part in zip(path.positions, parts, strict=True)}
    return PathEvidence(path.batches, calls, layer_sums(path))


def layer_sums(path: Path) -> dict[int, Sums]:
    """The mismatch of each measured layer, without the distributions: cheap enough to look at now and then."""
    host = _host_sums(path.layer_count, path.layer_total, path.layer_square)
    return {index: sums for index, sums in enumerate(host) if sums.count}


def merge_values(values: list[Values]) -> Values:
    """The values of several calls, taken together."""
    first, *rest = values
    for other in rest:
        first = Values(
            first.count + other.count,
            first.total + other.total,
            first.square + other.square,
            first.clipped + other.clipped,
            min(first.low, other.low),
            max(first.high, other.high),
            first.histogram + other.histogram,
        )
    return first


def _host_sums(count: Tensor, total: Tensor, square: Tensor) -> list[Sums]:
    rows = zip(count.tolist(), total.tolist(), square.tolist(), strict=True)
    return [Sums(int(number), sum_, sum_of_squares) for number, sum_, sum_of_squares in rows]


def _host_values(sums: ValueSums) -> list[Values]:
    scalars = (sums.count, sums.total, sums.square, sums.clipped, sums.low, sums.high)
    histograms = sums.histogram.view(-1, sums.axis.bins).cpu().numpy()
    columns = zip(*(tensor.tolist() for tensor in scalars), histograms, strict=True)
    return [Values(*column) for column in columns]
