"""What a repair changed, and what it was proved to give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from bnprobe.records.basics import Interval
from bnprobe.records.findings import Score
from bnprobe.records.scans import Environment, Tool

Ending = Literal["finished", "early_stop", "diverged"]
"""How a training run ended."""

Conclusion = Literal["better", "same", "worse", "undecided", "not_compared"]
"""The repaired model against its control."""


@dataclass(frozen=True)
class LayerChange:
    """One layer that a repair converts.

    Attributes:
        kind, to: Class names before and after.
        reason: Why it is converted, a clause, e.g. "flagged: n_eq 2.8, below 32 (small batch)".
        note: What changes beyond the class, a clause; empty if nothing does.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    to: str
    reason: str
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """A layer that was asked for and cannot be converted."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a repair would change; making it changes nothing.

    Attributes:
        to: Name of the repair, e.g. "batch-renorm".
        source: What chose the layers, a phrase, e.g. "a scan at batch size 2", "--layers", "report.json".
        changes: In network order.
        refused: Layers asked for that stay as they are.
        untouched: Norm layers that were not asked for.
        deploys: Whether the repaired weights load strictly into the original model.
    """

    to: str
    source: str
    changes: tuple[LayerChange, ...]
    refused: tuple[Refusal, ...]
    untouched: int
    deploys: bool


@dataclass(frozen=True)
class TrainingStep:
    """One optimizer step, as progress bars and logs see it.

    Attributes:
        arm: As in ``Arm.name``.
        step: From 1; of ``steps``.
        loss: Mean over the step's micro-batches, of all processes.
        rate: Learning rate of the first parameter group.
        gradient_norm: L2 norm of the gradient before clipping; None if nothing is clipped.
        r_max, d_max: Limits of Batch Renorm; None for other layers.
        clipped_r, clipped_d: Part of r and d beyond these limits; None where not looked at.
        score: On the evaluation batches set apart for choosing, after this step; None where not evaluated.
    """

    arm: str
    seed: int
    step: int
    steps: int
    loss: float
    rate: float
    gradient_norm: float | None = None
    r_max: float | None = None
    d_max: float | None = None
    clipped_r: float | None = None
    clipped_d: float | None = None
    score: Score | None = None


@dataclass(frozen=True)
class Run:
    """One training run of one arm.

    Attributes:
        seed: Of the order of the data, dropout and the like.
        steps: Optimizer steps taken.
        best_step: The step whose weights were kept, by the evaluation batches set apart for choosing; 0: the start.
        score: Of the kept weights, on the evaluation batches set apart for the proof.
        ending: How it ended.
        note: Where and why it diverged, a sentence; empty otherwise.
        seconds: Wall time.
        clipped_r, clipped_d: Part of r and d that Batch Renorm clipped over the last tenth of the steps; None for
            other layers.
    """

    seed: int
    steps: int
    best_step: int
    score: Score
    ending: Ending
    note: str
    seconds: float
    clipped_r: float | None = None
    clipped_d: float | None = None


@dataclass(frozen=True)
class Estimate:
    """Mean over runs, and its 95% interval (Student's t); None with one run, or where all gave the same."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Arm:
    """One way to treat the model.

    Attributes:
        name: "as is", "recalibrated", "BN fine-tuned" and "BN recalibrated after" (the controls), or a repair, e.g.
            "batch-renorm".
        trained: Whether it was fine-tuned.
        runs: One for each seed; one where nothing was trained.
        loss, metric: Over the runs; None where not given or not finite.
    """

    name: str
    trained: bool
    runs: tuple[Run, ...]
    loss: Estimate | None
    metric: Estimate | None


@dataclass(frozen=True)
class RequirementResult:
    """One ``--require``, and whether it held; ``value`` None: not measured, which fails it."""

    text: str
    value: float | None
    held: bool


@dataclass(frozen=True)
class Proof:
    """The repaired model beside its controls, on evaluation batches that chose nothing.

    Attributes:
        measure: What decides: "metric" where given, else "loss".
        arms: In the order in which they are printed.
        repaired: Name of the arm whose weights are written.
        control: Name of the arm it is held against: the better of the controls; None where nothing was trained.
        gain: Repaired minus control in ``measure``, so signed that more is better, paired by seed; for "recalibrate"
            paired by held-out batch.
        conclusion: The verdict, in a word; and ``message``, a sentence or two.
        images_choosing, images_proving: Evaluation images that chose the weights, and that score.
    """

    measure: Literal["loss", "metric"]
    arms: tuple[Arm, ...]
    repaired: str
    control: str | None
    gain: Estimate | None
    conclusion: Conclusion
    message: str
    images_choosing: int
    images_proving: int


@dataclass(frozen=True)
class RepairRecord:
    """The record that stands beside repaired weights.

    Attributes:
        action: "convert" or "recalibrate".
        command: As typed; None from Python.
        model, checkpoint: As in the scan's record.
        weights: File of the weights, and their SHA-256; None if nothing was written.
        settings: The spec's sections that matter: data, train, repair, scan.
        plan: None for "recalibrate".
        recalibrated: Layers whose running statistics were taken anew.
        proof: None if nothing was scored.
        flagged_before, flagged_after: Layers flagged by the two scans; None where that was not measured. Layers whose
            training and inference agree by construction count as not flagged.
        requirements: What was required.
        notes: What the reader should know, a sentence each.
    """

    schema_version: int
    tool: Tool
    environment: Environment
    action: Literal["convert", "recalibrate"]
    command: str | None
    model: str
    checkpoint: str | None
    weights: str | None
    weights_sha256: str | None
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    plan: Plan | None
    recalibrated: tuple[str, ...]
    proof: Proof | None
    flagged_before: int | None
    flagged_after: int | None
    requirements: tuple[RequirementResult, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LayerComparison:
    """One layer in two reports; the figures are those of the worse path."""

    name: str
    before: float | None
    after: float | None
    flagged_before: bool
    flagged_after: bool


@dataclass(frozen=True)
class Verification:
    """Two reports of one model, compared.

    Attributes:
        passed: No layer is newly flagged, none that was flagged is so still, and the output disagrees no more.
        problems: Why not, a sentence each.
        layers: Layers of either report, in network order; ``only_before``, ``only_after``: in one of them.
        output_before, output_after: Relative L2 distance of the outputs on the two paths; None where not measured.
        notes: Differences that make the comparison weaker (batch size, data, seed), a sentence each.
    """

    passed: bool
    problems: tuple[str, ...]
    layers: tuple[LayerComparison, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    output_before: float | None
    output_after: float | None
    notes: tuple[str, ...]
