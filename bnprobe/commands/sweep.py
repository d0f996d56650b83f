"""``bnprobe sweep``: the mismatch at other batch sizes, and what other rates of the running average would track.

A sweep is made of scans: one whose samples are regrouped for every batch size of the eval path, and one for each
further size of the train path. The rates are replayed on recorded batch statistics (``bnprobe.stats.ema``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnprobe.commands.scan import scan, scan_spec
from bnprobe.config.load import settings_from
from bnprobe.config.spec import PLAIN, ScanSettings, Spec
from bnprobe.errors import UsageError
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.loading.model import BatchFunction, unwrapped
from bnprobe.loading.workload import load_workload
from bnprobe.measure.momentum_series import MEMORY_CAP, LayerSeries, Recording, record
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import preserved_generators, preserved_random_state, seed_everything, untouched
from bnprobe.measure.scan_loop import FEWEST_PER_SIZE
from bnprobe.measure.session import Progress, Session, UserFunctions, no_progress
from bnprobe.records import (
    SCHEMA_VERSION,
    BatchSizePoint,
    BestRates,
    Layer,
    MomentumCurve,
    MomentumPoint,
    MomentumSweep,
    PathMeasurement,
    Report,
    SkippedLayer,
    Smallest,
    SweepLayer,
    SweepPoint,
    SweepReport,
    Tracking,
)
from bnprobe.stats.ema import (
    Rate,
    Statistics,
    Stream,
    effective_batches,
    ranking,
    recovery,
    replay,
    settled,
    standard_error,
    weights,
    with_shift,
)
from bnprobe.stats.theory import mismatch_iid, standing

DEFAULT_SIZES = (1, 2, 4, 8, 16, 32, 64)

DEFAULT_RATES: tuple[Rate, ...] = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)

_STANDINGS: dict[str, Literal["passes", "undecided", "fails"]] = {
    "flagged": "fails",
    "undecided": "undecided",
    "clean": "passes",
}


@dataclass(frozen=True)
class SweepPlan:
    """What to sweep.

    Attributes:
        batch_sizes: Sizes of the eval path; None: those of ``DEFAULT_SIZES`` for which there is enough data.
        train_sizes: Sizes at which the train path is measured too.
        momentum: Rates to replay; None: none.
    """

    batch_sizes: tuple[int, ...] | None = None
    train_sizes: tuple[int, ...] = ()
    momentum: MomentumPlan | None = None


@dataclass(frozen=True)
class MomentumPlan:
    """Which rates to replay, on which change of the data.

    Attributes:
        rates: Weights of the new batch; None: cumulative average. The layers' own rates are added.
        shift: Standard deviations added to every batch mean from halfway on; None and ``scale`` 1: no change.
        scale: Factor on the batch standard deviations from halfway on.
    """

    rates: tuple[Rate, ...] = DEFAULT_RATES
    shift: float | None = None
    scale: float = 1.0

    @property
    def shifts(self) -> bool:
        """Whether the data is to change halfway."""
        return self.shift is not None or self.scale != 1.0


def sweep(
    model: nn.Module,
    batches: Any,
    batch_size: int | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    train_sizes: Sequence[int] = (),
    momentum: MomentumPlan | None = None,
    num_batches: int | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch_size_of: Callable[[Any], int] | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> SweepReport:
    """Measure ``model`` at several batch sizes, and how well other rates of the running average would track.

    Model and random state are restored bit-identically, also after an exception.

    Args:
        model: Any module, on any device.
        batches: As for ``bnprobe.scan``. Not a generator: it is read again for every train size and for the rates.
        batch_size: As for ``bnprobe.scan``: the size for which layers are flagged.
        batch_sizes: Sizes of the eval path; None: those of 1, 2, 4, ..., 64 for which there is enough data.
        train_sizes: Sizes at which the train path is measured too.
        momentum: Rates of the running average to replay; None: none.
        num_batches: Exact number of micro-batches; None: at least as many as the largest size needs.
        forward: ``f(model, batch)``, as in a model file.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.
        progress: Called with the micro-batches done and planned so far, in every measurement.
        **settings: Any further field of ``bnprobe.config.spec.ScanSettings``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    given = settings_from({"batch_size": batch_size, "batches": num_batches, **settings})
    source = as_batch_source(batches, batch_size, batch_size_of=batch_size_of)
    inner, _ = unwrapped(model)

    def scan_with(changes: dict[str, Any]) -> Report:
        keywords = {"batch_size": batch_size, "num_batches": num_batches, **settings, **changes}
        return scan(model, batches, forward=forward, batch_size_of=batch_size_of, progress=progress, **keywords)

    may_extend = num_batches is None and "max_batches" not in settings
    subject = _Subject(scan_with, _Material(inner, source, forward), given, may_extend)
    sizes = None if batch_sizes is None else tuple(batch_sizes)
    with preserved_generators(batches):
        return _sweep(subject, SweepPlan(sizes, tuple(train_sizes), momentum), progress)


