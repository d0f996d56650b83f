"""BN101: momentum that looks like that of another framework."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.wording import number

SUSPECT = 0.9
"""Values from here on are what other frameworks use for the weight of the *old* statistics (0.9, 0.99, 0.997)."""


class MomentumConvention(Rule):
    """Momentum of 0.9 and above: in PyTorch it is the weight of the new batch, not of the old statistics.

    What:
        The momentum of each layer that updates its running statistics in training, against 0.9. An error where the
        layer is also flagged by a scan, else a warning.

    Why:
        PyTorch computes running = (1 - momentum) * running + momentum * batch; TensorFlow, Keras, JAX and most papers
        give the other factor the same name. Their 0.99 is 0.01 here. With 0.99 in PyTorch the running statistics are
        those of the last batch, and inference depends on which batch that was.

    Example:
        Accuracy in evaluation mode jumps up and down from epoch to epoch, while the training loss falls smoothly,
        after a model was ported from Keras with `momentum=0.99`.

    Remedy:
        Use 1 - momentum, e.g. `nn.BatchNorm2d(64, momentum=0.01)`. In a trained model also take the running statistics
        anew (`bnprobe recalibrate`); the weights need no training.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, note on momentum. Ioffe and Szegedy 2015, arXiv 1502.03167,
        section 3.1 (moving averages at inference).
    """

    code = "BN101"
    title = "momentum convention"
    cause = "momentum_convention"
    severity = "warning"
    unit = "weight of the new batch"
    finding = "momentum looks like 1 - momentum: the running statistics keep little but the last batch"
    remedy = (
        "Use 1 - momentum: in PyTorch it is the weight of the new batch. Then take the running statistics anew over"
        " training batches."
    )

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer, facts)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer keeps no running statistics")
        if layer.momentum is None:
            return self.passed(layer.name, "momentum=None: all batches count alike.", None, SUSPECT)
        if layer.momentum < SUSPECT or not layer.trains_statistics:
            moves = "" if layer.trains_statistics else ", and training does not move the running statistics"
            return self.passed(layer.name, f"Momentum is {layer.momentum:g}{moves}.", layer.momentum, SUSPECT)
        measured = facts.layers.get(layer.name)
        severity = "error" if measured is not None and measured.flagged else self.severity
        return self.failed(layer.name, _message(layer.momentum), layer.momentum, SUSPECT, severity)


def _message(momentum: float) -> str:
    if momentum >= 1:
        return f"momentum={momentum:g} keeps the statistics of the last training batch only, whichever that was."
    kept = (2 - momentum) / momentum
    return (
        f"momentum={momentum:g} is the weight of the newest batch, so the running statistics average over about"
        f" {number(kept)} batches; {number(1 - momentum)} was probably meant."
    )
