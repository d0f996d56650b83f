"""From what was measured to the layers and the summary of a report: thresholds, flags, notes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bnprobe.analysis.decomposition import Attribution, attribute, beyond_noise, model_shares
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import NonFiniteError, NothingToProbeError
from bnprobe.measure.accumulators import Values
from bnprobe.measure.evidence import Evidence, by_layer
from bnprobe.measure.forward_pass import Slot
from bnprobe.measure.layers import ONE_VALUE, ProbedLayer
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.numbers import listed, number
from bnprobe.records import (
    FROZEN,
    MEASURES,
    BatchSizePoint,
    CallMeasurement,
    Distribution,
    Gap,
    Histogram,
    Interval,
    Layer,
    PathMeasurement,
    SkippedLayer,
    Summary,
)
from bnprobe.rules.shares import deciding_limit, noise_limit, screened
from bnprobe.stats.histogram import D_AXIS, R_AXIS, Axis
from bnprobe.stats.intervals import Sums, mean_interval
from bnprobe.stats.scores import independent_difference, paired_difference
from bnprobe.stats.theory import clipped_d_iid, clipped_r_iid, equivalent_batch_size, mismatch_iid, standing
from bnprobe.wording import given


@dataclass(frozen=True)
class Findings:
    """The part of a report that follows from the evidence alone."""

    summary: Summary
    layers: tuple[Layer, ...]
    skipped: tuple[SkippedLayer, ...]


def assemble(evidence: Evidence, settings: ScanSettings) -> Findings:
    """The figures and flags of every layer, and the summary.

    Raises:
        NonFiniteError: The input of a layer was NaN or Inf in training; names the first layer.
        NothingToProbeError: No BN layer was called.
    """
    _require_finite(evidence)
    called = by_layer(evidence.values)
    selected = evidence.layers.selected
    if not called.keys() & {layer.index for layer in selected}:
        raise NothingToProbeError(
            f"The forward pass called none of the BN layers (found: {len(selected)}). If the model is not called as"
            f" model(inputs), give {given('forward')}."
        )
    found = attribute(evidence)
    others = {size: beyond_noise(evidence, size) for size in evidence.batch_sizes}
    layers = tuple(
        _layer(evidence, layer, called[layer.index], settings, found.get(layer.index, Attribution()), others)
        for layer in selected
        if layer.index in called
    )
    silent = [_silent(layer, evidence) for layer in selected if layer.index not in called]
    functional = [SkippedLayer(place, "batch_norm", reason) for place, reason in sorted(evidence.functional)]
    skipped = (*evidence.layers.skipped, *silent, *functional)
    return Findings(_summary(evidence, settings, layers, skipped), layers, skipped)


def _summary(
    evidence: Evidence, settings: ScanSettings, layers: tuple[Layer, ...], skipped: tuple[SkippedLayer, ...]
) -> Summary:
    return Summary(
        layers=len(layers),
        flagged=sum(layer.flagged for layer in layers),
        undecided=sum(layer.undecided for layer in layers),
        skipped=len(skipped),
        output=evidence.output,
        shares=model_shares([layer.shares for layer in layers if layer.shares and layer.only_in != "train"]),
        gaps=tuple(_gaps(evidence, settings)),
    )


def _gaps(evidence: Evidence, settings: ScanSettings) -> Iterator[Gap]:
    """The steps in loss and metric from training to held-out data."""
    for measure in MEASURES:
        training, steady, inference = (evidence.scores.scores(measure, path) for path in ("train", "steady", "eval"))
        without_noise = training if evidence.steady is None else steady
        held_out = evidence.held_out.scores.scores(measure, "eval") if evidence.held_out else None
        if training is None or without_noise is None or inference is None:
            continue
        noise = paired_difference(without_noise, training, shared=True)
        inconsistency = paired_difference(inference, without_noise, shared=True)
        random = bool(evidence.repeat)
        generalization = None if held_out is None else independent_difference(held_out, inference, shared=random)
        yield Gap(
            measure=measure,
            training=training.mean,
            without_noise=without_noise.mean,
            inference=inference.mean,
            held_out=None if held_out is None else held_out.mean,
            training_noise=noise.mean,
            inconsistency=inconsistency.mean,
            generalization=None if generalization is None else generalization.mean,
            goal="min" if measure == "loss" else settings.goal,
            training_noise_interval=noise.interval if evidence.steady is not None else None,
            inconsistency_interval=inconsistency.interval,
            generalization_interval=None if generalization is None else generalization.interval,
            samples=inference.count,
            held_out_samples=None if held_out is None else held_out.count,
            goal_is_known=measure == "loss" or settings.goal_is_known,
        )


def _layer(
    evidence: Evidence,
    layer: ProbedLayer,
    slots: list[Slot],
    settings: ScanSettings,
    found: Attribution,
    others: Mapping[int, Mapping[int, float]],
) -> Layer:
    """``slots``: its calls; ``others``: by batch size and layer, what of its mismatch is no noise of i.i.d. batches."""
    train, eval_ = (_path(evidence, path, layer.index, slots) for path in (evidence.train, evidence.eval))
    threshold = settings.threshold_of(layer.name, *layer.aliases)
    only_in = _only_in(evidence, layer)
    noise = found.intervals.small_batch if found.intervals is not None else None
    if only_in == "train" and noise is not None:  # nothing uses its running statistics
        status = standing([noise], noise_limit(threshold))
    else:
        intervals = [path.interval for path in (train, eval_) if path is not None]
        status = screened(intervals, found.shares, found.composition, threshold)
    alike, overflows = evidence.normalizes_alike(layer.index), _overflows(evidence, slots)
    # What is behind a layer whose statistics are not finite is not at fault for being so, too.
    overflows = overflows and not _unusable(evidence)
    return Layer(
        name=layer.name,
        aliases=layer.aliases,
        kind=type(layer.module).__name__,
        channels=layer.info.channels,
        eps=layer.info.eps,
        momentum=layer.info.momentum,
        batches_tracked=layer.info.batches_tracked,
        calls_per_forward=len(slots),
        values_per_channel=evidence.values[slots[0]],
        running_statistics=layer.info.running_mean is not None,
        threshold=threshold,
        flagged=(status == "flagged" or overflows or layer.unusable is not None) and not alike,
        undecided=status == "undecided" and not overflows and not alike,
        note=_note(evidence, layer, slots),
        train=train,
        eval=eval_,
        calls=_calls(evidence, slots) if len(slots) > 1 else (),
        batch_sizes=tuple(_points(evidence, slots[0], threshold, others)),
        shares=found.shares,
        share_intervals=found.intervals,
        composition=found.composition,
        domains=found.domains,
        only_in=only_in,
    )


def _path(evidence: Evidence, path: PathEvidence, index: int, slots: list[Slot]) -> PathMeasurement | None:
    sums = evidence.layer(path, index)
    if sums is None or any(path.first_bad(slot) is not None for slot in slots):
        return None
    return _measurement(sums, path, slots, evidence.values[slots[0]] == 1)


def _measurement(sums: Sums, path: PathEvidence, slots: list[Slot], single: bool) -> PathMeasurement:
    """``single``: one value per channel, which is always normalized to 0; n_eq is then 1."""
    interval = mean_interval(sums)
    size = 1.0 if single else equivalent_batch_size(sums.mean)
    return PathMeasurement(
        mismatch=sums.mean,
        interval=interval,
        equivalent_batch_size=size,
        equivalent_batch_size_interval=(1.0, 1.0) if single else _size_interval(interval),
        r=_distribution(path.r(slots), R_AXIS, clipped_r_iid(size or math.inf)),
        d=_distribution(path.d(slots), D_AXIS, clipped_d_iid(size or math.inf)),
        statistics=path.reported(slots),
    )


def _size_interval(interval: Interval) -> Interval:
    low, high = interval
    lower = 1.0 if high is None else equivalent_batch_size(high)
    return (1.0 if lower is None else lower), equivalent_batch_size(low)


def _distribution(values: Values, axis: Axis, clipped_iid: float) -> Distribution:
    mean = values.total / values.count
    return Distribution(
        mean=mean,
        std=math.sqrt(max(values.square / values.count - mean * mean, 0.0)),
        min=values.low,
        max=values.high,
        quantiles=axis.quantiles(values.histogram, values.low, values.high),
        histogram=Histogram(axis.edges, axis.coarsen(values.histogram)),
        clipped=values.clipped / values.count,
        clipped_iid=clipped_iid,
    )


def _calls(evidence: Evidence, slots: list[Slot]) -> tuple[CallMeasurement, ...]:
    return tuple(
        CallMeasurement(
            index=slot[1],
            values_per_channel=evidence.values[slot],
            train=_call(evidence, evidence.train, slot),
            eval=_call(evidence, evidence.eval, slot),
        )
        for slot in slots
    )


def _call(evidence: Evidence, path: PathEvidence, slot: Slot) -> PathMeasurement | None:
    if slot not in path or path.first_bad(slot) is not None:
        return None
    return _measurement(path.mismatch(slot), path, [slot], evidence.values[slot] == 1)


def _points(
    evidence: Evidence, first: Slot, threshold: float, others: Mapping[int, Mapping[int, float]]
) -> Iterable[BatchSizePoint]:
    for size, path in evidence.batch_sizes.items():
        sums = path.layer(first[0])
        if sums and math.isfinite(sums.total):
            interval = mean_interval(sums)
            single = evidence.values[first] * size == evidence.batch_size
            n_eq = 1.0 if single else equivalent_batch_size(sums.mean)
            limit, other = mismatch_iid(threshold), others[size].get(first[0])
            if other is not None:
                limit = deciding_limit(sums.mean - other, other, threshold)
            yield BatchSizePoint(size, sums.count, sums.mean, interval, n_eq, limit)


def _only_in(evidence: Evidence, layer: ProbedLayer) -> Literal["train", "eval"] | None:
    """The mode in which the model runs a layer that it runs in one mode only."""
    in_training, at_inference = (layer.index in evidence.called[path] for path in ("train", "eval"))
    return None if in_training == at_inference else "train" if in_training else "eval"


_ONE_MODE = {
    "train": "runs in training only: nothing uses its running statistics, and it is judged by the noise of its batches",
    "eval": "runs at inference only: training does not update its running statistics",
}


def _note(evidence: Evidence, layer: ProbedLayer, slots: list[Slot]) -> str | None:
    if layer.info.running_mean is None:
        return "no running statistics (track_running_stats=False): uses batch statistics at inference too"
    if layer.unusable is not None:
        return f"{layer.unusable}: there is nothing to compare batches with"
    if layer.index in evidence.by_batch["eval"]:
        return "uses batch statistics in eval mode too, although it has running statistics"
    if evidence.is_frozen(layer.index):
        return f"{FROZEN}model.train() leaves it in eval mode, so both paths use the running statistics"
    if (mode := _only_in(evidence, layer)) is not None:
        return _ONE_MODE[mode]
    if _overflows(evidence, slots):
        if unusable := _unusable(evidence):
            return f"its input is not finite at inference, because of the running statistics of {listed(unusable)}"
        return "its input is NaN or Inf at inference: values overflow with the running statistics of earlier layers"
    note = layer.family.note(layer.info)
    if note is not None:
        return note
    if (sums := evidence.layer(evidence.eval, layer.index)) is not None and sums.heavy_tailed:
        return (
            "heavy tails: a few samples make up much of its mismatch, so how large that is at most cannot be told from"
            f" {sums.count} micro-batches; it is not called fine"
        )
    if evidence.values[slots[0]] == 1:
        return ONE_VALUE
    return None


def _silent(layer: ProbedLayer, evidence: Evidence) -> SkippedLayer:
    """A layer for which nothing was recorded."""
    kind = type(layer.module).__name__
    if layer.index in evidence.entered:
        functions = " or ".join(f"{each.__module__}.{each.__qualname__}" for each in layer.family.functionals)
        return SkippedLayer(layer.name, kind, f"its forward does not call {functions}")
    return SkippedLayer(layer.name, kind, "never called by the forward pass")


def _overflows(evidence: Evidence, slots: list[Slot]) -> bool:
    """Whether NaN or Inf reached the layer on the eval path."""
    return any(evidence.eval.first_bad(slot) is not None for slot in slots)


def _unusable(evidence: Evidence) -> list[str]:
    """The layers whose running statistics are NaN, Inf or negative."""
    return [layer.name for layer in evidence.layers.layers if layer.unusable is not None]


def _require_finite(evidence: Evidence) -> None:
    """The train path must be finite; an overflow on the eval path is a symptom, and a note says where it starts."""
    order = [slot for slot in evidence.values if slot in evidence.train]
    steps = {slot: step for slot in order if (step := evidence.train.first_bad(slot)) is not None}
    if not steps:
        return
    slot = next(slot for slot in steps if steps[slot] == min(steps.values()))
    layer = evidence.layers.layers[slot[0]]
    others = len({index for index, _ in steps} - {slot[0]})
    raise NonFiniteError(
        f"The input of {layer.name} ({type(layer.module).__name__}) contains NaN or Inf in train mode. It is the first"
        f" such layer in the order of the forward pass{f', of {others + 1}' if others else ''}."
        f" {_measured_before(evidence, order[: order.index(slot)])} Check what computes its input: weights that are not"
        " finite, an overflow in half precision, a division by zero."
    )


def _measured_before(evidence: Evidence, slots: list[Slot]) -> str:
    """What was measured in training of the layers before one whose input is not finite, a sentence."""
    found = {}
    for index in dict.fromkeys(index for index, _ in slots):
        sums = evidence.train.layer(index)
        if sums is not None and math.isfinite(sums.mean):
            found[evidence.layers.layers[index].name] = sums.mean
    if not found:
        return "No layer before it was measured."
    return f"Before it, in training: {listed([f'{name} (D = {number(mean)})' for name, mean in found.items()])}."