def sweep_spec(spec: Spec, plan: SweepPlan, progress: Progress = no_progress) -> SweepReport:
    """Load what a spec names, and sweep it; sizes default to ``spec.scan.batch_sizes``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """

    def scan_with(changes: dict[str, Any]) -> Report:
        data = {key: value for key, value in changes.items() if key == "batch_size"}
        run = {key: value for key, value in changes.items() if key != "batch_size"}
        update = {"data": spec.data.model_copy(update=data), "scan": spec.scan.model_copy(update=run)}
        return scan_spec(spec.model_copy(update=update), progress)

    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
    if plan.batch_sizes is None and spec.scan.batch_sizes:
        plan = replace(plan, batch_sizes=spec.scan.batch_sizes)
    may_extend = spec.data.batches is None and "max_batches" not in spec.scan.model_fields_set
    material = _Material(workload.model, workload.source, workload.forward)
    subject = _Subject(scan_with, material, workload.settings(spec.settings()), may_extend)
    return _sweep(subject, plan, progress)


@dataclass(frozen=True)
class _Subject:
    """A model and its data, given either as objects or by a spec.

    Attributes:
        scan: Runs a scan with some fields of ``ScanSettings`` changed.
        material: Gives the model and its batches, to record from.
        settings: The settings as given.
        may_extend: Whether more micro-batches may be measured if the largest size needs them, since no limit was given.
    """

    scan: Callable[[dict[str, Any]], Report]
    material: _Material
    settings: ScanSettings
    may_extend: bool

    @property
    def batch_size(self) -> int:
        """The scanned batch size, for which layers are flagged."""
        return self.material.source.batch_size

    @property
    def images(self) -> float:
        """Number of samples; infinite if unknown."""
        return math.inf if self.material.source.images is None else self.material.source.images


@dataclass(frozen=True)
class _Material:
    """The model and batches from which batch statistics are recorded."""

    model: nn.Module
    source: BatchSource
    forward: BatchFunction | None


def _sweep(subject: _Subject, plan: SweepPlan, progress: Progress) -> SweepReport:
    sizes, notes = _sizes(subject, plan)
    for size in plan.train_sizes:
        if size < 1 or 2 * size > subject.images:
            raise UsageError(_too_large("--train-sizes", size, subject.images))
    if plan.momentum is not None:
        check_plan(plan.momentum)
    report = _scan_sizes(subject, sizes, plan.batch_sizes is not None, notes)
    trains, momentum, partial = [report], None, report.scan.partial
    try:
        for size in plan.train_sizes:
            if size != subject.batch_size and not partial:
                other = subject.scan({**PLAIN, "batch_size": size})
                partial = other.scan.partial
                if other.scan.batch_size == size:
                    trains.append(other)
                else:
                    notes.append(f"Train size {size} was left out: the data has batches of {other.scan.batch_size}.")
        if plan.momentum is not None and not partial:
            momentum = _momentum(subject, plan.momentum, report.scan.device, progress, notes)
    except KeyboardInterrupt:  # report what was measured so far
        partial = True
    layers = tuple(sweep_layer(layer, subject.batch_size, trains) for layer in report.layers)
    return SweepReport(
        schema_version=SCHEMA_VERSION,
        tool=report.tool,
        environment=report.environment,
        scan=report.scan,
        layers=layers,
        skipped=report.skipped,
        smallest=smallest_of_all(report.layers, layers),
        momentum=momentum,
        notes=tuple(notes),
        partial=partial,
    )


