"""What ``bnprobe sweep`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnprobe.records.basics import Interval
from bnprobe.records.layers import SkippedLayer
from bnprobe.records.scans import Environment, Scan, Tool


@dataclass(frozen=True)
class SweepPoint:
    """One layer on one path at one batch size.

    Attributes:
        batches: Micro-batches of this size.
        theory: D that i.i.d. images would give: n_eq at the scanned size grows in proportion to the batch size.
        standing: Against the layer's threshold: "passes" and "fails" where the whole interval does.
    """

    batch_size: int
    batches: int
    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    theory: float
    standing: Literal["passes", "undecided", "fails"]


@dataclass(frozen=True)
class Smallest:
    """The smallest of the measured batch sizes from which on there is a pass; None: no measured size.

    Attributes:
        surely: The whole interval passes there.
        likely: The measured value passes there, and at every larger size.
    """

    surely: int | None
    likely: int | None


@dataclass(frozen=True)
class SweepLayer:
    """One layer at several batch sizes.

    Attributes:
        threshold: Equivalent batch size that it has to reach.
        flagged, undecided, note: As a scan at the scanned batch size says.
        eval: The eval path, every size from the same images; empty where it could not be measured.
        train: The train path at the scanned size and at the ``--train-sizes``, one measurement each.
        smallest: Of the eval path.
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
class Tracking:
    """How well running statistics of one rate follow: D of each micro-batch against those of before it.

    Attributes:
        mismatch: Mean over the second half of the recorded micro-batches.
        standard_error: Of ``mismatch``, by batch means, without what is no chance (the way from the start or from a
            shift); None with too few micro-batches.
    """

    mismatch: float
    standard_error: float | None


@dataclass(frozen=True)
class MomentumPoint:
    """One rate.

    Attributes:
        rate: Weight of the new batch, PyTorch's ``momentum``; None: cumulative average.
        effective_batches: (2 - rate) / rate micro-batches; None for the cumulative average.
        loaded: From the running statistics that the model was loaded with.
        converged: From statistics that have settled on the recorded micro-batches.
        shifted: As ``converged``, settled on the first half, with other data in the second; None without ``--shift``.
        recovery: Micro-batches after the shift until the mismatch is, and stays, within twice that without a shift;
            None without ``--shift``, or if that many were not recorded.
    """

    rate: float | None
    effective_batches: float | None
    loaded: Tracking
    converged: Tracking
    shifted: Tracking | None
    recovery: int | None


@dataclass(frozen=True)
class BestRates:
    """The rate that tracks best first, then those that it does not surely beat (95%)."""

    loaded: tuple[float | None, ...]
    converged: tuple[float | None, ...]
    shifted: tuple[float | None, ...]


@dataclass(frozen=True)
class MomentumCurve:
    """All rates, for one layer or for the mean over layers.

    Attributes:
        layer: Name; None: mean over the layers.
        momentum: What the layer is set to (None: cumulative average); for the mean over layers what all are set to.
        one_momentum: Whether ``momentum`` holds: False for the mean over layers that differ in it.
        points: By falling rate, the cumulative average last.
    """

    layer: str | None
    momentum: float | None
    one_momentum: bool
    points: tuple[MomentumPoint, ...]
    best: BestRates


@dataclass(frozen=True)
class MomentumSweep:
    """The running average replayed at several rates on recorded batch statistics of the train path.

    Attributes:
        batches: Micro-batches recorded.
        shift: Standard deviations of its channel added to every batch mean from the middle on; None: none.
        scale: Factor on the batch standard deviations from the middle on.
        dtype: In which the batch statistics were kept.
        bytes: Memory that they took.
        omitted: Layers that could not be replayed, and why.
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
class SweepReport:
    """The result of a sweep.

    Attributes:
        scan: The scan at the batch size of the data, which also gave the eval path at the other sizes.
        smallest: The smallest batch size at which every layer passes on the eval path.
        notes: Further facts that bear on the sweep, a sentence each.
        partial: True if Ctrl-C ended it early.
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
