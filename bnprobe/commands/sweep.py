"""``bnprobe sweep``: the mismatch at other batch sizes, and what other rates of the running average would track.

A sweep is made of scans: one whose samples are regrouped for every batch size of the eval path, and one for each
further size of the train path. The rates are replayed on recorded batch statistics (``bnprobe.analysis.momentum``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bnprobe.analysis.batch_sizes import smallest_of_all, sweep_layer
from bnprobe.analysis.momentum import MomentumPlan, check_plan, momentum_sweep
from bnprobe.commands.scan import scan, scan_spec
from bnprobe.config.spec import PLAIN, ScanSettings, Spec
from bnprobe.errors import UsageError
from bnprobe.loading.arguments import check_call
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.loading.model import BatchFunction, unwrapped
from bnprobe.loading.workload import load_workload
from bnprobe.measure.momentum_series import MEMORY_CAP, Recording, record
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import preserved_generators, preserved_random_state, seed_everything, untouched
from bnprobe.measure.scan_loop import FEWEST_PER_SIZE
from bnprobe.measure.session import Progress, Session, UserFunctions, no_progress
from bnprobe.records import SCHEMA_VERSION, MomentumSweep, Report, SweepReport
from bnprobe.wording import from_python, option

DEFAULT_SIZES = (1, 2, 4, 8, 16, 32, 64)


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


@from_python
def sweep(
    model: nn.Module,
    batches: Any,
    batch_size: int | None = None,
    *,
    batch_sizes: Sequence[int] | None = None,
    train_sizes: Sequence[int] = (),
    momentum: MomentumPlan | Sequence[float | None] | bool | None = None,
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
        momentum: Rates of the running average to replay, e.g. (0.1, 0.01, None), where None is the cumulative average;
            True: 0.3 to 0.001. None: nothing is replayed.
        num_batches: Exact number of micro-batches; None: at least as many as the largest size needs.
        forward: ``f(model, batch)``, as in a model file.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.
        progress: Called with the micro-batches done and planned so far, in every measurement.
        **settings: Any further field of ``bnprobe.config.spec.ScanSettings``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> sweep = bnprobe.sweep(model, loader, batch_size=2, batch_sizes=[2, 4, 16])
        >>> sweep.smallest.likely
        16
        >>> len(sweep.to_frame())
        4
    """
    functions = {"forward": forward, "batch_size_of": batch_size_of}
    given = check_call(model, functions, {"batch_size": batch_size, "batches": num_batches, **settings}, sweep)
    inner, _ = unwrapped(model)

    def scan_with(changes: dict[str, Any]) -> Report:
        keywords = {"batch_size": batch_size, "num_batches": num_batches, **settings, **changes}
        return scan(model, batches, forward=forward, batch_size_of=batch_size_of, progress=progress, **keywords)

    may_extend = num_batches is None and "max_batches" not in settings
    sizes = None if batch_sizes is None else tuple(batch_sizes)
    with preserved_random_state(), preserved_generators(batches):
        source = as_batch_source(batches, batch_size, batch_size_of=batch_size_of)
        subject = _Subject(scan_with, _Material(inner, source, forward), given, may_extend)
        return _sweep(subject, SweepPlan(sizes, tuple(train_sizes), _rates(momentum)), progress)


def _rates(given: MomentumPlan | Sequence[float | None] | bool | None) -> MomentumPlan | None:
    if given is None or isinstance(given, MomentumPlan):
        return given
    if isinstance(given, bool):
        return MomentumPlan() if given else None
    return MomentumPlan(rates=tuple(given))


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
            raise UsageError(_too_large(option("--train-sizes"), size, subject.images))
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
        raise UsageError(_too_large(option("--batch-sizes"), too_large[0], most))
    notes = []
    if too_large:
        left_out = ", ".join(map(str, too_large))
        notes.append(
            f"Batch size {left_out} was left out, because {most:.0f} samples give fewer than two such batches."
        )
    return tuple(size for size in asked if size not in (*too_large, subject.batch_size)), notes


def _too_large(asked: str, size: int, images: float) -> str:
    if size < 1:
        return f"{asked} {size} is not a batch size: give whole numbers of at least 1."
    return (
        f"{asked} {size} is more than half of the {images:.0f} samples that can be measured, but a batch size needs"
        f" at least two batches. Leave it out, or give more {option('--batches')} or more data."
    )


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
            f"{option('--momentum')}: {recording.batches} micro-batches were recorded; more would not fit into"
            f" {MEMORY_CAP >> 20} MiB."
        )
    return found


def _record(material: _Material, settings: ScanSettings, device: str, progress: Progress) -> Recording:
    model, source = material.model, material.source
    with untouched(model) as kept:
        seed_everything(settings.seed)
        chosen = settings.model_copy(update={"device": device})
        functions = UserFunctions(material.forward)
        session = Session.open(model, chosen, functions, synthetic=source.synthetic, kept=kept.restores)
        return record(session, Reader(source.batches, source.batch_size), settings, progress)