def _sizes(subject: _Subject, plan: SweepPlan) -> tuple[tuple[int, ...], list[str]]:
    """The further sizes of the eval path, and notes on the sizes left out.

    Raises:
        UsageError: A requested size is more than half of the samples.
    """
    asked = DEFAULT_SIZES if plan.batch_sizes is None else plan.batch_sizes
    # Upper limit on the samples that can be measured, as far as it is known in advance.
    settings = subject.settings
    given = settings.batches if settings.batches is not None else settings.max_batches
    most = subject.images if subject.may_extend else min(subject.images, given * subject.batch_size)
    too_large = [size for size in asked if (size != subject.batch_size and size < 1) or 2 * size > most]
    if too_large and plan.batch_sizes is not None:
        raise UsageError(_too_large("--batch-sizes", too_large[0], most))
    notes = []
    if too_large:
        left_out = ", ".join(map(str, too_large))
        notes.append(
            f"Batch size {left_out} was left out, because {most:.0f} samples give fewer than two such batches."
        )
    return tuple(size for size in asked if size not in (*too_large, subject.batch_size)), notes


def _too_large(option: str, size: int, images: float) -> str:
    if size < 1:
        return f"{option} {size} is not a batch size: give whole numbers of at least 1."
    return (
        f"{option} {size} is more than half of the {images:.0f} samples that can be measured, but a batch size needs"
        " at least two batches. Leave it out, or give more --batches or more data."
    )


def check_plan(plan: MomentumPlan) -> None:
    """Reject rates and changes of the data that are out of range.

    Raises:
        UsageError: A value is out of range; the message names it.
    """
    bad = [rate for rate in plan.rates if rate is not None and not 0 < rate <= 1]
    if bad:
        raise UsageError(
            f"--momentum {bad[0]:g} is out of range. It is the weight of the new batch, as in PyTorch: give numbers"
            " above 0 and up to 1 (TensorFlow's 0.99 is 0.01 here), or the word cumulative."
        )
    if not plan.rates:
        raise UsageError("--momentum needs at least one rate, e.g. 0.1,0.01.")
    if not 0 < plan.scale < float("inf"):
        raise UsageError(
            f"--scale {plan.scale:g} is out of range: it multiplies standard deviations; give a number above 0."
        )
    if plan.shift is not None and not abs(plan.shift) < float("inf"):
        raise UsageError(f"--shift {plan.shift:g} is not a finite number: give a number of standard deviations.")


def _scan_sizes(subject: _Subject, sizes: tuple[int, ...], required: bool, notes: list[str]) -> Report:
    """The scan that measures the eval path at all sizes on the same samples.

    Raises:
        UsageError: Sizes were requested, but the samples of this model cannot be regrouped.
    """
    changes: dict[str, Any] = {**PLAIN, "batch_sizes": sizes}
    needed = math.ceil(FEWEST_PER_SIZE * max(sizes, default=0) / subject.batch_size)
    if subject.may_extend:
        changes["max_batches"] = max(subject.settings.max_batches, needed)
    try:
        return subject.scan(changes)
    except UsageError as error:
        if required:
            raise
        report = subject.scan({**changes, "batch_sizes": ()})
        notes.append(str(error))
        return report


def _momentum(
    subject: _Subject, plan: MomentumPlan, device: str, progress: Progress, notes: list[str]
) -> MomentumSweep:
    with preserved_random_state():
        recording = _record(subject.material, subject.settings, device, progress)
        found = momentum_sweep(recording, plan, subject.batch_size)
    if recording.cut:
        notes.append(
            f"--momentum: {recording.batches} micro-batches were recorded; more would not fit into"
            f" {MEMORY_CAP >> 20} MiB."
        )
    return found


