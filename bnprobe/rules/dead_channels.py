"""BN106: channels with a variance below eps."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import number
from bnprobe.records import Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import Link, Rule

MOSTLY = 0.5
"""Above this fraction of dead channels the layer as a whole carries little but its bias."""


class DeadChannels(Rule):
    """Channels are (nearly) constant: their running variance is below eps, which then determines their scale.

    What:
        The number of channels whose running variance is below the layer's eps. One such channel is a warning, more than
        half of the channels are an error.

    Why:
        The layer divides by sqrt(variance + eps). Below eps it is almost constant: the channel carries no signal, or
        a weak one. It costs memory and time, and a small change of the data can produce large outputs.

    Example:
        Pruning most channels of a block does not change the accuracy; or outputs explode on new data in a few channels
        only.

    Remedy:
        Prune the channels, or find out why they died: a learning rate that is too high, weight decay on an unused
        branch, constant inputs. If the data is merely small in scale, scale it up or lower eps.

    Reference:
        Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1 (eps). Liu et al. 2017, arXiv 1708.06519, section 3
        (channels that BN scales to zero).
    """

    code = "BN106"
    title = "dead channels"
    cause = "dead_channels"
    severity = "warning"
    unit = "channels"
    finding = "some channels are nearly constant (variance below eps)"
    remedy = "Prune these channels or find out why they died. For data of small scale, scale it up or lower eps."
    follows_from = (Link("lag"), Link("never_trained"))

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer)

    def _judge(self, layer: Anatomy) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer has no running statistics")
        if not layer.dead:
            return self.passed(layer.name, "Every running variance is at least eps.", 0.0, 0.0)
        severity = "error" if layer.dead > MOSTLY * layer.channels else self.severity
        median = layer.median_variance
        usual = "" if median is None else f" (the median over channels is {number(median)})"
        message = f"{layer.dead} of {layer.channels} channels have a running variance below eps = {layer.eps:g}{usual}."
        return self.failed(layer.name, message, float(layer.dead), 0.0, severity)
