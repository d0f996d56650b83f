"""BN103: running statistics that are no statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.wording import count


class NonFinite(Rule):
    """Running statistics that hold NaN, Inf or a negative variance.

    What:
        The number of values of running_mean and running_var that are NaN or Inf, or variances below 0; the limit is 0.

    Why:
        One overflowing activation in training makes a running average NaN or Inf, and no later batch takes that back:
        the average of anything with NaN is NaN. Training goes on, since it normalizes with the batch; inference gives
        NaN from this layer on.

    Example:
        Loss in float16 is skipped once by the gradient scaler and recovers, but the evaluation loss is NaN from that
        epoch on.

    Remedy:
        Take the running statistics anew (`bnprobe recalibrate`), or load an earlier checkpoint. Then find what
        overflowed.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d (update rule of the running statistics). Micikevicius et al.
        2018, arXiv 1710.03740, section 3 (overflow in float16).
    """

    code = "BN103"
    title = "statistics not finite"
    cause = "non_finite"
    severity = "error"
    unit = "values"
    finding = "the running statistics hold NaN, Inf or negative variances"
    remedy = "Reset the running statistics (reset_running_stats()) and take them anew, or load an earlier checkpoint."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer)

    def _judge(self, layer: Anatomy) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer keeps no running statistics")
        bad = layer.non_finite + layer.negative
        if not bad:
            return self.passed(layer.name, "All running statistics are finite.", 0.0, 0.0)
        return self.failed(layer.name, f"{_message(layer)}, of {count(layer.channels, 'channel')}.", float(bad), 0.0)


def _message(layer: Anatomy) -> str:
    parts = []
    if layer.non_finite:
        parts.append(f"{count(layer.non_finite, 'value')} of NaN or Inf")
    if layer.negative:
        parts.append(f"{count(layer.negative, 'variance')} below 0")
    return f"Its running statistics hold {' and '.join(parts)}"
