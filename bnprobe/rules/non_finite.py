"""BN103: running statistics that are not finite."""

from __future__ import annotations

from bnprobe.numbers import count
from bnprobe.records import Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule


class NonFinite(AnatomyRule):
    """The running statistics contain NaN, Inf or a negative variance.

    What:
        The number of values of running_mean and running_var that are NaN or Inf, or variances below 0; the limit is 0.

    Why:
        One overflowing activation in training makes the running average NaN or Inf, and it stays so: no later batch can
        correct it. Training continues, since it normalizes with batch statistics; at inference the outputs are NaN from
        this layer on.

    Example:
        In float16 training, the gradient scaler skips one step with an overflow and the training loss recovers. The
        validation loss is NaN from that epoch on.

    Remedy:
        Recalibrate the running statistics (`bnprobe recalibrate`), or load an earlier checkpoint. Then find what
        overflowed.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d (update rule of the running statistics). Micikevicius et al.
        2018, arXiv 1710.03740, section 3 (overflow in float16).
    """

    code = "BN103"
    title = "non-finite running statistics"
    cause = "non_finite"
    severity = "error"
    unit = "values"
    finding = "the running statistics contain NaN, Inf or negative variances"
    remedy = (
        "Recalibrate the running statistics on training data (bnprobe recalibrate), or load an earlier checkpoint; then"
        " find what overflowed."
    )
    stops_training = True
    upstream_order = 10
    commands = ("recalibrate",)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.without_statistics(layer)
        bad = layer.non_finite + layer.negative
        if not bad:
            return self.passed(layer.name, "All running statistics are finite.", 0.0, 0.0)
        return self.failed(layer.name, _message(layer), float(bad), 0.0)


def _message(layer: Anatomy) -> str:
    parts = []
    if layer.non_finite:
        parts.append(f"{count(layer.non_finite, 'NaN or Inf value')}")
    if layer.negative:
        parts.append(f"{count(layer.negative, 'negative variance')}")
    return f"The running statistics of its {count(layer.channels, 'channel')} contain {' and '.join(parts)}."
