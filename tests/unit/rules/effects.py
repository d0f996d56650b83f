"""Losses and metrics as the tests of rules need them."""

from __future__ import annotations

from bnprobe.records import Chance, ChanceValues, Estimate, FreeRemedy, Gap, Remedy, Score


def metric(training: float, inference: float, width: float = 0.01) -> Gap:
    """A metric of which larger is better, in training and at inference."""
    change = inference - training
    interval = (change - width, change + width)
    return Gap("metric", training, training, inference, None, 0.0, change, None, "max", None, interval, None, 256)


def loss(training: float, inference: float, width: float = 0.01) -> Gap:
    """A loss in training and at inference."""
    change = inference - training
    interval = (change - width, change + width)
    return Gap("loss", training, training, inference, None, 0.0, change, None, "min", None, interval, None, 256)


def tried(before: float, after: float, name: FreeRemedy = "recalibrated", width: float = 0.01) -> Remedy:
    """A remedy without training that changes a metric, of which larger is better."""
    change = Estimate(after - before, (after - before - width, after - before + width))
    blend = {"instance statistics": 1.0, "instance renorm": 0.5, "example weighing": 0.25}.get(name)
    return Remedy(name, (), Score(None, before), Score(None, after), None, 256, "", None, change, blend=blend)


def chance(training: tuple[float, float], inference: tuple[float, float], measure: str = "loss") -> Chance:
    """Own and other outputs in both modes."""
    return Chance(measure, _values(*training), _values(*inference))  # type: ignore[arg-type]


def _values(own: float, other: float) -> ChanceValues:
    change = own - other
    return ChanceValues(own, other, Estimate(change, (change - 0.01, change + 0.01)))
