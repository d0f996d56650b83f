"""``bnprobe profile``: what healthy samples look like at the input of every layer, for a monitor in service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe._version import __version__
from bnprobe.analysis.description import environment
from bnprobe.config.spec import ScanSettings, Spec
from bnprobe.errors import DataError, NothingToProbeError, UsageError
from bnprobe.loading.arguments import check_call
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.loading.model import unwrapped
from bnprobe.loading.order import spread
from bnprobe.loading.workload import Workload, load_workload
from bnprobe.measure.batch import MicroBatch, to_device
from bnprobe.measure.drift import (
    LEAST_BLOCKS,
    MOST_BLOCKS,
    Healthy,
    LayerInputs,
    digest_of,
    watchable,
)
from bnprobe.measure.forward_pass import Pass, Slot
from bnprobe.measure.layers import ProbedLayer, require_layers
from bnprobe.measure.reader import RepeatedReader
from bnprobe.measure.restore import preserved_generators, preserved_random_state, seed_everything, untouched
from bnprobe.measure.session import Progress, Session, UserFunctions, no_progress
from bnprobe.numbers import count
from bnprobe.records import Profile, ProfiledLayer, SkippedLayer, Tool
from bnprobe.wording import either, from_python

BLOCK = 8
"""Samples in a block: small enough to find a strong shift soon, large enough to see one that no single sample shows."""

_DESCRIBED = 128
"""Samples that positions and extents are taken of, where there are three times as many; else a third of all."""

_FEW_BLOCKS = 64
"""With fewer scores small shifts take much longer to find, which a note says."""


@from_python
def profile(
    model: nn.Module,
    batches: Any,
    batch_size: int | None = None,
    *,
    num_batches: int | None = None,
    block: int = BLOCK,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch_size_of: Callable[[Any], int] | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Profile:
    """Record what healthy samples look like at the input of every BN layer, for `bnprobe.ShiftMonitor`.

    The model runs in eval mode and comes back bit-identical; so does the random state. Samples are described by the
    mean and the mean square of every channel, each sample by itself. Those of the first part say what is usual; the
    others give the scores with which a monitor compares what it sees. Give samples that the model was not trained on.

    Args:
        model: Any module, on any device.
        batches: A DataLoader or Dataset, or an iterable of batches; read in random order where that is possible.
        batch_size: Samples per batch; a DataLoader is rebuilt with it. None: the loader's own.
        num_batches: Read at most so many; None: as many as a profile can hold, 4,224 samples in blocks of 8.
        block: Samples in a block, of which the mean is compared. Larger ones show smaller shifts, and take longer.
        forward: ``f(model, batch)``, as in a model file.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.
        progress: Called with the batches done and planned.
        **settings: Fields of ``bnprobe.config.spec.ScanSettings``: device, autocast, seed, include, exclude, norms.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.

    Example:
        >>> found = bnprobe.profile(model, loader, block=2)
        >>> found
        <Profile: Sequential, 1 layer profiled on 63 samples>
    """
    functions = {"forward": forward, "batch_size_of": batch_size_of}
    given = check_call(model, functions, {"batch_size": batch_size, "batches": num_batches, **settings}, profile)
    _require_block(block)
    with preserved_random_state(), preserved_generators(batches):
        seed_everything(given.seed)
        source = as_batch_source(batches, batch_size, as_given=batch_size is None, batch_size_of=batch_size_of)
        inner, note = unwrapped(model)
        notes = (note,) if note else ()
        workload = Workload(inner, type(inner).__name__, None, source, None, forward, None, None, notes)
        return profile_workload(workload, source, given, block, progress)


def profile_spec(spec: Spec, block: int = BLOCK, progress: Progress = no_progress) -> Profile:
    """Load what a spec names, and profile it on its held-out data; without any, on the training data.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    _require_block(block)
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        note = ""
        if workload.held_out is None:
            note = (
                "The samples are those of the training data, to which a model answers otherwise than to new ones:"
                " healthy samples in service may raise an alarm. Give held-out data (--eval-data)."
            )
        source = workload.held_out or workload.source
        found = profile_workload(workload, source, spec.settings(), block, progress)
        return replace(found, notes=(*found.notes, *filter(None, [note])))


