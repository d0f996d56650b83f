"""How well the running statistics would track at other rates of their average: recorded batch statistics, replayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnprobe.errors import UsageError
from bnprobe.measure.momentum_series import LayerSeries, Recording
from bnprobe.records import BestRates, MomentumCurve, MomentumPoint, MomentumSweep, SkippedLayer, Tracking
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
from bnprobe.wording import either, option

DEFAULT_RATES: tuple[Rate, ...] = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)


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


def check_plan(plan: MomentumPlan) -> None:
    """Reject rates and changes of the data that are out of range.

    Raises:
        UsageError: A value is out of range; the message names it.
    """
    bad = [rate for rate in plan.rates if rate is not None and not 0 < rate <= 1]
    if bad:
        raise UsageError(
            f"{option('--momentum')} {bad[0]:g} is out of range. It is the weight of the new batch, as in PyTorch: give"
            " numbers above 0 and up to 1 (TensorFlow's 0.99 is 0.01 here), or"
            f" {either('the word cumulative', 'None for the cumulative average')}."
        )
    if not plan.rates:
        raise UsageError(f"{option('--momentum')} needs at least one rate, e.g. {either('0.1,0.01', '[0.1, 0.01]')}.")
    if not 0 < plan.scale < float("inf"):
        raise UsageError(
            f"{option('--scale')} {plan.scale:g} is out of range: it multiplies standard deviations; give a"
            " number above 0."
        )
    if plan.shift is not None and not abs(plan.shift) < float("inf"):
        raise UsageError(
            f"{option('--shift')} {plan.shift:g} is not a finite number: give a number of standard deviations."
        )


def momentum_sweep(recording: Recording, plan: MomentumPlan, batch_size: int) -> MomentumSweep:
    """Replay every rate on every layer, and find the one that tracks best.

    Raises:
        UsageError: No layer has running statistics that training updates.
    """
    if not recording.series:
        reason = f": {recording.omitted[0][1]}" if recording.omitted else ", but no layer is selected"
        raise UsageError(
            f"{option('--momentum')} needs a layer whose running statistics are updated in training{reason}."
        )
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
