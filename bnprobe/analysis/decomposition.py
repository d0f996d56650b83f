"""Where the mismatch of each layer comes from, by the ladder of reference statistics in ``stats.ladder``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from bnprobe.measure.evidence import Evidence, by_layer
from bnprobe.measure.forward_pass import Slot
from bnprobe.measure.path_evidence import AllCalls, PathEvidence
from bnprobe.records import Composition, Domains, Interval, ShareIntervals, Shares
from bnprobe.rules.composition import FEWEST_GROUPS
from bnprobe.stats import ladder
from bnprobe.stats.composition import analyse, draw, false_discovery_rates
from bnprobe.stats.intervals import JackknifeEstimate, jackknife_each
from bnprobe.stats.ladder import Means
from bnprobe.stats.segments import Segments

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

    Layers that correct their mismatch themselves are left out.
    """
    paths = [evidence.train, evidence.eval, *([evidence.steady] if evidence.steady else [])]
    others = [other.eval for other in (evidence.held_out, evidence.mixed) if other is not None]
    in_both = evidence.called["train"] & evidence.called["eval"]
    layers = by_layer(
        slot
        for slot in dict.fromkeys((*evidence.eval.calls, *evidence.train.calls))
        if (slot[0] not in in_both or (slot in evidence.train and slot in evidence.eval))
        and all(path.first_bad(slot) is None for path in paths)
    )
    compositions = _compositions(evidence, layers)
    found: dict[int, Attribution] = {}
    for indices, calls in evidence.side_by_side(layers, *paths, *others, evidence.eval.regroupable):
        parts = zip(indices, _shares(evidence, calls), _domains(evidence, calls), strict=True)
        found |= {index: Attribution(*shares, compositions.get(index), domains) for index, shares, domains in parts}
    return found


