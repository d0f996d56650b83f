"""BN107: a random layer before a BN layer."""

from __future__ import annotations

import math

from bnprobe.numbers import listed, number
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule, Link
from bnprobe.rules.shares import share_limit


class DropoutBeforeNorm(AnatomyRule):
    """Dropout or another random layer comes before a BN layer, so variances differ between training and inference.

    What:
        Random layers (dropout, drop path, stochastic depth, drop block) with a positive probability that are active in
        training and whose output reaches the layer, as one forward pass of a scan shows, or the code where torch.fx can
        follow it (otherwise the order of definition stands for it). Calls of F.dropout are not seen. The rule passes
        where a scan has measured that dropout hardly changes the layer's statistics. It is a warning where a scan has
        measured that it does, and a remark where nothing was measured: many networks are built so, and do well.

    Why:
        Dropout scales what it keeps by 1 / (1 - p), which preserves the mean but not the variance. The running variance
        is that of activations with dropout. At inference dropout is off, and every activation is scaled wrongly by the
        same factor.

    Example:
        Validation accuracy is below that of the same network without dropout, and recovers when the running statistics
        are recalibrated with dropout off.

    Remedy:
        Move dropout behind the last BN layer (before the classifier), or recalibrate the running statistics with
        dropout off (`bnprobe recalibrate`). Dropout of whole channels does more harm than dropout of single values.

    Reference:
        Li, Chen, Hu and Yang 2018, arXiv 1801.05134, sections 3 and 5.
    """

    code = "BN107"
    title = "dropout before BatchNorm"
    cause = "dropout_before_norm"
    severity = "info"
    unit = "random layers"
    finding = "dropout or another random layer comes before them, so variances differ at inference"
    remedy = "Move dropout behind the last BN layer, or recalibrate the running statistics with dropout off."
    accounts_for = ("dropout",)
    follows_from = (Link("dropout"),)
    free_remedy = "recalibrated"
    other_remedy = "Move dropout behind the last BN layer."

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        measured = facts.layers.get(layer.name)
        before = float(len(layer.dropouts_before))
        if not before or not (layer.has_running_statistics and layer.trains_statistics):
            return self.passed(layer.name, "No random layer shifts its running statistics.", before, 0.0)
        names = listed(layer.dropouts_before[::-1], 3)
        low, high = _share(measured)
        limit = 0.0 if measured is None else share_limit(measured)
        if measured is not None and measured.shares is not None and -limit < low and high < limit:
            share = number(measured.shares.dropout)
            message = f"Random layers before it ({names}) hardly change its statistics: D = {share}."
            return self.passed(layer.name, message, before, 0.0)
        message = f"Random layers that are active in training only come before it: {names}."
        return self.failed(layer.name, message, before, 0.0, "warning" if low > limit or high < -limit else None)


def _share(layer: Layer | None) -> tuple[float, float]:
    """The interval of the measured share of dropout; anything, where it was not measured."""
    if layer is None or layer.shares is None:
        return -math.inf, math.inf
    low, high = (layer.share_intervals and layer.share_intervals.dropout) or (layer.shares.dropout,) * 2
    return low, math.inf if high is None else high
