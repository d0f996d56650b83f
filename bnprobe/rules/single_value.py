"""BN208: one value per channel."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule, anatomy_of


class SingleValue(Rule):
    """A batch gives the layer one value per channel: training stops with an error.

    What:
        Images times spatial positions that one micro-batch brings to the layer, per channel; the limit is 1. A layer
        that stays in eval mode during training passes.

    Why:
        The mean of one value is the value: normalized, everything is 0 whatever the input. PyTorch refuses such a
        batch in training ("Expected more than 1 value per channel when training").

    Example:
        Training with batches of one image stops at the BN layer behind global pooling; or it stops once per epoch, at
        a last batch of one image.

    Remedy:
        Larger batches; or group or layer norm at this place; or no BN behind global pooling.

    Reference:
        PyTorch, torch.nn.functional.batch_norm (_verify_batch_size). Ioffe and Szegedy 2015, arXiv 1502.03167,
        algorithm 1.
    """

    code = "BN208"
    title = "one value per channel"
    cause = "single_value"
    severity = "error"
    unit = "values per channel"
    needs = "data"
    finding = "a batch brings one value per channel, with which training stops"
    remedy = "Use larger batches, or group or layer norm at this place."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer, facts)

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        fewest = min([layer.values_per_channel, *(call.values_per_channel for call in layer.calls)])
        anatomy = anatomy_of(facts, layer.name)
        if anatomy is not None and not anatomy.trains_statistics:
            return self.passed(layer.name, "In training the layer uses its running statistics.", float(fewest), 1.0)
        if fewest > 1:
            return self.passed(layer.name, f"A batch brings {fewest} values per channel.", float(fewest), 1.0)
        message = "A batch brings one value per channel; normalized it is 0 whatever it was, and PyTorch refuses it."
        return self.failed(layer.name, message, float(fewest), 1.0)
