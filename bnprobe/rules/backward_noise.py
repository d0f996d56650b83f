"""BN303: noisy batch statistics in the backward pass."""

from __future__ import annotations

from bnprobe.numbers import number, percent
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule
from bnprobe.rules.shares import lower_end


class BackwardNoise(MeasuredRule):
    """The batch statistics of the backward pass are too noisy.

    What:
        The variance over batches of the two means that BN's gradient subtracts, E[g] and E[g * xhat], expressed as the
        number of independent values with the same noise. It fails where even the upper end of its 95% interval is below
        the layer's threshold.

    Why:
        In the backward pass BN subtracts the batch mean of the gradient, and its projection on the normalized input.
        These are batch statistics too. With few values they add noise to the gradients of everything before the layer,
        which running statistics in the forward pass (Batch Renorm, frozen statistics) do not remove.

    Example:
        With batches of 2, fine-tuning with Batch Renorm stays behind training with batches of 32, although the forward
        pass is repaired.

    Remedy:
        Use larger normalization batches; or average the backward statistics over steps (moving average BN); or group
        norm, which has none.

    Reference:
        Yan et al. 2020, arXiv 2001.06838 (MABN), section 3.
    """

    code = "BN303"
    title = "noisy backward pass"
    cause = "backward_noise"
    severity = "warning"
    unit = "values"
    needs = "gradients"
    finding = "the batch statistics that the gradient subtracts are noisy"
    remedy = "Use larger normalization batches, or group norm, whose gradient does not depend on other samples."
    reports_impact = False

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        backward = layer.backward
        if backward is None:
            return self.skipped(layer.name, "no gradient reaches the layer")
        size, low = backward.equivalent_batch_size, lower_end(backward.interval)
        shown = "any number of" if size is None else number(size)
        message = f"In the backward pass, the statistics of a batch are as noisy as those of {shown} independent values"
        if low <= 0 or 2 / low >= layer.threshold:
            return self.passed(layer.name, f"{message}.", size, layer.threshold)
        noise = percent(2 / size if size else 0.0)
        message += f" (95%: at most {number(2 / low)}); this noise is {noise} of the gradient's mean square."
        return self.failed(layer.name, message, size, layer.threshold)
