"""BN101: a momentum with which the running statistics are no average over batches."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule

SUSPECT = 0.9
"""Other frameworks use values from here on (0.9, 0.99, 0.997) for the weight of the *old* statistics."""


class MomentumConvention(AnatomyRule):
    """A momentum of 0.9 or more, or of 0. In PyTorch it is the weight of the new batch, not of the old statistics.

    What:
        The momentum of each layer that updates its running statistics in training; 0.9 or more fails, and so does 0. It
        is an error where a scan also flags the layer, unless inference is known to be no worse than training; and where
        recalibrated statistics are surely better. Otherwise it is a warning.

    Why:
        PyTorch computes running = (1 - momentum) * running + momentum * batch. TensorFlow, Keras, JAX and most papers
        use the same name for the other factor: their 0.99 is 0.01 in PyTorch. With 0.99 in PyTorch, the running
        statistics are little more than those of the last batch, and the results at inference depend on which batch
        that was. With 0 they stay what they were, whatever happens to the weights, although training uses the
        statistics of batches.

    Example:
        A model was ported from Keras with `momentum=0.99`. The training loss falls smoothly, while the validation
        accuracy jumps up and down from epoch to epoch.

    Remedy:
        Use 1 - momentum, e.g. `nn.BatchNorm2d(64, momentum=0.01)`; for 0 the default, 0.1. In a model that is already
        trained, also recalibrate the running statistics (`bnprobe recalibrate`), which the scan tries.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, note on momentum. Ioffe and Szegedy 2015, arXiv 1502.03167,
        section 3.1 (moving averages at inference).
    """

    code = "BN101"
    title = "momentum that keeps no average"
    cause = "momentum_convention"
    severity = "warning"
    unit = "weight of the new batch"
    finding = "momentum is close to 1 or 0, so the running statistics are no average over batches"
    remedy = (
        "Use 1 - momentum: in PyTorch, momentum is the weight of the new batch. Then recalibrate the running statistics"
        " on training data (bnprobe recalibrate)."
    )
    accounts_for = ("lag",)
    upstream_order = 30
    free_remedy = "recalibrated"
    commands = ("recalibrate",)
    other_remedy = "Use 1 - momentum: in PyTorch, momentum is the weight of the new batch."

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.without_statistics(layer)
        if layer.momentum is None:
            return self.passed(layer.name, "momentum=None gives every batch the same weight.", None, SUSPECT)
        if 0 < layer.momentum < SUSPECT or not layer.trains_statistics:
            frozen = "" if layer.trains_statistics else ", and training does not update the running statistics"
            return self.passed(layer.name, f"Momentum is {layer.momentum:g}{frozen}.", layer.momentum, SUSPECT)
        measured = facts.layers.get(layer.name)
        severity = effect.severity_of_setting(facts, measured is not None and measured.flagged)
        remedy = _of_zero(facts) if layer.momentum == 0 else None
        return self.failed(layer.name, _message(layer.momentum), layer.momentum, SUSPECT, severity, remedy)


def _of_zero(facts: Facts) -> str:
    no_gain = effect.gain(facts, "recalibrated").is_no_gain
    then = "" if no_gain else "; then recalibrate the running statistics on training data (bnprobe recalibrate)"
    return f"Use another momentum (0.1 is the default){then}."


def _message(momentum: float) -> str:
    if momentum == 0:
        return (
            "momentum=0 never updates the running statistics: they stay what they were, while training uses the"
            " statistics of batches. To freeze a layer, call eval() on it after every model.train()."
        )
    if momentum >= 1:
        return f"momentum={momentum:g} keeps the statistics of the last training batch and nothing else."
    kept = (2 - momentum) / momentum
    return (
        f"momentum={momentum:g} is the weight of the newest batch, so the running statistics average over about"
        f" {number(kept)} batches. Did you mean {number(1 - momentum)}?"
    )
