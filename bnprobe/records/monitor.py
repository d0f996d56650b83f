"""What a monitor saw while a model trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.records.base import Record
from bnprobe.records.document import Document

if TYPE_CHECKING:
    from typing_extensions import Self

RECALIBRATE, UNDO = "recalibrate", "undo"
"""What leaves a layer BN: its statistics are taken anew, and what was done to it before is taken back."""


@dataclass(frozen=True)
class LayerSample(Record):
    """One layer on one batch, against its running statistics as they were before the step.

    Attributes:
        mismatch: D, the mean over channels of (z_train - z_test)^2.
        equivalent_batch_size: n_eq, the size of an i.i.d. batch that has this D; None if D is 0.
        r: Mean over channels.
        d: Root mean square over channels.
        frozen: Training holds the layer in eval mode: it normalizes with its running statistics, not with the batch.
    """

    mismatch: float
    equivalent_batch_size: float | None
    r: float
    d: float
    frozen: bool = False


@dataclass(frozen=True)
class ModeLoss(Record):
    """The loss of one step in both modes: the sum of what the loop calls ``backward()`` on and does not zero again.

    A GradScaler's factor is none of it; the number of batches that the loop divides by is.
    """

    train: float
    eval: float


@dataclass(frozen=True)
class MonitorSample(Record):
    """The batches of one step in both modes: one of each call of the model, whose figures are their means.

    Attributes:
        step: Optimizer steps before it.
        samples: In a batch, the mean over the calls; None where that is not known.
        output: Relative L2 distance of the outputs; None where they have none, or are not finite.
        loss: None where the loop's loss could not be computed again.
        layers: Those with running statistics that the batch passed through, by name.
    """

    step: int
    samples: int | None
    output: float | None
    loss: ModeLoss | None
    layers: Mapping[str, LayerSample]


@dataclass(frozen=True)
class MonitorFinding(Record):
    """What a scan of the batches that followed an alarm found, a root cause; or how the inputs changed.

    Attributes:
        step: Optimizer steps before the scan.
        alarm: Optimizer steps before the sample that raised the alarm.
        rule, cause, severity, layers, message, remedy: As in a scan's diagnosis; the rule of a finding on the inputs,
            which has no layers and needs no scan, is "inputs".
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
class MonitorChange(Record):
    """What a monitor did to layers, or took back.

    Attributes:
        step: Optimizer steps before it.
        action: "freeze", "renorm", "recalibrate"; or "undo", where the layers are BN again.
        layers: Their names.
    """

    step: int
    action: str
    layers: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class MonitorLog(Document):
    """What the log of a monitor says so far: of a run that was resumed, what was not done again.

    Attributes:
        path: The file.
        version: The version of bnprobe that watches; empty: the run has not begun.
        model: The class of the model.
        every: Optimizer steps from sample to sample.
        step: Optimizer steps before the run was resumed; 0: it was not.
        skipped: Reasons by the names of norm layers that are not watched.
        taken: Samples that were taken.
        samples: In order; of very many some are left out, evenly.
        findings: In order.
        changes: In order.
        unreadable: Lines that were cut off, or damaged.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.01)
        >>> with bnprobe.Monitor(model, every=1, log="run"):
        ...     for _ in range(3):
        ...         loss = model(pixels).square().mean()
        ...         loss.backward()
        ...         _ = optimizer.step()
        >>> log = bnprobe.MonitorLog.load("run")
        >>> [sample.step for sample in log.samples], log.ok
        ([1, 2], True)
        >>> log.save("page.html")
    """

    path: str
    version: str = ""
    model: str = ""
    every: int = 0
    step: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    taken: int = 0
    samples: tuple[MonitorSample, ...] = ()
    findings: tuple[MonitorFinding, ...] = ()
    changes: tuple[MonitorChange, ...] = ()
    unreadable: int = 0

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a log, the folder or file that a monitor was given; or what `save` or ``--format json`` wrote of one.

        Raises:
            UsageError: There is no such log, or it cannot be read.
        """
        log = import_module("bnprobe.monitor.log")  # above the records, as what `Document` calls
        read: Self = log.read_log(Path(path)) if log.is_log(Path(path)) else super().load(path)
        return read
