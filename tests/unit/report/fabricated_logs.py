"""Logs of training, made up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from bnprobe.records import LayerSample, ModeLoss, MonitorChange, MonitorFinding, MonitorLog, MonitorSample
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid

EVERY = 100
BEGUN = MonitorLog("run/monitor.jsonl", "0.1.0", "ResNet", EVERY)


def layer(n_eq: float | None) -> LayerSample:
    """A layer of this n_eq; NaN: its D is not finite."""
    mismatch = 0.0 if n_eq is None else n_eq if math.isnan(n_eq) else mismatch_iid(n_eq)
    known = None if math.isnan(mismatch) else equivalent_batch_size(mismatch)
    return LayerSample(mismatch, known, 0.95, 0.1)


def sample(step: int, n_eqs: list[float | None], loss: ModeLoss | None = None) -> MonitorSample:
    """A sample of so many layers."""
    layers = {f"layer{number}.bn": layer(n_eq) for number, n_eq in enumerate(n_eqs, start=1)}
    return MonitorSample(step, 32, 0.2, loss, layers)


def course(layers: int, samples: int) -> tuple[MonitorSample, ...]:
    """From the middle on the last layer is worse by far, and the loss in eval mode."""

    def one(number: int) -> MonitorSample:
        late = number > samples // 2
        n_eqs: list[float | None] = [40.0 + 10 * place for place in range(layers)]
        n_eqs[-1] = 4.0 if late else 40.0
        train = 2.0 / number
        return sample(EVERY * number, n_eqs, ModeLoss(train, train + 1.5 * late))

    return tuple(one(number) for number in range(1, samples + 1))


LAG = MonitorFinding(
    step=1316,
    alarm=1300,
    rule="BN203",
    cause="lag",
    severity="error",
    layers=("layer7.bn",),
    message="The running statistics lag behind.",
    remedy="Raise the momentum.",
)
SMALL = MonitorFinding(416, 400, "BN201", "small_batch", "warning", ("layer1.bn",), "Too few values.", "Use more.")


def found() -> MonitorLog:
    """Two rules in seven layers, one of them three times; a layer was changed and is so still, another no more."""
    findings = (SMALL, LAG, replace(LAG, step=1616, alarm=1600), replace(LAG, step=2216, message="It still lags."))
    changes = (
        MonitorChange(416, "renorm", ("layer1.bn", "layer2.bn")),
        MonitorChange(900, "undo", ("layer1.bn",)),
        MonitorChange(2216, "recalibrate", ("layer7.bn",)),
    )
    return replace(
        BEGUN,
        step=1000,
        skipped={"neck.bn": "it is frozen", "head.bn": "it is frozen"},
        taken=24,
        samples=course(7, 24),
        findings=findings,
        changes=changes,
        unreadable=1,
    )


def healthy() -> MonitorLog:
    """Nothing in three layers."""
    return replace(
        BEGUN,
        taken=12,
        samples=tuple(replace(each, layers=dict(list(each.layers.items())[:3])) for each in course(5, 12)),
    )


def held() -> MonitorLog:
    """A layer in eval mode from the middle on, and a finding without layers."""
    shift = MonitorFinding(
        600, 600, "inputs", "input_shift", "warning", (), "Batches are not like those before.", "Mix."
    )
    samples = course(2, 12)
    late = [
        replace(each, layers={**each.layers, "layer2.bn": replace(each.layers["layer2.bn"], frozen=True)})
        for each in samples[6:]
    ]
    return replace(BEGUN, taken=12, samples=(*samples[:6], *late), findings=(shift,))


def odd() -> MonitorLog:
    """No loss, outputs and layers that are not finite, a layer without mismatch, one that is not always there."""
    samples = (
        sample(100, [math.nan, None, 8.0]),
        replace(sample(200, [math.nan, None]), output=None),
        sample(300, [math.nan, None, 9.0], ModeLoss(0.5, math.nan)),
    )
    return replace(BEGUN, taken=3, samples=samples)


LOGS: dict[str, Callable[[], MonitorLog]] = {
    "found": found,
    "healthy": healthy,
    "held": held,
    "odd": odd,
    "begun": lambda: BEGUN,
    "empty": lambda: MonitorLog("run/monitor.jsonl"),
}
"""By name."""
