"""``bnprobe recalibrate``: recompute running statistics from data; the rest of the model stays as it is.

``recalibrate`` is the Python call, ``recalibrate_spec`` the command: scan, recalibrate, score, scan again.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bnprobe._version import __version__
from bnprobe.analysis.comparison import AS_IS, RECALIBRATED, make_arm, mean_estimate, verdict
from bnprobe.commands.held_out import HeldOut
from bnprobe.commands.scan import environment, scan_workload, whole
from bnprobe.config import StatisticsPath
from bnprobe.config.load import settings_from
from bnprobe.config.spec import ScanSettings, Spec, matches_any
from bnprobe.errors import NonFiniteError, NothingToProbeError, RepairError, UsageError
from bnprobe.loading.data import BatchSource, as_batch_source
from bnprobe.loading.model import BatchFunction, unwrapped
from bnprobe.loading.order import spread
from bnprobe.loading.workload import Workload, load_workload, read_again
from bnprobe.measure.layers import ProbedLayer, require_layers
from bnprobe.measure.norms import write_statistics
from bnprobe.measure.population import Settled, settle_by_batch, settle_by_layer
from bnprobe.measure.reader import RepeatedReader
from bnprobe.measure.restore import (
    deferred_interrupts,
    preserved_generators,
    preserved_random_state,
    seed_everything,
    untouched,
)
from bnprobe.measure.session import Progress, Session, UserFunctions, device_named, no_progress
from bnprobe.numbers import listed
from bnprobe.records import SCHEMA_VERSION, Arm, Conclusion, Estimate, Proof, RepairRecord, Report, Run, Score, Tool
from bnprobe.repairs import left_out, on_host


@dataclass(frozen=True)
class Recalibrated:
    """What was recalibrated.

    Attributes:
        layers: Names of the layers, in network order.
        images, batches: Samples and batches that were read.
        notes: What the reader should know, one sentence each.
    """

    layers: tuple[str, ...]
    images: int
    batches: int
    notes: tuple[str, ...]


def recalibrate(
    model: nn.Module,
    batches: Any,
    *,
    batch_size: int | None = None,
    num_batches: int | None = None,
    path: StatisticsPath = "train",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    layers: Iterable[str] = (),
    device: str | None = None,
    autocast: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Recalibrate the running statistics of BN layers in place: population mean and variance over all samples.

    Dropout and other random layers are off; only BN layers may normalize with batch statistics. Means and variances
    are pooled over all values in float64 (Chan et al. 1983), so that a partial last batch is weighted by its size. All
    calls of a shared layer count as one population. The buffers get the mean and the unbiased variance, and
    ``num_batches_tracked`` the number of pooled batches (times the calls of the layer), so that with momentum=None
    training continues as if these had been its updates. Layers that ``train()`` leaves in eval mode, layers without
    running statistics, and everything else of the model stay bit-identical, and so does the random state. If anything
    fails, including Ctrl-C, the model is unchanged.

    Args:
        model: Any module, on any device.
        batches: A DataLoader or Dataset, or an iterable of batches of any sizes.
        batch_size: Samples per batch; a DataLoader is rebuilt with it. None: the loader's own.
        num_batches: Number of batches to use, drawn from the whole data set if possible; None: all.
        path: "train": earlier layers normalize with batch statistics, in large physical batches of samples drawn at
            random if samples may be mixed (PreciseBN, Wu & Johnson 2021, arXiv 2105.07576, section 3.2); one pass over
            the data. "eval": earlier layers normalize with their new running statistics, as at inference, so that the
            result does not depend on the batch size; one pass over the data per layer.
        forward: ``f(model, batch)``, as in a model file.
        layers: Globs of layer names; empty: all layers.
        device: "cpu", "cuda", ...; None: the model's own, else CUDA if any.
        autocast: "bfloat16" or "float16".
        seed: Seed of torch, numpy and random.

    Returns:
        ``model``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    given = settings_from({"device": device, "autocast": autocast, "seed": seed, "batches": num_batches})
    inner, _ = unwrapped(model)
    listed = not isinstance(batches, DataLoader | Dataset)
    source = as_batch_source(batches, 1 if listed else batch_size, as_given=listed)
    with preserved_generators(batches):
        recalibrate_loaded(inner, source, forward, path=path, layers=tuple(layers), settings=given)
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
) -> Recalibrated:
    """Like ``recalibrate``, for a model and data that are already loaded.

    Args:
        model: Recalibrated in place, without wrappers.
        source: The micro-batches to read.
        forward: The user's function of (model, batch), if given.
        path, layers: As for ``recalibrate``.
        settings: Device, autocast, seed and number of batches.
        progress: Called with the batches done and planned.

    Returns:
        The recalibrated layers, and what was read.

    Raises:
        BnprobeError: As for ``recalibrate``.
    """
    if path not in ("train", "eval"):
        raise UsageError(f'Unknown path "{path}" for recalibration; give "train" or "eval".')
    settings = settings or ScanSettings()
    _check_values(model)
    with untouched(model):
        scattered = spread(source, settings.seed, mixed=path == "eval")
        batches = RepeatedReader(scattered.batches, _most(source, settings), settings.seed)
        session = _session(model, source, forward, layers, settings)
        with session.installed():
            seed_everything(settings.seed)
            session.explore(batches.look_ahead(), required=False)
            _check_globs(layers, session.layers.layers)
            require_layers(model, session.layers)
            wanted = _updating(session)
            settled = _settle(session, batches, path, wanted, progress)
    recalibrated = [layer for layer in wanted if layer.index in settled.statistics]
    if not recalibrated:
        raise NothingToProbeError(
            f"None of the layers to be recalibrated was called while {batches.images} samples ran through the model;"
            f" the first of them is {wanted[0].name}."
        )
    _write([(layer, _checked(layer, settled)) for layer in recalibrated], settled.updates)
    return Recalibrated(
        tuple(layer.name for layer in recalibrated),
        batches.images,
        batches.batches,
        tuple(_notes(session.layers.layers, wanted, recalibrated, batches, settings)),
    )


def _check_values(model: nn.Module) -> None:
    """Reject a model whose tensors have no values.

    Raises:
        RepairError: A parameter or buffer is on the meta device.
    """
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise RepairError(
                f"{name} is on the meta device, where tensors have no values, so the model cannot run. Allocate it with"
                " to_empty(), and load its weights."
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
) -> Session:
    chosen = settings.model_copy(update={"include": layers, "exclude": ()})
    return Session.open(model, chosen, UserFunctions(forward), synthetic=source.synthetic)


def _check_globs(globs: tuple[str, ...], layers: Iterable[ProbedLayer]) -> None:
    names = [name for layer in layers for name in (layer.name, *layer.aliases)]
    for glob in globs:
        if names and not matches_any(glob, names):
            nearest = difflib.get_close_matches(glob, names, 1, cutoff=0.0)[0]
            raise UsageError(f'The glob "{glob}" matches no BN layer of the model; the nearest name is "{nearest}".')


def _settle(
    session: Session, batches: RepeatedReader, path: StatisticsPath, wanted: list[ProbedLayer], progress: Progress
) -> Settled:
    if path == "train":
        return settle_by_batch(session, batches, progress)
    return settle_by_layer(session, batches, frozenset(layer.index for layer in wanted), progress)


def _updating(session: Session) -> list[ProbedLayer]:
    """The layers asked for that update running statistics in training; ``session`` has just been installed.

    Raises:
        RepairError: There is none.
    """
    selected = session.layers.selected
    found = [layer for layer in selected if layer.info.running_mean is not None and layer.module.training]
    if not found:
        first = selected[0]
        why = "has no running statistics" if first.info.running_mean is None else "is in eval mode also in training"
        raise RepairError(
            f"No layer can be recalibrated: {first.name} {why}{'' if len(selected) == 1 else ', and so do the others'}."
        )
    return found


def _checked(layer: ProbedLayer, settled: Settled) -> tuple[Tensor, Tensor]:
    """Mean and variance of a layer in the dtype of its buffers.

    Raises:
        RepairError: They come from a single value.
        NonFiniteError: They are not finite in that dtype.
    """
    if settled.values[layer.index] < 2:
        raise RepairError(
            f"A variance needs at least two values per channel, but {layer.name} received only one from all the data."
            " Give more samples. Nothing was changed."
        )
    assert layer.info.running_mean is not None  # only layers with running statistics get here
    mean, variance = (value.to(layer.info.running_mean.dtype) for value in settled.statistics[layer.index])
    bad = int((~torch.isfinite(mean + variance)).sum())
    if bad:
        raise NonFiniteError(
            f"The new statistics of {layer.name} are NaN or Inf in {bad} of {mean.numel()} channels, because its input"
            " overflows or is NaN. Check the layers before it with `bnprobe lint`. Nothing was changed."
        )
    return mean, variance


def _write(values: list[tuple[ProbedLayer, tuple[Tensor, Tensor]]], updates: dict[int, int]) -> None:
    with deferred_interrupts(), torch.no_grad():
        for layer, (mean, variance) in values:
            write_statistics(layer.family, layer.module, mean, variance)
            counter = getattr(layer.module, "num_batches_tracked", None)
            if counter is not None:
                counter.fill_(updates[layer.index])


def _notes(
    layers: Iterable[ProbedLayer],
    wanted: list[ProbedLayer],
    recalibrated: list[ProbedLayer],
    batches: RepeatedReader,
    settings: ScanSettings,
) -> Iterator[str]:
    kept = [layer.name for layer in layers if layer.selected and layer not in wanted]
    if kept:
        yield (f"Not recalibrated, because training does not update their running statistics: {listed(kept)}.")
    uncalled = [layer.name for layer in wanted if layer not in recalibrated]
    if uncalled:
        yield f"Not recalibrated, because they were never called: {listed(uncalled)}."
    if settings.batches is not None and batches.batches < settings.batches:
        yield f"The data ended after {batches.batches} of the {settings.batches} requested batches."


@dataclass(frozen=True)
class Repaired:
    """The result of a recalibration or conversion.

    Attributes:
        record: The record, without the weights file, which is not written yet.
        weights: Weights of the repaired model by the keys of its state dict, in their order, on the host.
        before, after: Scan reports of the model as loaded and repaired; None if it could not be scanned.
    """

    record: RepairRecord
    weights: dict[str, Tensor]
    before: Report | None
    after: Report | None


def recalibrate_spec(
    spec: Spec,
    *,
    path: StatisticsPath = "train",
    layers: tuple[str, ...] = (),
    num_batches: int | None = None,
    command: str | None = None,
    progress: Progress = no_progress,
) -> Repaired:
    """Load what a spec names, recalibrate it, and measure the effect.

    Args:
        spec: Model, data and how to scan.
        path, layers, num_batches: As in ``bnprobe.recalibrate``.
        command: The command line as typed.
        progress: Called with the batches done and planned, in each stage.

    Raises:
        UsageError: The inputs are synthetic.
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        _require_real_data(workload)
        settings = workload.settings(spec.settings())
        before, notes = _first_scan(workload, settings, progress)
        seed_everything(spec.data.seed)
        workload = read_again(spec, workload)
        held_out = HeldOut.of(spec, workload)
        scores = [held_out.scores(workload.model)]
        found = recalibrate_loaded(
            workload.model,
            workload.source,
            workload.forward,
            path=path,
            layers=layers,
            settings=settings.model_copy(update={"batches": num_batches}),
            progress=progress,
        )
        scores.append(held_out.scores(workload.model))
        seed_everything(spec.data.seed)
        after = whole(scan_workload(replace(read_again(spec, workload), checkpoint=None), settings, progress))
    proof = _proof(spec, held_out, *scores)
    notes = (*notes, *_how(found, path), *held_out.notes, *left_out(workload.model))
    record = _record(spec, workload, found, proof, (before, after), notes, command)
    return Repaired(record, on_host(workload.model.state_dict()), before, after)


