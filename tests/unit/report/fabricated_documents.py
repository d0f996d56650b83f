"""Every kind of document, made up: by kind, then by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import fabricated_reports as fabricated
from fabricated_logs import LOGS
from fabricated_parts import SCAN, equivalent, theory
from fabricated_scans import files, scans

from bnprobe.commands.compare import compare_named
from bnprobe.records import (
    BestRates,
    ChannelDrift,
    Claim,
    Comparison,
    Diagnosis,
    Difference,
    DriftReport,
    Environment,
    ExportReport,
    LabChart,
    LabReport,
    LabSeries,
    LabTable,
    Layer,
    LayerDrift,
    LintReport,
    MomentumCurve,
    MomentumPoint,
    MomentumSweep,
    Profile,
    ProfiledLayer,
    Report,
    SkippedFeature,
    SkippedLayer,
    Smallest,
    SweepLayer,
    SweepPoint,
    SweepReport,
    TableAdjustment,
    TableBatch,
    TableFeature,
    TableProjection,
    TableReport,
    Tool,
    Tracking,
    Trial,
    Verdict,
)
from bnprobe.report.repair import RepairReport
from support import repairs

TOOL = Tool("bnprobe", "0.1.0")
SIZES = (1, 2, 4, 8, 16, 32, 64)
RATES = (0.3, 0.1, 0.03, 0.01, None)


def repair(name: str) -> RepairReport:
    """The repair of this name with its scans and files."""
    record, (before, after) = repairs.RECORDS[name](), scans(name)
    return RepairReport(record, before, after, files(record, after))


# --- Lint -------------------------------------------------------------------------------------------------------------


def lint_clean() -> LintReport:
    """No finding."""
    passed = tuple(_verdict(code, None, "passed", "info") for code in ("BN101", "BN102", "BN103"))
    return LintReport(TOOL, "model.py:load_model", 9, passed, ())


def lint_findings() -> LintReport:
    """An error in many layers, a warning in one, and a layer that could not be judged."""
    names = tuple(f"blocks.{index}.bn" for index in range(12))
    verdicts = (
        *(_verdict("BN101", name, "failed", "error", "model.py:31") for name in names),
        _verdict("BN106", "head.bn", "failed", "warning"),
    )
    diagnoses = (
        Diagnosis(
            "momentum_convention",
            "BN101",
            "error",
            names,
            None,
            "12 of 13 layers: momentum is 0.99, so one batch replaces the running statistics.",
            "Set momentum=0.01.",
            ("lag in 12 layers",),
        ),
        Diagnosis("dead_channels", "BN106", "warning", ("head.bn",), None, "head.bn: 3 channels are dead.", "Prune."),
    )
    skipped = (SkippedLayer("decoder.norm", "FancyNorm", "its class is not known to bnprobe"),)
    return LintReport(TOOL, "model.py:load_model", 13, verdicts, diagnoses, skipped)


def _verdict(code: str, layer: str | None, outcome: str, severity: str, location: str | None = None) -> Verdict:
    return Verdict(code, "lag", layer, outcome, severity, "", None, None, "", "", None, location)  # type: ignore[arg-type]


# --- Sweep ------------------------------------------------------------------------------------------------------------


def sweep_sizes() -> SweepReport:
    """Four layers, of which the worst needs a batch of 16 and one cannot be measured at inference."""
    layers = (
        _sweep_layer("stem.bn", 400.0, Smallest(1, 1)),
        _sweep_layer("layer1.0.bn1", 16.0, Smallest(2, 2)),
        _sweep_layer("layer2.0.downsample.1", 1.2, Smallest(32, 16)),
    )
    lost = replace(layers[0], name="head.bn", eval=(), note="On the eval path its input is not finite.")
    return _sweep((*layers, lost), Smallest(surely=None, likely=16))


def sweep_momentum() -> SweepReport:
    """The same, with rates replayed and a shift."""
    curves = tuple(_curve(name, scale) for name, scale in (("stem.bn", 1.0), ("layer1.0.bn1", 2.5)))
    omitted = (SkippedLayer("head.bn", "BatchNorm2d", "it keeps no running statistics"),)
    momentum = MomentumSweep(256, 2, 1.0, 2.0, "float32", 81_920, omitted, _curve(None, 1.8), curves)
    return replace(sweep_sizes(), momentum=momentum, notes=("The data was read twice.",))


def sweep_partial() -> SweepReport:
    """Ctrl-C before the rates."""
    return replace(sweep_sizes(), partial=True, scan=replace(SCAN, partial=True, stopped="interrupted"))


def _sweep(layers: tuple[SweepLayer, ...], smallest: Smallest) -> SweepReport:
    environment = Environment("3.12.4", "2.6.0", "Linux-x86_64", "8-core CPU", 4)
    return SweepReport(1, TOOL, environment, SCAN, layers, (), smallest, None, (), False)


def _sweep_layer(name: str, values_per_sample: float, smallest: Smallest) -> SweepLayer:
    points = tuple(_point(size, values_per_sample) for size in SIZES)
    flagged = points[1].standing == "fails"
    train = (points[1], replace(points[3], batches=32))
    return SweepLayer(name, "BatchNorm2d", 64, 32.0, flagged, False, None, points, train, smallest)


def _point(size: int, values_per_sample: float) -> SweepPoint:
    mismatch = theory(max(values_per_sample * size, 1.1))
    interval = (0.9 * mismatch, 1.1 * mismatch)
    limit = theory(19.0)  # most of it is noise of batches
    standing = "passes" if interval[1] < limit else "fails" if interval[0] > limit else "undecided"
    return SweepPoint(size, 256 // size, mismatch, interval, equivalent(mismatch), 1.05 * mismatch, limit, standing)  # type: ignore[arg-type]


def _curve(layer: str | None, scale: float) -> MomentumCurve:
    points = tuple(
        MomentumPoint(
            rate,
            None if rate is None else (2 - rate) / rate,
            Tracking(scale * (0.2 + index / 50), 0.003),
            Tracking(scale * (0.3 - index / 20), None if rate is None else 0.002),
            Tracking(scale * (0.4 + index / 10), 0.004),
            None if rate is None else 2 * 4**index,
        )
        for index, rate in enumerate(RATES)
    )
    best = BestRates(loaded=(0.3, 0.1), converged=(None, 0.01), shifted=(0.3,))
    return MomentumCurve(layer, 0.1, True, points, best)


# --- Export -----------------------------------------------------------------------------------------------------------


def exported() -> ExportReport:
    """Written, the outputs agree."""
    differences = (Difference(4, 2.4e-7, 1.9e-7), Difference(8, 2.4e-7, 2.1e-7), Difference(1, 1.2e-7, 1.1e-7))
    return ExportReport("onnx", "model.py:load_model", "w.safetensors", "w.onnx", 1e-5, differences, (), ())


def export_refused() -> ExportReport:
    """Quantized, and one output has another shape."""
    differences = (Difference(4, 0.03, 0.02), Difference(8, float("inf"), float("inf")))
    note = "The file takes batches of 4 samples only: the model fixes the size of its batch."
    return replace(exported(), output=None, differences=differences, quantization=differences[:1], notes=(note,))


def export_unchecked() -> ExportReport:
    """Nothing that runs the file is installed."""
    return replace(exported(), differences=(), notes=("The outputs were not checked.",))


# --- Comparison -------------------------------------------------------------------------------------------------------


def compared() -> Comparison:
    """Three checkpoints: two layers become better, one worse, and one was not measured at first."""
    found = fabricated.flagged()
    names = [layer.name for layer in found.layers]

    def scaled(factors: dict[str, float]) -> Report:
        layers = [_scaled(layer, factors.get(layer.name, 1.0)) for layer in found.layers]
        return replace(
            found, layers=tuple(layers), summary=replace(found.summary, flagged=sum(f > 0.5 for f in factors.values()))
        )

    first = replace(scaled({names[0]: 3.0}), layers=scaled({}).layers[:-1])
    reports = [first, scaled({names[0]: 0.5, names[1]: 0.7}), scaled({names[0]: 0.1, names[1]: 0.2, names[2]: 2.0})]
    return compare_named([(f"run/epoch{number}.ckpt", report) for number, report in enumerate(reports, start=1)])


def _scaled(layer: Layer, factor: float) -> Layer:
    """The layer with D, and its interval, times a factor."""
    changed = {}
    for mode, path in (("train", layer.train), ("eval", layer.eval)):
        low, high = (0.0, None) if path is None else path.interval
        ends = (factor * low, None if high is None else factor * high)
        changed[mode] = path and replace(path, mismatch=factor * path.mismatch, interval=ends)
    return replace(layer, **changed)


# --- Drift ------------------------------------------------------------------------------------------------------------


def profiled() -> Profile:
    """Two layers, the second called twice; few blocks; one layer was skipped."""
    figures = ((0.1, -0.2), (0.5, 0.4), (0.7, 0.6), (0.1, 0.2), (0.9, 1.1, 1.4))
    layers = tuple(
        ProfiledLayer(name, call, 2, *figures) for name, call in (("stem.bn", 0), ("head.bn", 0), ("head.bn", 1))
    )
    return Profile(
        tool=TOOL,
        environment=fabricated.flagged().environment,
        model="model.py:load_model",
        checkpoint=None,
        statistics="ab" * 32,
        data="load_eval_data of model.py",
        seed=0,
        block=8,
        described=128,
        blocks=3,
        layers=layers,
        skipped=(SkippedLayer("rois.bn", "BatchNorm2d", "it does not see one row for each sample"),),
        notes=("There are 3 blocks to compare with.",),
    )


def drifted(alarm: int | None = 48, e_value: float = 3.2e8) -> DriftReport:
    """The second call of a layer moved; the first layer hardly did."""
    channels = (ChannelDrift(1, 2.34, 0.5), ChannelDrift(0, -0.3, -1.2))
    return DriftReport(
        tool=TOOL,
        model="model.py:load_model",
        data="new.pt",
        alpha=0.01,
        e_value=e_value,
        alarm=alarm,
        samples=1_024,
        batches=32,
        left_out=0,
        block=8,
        layers=(
            LayerDrift("stem.bn", 0, 1_024, 0.03, False, None, 0.0, 0.02, channels[1:]),
            LayerDrift("head.bn", 1, 1_024, 2 * e_value, alarm is not None, 984, 1.67, 0.92, channels),
        ),
        notes=(),
    )


def experiment() -> LabReport:
    """One claim of each verdict; a chart over numbers with a formula, one over names, a table."""
    sizes = (2.0, 8.0, 256.0)
    measured = LabSeries("batch norm", sizes, (0.55, 0.9, 0.97), (0.5, 0.88, None), (0.6, 0.92, None))
    by_formula = LabSeries("1 - 1/B", sizes, (0.5, 0.875, 0.996), (None,) * 3, (None,) * 3, theory=True)
    arms = ("batch norm", "Batch Renorm")
    named = LabSeries("sorted by class", arms, (0.4, None), (0.3, None), (0.5, None))
    return LabReport(
        tool=TOOL,
        environment=Environment("3.11", "2.13.0", "Linux", "x86_64", 1),
        experiment="sizes",
        title="Accuracy and the batch",
        question="Does accuracy fall with the batch?",
        sources=("Ioffe 2017",),
        data="scikit-learn's digits",
        budget=1.0,
        seeds=3,
        seconds=90.0,
        claims=(
            Claim("It falls.", "shown", "Difference: 0.4 ± 0.1; the claim needs more than 0."),
            Claim("It is as the formula says.", "refuted", "Ratio: 1.1 ± 0.01; the formula gives 1."),
            Claim("Batch Renorm is better.", "open", "Difference: not measured."),
        ),
        charts=(
            LabChart(
                "size",
                "Accuracy against the batch size",
                "samples in a batch",
                "accuracy",
                (measured, by_formula),
                ("Held-out images.",),
                x_scale="log",
            ),
            LabChart("order", "Accuracy by order", "layer", "accuracy", (named,)),
        ),
        tables=(LabTable("Runs that diverged", ("layer", "runs"), (("batch norm", "0"), ("Batch Renorm", "2"))),),
        notes=("Two runs diverged.",),
        trials=(
            Trial({"norm": "batch norm", "batch": 2}, 0, {"accuracy": 0.55, "losses": (1.0, 0.5)}, 45.0),
            Trial({"norm": "Batch Renorm", "batch": 2}, 0, {"accuracy": None}, 45.0),
        ),
        answer="It does: by 0.4 ± 0.1 from batches of 256 to those of 2.",
    )


def diverged_experiment() -> LabReport:
    """No trial has a figure."""
    nothing = LabSeries("batch norm", (2.0,), (None,), (None,), (None,))
    chart = LabChart("size", "Accuracy", "samples in a batch", "accuracy", (nothing,), x_scale="log", y_scale="log")
    claims = (Claim("It falls.", "open", "Difference: not measured."),)
    return replace(experiment(), claims=claims, charts=(chart,), tables=(), notes=(), answer="")


def undrifted() -> DriftReport:
    """Nothing moved."""
    return drifted(None, 0.04)


# --- Tables -----------------------------------------------------------------------------------------------------------


def tabled(several: int = 1) -> TableReport:
    """One of three plates is off in two of three features, one of which has no scale there; adjusted."""
    differ = ("IL6", "TNF")
    features = tuple(
        TableFeature(name, 95, 2.5, 0.8, p, scale, rate, name in differ, part)
        for name, p, scale, rate, part in (
            ("IL6", 3e-120, 0.04, 9e-120, 0.93),
            ("TNF", 2e-8, 0.6, 3e-8, 0.21),
            ("IL10", 0.4, 0.2, 0.4, 0.0),
        )
    )
    batches = (
        TableBatch("P1", 48, False, 0.021, 49.2, 0.024, (0.012, 0.041), 0.62, (), (1.02, 0.97, 1.1), (0.1, -0.08, 0.0)),
        TableBatch("P2", 1, True, 9.4, 1.0, 1.1, (0.2, 3.1), 0.005, differ, (None,) * 3, (5.2, -1.3, 0.02)),
        TableBatch("P3", 46, False, 0.028, 41.0, 0.025, (0.012, 0.042), 0.4, (), (0.9, 1.3, None), (-0.1, 0.08, None)),
    )
    return TableReport(
        tool=TOOL,
        data="elisa.csv",
        batch="plate",
        covariates=("dose", "age"),
        rows=95,
        fdr=0.05,
        agree=True,
        population=("P1", "P3"),
        explained=0.38,
        batches=batches * several,
        features=features,
        skipped=(SkippedFeature("blank", "is constant"), SkippedFeature("spare", "has no values")),
        adjusted=TableAdjustment("adjusted.csv", "P1", ("P2",), ("blank", "spare"), ("dose",), True, 0.002, 0),
        projection=TableProjection((0.61, 0.2), (0, 0, 1, 2), ((1.0, 0.2), (1.2, 0.1), (9.0, 3.0), (0.8, 0.0)), ()),
        notes=("P2 has one row: there is no r, and nothing can be said of the scale.",),
    )


def table_without_effects() -> TableReport:
    """Nothing differs, and nothing was adjusted; the column of the batch has a name that is no word."""
    found = tabled()
    return replace(
        found,
        batch="Run ID",
        covariates=(),
        explained=0.0,
        population=("P1", "P2", "P3"),
        batches=tuple(replace(batch, off=False, differing=()) for batch in found.batches),
        features=tuple(replace(each, differs=False, rate=0.7, location=0.3, explained=0.0) for each in found.features),
        skipped=(),
        adjusted=None,
        projection=None,
        notes=(),
    )


def table_without_agreement() -> TableReport:
    """All batches are off."""
    found = tabled()
    return replace(
        found,
        agree=False,
        batches=tuple(replace(batch, off=True) for batch in found.batches),
        adjusted=replace(found.adjusted, reference=None, mean_only=("P1", "P2", "P3"), shrunk=False, differing=1),
        projection=replace(found.projection, after=((1.0, 0.2), (1.2, 0.1), (1.0, 0.3), (0.8, 0.0))),
    )


DOCUMENTS: dict[str, dict[str, Callable[[], object]]] = {
    "scan": {**fabricated.REPORTS},
    "lint": {"clean": lint_clean, "findings": lint_findings},
    "sweep": {"sizes": sweep_sizes, "momentum": sweep_momentum, "partial": sweep_partial},
    "plan": {**repairs.PLANS},
    "repair": {name: lambda name=name: repair(name) for name in repairs.RECORDS},
    "verify": {**repairs.VERIFICATIONS},
    "compare": {"several": compared},
    "export": {"agrees": exported, "refused": export_refused, "unchecked": export_unchecked},
    "profile": {"few": profiled},
    "drift": {"alarm": drifted, "none": undrifted},
    "log": {**LOGS},
    "table": {"off": tabled, "none": table_without_effects, "all": table_without_agreement},
    "lab": {"shown": experiment, "diverged": diverged_experiment},
}
"""Documents by kind and name."""

CASES = [(kind, name) for kind, made in DOCUMENTS.items() for name in made]


@cache
def document(kind: str, name: str) -> object:
    """The document of a case."""
    return DOCUMENTS[kind][name]()
