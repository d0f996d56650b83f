"""BN106: channels that eps decides."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.wording import number

MOSTLY = 0.5
"""Above this part of dead channels the layer as a whole carries little but its bias."""


class DeadChannels(Rule):
    """Channels whose running variance is below eps: they are constant, and eps decides what they give.

    What:
        The number of channels whose running variance is below the layer's eps. A warning from the first on, an error
        from more than half of the channels on.

    Why:
        The layer divides by sqrt(variance + eps). Below eps that is a constant: the channel carries no signal, or one
        that is scaled down. It costs memory and time; in half precision it is where overflow starts; and a small
        change of the data can bring it back to life with a huge scale.

    Example:
        A network shows no accuracy loss after most channels of a block are pruned; or outputs explode on new data in a
        few channels only.

    Remedy:
        Prune the channels, or find why they died: too high a learning rate, weight decay on an unused branch, inputs
        that are constant. If the data is merely small in scale, scale it up or lower eps.

    Reference:
        Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1 (eps). Liu et al. 2017, arXiv 1708.06519, section 3
        (channels that BN scales away).
    """

    code = "BN106"
    title = "dead channels"
    cause = "dead_channels"
    severity = "warning"
    unit = "channels"
    finding = "some channels are constant (variance below eps)"
    remedy = (
        "Prune these channels or find why they died; if the data is merely small in scale, scale it up or lower eps."
    )

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer)

    def _judge(self, layer: Anatomy) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer keeps no running statistics")
        if not layer.dead:
            return self.passed(layer.name, "Every running variance is above eps.", 0.0, 0.0)
        severity = "error" if layer.dead > MOSTLY * layer.channels else self.severity
        return self.failed(layer.name, _message(layer), float(layer.dead), 0.0, severity)


def _message(layer: Anatomy) -> str:
    usual = "" if layer.median_variance is None else f" (the median channel has {number(layer.median_variance)})"
    return f"{layer.dead} of {layer.channels} channels have a running variance below eps = {layer.eps:g}{usual}."
