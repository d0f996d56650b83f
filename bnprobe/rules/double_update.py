"""BN301: running statistics updated more than once per step."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Layer, Updates, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule

ROUNDING = 0.05
"""Updates are counted, so more than a few percent too many is not rounding."""

RATE_FACTOR = 1.3
"""A rate is estimated from how far the statistics moved; within 30% the estimate itself may be off."""


def has_extra_updates(layer: Layer) -> bool:
    """Whether a training step updates the statistics more often than one forward pass calls the layer."""
    return layer.updates is not None and layer.updates.per_step > layer.calls_per_forward * (1 + ROUNDING)


class DoubleUpdate(MeasuredRule):
    """The running statistics are updated more often than once per training step.

    What:
        In real training steps: the number of updates of the running statistics per step, against the number of calls
        in one forward pass; and the weight that a step gave to its batch, against the weight that momentum implies.

    Why:
        Activation checkpointing repeats the forward pass in backward, and each pass in train mode updates the running
        statistics. The effective rate is then 1 - (1 - momentum)^2, nearly double: the average is noisier than
        intended, and differs between runs with and without checkpointing. A second forward pass in the step (a penalty
        term, a teacher, logging) does the same, perhaps with other data.

    Example:
        num_batches_tracked is twice the number of steps; evaluation results change when checkpointing is switched on.

    Remedy:
        With checkpointing, use 1 - sqrt(1 - momentum) as momentum, or exclude BN layers from the checkpointed segment.
        Run other forward passes in eval mode or with frozen statistics. With gradient accumulation, several updates per
        step are expected.

    Reference:
        Chen et al. 2016, arXiv 1604.06174 (recomputation). PyTorch documentation of torch.utils.checkpoint.
    """

    code = "BN301"
    title = "extra updates per training step"
    cause = "double_update"
    severity = "warning"
    unit = "updates per step"
    needs = "training steps"
    finding = (
        "the running statistics are updated more than once per training step (checkpointing, a second forward pass?)"
    )
    remedy = (
        "Exclude BN layers from checkpointed segments or use 1 - sqrt(1 - momentum); run other forward passes of the"
        " step in eval mode."
    )
    upstream_order = 40

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        updates, expected = layer.updates, float(layer.calls_per_forward)
        if updates is None:
            return self.skipped(layer.name, "its updates were not recorded")
        rate = _expected_rate(updates, expected)
        often = has_extra_updates(layer)
        fast = rate is not None and updates.rate is not None and updates.rate > RATE_FACTOR * rate
        message = f"Updates per training step: {number(updates.per_step)}, expected {number(expected)}"
        if rate is not None and updates.rate is not None:
            message += f"; weight of a step: {number(updates.rate)}, expected from momentum {number(rate)}"
        if not (often or fast):
            return self.passed(layer.name, f"{message}.", updates.per_step, expected)
        severity = "error" if layer.flagged else self.severity
        return self.failed(layer.name, f"{message}.", updates.per_step, expected, severity)


def _expected_rate(updates: Updates, calls: float) -> float | None:
    """The weight that the calls of one forward pass give to its batch; None where momentum does not say."""
    return None if updates.configured is None else 1.0 - (1.0 - updates.configured) ** calls
