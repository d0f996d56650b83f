"""BN204: dropout shifts the variance."""

from __future__ import annotations

from bnprobe.numbers import listed, mismatch
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import anatomy_of
from bnprobe.rules.shares import ShareRule, is_noisy_in_training, is_off_at_inference

_NO_NEED = (
    "None is needed at inference. Before you train on, move dropout behind the last BN layer: training takes the"
    " running statistics with dropout on again."
)


def _is_in_training_only(layer: Layer, facts: Facts) -> bool:
    """Whether random layers, and not the noise of batches, flag it in training: as after recalibration without them."""
    anatomy = anatomy_of(facts, layer.name)
    random = anatomy is not None and bool(anatomy.dropouts_before)
    return random and layer.flagged and not is_off_at_inference(layer) and not is_noisy_in_training(layer)


class DropoutShift(ShareRule):
    """Dropout is on when the running statistics are taken, and off when they are used.

    What:
        The part of the layer's mismatch D that disappears when the statistics of the training batches are taken with
        dropout and other random layers off. It fails on a flagged layer where it is the largest share, or from half of
        the layer's limit on, unless the layer would be within its limit without its larger causes. It is a warning
        where the running statistics fit the data with dropout off, and the layer is flagged in training only.

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

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        found = super()._judge(layer, facts)
        if found.outcome != "passed" or layer.train is None or not _is_in_training_only(layer, facts):
            return found
        apart = layer.train.mismatch
        message = (
            f"{self.explain(layer, facts)} Its running statistics fit the data at inference; only in training, with"
            f" these layers on, it is off: D = {mismatch(apart)}."
        )
        return self.failed(layer.name, message, apart, found.limit, "warning", _NO_NEED)

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        names = () if anatomy is None else anatomy.dropouts_before[::-1]
        where = f" ({listed(names, 3)})" if names else ""
        return f"Random layers before it{where} change its mean and variance in training, and are off at inference."