def profile_workload(
    workload: Workload, source: BatchSource, settings: ScanSettings, block: int, progress: Progress
) -> Profile:
    """Profile a model that is loaded already, on samples of ``source``."""
    settings = workload.settings(settings)
    with untouched(workload.model) as kept:
        reader = reader_of(source, settings)
        session = session_of(workload, settings, kept.restores)
        layers, skipped = watchable(session.layers.selected)
        if not layers:
            require_layers(workload.model, session.layers)
            raise NothingToProbeError(f"No layer can be profiled. The first is {skipped[0].name}: {skipped[0].reason}.")
        with session.installed():
            build = _Build(LayerInputs(layers, exact=True), block)
            for done, _ in enumerate(passes(session, build.inputs, reader), 1):
                build.add()
                progress(done, done)
                if len(build.scores) >= MOST_BLOCKS:
                    break
        build.finish(str(source.origin))
        skipped = [*session.layers.skipped, *skipped, *_without_samples(layers, build)]
    return _profile(workload, source, settings, build, layers, tuple(skipped), environment(session.device))


def session_of(workload: Workload, settings: ScanSettings, kept: Any) -> Session:
    """The workload's model on its device; real data only.

    Raises:
        UsageError: The inputs are synthetic.
    """
    if workload.source.synthetic:
        raise UsageError(
            "Synthetic inputs (--input-shape) look like no data that the model will see in service. Add"
            " load_data(batch_size) to the model file, or name data in the spec."
        )
    return Session.open(workload.model, settings, UserFunctions(workload.forward), kept=kept)


def reader_of(source: BatchSource, settings: ScanSettings) -> RepeatedReader:
    """The batches of a source, from all over the data where it can be read so."""
    limits = [limit for limit in (source.most, settings.batches) if limit is not None]
    return RepeatedReader(spread(source, settings.seed, mixed=True).batches, min(limits, default=None), settings.seed)


def passes(session: Session, inputs: LayerInputs, reader: RepeatedReader) -> Iterator[MicroBatch]:
    """Run every batch in eval mode; ``inputs`` has then taken its samples. The session is installed."""
    for batch in reader:
        # No layer waits for its moments, so that no pass runs twice.
        with inputs.taking(batch.samples):
            pass_ = Pass(batch.samples, batch.samples, moments=False, immediate=True)
            session.forward("eval", to_device(batch.data, session.device), pass_)
        yield batch


