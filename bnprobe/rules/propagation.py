"""BN205: mismatch handed down from layers upstream."""

from __future__ import annotations

from bnprobe.facts import Facts
from bnprobe.records import Layer
from bnprobe.rules.shares import ShareRule


class Propagation(ShareRule):
    """The layer is given other values at inference than in training, because of layers before it.

    What:
        How much of the layer's mismatch D goes away when its statistics are taken at inference, after layers that use
        their running statistics, instead of after layers that use their batches. It fails on a flagged layer where it
        is the largest share, or from half of the layer's limit on unless the layer would be within its limit without
        its larger causes.

    Why:
        A layer's running statistics are taken behind layers that normalize with the batch. At inference those
        normalize with running statistics; where these differ, all that follows is given values that it has never seen,
        however right its own statistics were in training.

    Example:
        One layer early in the network has stale statistics, and a scan flags most layers behind it.

    Remedy:
        Mend the first layer that has a cause of its own, and scan again; most of this goes with it. If it stays, take
        the running statistics anew layer by layer, from the input to the output: `bnprobe recalibrate --path eval`.

    Reference:
        Ioffe 2017, arXiv 1702.03275, section 2 (activations differ in training and at inference). Wu and Johnson 2021,
        arXiv 2105.07576, section 3.
    """

    code = "BN205"
    title = "mismatch from layers before"
    cause = "propagation"
    real_data = True
    finding = "layers before them give other values at inference than in training"
    remedy = "Mend the first layer that has a cause of its own and scan again; most of this goes with it."

    def explain(self, layer: Layer, facts: Facts) -> str:
        return "Layers before it hand it other means and variances at inference than in training."