def _record(material: _Material, settings: ScanSettings, device: str, progress: Progress) -> Recording:
    model, source = material.model, material.source
    with untouched(model):
        seed_everything(settings.seed)
        chosen = settings.model_copy(update={"device": device})
        session = Session.open(model, chosen, UserFunctions(material.forward), synthetic=source.synthetic)
        return record(session, Reader(source.batches, source.batch_size), settings, progress)


def momentum_sweep(recording: Recording, plan: MomentumPlan, batch_size: int) -> MomentumSweep:
    """Replay every rate on every layer, and find the one that tracks best.

    Raises:
        UsageError: No layer has running statistics that training updates.
    """
    if not recording.series:
        reason = f": {recording.omitted[0][1]}" if recording.omitted else ", but no layer is selected"
        raise UsageError(f"--momentum needs a layer whose running statistics are updated in training{reason}.")
    rates = _rates(recording, plan)
    paths = [_paths(series, recording.batches, rates, plan) for series in recording.series]
    own = [series.layer.info.momentum for series in recording.series]
    return MomentumSweep(
        batches=recording.batches,
        batch_size=batch_size,
        shift=plan.shift if plan.shifts else None,
        scale=plan.scale,
        dtype="float32" if recording.single else "float64",
        bytes=recording.bytes,
        omitted=tuple(
            SkippedLayer(layer.name, type(layer.module).__name__, reason) for layer, reason in recording.omitted
        ),
        model=_curve(None, own[0] if len(set(own)) == 1 else None, len(set(own)) == 1, rates, _mean(paths)),
        layers=tuple(
            _curve(series.layer.name, series.layer.info.momentum, True, rates, path)
            for series, path in zip(recording.series, paths, strict=True)
        ),
    )


@dataclass(frozen=True)
class _Paths:
    """D of each micro-batch of the second half under each rate, shape (batches, rates)."""

    loaded: Tensor
    converged: Tensor
    shifted: Tensor | None


def _rates(recording: Recording, plan: MomentumPlan) -> tuple[Rate, ...]:
    """All rates in decreasing order, including the layers' own where valid, then the cumulative average."""
    own = {series.layer.info.momentum for series in recording.series}
    rates = {*plan.rates, *(rate for rate in own if rate is None or 0 <= rate <= 1)}
    numbers = sorted((rate for rate in rates if rate is not None), reverse=True)
    return (*numbers, None) if None in rates else tuple(numbers)


def _paths(series: LayerSeries, batches: int, rates: Sequence[Rate], plan: MomentumPlan) -> _Paths:
    stream, eps = series.stream, series.layer.info.eps
    middle = batches // 2 * series.calls
    weight = weights(rates, len(stream.values), series.layer.info.batches_tracked or 0)
    start = settled(stream, middle)

    def second_half(stream_: Stream, start_: Statistics) -> Tensor:
        mismatch: Tensor = replay(stream_, start_, weight, eps).mismatch[middle:].unflatten(0, (-1, series.calls))
        return mismatch.mean(1)

    shifted = None
    if plan.shifts:
        unit = (start.variance + eps).sqrt()
        shifted = second_half(with_shift(stream, middle, unit, plan.shift or 0.0, plan.scale), start)
    return _Paths(second_half(stream, series.start), second_half(stream, start), shifted)


def _mean(paths: Sequence[_Paths]) -> _Paths:
    """Mean over layers."""
    shifted = [path.shifted for path in paths if path.shifted is not None]
    return _Paths(
        loaded=torch.stack([path.loaded for path in paths]).mean(0),
        converged=torch.stack([path.converged for path in paths]).mean(0),
        shifted=torch.stack(shifted).mean(0) if shifted else None,
    )


def _curve(
    layer: str | None, momentum: Rate, one_momentum: bool, rates: Sequence[Rate], paths: _Paths
) -> MomentumCurve:
    def best(mismatch: Tensor | None) -> tuple[Rate, ...]:
        return () if mismatch is None else tuple(rates[index] for index in ranking(mismatch, paths.converged))

    return MomentumCurve(
        layer=layer,
        momentum=momentum,
        one_momentum=one_momentum,
        points=tuple(_point(index, rate, paths) for index, rate in enumerate(rates)),
        best=BestRates(best(paths.loaded), best(paths.converged), best(paths.shifted)),
    )


