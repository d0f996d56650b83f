"""BN205: mismatch passed on by earlier layers."""

from __future__ import annotations

from bnprobe.records import Layer
from bnprobe.rules.facts import Facts
from bnprobe.rules.shares import ShareRule


class Propagation(ShareRule):
    """The layer's input differs between training and inference because of earlier layers.

    What:
        The part of the layer's mismatch D that disappears when its statistics are taken at inference, where earlier
        layers use running statistics, instead of in training, where they use batch statistics. It fails on a flagged
        layer where it is the largest share, or from half of the layer's limit on, unless the layer would be within its
        limit without its larger causes.

    Why:
        A layer's running statistics are taken behind layers that normalize with batch statistics. At inference these
        normalize with running statistics. Where the two differ, every later layer gets inputs that it has never seen,
        however right its own statistics were in training.

    Example:
        One layer early in the network has stale running statistics, and a scan flags most layers behind it.

    Remedy:
        Fix the first layer that has a cause of its own, and scan again; most of this goes with it. If it stays,
        recalibrate layer by layer, from the input to the output: `bnprobe recalibrate --path eval`. Where no earlier
        layer has a cause of its own, the report blames what adds up to most in these: stale statistics (BN203) or
        dropout (BN204); recalibration mends both.

    Reference:
        Ioffe 2017, arXiv 1702.03275, section 2 (activations differ in training and at inference). Wu and Johnson 2021,
        arXiv 2105.07576, section 3.
    """

    code = "BN205"
    title = "mismatch from earlier layers"
    cause = "propagation"
    real_data = True
    finding = "earlier layers make their inputs differ between training and inference"
    remedy = "Fix the first layer that has a cause of its own and scan again; most of this goes with it."
    follows_upstream = True
    free_remedy = "recalibrated"

    def explain(self, layer: Layer, facts: Facts) -> str:
        return "Because of earlier layers, the mean and variance of its input differ between training and inference."
