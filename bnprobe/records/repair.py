"""What a repair would change, what it changed, what that gained, and how two scans or two outputs compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from bnprobe.records.base import Environment, Estimate, Measure, Record, Score, Tool
from bnprobe.records.document import Document, Tabular

Ending = Literal["finished", "early_stop", "diverged"]
"""How a training run ended."""

Conclusion = Literal["better", "same", "worse", "undecided", "not_compared"]
"""The repaired model compared with its baseline."""


@dataclass(frozen=True)
class LayerChange(Record):
    """One layer that a repair converts.

    Attributes:
        kind, to: Class names before and after.
        reason: Why it is converted, a clause, e.g. "flagged: n_eq 2.8, below 32 (small batch)".
        note: What else changes beside the class, a clause; empty if nothing does.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    to: str
    reason: str
    note: str = ""


@dataclass(frozen=True)
class Refusal(Record):
    """A layer that was asked for and cannot be converted."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan(Document):
    """What a repair would change; planning changes nothing.

    Attributes:
        to: Name of the repair, e.g. "batch-renorm".
        source: What chose the layers, a phrase, e.g. "a scan at batch size 2", "--layers", "report.json".
        changes: In network order.
        refused: Layers that were asked for and cannot be converted.
        untouched: Number of normalization layers that were not asked for.
        deploys: Whether the repaired weights load strictly into the original model.
    """

    to: str
    source: str
    changes: tuple[LayerChange, ...]
    refused: tuple[Refusal, ...]
    untouched: int
    deploys: bool

    def refused_by_reason(self) -> dict[tuple[str, str], list[str]]:
        """Names of the refused layers, by class name and reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for layer in self.refused:
            groups.setdefault((layer.kind, layer.reason), []).append(layer.name)
        return groups


@dataclass(frozen=True)
class TrainingStep(Record):
    """One optimizer step, for progress bars and logs.

    Attributes:
        arm: As in ``Arm.name``.
        step: Counted from 1 to ``steps``.
        loss: Mean over the step's micro-batches, of all processes.
        rate: Learning rate of the first parameter group.
        gradient_norm: L2 norm of the gradient before clipping; None without gradient clipping.
        r_max, d_max: Limits of Batch Renorm (docs/explanation/batch-renorm.md); None for other layers.
        clipped_r, clipped_d: Fractions of r and d beyond these limits; None where not measured.
        score: On the held-out data that choose the weights, after this step; None where not evaluated.
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
class Curve(Record):
    """How one training run went, in about fifty points of each kind at most.

    Attributes:
        steps: Optimizer steps, counted from 1, up to which ``losses`` are means.
        losses: Mean training loss since the step before; None where it was not finite.
        evaluated_at: Steps after which the held-out data that choose the weights were scored; 0: before the first.
        evaluation_losses, evaluation_metrics: Their scores; None where not given or not finite.
    """

    steps: tuple[int, ...]
    losses: tuple[float | None, ...]
    evaluated_at: tuple[int, ...] = ()
    evaluation_losses: tuple[float | None, ...] = ()
    evaluation_metrics: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Run(Record):
    """One training run of one arm.

    Attributes:
        seed: Of the order of the data, of dropout and of other randomness.
        steps: Optimizer steps taken.
        best_step: The step whose weights were kept, chosen on one part of the held-out data; 0: the start.
        score: Of the kept weights, on the other part of the held-out data.
        ending: How it ended.
        note: Where and why it diverged, a sentence; empty otherwise.
        seconds: Wall time.
        clipped_r, clipped_d: Fractions of r and d that Batch Renorm clipped over the last tenth of the steps; None for
            other layers.
        curve: None where nothing was trained.
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
    curve: Curve | None = None


@dataclass(frozen=True)
class Arm(Record):
    """One way to treat the model, in a comparison of several.

    Attributes:
        name: "as is", "recalibrated", "batch-renorm untrained" (a repair without its training), "BN fine-tuned" and "BN
            recalibrated after" (the baselines), or a repair, e.g. "batch-renorm".
        trained: Whether it was fine-tuned.
        runs: One for each seed; one where nothing was trained.
        loss, metric: Over the runs; None where not given or not finite.
    """

    name: str
    trained: bool
    runs: tuple[Run, ...]
    loss: Estimate | None
    metric: Estimate | None

    def of(self, measure: Measure) -> Estimate | None:
        """One of the two."""
        return self.loss if measure == "loss" else self.metric


@dataclass(frozen=True)
class RequirementResult(Record):
    """One ``--require`` and whether it held; a ``value`` that was not measured is None and does not hold."""

    text: str
    value: float | None
    held: bool