def _require_real_data(workload: Workload) -> None:
    if workload.source.synthetic:
        raise UsageError(
            "Recalibration needs real data: the statistics of synthetic inputs (--input-shape) do not match any data"
            " that the model will see. Add load_data(batch_size) to the model file, or name data in the spec."
        )


def _first_scan(
    workload: Workload, settings: ScanSettings, progress: Progress
) -> tuple[Report | None, tuple[str, ...]]:
    """Scan the model as loaded. NaN in running statistics prevents a scan, but recalibration can replace them."""
    try:
        return whole(scan_workload(workload, settings, progress)), ()
    except NonFiniteError as error:
        return None, (f"The model as loaded could not be scanned. {error}",)


def _how(found: Recalibrated, path: StatisticsPath) -> tuple[str, ...]:
    way = (
        "in large batches that use batch statistics"
        if path == "train"
        else "layer by layer, using the new statistics of earlier layers"
    )
    sentence = f"The statistics are those of {found.images} samples in {found.batches} batches ({path} path: {way})."
    return (sentence, *found.notes)


def _proof(spec: Spec, held_out: HeldOut, before: list[Score], after: list[Score]) -> Proof | None:
    """Compare both models batch by batch, so that chance lies only in the choice of samples; None: not scored."""
    if not held_out.batches:
        return None
    measure: Literal["loss", "metric"] = "loss" if held_out.metric is None else "metric"
    sign = 1.0 if measure == "metric" and spec.repair.goal == "max" else -1.0
    pairs = [(getattr(one, measure), getattr(two, measure)) for one, two in zip(before, after, strict=True)]
    gain = mean_estimate([None if one is None or two is None else sign * (two - one) for one, two in pairs])
    arms = tuple(
        _arm(name, spec.data.seed, held_out, scores) for name, scores in ((AS_IS, before), (RECALIBRATED, after))
    )
    conclusion, message = _conclude(gain, len(pairs), f"The {measure} on the same {held_out.images} held-out samples")
    return Proof(measure, arms, RECALIBRATED, AS_IS, gain, conclusion, message, 0, held_out.images)


