"""What ``bnprobe sweep`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnprobe.records.base import Environment, Interval, Record, Tool
from bnprobe.records.document import Plotted
from bnprobe.records.layers import SkippedLayer
from bnprobe.records.scan import Scan


@dataclass(frozen=True)
class SweepPoint(Record):
    """One layer on one path at one batch size.

    Attributes:
        batches: Micro-batches of this size.
        theory: D that i.i.d. samples would give: n_eq at the scanned size grows in proportion to the batch size.
        limit: The D above which the layer is flagged at this size, as in a scan.
        standing: "passes" or "fails" if the whole interval is within the limit, or beyond it.
    """

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    theory: float
    limit: float
    standing: Literal["passes", "undecided", "fails"]


@dataclass(frozen=True)
class Smallest(Record):
    """The smallest measured batch size that passes, as do all larger ones; None: there is none.

    Attributes:
        surely: The whole 95% interval passes.
        likely: The measured value passes.
    """

    surely: int | None
    likely: int | None


@dataclass(frozen=True)
class SweepLayer(Record):
    """One layer at several batch sizes.

    Attributes:
        threshold: The equivalent batch size below which all that is no noise of batches flags it.
        flagged, undecided, note: As in a scan at the scanned batch size.
        eval: The eval path, every size from the same samples; empty where it could not be measured.
        train: The train path at the scanned size and at the ``--train-sizes``, one measurement each.
        smallest: The smallest batch size that passes on the eval path.
    """

    name: str
    kind: str
    channels: int
    threshold: float
    flagged: bool
    undecided: bool
    note: str | None
    eval: tuple[SweepPoint, ...]
    train: tuple[SweepPoint, ...]
    smallest: Smallest


@dataclass(frozen=True)
class Tracking(Record):
    """How well a running average of one rate tracks the batch statistics.

    Attributes:
        mismatch: D of each micro-batch against the running statistics before it, mean over the second half of the
            recorded micro-batches.
        standard_error: Standard error of ``mismatch`` by batch means, without the trend after the start or after a
            shift; None with too few micro-batches.
    """

    mismatch: float
    standard_error: float | None


@dataclass(frozen=True)
class MomentumPoint(Record):
    """One rate of the running average.

    Attributes:
        rate: Weight of the new batch, PyTorch's ``momentum``; None: cumulative average.
        effective_batches: (2 - rate) / rate micro-batches; None for the cumulative average.
        loaded: Starting from the running statistics that the model was loaded with.
        converged: Starting from statistics that have settled on the recorded micro-batches.
        shifted: As ``converged``, but settled on the first half, with the data shifted in the second; None without
            ``--shift``.
        recovery: Micro-batches after the shift until the mismatch falls, for good, below twice that without a shift;
            None without ``--shift``, or if it was still above at the last micro-batch.
    """

    rate: float | None
    effective_batches: float | None
    loaded: Tracking
    converged: Tracking
    shifted: Tracking | None
    recovery: int | None


@dataclass(frozen=True)
class BestRates(Record):
    """The rate that tracks best, followed by those that are not significantly worse (95%)."""

    loaded: tuple[float | None, ...]
    converged: tuple[float | None, ...]
    shifted: tuple[float | None, ...]


@dataclass(frozen=True)
class MomentumCurve(Record):
    """All rates, for one layer or for the mean over layers.

    Attributes:
        layer: Name; None: mean over the layers.
        momentum: The layer's own momentum (None: cumulative average); for the mean over layers, that of all layers.
        one_momentum: False for the mean over layers that differ in their momentum: ``momentum`` says nothing then.
        points: By falling rate, the cumulative average last.
    """

    layer: str | None
    momentum: float | None
    one_momentum: bool
    points: tuple[MomentumPoint, ...]
    best: BestRates


@dataclass(frozen=True)
class MomentumSweep(Record):
    """The running average replayed at several rates on recorded batch statistics of the train path.

    Attributes:
        batches: Micro-batches recorded.
        batch_size: Samples in a micro-batch.
        shift: Added to every batch mean from the middle on, in standard deviations of its channel; None: nothing.
        scale: Factor of the batch standard deviations from the middle on.
        dtype: In which the batch statistics were kept.
        bytes: Memory that they took.
        omitted: Layers that could not be replayed, and why.
        model: The mean over the layers.
    """

    batches: int
    batch_size: int
    shift: float | None
    scale: float
    dtype: str
    bytes: int
    omitted: tuple[SkippedLayer, ...]
    model: MomentumCurve
    layers: tuple[MomentumCurve, ...]


@dataclass(frozen=True)
class SweepReport(Plotted):
    """The result of a sweep.

    Attributes:
        scan: The scan at the batch size of the data; it also gave the eval path at the other sizes.
        smallest: The smallest batch size at which every layer passes on the eval path.
        momentum: With ``--momentum``.
        notes: Further facts that affect the sweep, a sentence each.
        partial: True if Ctrl-C ended it early.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> sweep = bnprobe.sweep(model, loader, batch_size=2, batch_sizes=[2, 32])
        >>> [point.standing for point in sweep["1"].eval]
        ['fails', 'passes']
    """

    schema_version: int
    tool: Tool
    environment: Environment
    scan: Scan
    layers: tuple[SweepLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    smallest: Smallest
    momentum: MomentumSweep | None
    notes: tuple[str, ...]
    partial: bool
