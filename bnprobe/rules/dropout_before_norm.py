"""BN107: a random layer in front of a norm."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import share_limit
from bnprobe.rules.wording import listed, number


class DropoutBeforeNorm(Rule):
    """Dropout, or another random layer, in front of a BN layer: variances differ in training and at inference.

    What:
        Random layers (dropout, drop path, stochastic depth, drop block) with a positive probability that are active in
        training and defined before the layer. Definition order stands for call order, and calls of F.dropout are not
        seen. Where a scan has measured that dropout hardly changes the layer's statistics, the rule passes.

    Why:
        Dropout scales what it keeps by 1 / (1 - p), which keeps the mean and not the variance. The running variance is
        that of activations with dropout; at inference there is none, and each activation is scaled wrongly by the same
        factor in every image.

    Example:
        Validation accuracy is below that of the same network without dropout, and recovers when the running statistics
        are taken anew with dropout off.

    Remedy:
        Move dropout behind the last BN layer (in front of the classifier), or take the running statistics anew with
        dropout off (`bnprobe recalibrate`); dropout of whole channels hurts more than of single values.

    Reference:
        Li, Chen, Hu and Yang 2018, arXiv 1801.05134, sections 3 and 5.
    """

    code = "BN107"
    title = "dropout before a norm"
    cause = "dropout_before_norm"
    severity = "warning"
    unit = "random layers"
    finding = "dropout or another random layer comes first, so that variances differ at inference"
    remedy = "Move dropout behind the last BN layer, or take the running statistics anew with dropout off."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer, facts.layers.get(layer.name))

    def _judge(self, layer: Anatomy, measured: Layer | None) -> Verdict:
        before = float(len(layer.dropouts_before))
        if not before or not (layer.has_running_statistics and layer.trains_statistics):
            return self.passed(layer.name, "No random layer shifts its running statistics.", before, 0.0)
        names = listed(layer.dropouts_before[::-1])
        share = _harmless(measured)
        if share is not None:
            message = f"Random layers come before it ({names}), but hardly change its statistics: D = {number(share)}."
            return self.passed(layer.name, message, before, 0.0)
        return self.failed(layer.name, f"Random layers that act in training only come before it: {names}.", before, 0.0)


def _harmless(layer: Layer | None) -> float | None:
    """The measured share of dropout, where it is surely small."""
    if layer is None or layer.shares is None:
        return None
    interval = None if layer.share_intervals is None else layer.share_intervals.dropout
    low, high = (layer.shares.dropout, layer.shares.dropout) if interval is None else interval
    limit = share_limit(layer)
    return layer.shares.dropout if high is not None and -limit < low and high < limit else None