def _arm(name: str, seed: int, held_out: HeldOut, scores: list[Score]) -> Arm:
    means = {measure: held_out.mean([getattr(score, measure) for score in scores]) for measure in ("loss", "metric")}
    return make_arm(name, [Run(seed, 0, 0, Score(**means), "finished", "", 0.0)], trained=False)


def _conclude(gain: Estimate | None, batches: int, what: str) -> tuple[Conclusion, str]:
    """The conclusion, and a sentence that explains it."""
    if gain is None:
        return "not_compared", f"{what} is not finite before or after the recalibration."
    if gain.interval is None:
        return "undecided", f"{what}: there is only one batch, so no interval can be given."
    return verdict(gain.mean, gain.interval), f"{what}, compared over {batches} batches."


def _record(
    spec: Spec,
    workload: Workload,
    found: Recalibrated,
    proof: Proof | None,
    scans: tuple[Report | None, Report],
    notes: tuple[str, ...],
    command: str | None,
) -> RepairRecord:
    before, after = scans
    return RepairRecord(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", __version__),
        environment=environment(device_named(spec.scan.device, workload.model)),
        action="recalibrate",
        command=command,
        model=workload.model_name,
        checkpoint=workload.checkpoint,
        weights=None,
        weights_sha256=None,
        settings=spec.recorded(),
        seeds=(spec.data.seed,),
        plan=None,
        recalibrated=found.layers,
        proof=proof,
        flagged_before=None if before is None else before.summary.flagged,
        flagged_after=after.summary.flagged,
        requirements=(),
        notes=(*workload.notes, *workload.source.notes, *notes),
    )
