"""Where the mismatch of each layer comes from, by the ladder of reference statistics in ``stats.ladder``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from bnprobe.measure.evidence import Evidence, PathEvidence
from bnprobe.measure.forward_pass import Slot
from bnprobe.records import Composition, Domains, Interval, ShareIntervals, Shares
from bnprobe.rules.composition import FEWEST_GROUPS
from bnprobe.stats import ladder
from bnprobe.stats.composition import Images, analyse, draw, false_discovery_rates
from bnprobe.stats.intervals import JackknifeEstimate, jackknife
from bnprobe.stats.ladder import BatchSums, Means

NON_LINEAR = 2.0
"""This over the batch size is the part of the variance of settled statistics that stays where all of the data was read.

A batch statistic is a sum over its samples, which in the end is the same for every order of the data, and products of
them, which are not; their variance is that of the sum over the batch size, times 0.1 to 3 in simulations.
"""

BATCHES_FOR_SHIFT = 8
"""With fewer micro-batches of training data, data shift is measured from their samples, where these are told apart."""


@dataclass(frozen=True)
class Attribution:
    """The decomposition of one layer's mismatch, as far as it is known."""

    shares: Shares | None = None
    intervals: ShareIntervals | None = None
    composition: Composition | None = None
    domains: Domains | None = None


def attribute(evidence: Evidence) -> dict[int, Attribution]:
    """Decompose the eval-path mismatch of every layer; of one that runs in training only, that of the train path.

    Layers that correct their mismatch themselves are left out: what remains after their limits is not a quadratic form
    in the running statistics.
    """
    calls: dict[int, list[Slot]] = {}
    paths = [evidence.train, evidence.eval, *([evidence.steady] if evidence.steady else [])]
    in_both = evidence.called["train"] & evidence.called["eval"]
    for slot in dict.fromkeys((*evidence.eval.calls, *evidence.train.calls)):
        if evidence.layers.layers[slot[0]].info.corrects:
            continue
        comparable = slot[0] not in in_both or (slot in evidence.train and slot in evidence.eval)
        if comparable and all(path.first_bad(slot) is None for path in paths):
            calls.setdefault(slot[0], []).append(slot)
    # A scan that went over to real micro-batches midway knows the samples of the first ones only.
    pool = evidence.eval.pool() if evidence.batching.emulation.trusted else {}
    compositions = _compositions(evidence, calls) if pool else {}
    return {
        index: Attribution(*_shares(evidence, slots, pool), compositions.get(index), _domains(evidence, slots))
        for index, slots in calls.items()
    }


