"""BN204: dropout shifts the variance."""

from __future__ import annotations

from bnprobe.numbers import listed
from bnprobe.records import Layer
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import anatomy_of
from bnprobe.rules.shares import ShareRule


class DropoutShift(ShareRule):
    """Dropout is on when the running statistics are taken, and off when they are used.

    What:
        The part of the layer's mismatch D that disappears when the statistics of the training batches are taken with
        dropout and other random layers off. It fails on a flagged layer where it is the largest share, or from half of
        the layer's limit on, unless the layer would be within its limit without its larger causes.

    Why:
        Dropout preserves the mean, but raises the second moment by the factor 1 / (1 - p), and so the variance. Running
        variances hold the raised value. At inference dropout is off, and the layer divides by too much. The error is
        the same for every sample, and accumulates from layer to layer.

    Example:
        Dropout between the two convolutions of each block lowers validation accuracy; in train mode, but without
        dropout, the network is better than in eval mode.

    Remedy:
        Move dropout behind the last BN layer and continue training; or recalibrate the running statistics with dropout
        off (`bnprobe recalibrate`), and compare on held-out data. On networks with strong dropout the one won back 81%
        of what was lost, the other 24%.

    Reference:
        Li, Chen, Hu and Yang 2018, arXiv 1801.05134, sections 3 and 5.
    """

    code = "BN204"
    title = "variance shift from dropout"
    cause = "dropout"
    finding = "dropout was on when the running statistics were taken and is off when they are used"
    remedy = (
        "Move dropout behind the last BN layer and continue training. Recalibrating the running statistics with dropout"
        " off (bnprobe recalibrate) needs no training."
    )
    upstream_order = 90
    adds_up = "what dropout changes in them"
    free_remedy = "recalibrated"
    commands = ("recalibrate",)
    other_remedy = "Move dropout behind the last BN layer and continue training."

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        names = () if anatomy is None else anatomy.dropouts_before[::-1]
        where = f" ({listed(names, 3)})" if names else ""
        return f"Random layers before it{where} change its mean and variance in training, and are off at inference."
