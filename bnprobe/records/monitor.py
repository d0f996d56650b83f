"""What a monitor saw while a model trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bnprobe.records.base import Record


@dataclass(frozen=True)
class LayerSample(Record):
    """One layer on one batch, against its running statistics as they were before the step.

    Attributes:
        mismatch: D, the mean over channels of (z_train - z_test)^2.
        equivalent_batch_size: n_eq, the size of an i.i.d. batch that has this D; None if D is 0.
        r: Mean over channels.
        d: Root mean square over channels.
    """

    mismatch: float
    equivalent_batch_size: float | None
    r: float
    d: float


@dataclass(frozen=True)
class ModeLoss(Record):
    """The loss of one batch in both modes: what the loop calls ``backward()`` on, so that a GradScaler's factor, or the
    number of batches that it is divided by, is in it.
    """

    train: float
    eval: float


@dataclass(frozen=True)
class MonitorSample(Record):
    """One batch in both modes.

    Attributes:
        step: Optimizer steps before it.
        samples: In the batch; None where that is not known.
        output: Relative L2 distance of the outputs; None where they have none, or are not finite.
        loss: None where the loop's loss could not be computed again.
        layers: Those that normalized with the batch, by name.
    """

    step: int
    samples: int | None
    output: float | None
    loss: ModeLoss | None
    layers: Mapping[str, LayerSample]


@dataclass(frozen=True)
class MonitorFinding(Record):
    """What a scan of the batches that followed an alarm found, a root cause.

    Attributes:
        step: Optimizer steps before the scan.
        alarm: Optimizer steps before the sample that raised the alarm.
        rule, cause, severity, layers, message, remedy: As in a scan's diagnosis.
    """

    step: int
    alarm: int
    rule: str
    cause: str
    severity: str
    layers: tuple[str, ...]
    message: str
    remedy: str


@dataclass(frozen=True)
class MonitorLog(Record):
    """What the log of a monitor says so far: of a run that was resumed, what was not done again.

    Attributes:
        path: The file.
        version: The version of bnprobe that watches; empty: the run has not begun.
        model: The class of the model.
        every: Optimizer steps from sample to sample.
        step: Optimizer steps before the run began, or was resumed.
        skipped: Reasons by the names of norm layers that are not watched.
        samples: In order; of very many some are left out, evenly.
        findings: In order.
        changed: What was done, by the names of the layers that it was done to and that are still so.
        unreadable: Lines that were cut off, or damaged.
    """

    path: str
    version: str = ""
    model: str = ""
    every: int = 0
    step: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    samples: tuple[MonitorSample, ...] = ()
    findings: tuple[MonitorFinding, ...] = ()
    changed: Mapping[str, str] = field(default_factory=dict)
    unreadable: int = 0