class _Build:
    """Features of the first samples, and the scores of the blocks of all others."""

    def __init__(self, inputs: LayerInputs, block: int) -> None:
        self.inputs, self.block = inputs, block
        self.slots: list[Slot] = []
        self.failed: dict[Slot, str] = {}
        self.scores: list[list[float]] = []
        self.healthy: Healthy | None = None
        self.described = self.left_out = 0
        self._sizes: list[int] = []
        self._rows: list[Tensor] = []

    def add(self) -> None:
        """Take in the samples of the last pass."""
        if not self.slots:
            self.slots, self.failed = self.inputs.taken, dict(self.inputs.failed)
            self._sizes = self.inputs.sizes(self.slots)
        features = self.inputs.features(self.slots)
        if features is None:
            self.left_out += 1
            return
        self._rows.append(features)
        held = sum(len(rows) for rows in self._rows)
        if self.healthy is None and held >= 3 * _DESCRIBED:
            self._describe(_DESCRIBED)
        self._score()

    def finish(self, origin: str) -> None:
        """Judge what there is, once there is no more.

        Raises:
            NothingToProbeError: No layer sees a row for each sample.
            DataError: There are too few samples.
        """
        if not self.slots:
            reason = next(iter(self.failed.values()), "none was called")
            raise NothingToProbeError(f"No layer can be profiled: {reason}.")
        held = sum(len(rows) for rows in self._rows)
        if self.healthy is None and held:
            self._describe(max(held // 3, 1))
            self._score()
        if len(self.scores) < LEAST_BLOCKS:
            least = -(-3 * LEAST_BLOCKS * self.block // 2) + 1
            raise DataError(
                f"{origin} gave {count(held, 'sample')}, and a profile in blocks of {self.block} needs at least"
                f" {least}. Give more, or smaller blocks ({either('--block', 'block=...')})."
            )

    def _describe(self, samples: int) -> None:
        rows = torch.cat(self._rows)
        first, self._rows = rows[:samples], [rows[samples:]]
        spread = first.std(0) if samples > 1 else torch.zeros_like(first[0])
        self.healthy = Healthy(_rounded(first.mean(0)), _rounded(spread), self._sizes)
        self.described = samples

    def _score(self) -> None:
        if self.healthy is None:
            return
        rows = torch.cat(self._rows)
        whole = min(len(rows) // self.block, MOST_BLOCKS - len(self.scores)) * self.block
        if whole:
            found = self.healthy.scores(self.healthy.deviations(rows[:whole], self.block), self.block)
            self.scores += found.tolist()
        self._rows = [rows[whole:]]


def _rounded(values: Tensor) -> Tensor:
    """To six digits, as they are written."""
    return torch.tensor([[float(f"{value:.6g}") for value in row] for row in values.tolist()]).to(values)


def _profile(
    workload: Workload,
    source: BatchSource,
    settings: ScanSettings,
    build: _Build,
    layers: list[ProbedLayer],
    skipped: tuple[SkippedLayer, ...],
    where: Any,
) -> Profile:
    assert build.healthy is not None  # finish() said so
    named = {layer.index: layer for layer in layers}
    healthy = build.healthy
    rows = torch.stack([healthy.centre[0], healthy.spread[0], healthy.centre[1], healthy.spread[1]]).cpu()
    parts = [map(tuple, part.tolist()) for part in rows.split(healthy.sizes, dim=1)]
    scores = [tuple(column) for column in zip(*build.scores, strict=True)]
    found = tuple(
        ProfiledLayer(named[index].name, call, size, position, position_spread, extent, extent_spread, own)
        for (index, call), size, (position, position_spread, extent, extent_spread), own in zip(
            build.slots, healthy.sizes, parts, scores, strict=True
        )
    )
    called = [layer for layer in layers if any(index == layer.index for index, _ in build.slots)]
    return Profile(
        tool=Tool("bnprobe", __version__),
        environment=where,
        model=workload.model_name,
        checkpoint=workload.checkpoint,
        statistics=digest_of(called),
        data=source.origin,
        seed=settings.seed,
        block=build.block,
        described=build.described,
        blocks=len(build.scores),
        layers=found,
        skipped=skipped,
        notes=(*workload.notes, *source.notes, *_notes(build)),
    )


def _notes(build: _Build) -> Iterator[str]:
    if build.left_out:
        yield (
            f"{count(build.left_out, 'batch')} left out, in which not every layer saw a row for each sample: a monitor"
            " leaves such batches out, too."
        )
    if len(build.scores) < _FEW_BLOCKS:
        yield (
            f"There are {len(build.scores)} blocks to compare with. The rate of false alarms holds, but small shifts"
            f" are found late, or not; with {_FEW_BLOCKS} blocks or more they are found sooner."
        )


def _without_samples(layers: list[ProbedLayer], build: _Build) -> Iterator[SkippedLayer]:
    """Layers of which the first batch showed no samples, and why."""
    taken = {index for index, _ in build.slots}
    reasons = {index: reason for (index, _), reason in reversed(list(build.failed.items()))}
    for layer in layers:
        if layer.index not in taken:
            reason = reasons.get(layer.index, "it was not called")
            yield SkippedLayer(layer.name, type(layer.module).__name__, reason)


def _require_block(block: int) -> None:
    if block < 1:
        raise UsageError(f"{either('--block', 'block=')} {block} is no number of samples: give at least 1.")
