"""BN208: one value per channel."""

from __future__ import annotations

from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule, anatomy_of

_OF_ONE = (
    "If this is not training (acting, serving or evaluating one sample at a time), call model.eval() first: the"
    " likeliest mistake. For training use larger batches, or group or layer norm in this place."
)


class SingleValue(MeasuredRule):
    """A batch gives the layer one value per channel, with which training raises an error.

    What:
        The number of values per channel (samples times spatial positions) that one micro-batch gives the layer; 1
        fails. A layer that stays in eval mode during training passes.

    Why:
        The mean of one value is the value itself, so the normalized value is always 0. PyTorch refuses such a batch in
        training ("Expected more than 1 value per channel when training").

    Example:
        Training with batch size 1 stops at the BN layer behind global pooling; or it stops once per epoch, at a last
        batch of one sample.

    Remedy:
        If this is not training (acting, serving, evaluating one sample at a time), call eval() first: that is the
        likeliest mistake where a batch is one sample. In training use larger batches, or group or layer norm in this
        place, or no BN behind global pooling.

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
    finding = "a batch gives one value per channel, for which PyTorch raises an error in training"
    remedy = "Use larger batches, or group or layer norm in this place."
    stops_training = True
    accounts_for = ("small_batch", "composition")
    upstream_order = 100

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        fewest = min([layer.values_per_channel, *(call.values_per_channel for call in layer.calls)])
        anatomy = anatomy_of(facts, layer.name)
        if anatomy is not None and not anatomy.trains_statistics:
            return self.passed(layer.name, "The layer uses its running statistics in training.", float(fewest), 1.0)
        if fewest > 1:
            return self.passed(layer.name, f"A batch gives {fewest} values per channel.", float(fewest), 1.0)
        message = "A batch gives one value per channel, which is always normalized to 0: PyTorch raises an error."
        one = facts.scan is not None and facts.scan.batch_size == 1
        return self.failed(layer.name, message, float(fewest), 1.0, remedy=_OF_ONE if one else None)