def _point(index: int, rate: Rate, paths: _Paths) -> MomentumPoint:
    plain, shifted = paths.converged[:, index], None if paths.shifted is None else paths.shifted[:, index]
    error = standard_error(plain)
    return MomentumPoint(
        rate=rate,
        effective_batches=effective_batches(rate),
        loaded=Tracking(float(paths.loaded[:, index].mean()), error),
        converged=Tracking(float(plain.mean()), error),
        shifted=None if shifted is None else Tracking(float(shifted.mean()), error),
        recovery=None if shifted is None else recovery(plain, shifted),
    )


def sweep_layer(layer: Layer, batch_size: int, trains: Sequence[Report]) -> SweepLayer:
    """Mismatch of one layer over the batch size.

    Args:
        layer: The layer as scanned at ``batch_size``, with the further sizes of the eval path.
        batch_size: The scanned batch size.
        trains: That scan, and one scan for each further size of the train path.
    """
    limit = mismatch_iid(layer.threshold)
    found = list(layer.batch_sizes)
    if layer.eval is not None:
        found.append(_measured(layer.eval, batch_size, trains[0].scan.batches))
    others = [(report.scan, _named(report, layer.name)) for report in trains]
    trained = [_measured(other.train, scan.batch_size, scan.batches) for scan, other in others if other and other.train]
    points = _points(found, layer.eval, batch_size, limit)
    return SweepLayer(
        name=layer.name,
        kind=layer.kind,
        channels=layer.channels,
        threshold=layer.threshold,
        flagged=layer.flagged,
        undecided=layer.undecided,
        note=layer.note,
        eval=points,
        train=_points(trained, layer.train, batch_size, limit),
        smallest=_smallest(points, limit),
    )


def _measured(path: PathMeasurement, batch_size: int, batches: int) -> BatchSizePoint:
    return BatchSizePoint(batch_size, batches, path.mismatch, path.interval, path.equivalent_batch_size)


def _named(report: Report, name: str) -> Layer | None:
    return next((layer for layer in report.layers if layer.name == name), None)


def _points(
    measured: Sequence[BatchSizePoint], scanned: PathMeasurement | None, batch_size: int, limit: float
) -> tuple[SweepPoint, ...]:
    """Points of the curve by increasing size, with the value for i.i.d. samples."""
    n_eq = scanned.equivalent_batch_size if scanned else None
    return tuple(
        SweepPoint(
            batch_size=point.batch_size,
            batches=point.batches,
            mismatch=point.mismatch,
            interval=point.interval,
            equivalent_batch_size=point.equivalent_batch_size,
            theory=0.0 if n_eq is None else mismatch_iid(n_eq * point.batch_size / batch_size),
            standing=_STANDINGS[standing([point.interval], limit)],
        )
        for point in sorted(measured, key=lambda point: point.batch_size)
    )


def _smallest(points: Sequence[SweepPoint], limit: float) -> Smallest:
    likely: list[int] = []
    for point in reversed(points):
        if point.mismatch > limit:
            break
        likely.append(point.batch_size)
    sure = [point.batch_size for point in points if point.batch_size in likely and point.standing == "passes"]
    return Smallest(surely=min(sure, default=None), likely=min(likely, default=None))


def smallest_of_all(scanned: Sequence[Layer], layers: Sequence[SweepLayer]) -> Smallest:
    """The smallest size at which every layer passes that can differ between training and inference.

    A layer that overflowed passes at no size. Frozen layers and layers without running statistics are ignored.
    """
    judged = [
        layer.smallest
        for layer, found in zip(layers, scanned, strict=True)
        if layer.flagged or (found.train is not None and found.eval is not None)
    ]
    return Smallest(_largest([one.surely for one in judged]), _largest([one.likely for one in judged]))


def _largest(sizes: Sequence[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None