def beyond_noise(evidence: Evidence, index: int, size: int) -> float | None:
    """How much of a layer's D at another batch size is no noise of i.i.d. batches; None where it is not known."""
    path = evidence.batch_sizes[size]
    slots = [slot for slot in path.calls if slot[0] == index]
    if not slots or evidence.layers.layers[index].info.corrects:
        return None
    sums, values = _together(path, slots), max(1, evidence.values[slots[0]] * size // evidence.batch_size)
    means = sums.means()
    known = ladder.settled(means, values, ladder.blend(means, values))
    wrong = ladder.mismatch(means, ladder.running(means)) - ladder.mismatch(means, known)
    return jackknife(wrong, sums.counts).value + evidence.composed(slots, path)


def model_shares(layers: Sequence[Shares]) -> Shares | None:
    """Mean over layers; None for a share that is None in some layer."""
    if not layers:
        return None
    return Shares(
        small_batch=sum(shares.small_batch for shares in layers) / len(layers),
        composition=_mean([shares.composition for shares in layers]),
        lag=sum(shares.lag for shares in layers) / len(layers),
        dropout=sum(shares.dropout for shares in layers) / len(layers),
        propagation=sum(shares.propagation for shares in layers) / len(layers),
        data_shift=_mean([shares.data_shift for shares in layers]),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _shares(
    evidence: Evidence, slots: list[Slot], pool: Mapping[Slot, Images]
) -> tuple[Shares | None, ShareIntervals | None]:
    """The shares and their intervals; None where figures overflowed float64 on the eval path."""
    sums = _together(_decomposed(evidence, slots), slots)
    values = evidence.values[slots[0]]
    means, counts = sums.means(), sums.counts
    train = _together(evidence.train, slots).means() if slots[0] in evidence.train else means
    steady = train
    if evidence.steady is not None and slots[0] in evidence.steady:
        steady = _together(evidence.steady, slots).means()
    way, references, nearest = _references([train, steady, means], values)
    rungs = [ladder.mismatch(means, reference) for reference in (ladder.running(means), *references)]
    alone = evidence.batch_size == 1  # one sample per batch has no composition
    drawn = None if alone else _drawn(evidence, slots, pool, means, counts)
    mixed = None if drawn is not None else _mixed(evidence, slots)
    if drawn is not None:
        floor = ladder.mismatch_drawn(means, drawn, values, way)
    else:
        floor = rungs[-1] if mixed is None else ladder.mismatch(mixed, ladder.settled(mixed, values, way))
    rungs.append(floor)
    heavy = _heavy_tailed(evidence, slots)
    lag, dropout, propagation, composition, small_batch = (
        replace(estimate, open=heavy) for estimate in _estimates(evidence, rungs, counts, drawn)
    )
    shift, shift_interval = _data_shift(evidence, slots)
    known = alone or drawn is not None or mixed is not None or evidence.random_order
    shares = Shares(
        small_batch=small_batch.value,
        composition=composition.value if known else None,
        lag=lag.value,
        dropout=dropout.value,
        propagation=propagation.value,
        data_shift=shift,
    )
    intervals = ShareIntervals(
        small_batch=small_batch.interval(),
        # with heavy tails either end may be wrong
        composition=None if (drawn is None and mixed is None) or heavy else composition.interval(),
        lag=lag.interval(),
        dropout=None if evidence.steady is None or nearest > 0 else dropout.interval(),
        propagation=None if nearest > 1 else propagation.interval(),
        data_shift=shift_interval,
    )
    finite = all(math.isfinite(value) for value in asdict(shares).values() if value is not None)
    return (shares, intervals) if finite else (None, None)


def _estimates(
    evidence: Evidence, rungs: list[Tensor], counts: Tensor, drawn: ladder.Regrouped | None
) -> list[JackknifeEstimate]:
    """Each rung's difference to the next, and the last rung itself: bias-corrected, with variances.

    Where the data set is finite (docs/decisions/0030), the bias and the variance that come from which samples were
    drawn shrink with the part that was measured. What comes from how samples fell into micro-batches, and from what
    random layers drew, does not: all of the variance of composition and dropout, a part of that of the others.
    """
    sampled = evidence.sampled
    kept = min(NON_LINEAR / evidence.batch_size, 1.0)
    lag, dropout, propagation, composition = (
        jackknife(one - other, counts) for one, other in itertools.pairwise(rungs)
    )
    settled = jackknife(rungs[0] - rungs[2], counts).of_finite_data(sampled)
    bias = settled.bias - dropout.bias
    lag = replace(lag.of_finite_data(sampled, kept), value=lag.value + lag.bias - bias, bias=bias)
    lag = lag.with_noise(sampled * dropout.variance)
    small_batch = jackknife(rungs[-1], counts)
    composition = composition.of_finite_data(sampled, 1.0)
    if drawn is None:
        small_batch = small_batch.of_finite_data(sampled, 1.0)
    else:
        composition = composition.with_noise(drawn.chance)
        small_batch = small_batch.with_noise(0.0, drawn.excess).of_finite_data(sampled, max(kept, 1 - drawn.pooled))
        small_batch = small_batch.with_noise(drawn.chance)
    return [lag, dropout, propagation.of_finite_data(sampled, kept), composition, small_batch]


def _references(paths: list[Means], values: int) -> tuple[Tensor, list[ladder.Reference], int]:
    """Settled statistics of each path, starting with the one that is nearest to the running statistics.

    Returns:
        The blend, the statistics, and the position of that path.
    """
    ways = [ladder.blend(path, values) for path in paths]
    distances = [ladder.distance(ladder.settled(path, values, way)) for path, way in zip(paths, ways, strict=True)]
    nearest = distances.index(min(distances))
    taken = [paths[max(position, nearest)] for position in range(len(paths))]
    return ways[nearest], [ladder.settled(path, values, ways[nearest]) for path in taken], nearest


def _decomposed(evidence: Evidence, slots: list[Slot]) -> PathEvidence:
    """The path whose mismatch is decomposed: the eval path, where the layer runs there."""
    return evidence.eval if slots[0] in evidence.eval else evidence.train


def _together(path: PathEvidence, slots: list[Slot]) -> BatchSums:
    """The sums of all calls of a layer, which share its running statistics."""
    return reduce(add, (path.moments(slot) for slot in slots if slot in path))


def _heavy_tailed(evidence: Evidence, slots: list[Slot]) -> bool:
    """Whether a few samples make up much of the layer's mismatch: figures may be far larger than they look."""
    sums = evidence.eval.layer(slots[0][0])  # also where all was read: which samples met matters as much
    return sums is not None and sums.heavy_tailed


def _drawn(
    evidence: Evidence, slots: list[Slot], pool: Mapping[Slot, Images], means: Means, counts: Tensor
) -> ladder.Regrouped | None:
    """Micro-batches drawn at random from the samples of all calls; None where these are not known."""
    pools = [pool[slot] for slot in slots if slot in pool]
    if len(pools) < len(slots):
        return None
    images = Images(*(torch.cat([getattr(pool, name) for pool in pools]) for name in ("mean", "variance", "replicate")))
    if images.mean.shape[0] < FEWEST_GROUPS * evidence.batch_size:
        return None
    squares = sum((evidence.eval.sample_squares(slot) for slot in slots), start=torch.zeros(()))
    return draw(means, counts, squares, images, evidence.batch_size, 0, evidence.population or math.inf)


def _mixed(evidence: Evidence, slots: list[Slot]) -> Means | None:
    """What batches drawn at random gave for the calls of a layer; None where none were measured."""
    if evidence.mixed is None or any(slot not in evidence.mixed.eval for slot in slots):
        return None
    return _together(evidence.mixed.eval, slots).means()


def _data_shift(evidence: Evidence, slots: list[Slot]) -> tuple[float | None, Interval | None]:
    """The held-out data as one batch against the training data, on the eval path."""
    if evidence.held_out is None or any(slot not in evidence.held_out.eval for slot in slots):
        return None, None
    training = _together(evidence.eval, slots)
    if evidence.eval.batches < BATCHES_FOR_SHIFT:
        training = evidence.eval.by_sample(slots) or training
    estimate = ladder.shift(_together(evidence.held_out.eval, slots), training)
    heavy = _heavy_tailed(evidence, slots) or _heavy_tailed(evidence.held_out, slots)
    return max(estimate.value, 0.0), replace(estimate, open=heavy).interval()


def _compositions(evidence: Evidence, calls: dict[int, list[Slot]]) -> dict[int, Composition]:
    """By layer, from an analysis of variance of each call; p-values are corrected for all channels of all layers."""
    if evidence.batch_size < 2 or evidence.eval.batches < 2:
        return {}
    size, path = evidence.batch_size, evidence.eval
    calls = {index: slots for index, slots in calls.items() if slots[0] in path}
    found = {
        slot: analyse(path.moments(slot), path.sample_squares(slot), size) for slots in calls.values() for slot in slots
    }
    if not found:
        return {}
    every = torch.cat([variance.p_value for variance in found.values()])
    corrected = false_discovery_rates(every)
    p_values = dict(zip(found, corrected.split([len(one.p_value) for one in found.values()]), strict=True))
    compositions = {}
    for index, slots in calls.items():
        correlation = float(torch.cat([found[slot].intraclass_correlation for slot in slots]).mean())
        smallest = min(float(p_values[slot].min()) for slot in slots)
        compositions[index] = Composition(correlation, 1 + (size - 1) * correlation, smallest)
    return compositions


def _domains(evidence: Evidence, slots: list[Slot]) -> Domains | None:
    """How far the data of a layer's separate calls differs from that of all calls together."""
    if len(slots) < 2:
        return None
    path = _decomposed(evidence, slots)
    sums = [path.moments(slot) for slot in slots]
    together = _together(path, slots).means()
    distances = [ladder.shift_between(part.means(), together) for part in sums]
    estimate = jackknife(torch.stack(distances).mean(0), sums[0].counts)
    estimate = replace(estimate, open=_heavy_tailed(evidence, slots))
    return Domains(max(estimate.value, 0.0), estimate.interval())
