"""What probing hands on: the sums of both paths, on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bnprobe.errors import BnprobeError
from bnprobe.probing.accumulate import Path, ValueSums
from bnprobe.probing.emulation import Emulation
from bnprobe.probing.intercept import Slot
from bnprobe.probing.layers import LayerSet
from bnprobe.probing.runner import PathName
from bnprobe.records import Output, Score, SelfCheck, StopReason
from bnprobe.stats.composition import Images
from bnprobe.stats.ladder import BatchSums


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
        moments: Sums per channel, by call; empty at further batch sizes.
        image_squares: By call, the squared image means (as d) summed, shape (replicates, channels).
    """

    batches: int
    calls: Mapping[Slot, CallSums]
    layers: Mapping[int, Sums]
    moments: Mapping[Slot, BatchSums] = field(default_factory=dict)
    image_squares: Mapping[Slot, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The evaluation data on the eval path."""

    path: PathEvidence
    score: Score
    images: int
    seconds: float
    batch_size: int
    kept: Sequence[Any]


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
        steady: The train path without random layers; None where there are none, and it is the train path.
        steady_seconds: What measuring it took.
        evaluation: None without evaluation data.
        pool: Images for regrouping, by call; empty where images could not be told apart.
        pool_bytes: Size of the pool.
        scores: Loss and metric of the training batches, by path.
        kept: The first micro-batches, on the host, for what is measured afterwards.
        at_once: Micro-batches that ran at once in the end.
        trust: Whether micro-batches may run together.
    """

    layers: LayerSet
    train: PathEvidence
    eval: PathEvidence
    steady: PathEvidence | None
    steady_seconds: float
    evaluation: Evaluation | None
    pool: Mapping[Slot, Images]
    pool_bytes: int
    scores: Mapping[PathName, Score]
    kept: Sequence[Any]
    at_once: int
    trust: Emulation
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
    moments, squares = _moments(path)
    return PathEvidence(path.batches, calls, layer_sums(path), moments, squares)


def channels_of(path: Path) -> dict[Slot, int]:
    """Channels of each call that a path has seen."""
    return {slot: path.layers[slot[0]].info.channels for slot in path.positions}


def _moments(path: Path) -> tuple[dict[Slot, BatchSums], dict[Slot, Tensor]]:
    if path.replicates is None:
        return {}, {}
    moments, squares = {}, {}
    for slot, (counts, sums, image_squares) in path.replicates.per_call(channels_of(path)).items():
        info = path.layers[slot[0]].info
        assert info.running_variance is not None  # what is compared with running statistics has some
        eps = info.eps / (info.running_variance.cpu().double() + info.eps)
        moments[slot] = BatchSums(counts, sums, eps)
        squares[slot] = image_squares
    return moments, squares


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
