"""BN303: noise of the backward pass."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import lower_end
from bnprobe.rules.wording import number, percent


class BackwardNoise(Rule):
    """The batch statistics of the backward pass are too noisy.

    What:
        The variance over batches of the two means that BN's gradient subtracts, E[g] and E[g * xhat], as the number of
        independent values that would give it. It fails where even the upper end of the interval is below the layer's
        threshold.

    Why:
        In backward, BN subtracts the batch's mean gradient and its projection on the normalized input. These are batch
        statistics too, and with few values they are noise in every gradient before the layer, which running statistics
        in forward (Batch Renorm, frozen statistics) do not take away.

    Example:
        With batches of 2, fine-tuning with Batch Renorm stays behind training with batches of 32, although the forward
        pass is mended.

    Remedy:
        Larger normalization batches; or average the backward statistics over steps (moving average BN); or group norm,
        which has none.

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
    remedy = "Use larger normalization batches, or group norm, whose gradient does not depend on other images."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer)

    def _judge(self, layer: Layer) -> Verdict:
        backward = layer.backward
        if backward is None:
            return self.skipped(layer.name, "no gradient reaches it")
        size, surely = backward.equivalent_batch_size, lower_end(backward.interval)
        shown = "any number of" if size is None else number(size)
        message = f"In the backward pass a batch counts as {shown} independent values"
        if surely <= 0 or 2 / surely >= layer.threshold:
            return self.passed(layer.name, f"{message}.", size, layer.threshold)
        noise = percent(2 / size if size else 0.0)
        message += f" (at most {number(2 / surely)}, 95%): {noise} of the gradient's energy is noise of these averages."
        return self.failed(layer.name, message, size, layer.threshold)
