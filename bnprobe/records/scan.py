"""What a scan and a lint return: what was run, what was measured, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bnprobe.records.base import SCHEMA_VERSION, Environment, Record, Tool
from bnprobe.records.baseline import BaselineComparison
from bnprobe.records.document import Document, Plotted
from bnprobe.records.findings import Diagnosis, Remedy, Verdict
from bnprobe.records.layers import Layer, Shares, SkippedLayer
from bnprobe.records.outputs import Chance, Gap, GradientAngle, Output

StopReason = Literal["requested", "decided", "max_batches", "data_exhausted", "interrupted", "failed"]


@dataclass(frozen=True)
class Summary(Record):
    """Counts of layers, and the model as a whole.

    Attributes:
        shares: Mean over the layers whose mismatch was decomposed; None if there is none.
        gaps: One for the loss and one for the metric, where given.
        gradient_angle: With ``--gradients``.
        chance: One for the loss and one for the metric, where outputs of other samples could be scored.
    """

    layers: int
    flagged: int
    undecided: int
    skipped: int
    output: Output
    shares: Shares | None = None
    gaps: tuple[Gap, ...] = ()
    gradient_angle: GradientAngle | None = None
    chance: tuple[Chance, ...] = ()


@dataclass(frozen=True)
class SelfCheck(Record):
    """One emulated step compared with the same micro-batches run one by one.

    Attributes:
        output_error: Relative L2 difference of the outputs.
        statistic_error: Largest relative difference of a layer's normalized statistics.
        tolerance: The largest difference that rounding explains for this model; above it emulation is not used.
        passed: Whether emulation can be trusted.
        first_layer: The first layer, in call order, that differs; None where the check passed.
        paths: The paths that were compared. With "steady" among them, training draws random numbers: the step was
            compared without random layers, and on "train" it was whether a micro-batch depends on the others.
        float64: A copy of the model was compared in float64, since rounding hides differences in its own dtype.
    """

    output_error: float
    statistic_error: float
    tolerance: float
    passed: bool
    first_layer: str | None
    paths: tuple[Literal["train", "steady", "eval"], ...] = ("train", "eval")
    float64: bool = False


WITHOUT_RANDOM, REST_IN_EVAL, SCORING, HELD_OUT = WITHIN_SCAN = (
    "train path without random layers",
    "train path with the rest in eval mode",
    "loss and metric",
    "held-out data",
)
"""Names of measurements whose time is part of ``Scan.seconds``; that of all others comes on top."""


@dataclass(frozen=True)
class ExtraPass(Record):
    """A measurement beyond the two paths: its name, why it was run, and its cost."""

    name: str
    reason: str
    images: int
    seconds: float


@dataclass(frozen=True)
class Pool(Record):
    """Moments of single samples, kept for regrouping samples at random.

    Attributes:
        images: Samples in the pool, drawn at random from those measured.
        bytes: Its size.
        regrouped: Number of micro-batches that were formed from it.
    """

    images: int
    bytes: int
    regrouped: int


@dataclass(frozen=True)
class Scan(Record):
    """What was run.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        data: Where the micro-batches came from, in words.
        synthetic: Inputs were generated from ``--input-shape``.
        checkpoint: The weights file, where one was given.
        batch_size: Samples in a micro-batch; where they differ in size, their mean, rounded.
        batches: Micro-batches measured on both paths.
        batches_requested: ``--batches``, where given.
        images: Samples measured.
        left_out: Samples of a partial last batch that was not measured.
        emulated: Several micro-batches ran together as one physical batch, with statistics per micro-batch
            (docs/explanation/emulation.md).
        physical_batch: Samples that ran at once.
        emulation: Why emulation was or was not used, one sentence.
        self_check: The comparison behind that decision; None if none was needed.
        seed: Seed of torch, numpy and random during the scan.
        device: E.g. "cpu", "cuda:0".
        dtype: Of the model's parameters, e.g. "float32".
        autocast: The autocast dtype, where used.
        stopped: Why no more batches were drawn.
        partial: True if Ctrl-C, or an error in the user's loader or model, ended the scan early.
        seconds: Wall time of the two paths, and of the passes in ``WITHIN_SCAN``.
        notes: Further facts that affect the result, a sentence each.
        passes: Measurements beyond the two paths, with their cost.
        pool: What the composition share was measured with; None if the samples could not be regrouped, or were too few.
        unselected: Layers that ``--include`` and ``--exclude`` leave out of the report, in network order.
        size_range: Fewest and most samples of a micro-batch, where they differ.
        held_out: Where the held-out data came from, in words; None without any.
        held_out_images: Held-out samples measured.
        sample: What a sample is, a noun: "image", "row", "graph" or "sequence"; "sample" where that is not known.
        command: As typed; None from Python.
        taken: What was taken from where, in words by role ("model", "data", "loss", ...); empty for a model file that
            says all by the documented names.
        missing: Why there is no loss or no metric, clauses by role; empty where ``taken`` is.
    """

    model: str
    data: str
    synthetic: bool
    checkpoint: str | None
    batch_size: int
    batches: int
    batches_requested: int | None
    images: int
    left_out: int
    emulated: bool
    physical_batch: int
    emulation: str
    self_check: SelfCheck | None
    seed: int
    device: str
    dtype: str
    autocast: str | None
    stopped: StopReason
    partial: bool
    seconds: float
    notes: tuple[str, ...] = ()
    passes: tuple[ExtraPass, ...] = ()
    pool: Pool | None = None
    unselected: tuple[str, ...] = ()
    size_range: tuple[int, int] | None = None
    held_out: str | None = None
    held_out_images: int | None = None
    sample: str = "sample"
    command: str | None = None
    taken: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report(Plotted):
    """The result of a scan.

    Attributes:
        baseline: The findings against those that are known; left out where no baseline was given.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.scan(model, loader, batch_size=2)
        >>> report["1"].flagged
        True
        >>> report.save("report.json")
        >>> bnprobe.Report.load("report.json") == report
        True
    """

    schema_version: int
    tool: Tool
    environment: Environment
    scan: Scan
    summary: Summary
    layers: tuple[Layer, ...]
    skipped: tuple[SkippedLayer, ...]
    verdicts: tuple[Verdict, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    baseline: BaselineComparison | None = None

    @property
    def unexplained(self) -> Diagnosis | None:
        """Loss or metric are surely worse at inference and no cause was found: what was ruled out; None otherwise."""
        alone = (diagnosis for diagnosis in self.diagnoses if diagnosis.cause == "inconsistency")
        return next((diagnosis for diagnosis in alone if diagnosis.severity == "error"), None)


@dataclass(frozen=True)
class LintReport(Document):
    """The result of a lint.

    Attributes:
        model: How the model was named, e.g. "model.py:load_model".
        layers: Number of layers judged.
        verdicts: Of the rules that need the model alone.
        diagnoses: The failed ones, grouped by root cause, the worst first.
        skipped: Layers that could not be judged.
        notes: Which weights were judged, and what else was noticed while loading; one sentence each.
        baseline: The findings against those that are known; left out where no baseline was given.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> bnprobe.lint(model).verdicts[0].outcome
        'passed'
    """

    tool: Tool
    model: str
    layers: int
    verdicts: tuple[Verdict, ...]
    diagnoses: tuple[Diagnosis, ...]
    skipped: tuple[SkippedLayer, ...] = ()
    notes: tuple[str, ...] = ()
    baseline: BaselineComparison | None = None
    schema_version: int = SCHEMA_VERSION
