"""What is wrong: the verdicts of the rules, the root causes, and what remedies without training gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bnprobe.records.base import Estimate, Record, Score

Cause = str
"""Why a layer is off, or may become so, e.g. "small_batch": the ``cause`` of one of ``bnprobe.rules.RULES``."""

Severity = Literal["error", "warning", "info"]
"""error: training and inference differ, or will; warning: likely a mistake, or harmless so far; info: a remark."""

Outcome = Literal["passed", "failed", "skipped"]

EXEMPT = "Exempt: "
"""The message of a verdict begins so if, and only if, it was skipped because the user exempts the layer."""


@dataclass(frozen=True)
class Verdict(Record):
    """What one rule says about one layer, or about the model.

    Attributes:
        rule: Code, e.g. "BN201".
        cause: What the rule looks for, e.g. "small_batch".
        layer: Name of the layer; None: the model or the run as a whole.
        message: What was found, a sentence.
        value, limit, unit: What was measured, the limit from which on the rule fails, and the unit of both.
        remedy: What to do where the rule failed, a sentence; empty otherwise.
        reason: Why the rule was skipped; None otherwise.
        location: File and line in the user's code where the layer is built, where Python can tell.
    """

    rule: str
    cause: Cause
    layer: str | None
    outcome: Outcome
    severity: Severity
    message: str
    value: float | None
    limit: float | None
    unit: str
    remedy: str
    reason: str | None = None
    location: str | None = None


@dataclass(frozen=True)
class Diagnosis(Record):
    """One root cause, and all layers that it explains.

    Attributes:
        cause: What is wrong, e.g. "small_batch".
        rule: Code of the rule that found it.
        layers: In network order; empty if it concerns the model as a whole.
        impact: Relative L2 change of the model's outputs if these layers normalize with batch statistics; None where
            it was not measured.
        message: What is wrong, and how that is known.
        remedy: What to do first.
        consequences: Causes that follow from this one and are therefore not diagnosed separately, with their layers,
            in words, e.g. "propagation in 5 layers".
    """

    cause: Cause
    rule: str
    severity: Severity
    layers: tuple[str, ...]
    impact: float | None
    message: str
    remedy: str
    consequences: tuple[str, ...] = ()


FreeRemedy = Literal[
    "recalibrated",
    "evaluation statistics",
    "batch statistics",
    "instance statistics",
    "instance renorm",
    "example weighing",
    "micro-batch statistics, averaged",
    "micro-batch statistics, pooled",
    "recalibrated with frozen layers",
    "statistics per call",
]
"""What a scan tries without training: running statistics of the training data, or of the held-out data; the statistics
of every batch, or of every sample; outputs or moments in part of every sample's own statistics (conversions to
instance renorm and example weighing); running statistics of micro-batches as they are in training, their variances
averaged, or pooled with the spread of their means; those of the training data in layers that training leaves in eval
mode, too; statistics of its own for every call of a layer that is called more than once."""

FREE_REMEDIES: tuple[FreeRemedy, ...] = get_args(FreeRemedy)


@dataclass(frozen=True)
class Remedy(Record):
    """The effect of a remedy that needs no training, measured without changing the model.

    Attributes:
        name: A ``FreeRemedy``, or "batch statistics, batches of N".
        layers: Layers whose statistics were changed.
        before, after: Scores without and with the remedy.
        control: The baseline that the gain is to be compared with; None: ``before``.
        images: Number of samples scored.
        detail: How it was done, a phrase, e.g. "statistics of 512 training samples".
        loss_change, metric_change: ``after`` minus the baseline, paired by sample where the user's function is a mean
            over samples, otherwise by batch.
        scored_on: Where the samples come from; without held-out data, training samples that the statistics were not
            taken from.
        blend: Weight of the samples' own statistics, where ``bnprobe convert --blend`` carries it out; else None.
        domains: How many kinds of data the user's code says that the calls are of (``bnprobe.nn.domain``), where
            ``bnprobe convert --to per-domain`` carries it out; else None.
        recalibrated: The running statistics were recalibrated first, as ``bnprobe convert`` does; so were those of the
            control.
        cost: What the remedy costs where it is used, a phrase; empty: nothing.
        cut_short: It was worse on these samples already, and so was scored on no more.
    """

    name: str
    layers: tuple[str, ...]
    before: Score
    after: Score
    control: Score | None
    images: int
    detail: str
    loss_change: Estimate | None = None
    metric_change: Estimate | None = None
    scored_on: Literal["held-out", "training"] = "held-out"
    blend: float | None = None
    recalibrated: bool = False
    cost: str = ""
    domains: int | None = None
    cut_short: bool = False