@dataclass(frozen=True)
class Proof(Record):
    """The repaired model compared with its baselines, on held-out data that were not used to choose the weights.

    Attributes:
        measure: What decides: "metric" where given, else "loss".
        arms: In the order in which they are printed.
        repaired: Name of the arm whose weights are written.
        control: Name of the baseline that it is compared with, the best one; where nothing was trained, "as is", or
            "recalibrated" where the repaired model is the recalibrated one at inference.
        gain: Difference of repaired and baseline in ``measure``, positive where the repaired model is better. Of
            several seeds paired by seed: the interval covers the chance of training. Of one run paired by sample, or by
            batch where the user's function is no mean over samples: the interval covers the choice of samples.
        conclusion: The verdict in a word.
        message: The verdict in a sentence or two.
        images_choosing, images_proving: Number of held-out samples that chose the weights, and that scored them.
        over_as_is: Difference of the weights to be written and those as loaded, like ``gain`` of one run.
        surely_worse: The weights are significantly worse (95%) than as loaded: written only with ``--force``.
        below_recalibrated: They are significantly worse than the model as loaded with recalibrated statistics alone.
        scored_on: "training" where there was no held-out data.
        which: Which of the held-out samples scored, a phrase; empty: all that were read.
        over_converted: Difference of the weights to be written and the same conversion without training, like
            ``gain`` of one run; None where nothing was trained.
        below_converted: They are significantly worse than that conversion.
    """

    measure: Measure
    arms: tuple[Arm, ...]
    repaired: str
    control: str | None
    gain: Estimate | None
    conclusion: Conclusion
    message: str
    images_choosing: int
    images_proving: int
    over_as_is: Estimate | None = None
    surely_worse: bool = False
    below_recalibrated: bool = False
    scored_on: Literal["held-out", "training"] = "held-out"
    over_converted: Estimate | None = None
    below_converted: bool = False
    which: str = ""

    @property
    def is_recalibration(self) -> bool:
        """Whether all that the repair gains is what recalibrating gives: at inference they are the same."""
        return self.control == "recalibrated" and self.conclusion == "same"


@dataclass(frozen=True)
class RepairRecord(Record):
    """The record that is written with repaired weights.

    Attributes:
        action: "convert" or "recalibrate".
        command: As typed; None from Python.
        model, checkpoint: As in the report of a scan.
        weights: File of the weights; None if none was written.
        weights_sha256: SHA-256 of that file; None if none was written.
        settings: The sections data, train, repair and scan of the spec.
        plan: None for "recalibrate".
        recalibrated: Layers whose running statistics were recalibrated.
        proof: None if nothing was scored.
        flagged_before, flagged_after: Number of layers flagged by the two scans; None where not measured. Layers whose
            training and inference agree by construction count as not flagged.
        requirements: What was required with ``--require``.
        notes: What the reader should know, a sentence each.
        tracked: Layers that kept no running statistics and do now, with the line of the user's code that makes them,
            where Python can tell.
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
    tracked: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerComparison(Record):
    """The mismatch D of one layer in two reports, each on the path where it is larger.

    ``undecided_after``: the later scan could not tell on which side of its limit the layer is. ``lost``: the layer was
    flagged, and the later scan could not measure it, so that nothing is known of its mismatch.
    """

    name: str
    before: float | None
    after: float | None
    flagged_before: bool
    flagged_after: bool
    undecided_after: bool = False
    lost: bool = False


@dataclass(frozen=True)
class Verification(Tabular):
    """Two reports of one model, compared.

    Attributes:
        model: As in the later report.
        passed: No layer is flagged in the later report or lost, and its outputs are no farther apart.
        problems: Why it did not pass, a sentence each.
        layers: Layers of both reports, in network order.
        only_before, only_after: Names of the layers of one report only.
        output_before, output_after: Relative L2 distance of the outputs on the two paths; None where not measured.
        notes: Differences that weaken the comparison (batch size, data, seed), a sentence each.
        unchanged: Both reports have the same figures: there was no repair, and none is missing.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.scan(model, loader, batch_size=2)
        >>> bnprobe.verify(report, report).unchanged
        True
    """

    tool: Tool
    model: str
    passed: bool
    problems: tuple[str, ...]
    layers: tuple[LayerComparison, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    output_before: float | None
    output_after: float | None
    notes: tuple[str, ...]
    unchanged: bool = False


@dataclass(frozen=True)
class Difference(Record):
    """How far two outputs for the same batch are apart.

    Attributes:
        images: Samples in the batch.
        absolute: Largest absolute difference; infinite where shapes differ, or one is NaN and the other is not.
        relative: For each tensor the largest absolute difference over its own largest value; the largest of these.
    """

    images: int
    absolute: float
    relative: float


@dataclass(frozen=True)
class ExportReport(Document):
    """The result of an export.

    Attributes:
        format: As given to ``--to``, e.g. "onnx".
        model, checkpoint: As in the report of a scan.
        output: The file; None: the outputs differ, and nothing was written.
        tolerance: The largest relative difference of the outputs that was accepted.
        differences: The file's outputs against those of the model, batch by batch; empty: the file could not be run.
        quantization: The quantized model's outputs against those of the model as loaded; empty: not quantized.
        notes: What the reader should know, a sentence each.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> bnprobe.export(model, loader, "exported.pt2").output
        'exported.pt2'
    """

    format: str
    model: str
    checkpoint: str | None
    output: str | None
    tolerance: float
    differences: tuple[Difference, ...]
    quantization: tuple[Difference, ...]
    notes: tuple[str, ...]
