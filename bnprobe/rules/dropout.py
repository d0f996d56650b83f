"""BN204: dropout shifts the variance."""

from __future__ import annotations

from bnprobe.facts import Facts
from bnprobe.records import Layer
from bnprobe.rules.interface import anatomy_of
from bnprobe.rules.shares import ShareRule
from bnprobe.rules.wording import listed


class DropoutShift(ShareRule):
    """Dropout is active when the running statistics are taken, and off when they are used.

    What:
        How much of the layer's mismatch D goes away when the training batches' statistics are taken with dropout and
        other random layers off. It fails on a flagged layer where it is the largest share, or from half of the layer's
        limit on unless the layer would be within its limit without its larger causes.

    Why:
        Dropout keeps the mean of what it passes on, and raises the variance by the factor 1 / (1 - p) of the second
        moment. Running variances hold the raised value; at inference dropout is off, and the layer divides by too
        much. The error is the same in every image, and it adds up from layer to layer.

    Example:
        Dropout between two convolutions of each block lowers the training loss's noise and validation accuracy alike;
        in training mode without dropout the network is better than in evaluation mode.

    Remedy:
        Take the running statistics anew with dropout off (`bnprobe recalibrate`), and compare on held-out data; or move
        dropout behind the last BN layer and train on.

    Reference:
        Li, Chen, Hu and Yang 2018, arXiv 1801.05134, sections 3 and 5.
    """

    code = "BN204"
    title = "variance shifted by dropout"
    cause = "dropout"
    finding = "dropout was on when the running statistics were taken and is off when they are used"
    remedy = "Move dropout behind the last BN layer and train on, or take the running statistics anew with dropout off."

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        names = () if anatomy is None else anatomy.dropouts_before[::-1]
        where = f" ({listed(names)})" if names else ""
        return f"Random layers before it{where} change its mean and variance in training, and are off at inference."
