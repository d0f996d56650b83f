"""Several scans of one model side by side: two versions, or the checkpoints of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnprobe.records.base import SCHEMA_VERSION, Interval, Record, Tool
from bnprobe.records.document import Document
from bnprobe.records.outputs import PathValues

Trend = Literal["same", "better", "worse", "unsure", "unknown"]
"""From the first scan to the last: the same figure; surely less or more mismatch (95%); a difference that chance may
explain; or not measured in both."""


@dataclass(frozen=True)
class ComparedScan(Record):
    """One of the scans.

    Attributes:
        name: The file of the report, or of the checkpoint.
        errors: Root causes that are errors.
        worst: The layer with the largest D; None if none was measured.
        mismatch: Its D, on the path where it is larger.
        equivalent_batch_size: Its n_eq; None if D is 0, or there is no such layer.
        output: Relative L2 distance of the outputs in training and at inference; None where not measured.
        loss, metric: In both modes; None where not given.
    """

    name: str
    model: str
    checkpoint: str | None
    batch_size: int
    layers: int
    flagged: int
    undecided: int
    errors: int
    worst: str | None
    mismatch: float | None
    equivalent_batch_size: float | None
    output: float | None
    loss: PathValues | None
    metric: PathValues | None


@dataclass(frozen=True)
class LayerPoint(Record):
    """A layer in one of the scans, on the path where its D is larger."""

    mismatch: float
    interval: Interval
    equivalent_batch_size: float | None
    flagged: bool
    undecided: bool


@dataclass(frozen=True)
class LayerTrend(Record):
    """One layer in all of the scans.

    Attributes:
        points: One for each scan; None where it was not measured.
        ratio: D of the last scan over that of the first; None where one was not measured, or is 0.
        ratio_interval: 95% interval of ``ratio``, from 0 on where no lower end can be given; None where neither can.
        trend: Which of the two is larger, and whether that is sure.
    """

    name: str
    points: tuple[LayerPoint | None, ...]
    ratio: float | None
    ratio_interval: Interval | None
    trend: Trend


@dataclass(frozen=True)
class Comparison(Document):
    """Scans of one model, compared layer by layer.

    Attributes:
        scans: In the order given.
        layers: Of all scans, in network order.
        notes: Differences that weaken the comparison (batch size, data, seed), a sentence each.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.scan(model, loader, batch_size=2)
        >>> bnprobe.compare({"first": report, "second": report}).layers[0].trend
        'same'
    """

    tool: Tool
    scans: tuple[ComparedScan, ...]
    layers: tuple[LayerTrend, ...]
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION
