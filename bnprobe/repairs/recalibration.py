"""Recompute running statistics from data; the rest of the model stays as it is.

``recalibrate`` is the Python call, and ``recalibrate_loaded`` the same for what is loaded already.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bnprobe.config import PathChoice, StatisticsPath
from bnprobe.config.spec import ScanSettings, matches_any
from bnprobe.errors import NonFiniteError, NothingToProbeError, RepairError, UsageError
from bnprobe.loading.arguments import check_call, device_named
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.loading.model import BatchFunction, unwrapped
from bnprobe.loading.order import spread
from bnprobe.loading.tracking import keeps_none, tracking
from bnprobe.measure.interrupts import Restore
from bnprobe.measure.layers import ProbedLayer, find_layers, require_layers
from bnprobe.measure.norms import write_statistics
from bnprobe.measure.origins import by_name, origin
from bnprobe.measure.population import (
    PopulationStatistics,
    population_by_batch,
    population_by_layer,
    population_by_micro_batch,
)
from bnprobe.measure.reader import RepeatedReader
from bnprobe.measure.restore import (
    preserved_generators,
    preserved_random_state,
    seed_everything,
    undone_if_failed,
    untouched,
)
from bnprobe.measure.session import Progress, Session, UserFunctions, no_progress
from bnprobe.numbers import listed
from bnprobe.records import ROOT
from bnprobe.wording import from_python, nearest, option


@dataclass(frozen=True)
class Recalibrated:
    """What was recalibrated.

    Attributes:
        layers: Names of the layers, in network order.
        images, batches: Samples and batches that were read.
        notes: What the reader should know, one sentence each.
        mixed, passes: As in ``PopulationStatistics``.
        tracked: Layers that kept no running statistics before, with the line of the user's code that makes them.
    """

    layers: tuple[str, ...]
    images: int
    batches: int
    notes: tuple[str, ...]
    mixed: bool
    tracked: dict[str, str | None]
    passes: int = 1


@from_python
def recalibrate(
    model: nn.Module,
    batches: Any,
    batch_size: int | None = None,
    *,
    num_batches: int | None = None,
    path: StatisticsPath = "train",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layers: Iterable[str] = (),
    device: str | None = None,
    autocast: str | None = None,
    seed: int = 0,
    include_frozen: bool = False,
    batch_size_of: Callable[[Any], int] | None = None,
) -> nn.Module:
    """Recalibrate the running statistics of BN layers in place: population mean and variance over all samples.

    Dropout and other random layers are off; only BN layers may normalize with batch statistics. Means and variances
    are pooled over all values in float64 (Chan et al. 1983), so that a partial last batch is weighted by its size. All
    calls of a shared layer count as one population. The buffers get the mean and the unbiased variance, and
    ``num_batches_tracked`` the number of pooled batches (times the calls of the layer), so that with momentum=None
    training continues as if these had been its updates. Layers without running statistics (track_running_stats=False)
    are given some, and use them at inference from then on. Layers that ``train()`` leaves in eval mode, unless they are
    asked for, and everything else of the model stay bit-identical, and so does the random state. If anything fails,
    including Ctrl-C, the model is unchanged.

    Args:
        model: Any module, on any device.
        batches: A DataLoader or Dataset, or an iterable of batches of any sizes.
        batch_size: Samples per batch; a DataLoader is rebuilt with it. None: the loader's own.
        num_batches: Number of batches to use, drawn from the whole data set if possible; None: all.
        path: "train": earlier layers normalize with batch statistics, in large physical batches of samples drawn at
            random if samples may be mixed (PreciseBN, Wu & Johnson 2021, arXiv 2105.07576, section 3.2); one pass over
            the data. "eval": earlier layers normalize with their new running statistics, as at inference, so that the
            result does not depend on the batch size; one pass over the data if samples may be mixed and all of them fit
            into memory at once, else one per layer. "micro-batch-pooled" and "micro-batch-averaged": as "train", but in
            the batches as they come, as in training; with the pooled variance, or the mean of the biased variances that
            the batches were normalized with. There is no "auto" as on the command line, which scores the paths on
            held-out data with the loss or metric of a model file.
        forward: ``f(model, batch)``, as in a model file.
        layers: Globs of layer names; empty: all layers.
        device: "cpu", "cuda", ...; None: the model's own, else CUDA if any.
        autocast: "bfloat16" or "float16".
        seed: Seed of torch, numpy and random.
        include_frozen: Recalibrate layers, too, that ``train()`` leaves in eval mode.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.

    Returns:
        ``model``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> model = bnprobe.recalibrate(model, loader, batch_size=32)
        >>> int(model[1].num_batches_tracked)
        2

    Warns:
        UserWarning: There are fewer than ``num_batches`` batches.
    """
    functions = {"forward": forward, "batch_size_of": batch_size_of}
    settings = {"batch_size": batch_size, "batches": num_batches, "device": device, "autocast": autocast, "seed": seed}
    given = check_call(model, functions, settings, recalibrate).model_copy(update={"batch_size": None})
    inner, _ = unwrapped(model)
    listed = not isinstance(batches, DataLoader | Dataset)
    size = 1 if listed else batch_size
    with undone_if_failed(inner), preserved_random_state(), preserved_generators(batches):
        source = as_batch_source(batches, size, as_given=listed, batch_size_of=batch_size_of)
        found = recalibrate_loaded(
            inner, source, forward, path=path, layers=tuple(layers), settings=given, include_frozen=include_frozen
        )
    if num_batches is not None and found.batches < num_batches:
        warnings.warn(found.notes[-1], stacklevel=2)
    return model


def recalibrate_loaded(
    model: nn.Module,
    source: BatchSource,
    forward: BatchFunction | None = None,
    *,
    path: StatisticsPath = "train",
    layers: tuple[str, ...] = (),
    settings: ScanSettings | None = None,
    progress: Progress = no_progress,
    track: bool = True,
    include_frozen: bool = False,
    batches: RepeatedReader | None = None,
) -> Recalibrated:
    """Like ``recalibrate``, for a model and data that are already loaded.

    Args:
        model: Recalibrated in place, without wrappers.
        source: The micro-batches to read.
        forward: The user's function of (model, batch), if given.
        path, layers: As for ``recalibrate``.
        settings: Device, autocast, seed and number of batches.
        progress: Called with the batches done and planned.
        track: Whether to give running statistics to layers that keep none.
        include_frozen: As for ``recalibrate``.
        batches: Those of ``repeated``, where several models are recalibrated on the same; None: reads ``source``.

    Returns:
        The recalibrated layers, and what was read.

    Raises:
        BnprobeError: As for ``recalibrate``.
    """
    if path not in get_args(StatisticsPath):
        known = ", ".join(f'"{each}"' for each in get_args(StatisticsPath))
        why = (
            'path="auto" scores the paths on held-out data, which only the command bnprobe recalibrate has'
            if path in get_args(PathChoice)
            else f'Unknown path "{path}" for recalibration'
        )
        raise UsageError(f"{why}; give one of {known}.")
    settings = settings or ScanSettings()
    without = untracked(model, layers) if track else []
    device = device_named(settings.device, model)
    with tracking([layer.module for layer in without], device):
        batches = batches or repeated(source, settings, path)
        found = _recalibrate(model, source, batches, forward, path, layers, settings, progress, include_frozen)
    names = by_name(model)
    places = {layer.name: origin(names, "" if layer.name == ROOT else layer.name) for layer in without}
    return replace(found, tracked={name: place for name, place in places.items() if name in found.layers})


def repeated(source: BatchSource, settings: ScanSettings, path: StatisticsPath = "train") -> RepeatedReader:
    """The batches of a source as recalibration reads them: from all over the data."""
    scattered = spread(source, settings.seed, mixed=path == "eval")
    return RepeatedReader(scattered.batches, _most(source, settings), settings.seed)


def untracked(model: nn.Module, globs: tuple[str, ...]) -> list[ProbedLayer]:
    """The layers asked for that keep no running statistics."""
    layers = find_layers(model, lambda *names: True, required=False).layers
    _check_globs(globs, layers)
    asked = [layer for layer in layers if not globs or any(matches_any(glob, _names(layer)) for glob in globs)]
    return [layer for layer in asked if keeps_none(layer.module)]


def _names(layer: ProbedLayer) -> tuple[str, ...]:
    return layer.name, *layer.aliases


def _recalibrate(
    model: nn.Module,
    source: BatchSource,
    batches: RepeatedReader,
    forward: BatchFunction | None,
    path: StatisticsPath,
    layers: tuple[str, ...],
    settings: ScanSettings,
    progress: Progress,
    include_frozen: bool,
) -> Recalibrated:
    with untouched(model) as kept:
        session = _session(model, source, forward, layers, settings, kept.restores)
        with session.installed():
            seed_everything(settings.seed)
            session.explore(batches.look_ahead(), required=False)
            _check_globs(layers, session.layers.layers)
            require_layers(model, session.layers)
            wanted = _wanted(session, include_frozen)
            found = _population(session, batches, path, wanted, progress)
    recalibrated = [layer for layer in wanted if layer.index in found.statistics]
    if not recalibrated:
        raise NothingToProbeError(
            f"None of the layers to be recalibrated was called while {batches.images} samples ran through the model;"
            f" the first of them is {wanted[0].name}."
        )
    _write([(layer, _checked(layer, found)) for layer in recalibrated], found.updates)
    return Recalibrated(
        tuple(layer.name for layer in recalibrated),
        batches.images,
        batches.batches,
        tuple(_notes(session, wanted, recalibrated, batches, settings)),
        found.mixed,
        {},
        found.passes,
    )


def _most(source: BatchSource, settings: ScanSettings) -> int | None:
    """Number of batches to read; synthetic data never ends."""
    if settings.batches is None and source.synthetic:
        return settings.max_batches
    return settings.batches


def _session(
    model: nn.Module,
    source: BatchSource,
    forward: BatchFunction | None,
    layers: tuple[str, ...],
    settings: ScanSettings,
    kept: Sequence[Restore],
) -> Session:
    chosen = settings.model_copy(update={"include": layers, "exclude": ()})
    return Session.open(model, chosen, UserFunctions(forward), synthetic=source.synthetic, kept=kept)


def _check_globs(globs: tuple[str, ...], layers: Iterable[ProbedLayer]) -> None:
    names = [name for layer in layers for name in _names(layer)]
    for glob in globs:
        if names and not matches_any(glob, names):
            near = nearest(glob, names, cutoff=0.0)
            raise UsageError(f'The glob "{glob}" matches no BN layer of the model; the nearest name is "{near}".')


def _population(
    session: Session, batches: RepeatedReader, path: StatisticsPath, wanted: list[ProbedLayer], progress: Progress
) -> PopulationStatistics:
    frozen = session.frozen & {layer.index for layer in wanted}
    if path == "train":
        return population_by_batch(session, batches, progress, frozen)
    if path != "eval":
        averaged = path == "micro-batch-averaged"
        return population_by_micro_batch(session, batches, progress, frozen, averaged=averaged)
    return population_by_layer(session, batches, frozenset(layer.index for layer in wanted), progress)


def _wanted(session: Session, include_frozen: bool) -> list[ProbedLayer]:
    """The layers asked for that keep running statistics, and update them in training unless ``include_frozen``.

    ``session`` is installed.

    Raises:
        RepairError: There is none.
    """
    selected = session.layers.selected
    keeping = [layer for layer in selected if layer.info.running_mean is not None]
    found = [layer for layer in keeping if include_frozen or layer.index not in session.frozen]
    if not found:
        first, others = selected[0], "" if len(selected) == 1 else ", and so are the others"
        why = "is in eval mode also in training" if first.info.running_mean is not None else "keeps no statistics"
        how = f" To recalibrate such layers, give {option('--include-frozen', True)}." if keeping else ""
        raise RepairError(f"No layer can be recalibrated: {first.name} {why}{others}.{how}")
    return found


def _checked(layer: ProbedLayer, found: PopulationStatistics) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer in the dtype of its buffers.

    Raises:
        RepairError: They come from a single value.
        NonFiniteError: They are not finite in that dtype.
    """
    if found.values[layer.index] < 2:
        raise RepairError(
            f"A variance needs at least two values per channel, but {layer.name} received only one from all the data."
            " Give more samples. Nothing was changed."
        )
    assert layer.info.running_mean is not None  # only layers with running statistics get here
    mean, variance = (value.to(layer.info.running_mean.dtype) for value in found.statistics[layer.index])
    bad = int((~torch.isfinite(mean + variance)).sum())
    if bad:
        raise NonFiniteError(
            f"The new statistics of {layer.name} are NaN or Inf in {bad} of {mean.numel()} channels, because its input"
            " overflows or is NaN. Check the layers before it with `bnprobe lint`. Nothing was changed."
        )
    return mean, variance


def _write(values: list[tuple[ProbedLayer, tuple[Tensor, Tensor]]], updates: dict[int, int]) -> None:
    at_inference = any(buffer.is_inference() for layer, _ in values for buffer in layer.module.buffers(recurse=False))
    # Buffers made under torch.inference_mode are written to in no other mode.
    with torch.inference_mode() if at_inference else torch.no_grad():
        for layer, (mean, variance) in values:
            write_statistics(layer.family, layer.module, mean, variance)
            counter = getattr(layer.module, "num_batches_tracked", None)
            if counter is not None:
                counter.fill_(updates[layer.index])


def _notes(
    session: Session,
    wanted: list[ProbedLayer],
    recalibrated: list[ProbedLayer],
    batches: RepeatedReader,
    settings: ScanSettings,
) -> Iterator[str]:
    layers = session.layers.layers
    kept = [layer.name for layer in layers if layer.selected and layer not in wanted]
    if kept:
        frozen = any(layer.index in session.frozen and layer.name in kept for layer in layers)
        how = f" To recalibrate layers in eval mode, give {option('--include-frozen', True)}." if frozen else ""
        yield f"Not recalibrated, because training does not update their running statistics: {listed(kept)}.{how}"
    uncalled = [layer.name for layer in wanted if layer not in recalibrated]
    if uncalled:
        yield f"Not recalibrated, because inference does not call them: {listed(uncalled)}."
    if settings.batches is not None and batches.batches < settings.batches:
        yield f"The data ended after {batches.batches} of the {settings.batches} requested batches."