def beyond_noise(evidence: Evidence, size: int) -> dict[int, float]:
    """By layer, how much of D at another batch size is no noise of i.i.d. batches; without those it is not known of."""
    path, found = evidence.batch_sizes[size], dict[int, float]()
    for indices, calls in evidence.side_by_side(by_layer(path.calls)):
        sums, composed = path.together(calls), evidence.composed(calls, path).tolist()
        means = sums.means()
        values = torch.tensor([max(1, evidence.values[slot] * size // evidence.batch_size) for slot in calls[0]])
        known = ladder.settled(means, values, ladder.blend(means, values))
        wrong = ladder.mismatch(means, ladder.running(means)) - ladder.mismatch(means, known)
        estimates = jackknife_each(wrong, sums.counts)
        found |= {index: one.value + other for index, one, other in zip(indices, estimates, composed, strict=True)}
    return found


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


def _shares(evidence: Evidence, calls: AllCalls) -> Iterator[tuple[Shares | None, ShareIntervals | None]]:
    """The shares and their intervals; None where figures overflowed float64 on the eval path."""
    first = calls[0]
    values = torch.tensor([evidence.values[slot] for slot in first])
    sums = _decomposed(evidence, calls).together(calls)
    means = sums.means()
    paths = [path.together(calls).means() for path in (evidence.train, evidence.steady) if path and first[0] in path]
    paths = [*(paths or [means]), means]
    rungs, way, nearest = _rungs(means, paths, values)
    if len(paths) == 2:
        rungs.insert(2, rungs[1])  # nothing random
    alone = evidence.batch_size == 1  # one sample per batch has no composition
    drawn = None if alone else _drawn(evidence, calls, means, sums.counts)
    mixed = None if drawn is not None else _mixed(evidence, calls)
    if drawn is not None:
        rungs.append(ladder.mismatch_drawn(means, drawn, values, way))
    else:
        rungs.append(rungs[-1] if mixed is None else ladder.mismatch(mixed, ladder.settled(mixed, values, way)))
    known = alone or drawn is not None or mixed is not None or evidence.random_order
    estimates, shifts = _estimates(evidence, rungs, sums.counts, drawn), _data_shift(evidence, calls)
    for slot, start, found, (shift, shift_interval) in zip(first, nearest.tolist(), estimates, shifts, strict=True):
        heavy = _heavy_tailed(evidence, slot)
        lag, dropout, propagation, composition, small_batch = (replace(each, open=heavy) for each in found)
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
            dropout=None if evidence.steady is None or start > 0 else dropout.interval(),
            propagation=None if start == len(paths) - 1 else propagation.interval(),
            data_shift=shift_interval,
        )
        finite = all(math.isfinite(value) for value in vars(shares).values() if value is not None)
        yield (shares, intervals) if finite else (None, None)


def _estimates(
    evidence: Evidence, rungs: list[Tensor], counts: Tensor, drawn: ladder.Regrouped | None
) -> Iterator[list[JackknifeEstimate]]:
    """For each layer each rung's difference to the next, and the last rung itself: bias-corrected, with variances.

    Where the data set is finite (docs/decisions/0030), the bias and the variance that come from which samples were
    drawn shrink with the part that was measured. What comes from how samples fell into micro-batches, and from what
    random layers drew, does not: all of the variance of composition and dropout, a part of that of the others.
    """
    sampled = evidence.sampled
    kept = min(NON_LINEAR / evidence.batch_size, 1.0)
    steps = [one - other for one, other in itertools.pairwise(rungs)]
    found = zip(*(jackknife_each(each, counts) for each in (*steps, rungs[0] - rungs[2], rungs[-1])), strict=True)
    noise = [] if drawn is None else [each.tolist() for each in (drawn.chance, drawn.excess, drawn.pooled)]
    for layer, (lag, dropout, propagation, composition, settled, small_batch) in enumerate(found):
        bias = settled.of_finite_data(sampled).bias - dropout.bias
        lag = replace(lag.of_finite_data(sampled, kept), value=lag.value + lag.bias - bias, bias=bias)
        lag = lag.with_noise(sampled * dropout.variance)
        composition = composition.of_finite_data(sampled, 1.0)
        if drawn is None:
            small_batch = small_batch.of_finite_data(sampled, 1.0)
        else:
            chance, excess, pooled = (each[layer] for each in noise)
            composition = composition.with_noise(chance)
            small_batch = small_batch.with_noise(0.0, excess).of_finite_data(sampled, max(kept, 1 - pooled))
            small_batch = small_batch.with_noise(chance)
        yield [lag, dropout, propagation.of_finite_data(sampled, kept), composition, small_batch]


def _rungs(means: Means, paths: list[Means], values: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """D against the running statistics, and against the settled ones of each path.

    Paths before the one that is nearest to the running statistics count as that one.

    Returns:
        D and the blend of that path, each of shape (estimates, layers); and for each layer the position of that path.
    """
    each = torch.arange(len(values))
    nearest, least = torch.zeros_like(each), torch.full(each.shape, math.inf, dtype=torch.float64)
    for position, path in enumerate(path.whole() for path in paths):
        [distance] = ladder.distance(path, ladder.settled(path, values, ladder.blend(path, values)))
        nearest, least = torch.where(distance < least, position, nearest), torch.fmin(distance, least)
    way = torch.stack([ladder.blend(path, values) for path in paths])[nearest, :, each].T
    found = torch.stack([ladder.mismatch(means, ladder.settled(path, values, way)) for path in paths])
    settled = [found[nearest.clamp(min=position), :, each].T for position in range(len(paths))]
    return [ladder.mismatch(means, ladder.running(means)), *settled], way, nearest


def _decomposed(evidence: Evidence, calls: AllCalls) -> PathEvidence:
    """The path whose mismatch is decomposed: the eval path, where the layers run there."""
    return evidence.eval if calls[0][0] in evidence.eval else evidence.train


def _heavy_tailed(evidence: Evidence, slot: Slot) -> bool:
    """Whether a few samples make up much of a layer's mismatch: figures may be far larger than they look."""
    sums = evidence.eval.layer(slot[0])  # also where all was read: which samples met matters as much
    return sums is not None and sums.heavy_tailed


def _drawn(evidence: Evidence, calls: AllCalls, means: Means, counts: Tensor) -> ladder.Regrouped | None:
    """Micro-batches drawn at random from the samples of all calls; None where these are not known."""
    # A scan that went over to real micro-batches midway knows the samples of the first ones only.
    if not evidence.batching.emulation.trusted or not _is_known(calls, evidence.eval.regroupable):
        return None
    pool = evidence.eval.pool(calls)
    if pool.mean.shape[0] < FEWEST_GROUPS * evidence.batch_size:
        return None
    squares = reduce(add, map(evidence.eval.sample_squares, calls))
    return draw(means, counts, squares, pool, evidence.batch_size, 0, evidence.population or math.inf)


def _is_known(calls: AllCalls, known: Container[Slot]) -> bool:
    """Whether something is known of all calls of the layers."""
    return all(slots[0] in known for slots in calls)


def _mixed(evidence: Evidence, calls: AllCalls) -> Means | None:
    """What batches drawn at random gave for the calls of layers; None where none were measured."""
    if evidence.mixed is None or not _is_known(calls, evidence.mixed.eval):
        return None
    return evidence.mixed.eval.together(calls).means()


def _data_shift(evidence: Evidence, calls: AllCalls) -> Iterator[tuple[float | None, Interval | None]]:
    """The held-out data as one batch against the training data, on the eval path."""
    if evidence.held_out is None or not _is_known(calls, evidence.held_out.eval):
        yield from [(None, None)] * len(calls[0])
        return
    few = evidence.eval.batches < BATCHES_FOR_SHIFT and _is_known(calls, evidence.eval.regroupable)
    training = evidence.eval.by_sample(calls) if few else evidence.eval.together(calls)
    shifts = ladder.shift(evidence.held_out.eval.together(calls), training)
    for slot, estimate in zip(calls[0], shifts, strict=True):
        heavy = _heavy_tailed(evidence, slot) or _heavy_tailed(evidence.held_out, slot)
        yield max(estimate.value, 0.0), replace(estimate, open=heavy).interval()


def _compositions(evidence: Evidence, layers: Mapping[int, Sequence[Slot]]) -> dict[int, Composition]:
    """By layer, from an analysis of variance of each call; p-values are corrected for all channels of all layers."""
    size, path = evidence.batch_size, evidence.eval
    known = evidence.batching.emulation.trusted and path.regroupable
    if size < 2 or path.batches < 2 or not known:
        return {}
    layers = {index: slots for index, slots in layers.items() if slots[0] in path}
    order, sizes, p_values, correlations = list[Slot](), list[Tensor](), list[Tensor](), list[float]()
    for _, calls in evidence.side_by_side(layers):
        for slots in calls:
            sums = path.moments(slots)
            found = analyse(sums, path.sample_squares(slots), size)
            order += slots
            sizes.append(sums.segments.sizes)
            p_values.append(found.p_value)
            correlations += sums.segments.mean(found.intraclass_correlation).tolist()
    if not order:
        return {}
    least = Segments(torch.cat(sizes)).least(false_discovery_rates(torch.cat(p_values))).tolist()
    by_layer: dict[int, list[tuple[float, float]]] = {}
    for slot, correlation, smallest in zip(order, correlations, least, strict=True):
        by_layer.setdefault(slot[0], []).append((correlation, smallest))
    compositions = {}
    for index, found_of in by_layer.items():
        correlation = sum(each for each, _ in found_of) / len(found_of)
        compositions[index] = Composition(correlation, 1 + (size - 1) * correlation, min(each for _, each in found_of))
    return compositions


def _domains(evidence: Evidence, calls: AllCalls) -> Iterator[Domains | None]:
    """How far the data of a layer's separate calls differs from that of all calls together."""
    if len(calls) < 2:
        yield from [None] * len(calls[0])
        return
    path = _decomposed(evidence, calls)
    together = path.together(calls).means()
    distances = [ladder.shift_between(path.moments(slots).means(), together) for slots in calls]
    estimates = jackknife_each(reduce(add, distances) / len(calls), path.moments(calls[0]).counts)
    for slot, estimate in zip(calls[0], estimates, strict=True):
        estimate = replace(estimate, open=_heavy_tailed(evidence, slot))
        yield Domains(max(estimate.value, 0.0), estimate.interval())
