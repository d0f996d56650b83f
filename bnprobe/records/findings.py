"""What is wrong, and what remedies gave."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.basics import Cause, Outcome, Severity


@dataclass(frozen=True)
class Verdict:
    """What one rule says of one layer, or of the model.

    Attributes:
        rule: Code, e.g. "BN201".
        layer: Name of the layer; None: the model or the run as a whole.
        message: What was found, a sentence.
        value, limit, unit: What was measured, and from where on it fails.
        remedy: What to do where the rule failed, a sentence; empty otherwise.
        reason: Why the rule was skipped; None otherwise.
        location: File and line in the user's code where the layer was assigned, where Python can tell.
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
class Diagnosis:
    """One cause, and all layers that it explains.

    Attributes:
        rule: Code of the rule that found it.
        layers: In network order; empty if it concerns the model as a whole.
        impact: Relative L2 change of the model's outputs if these layers normalize with their batch's statistics;
            None where it was not measured.
        message: What is wrong and how that is known.
        remedy: What to do first.
        consequences: Causes that follow from this one and are therefore no diagnoses of their own, with their layers
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


@dataclass(frozen=True)
class Score:
    """Loss and metric, where given."""

    loss: float | None
    metric: float | None


@dataclass(frozen=True)
class Remedy:
    """What a free remedy gives on the evaluation batches, measured on a copy.

    Attributes:
        name: Which: "recalibrated", "evaluation statistics", "batch statistics", "batch statistics, batches of N".
        layers: Layers whose statistics were changed.
        before, after: Without and with it.
        control: What the gain is to be held against; None: ``before``.
        images: Evaluation images scored.
        detail: How it was done, a phrase, e.g. "statistics of 512 training images".
    """

    name: str
    layers: tuple[str, ...]
    before: Score
    after: Score
    control: Score | None
    images: int
    detail: str
