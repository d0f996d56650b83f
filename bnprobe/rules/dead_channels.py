"""BN106: channels with a variance below eps."""

from __future__ import annotations

from bnprobe.numbers import number, percent
from bnprobe.records import Severity, Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule, Link


class DeadChannels(AnatomyRule):
    """Channels have a running variance below eps, which then determines their scale.

    What:
        The number of channels whose running variance is below the layer's eps. It is a remark, and a warning where
        channels are constant: with a variance below a ten-thousandth of eps the layer turns them into less than 1% of a
        standard deviation.

    Why:
        The layer divides by sqrt(variance + eps). Below eps that is about sqrt(eps), so the channel is scaled down. The
        same happens with batch statistics: training and inference agree, and the weights after the layer were trained
        on what it gives. Data that is small in scale, or a large eps as ported from TensorFlow (1e-3), has this effect
        in healthy networks. A channel that is constant carries no signal.

    Example:
        Images between 0 and 0.1 in front of a layer with eps=1e-3. Or all weights of a channel were driven to 0 by
        weight decay.

    Remedy:
        Nothing has to be done for inference to be like training. Keep eps as it was in training: the weights fit it.
        Where channels are constant, look for the reason: a learning rate that was too high, weight decay on a branch
        that is not used, constant inputs.

    Reference:
        Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1 (eps). Liu et al. 2017, arXiv 1708.06519, section 3
        (channels that BN scales to zero).
    """

    code = "BN106"
    title = "dead channels"
    cause = "dead_channels"
    severity = "info"
    unit = "channels"
    finding = "some channels have a variance below eps, which scales them down"
    remedy = "Nothing has to be done for inference to be like training; keep eps as it was in training."
    reports_impact = False
    follows_from = (Link("lag"), Link("never_trained"))

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.without_statistics(layer)
        if not layer.dead:
            return self.passed(layer.name, "Every running variance is at least eps.", 0.0, 0.0)
        severity: Severity = "warning" if layer.constant else "info"
        median = layer.median_variance
        usual = "" if median is None else f" (the median over channels is {number(median)})"
        message = (
            f"{layer.dead} of {layer.channels} channels ({percent(layer.dead / layer.channels)}) have a running"
            f" variance below eps = {layer.eps:g}{usual}. The layer scales such channels down, with batch statistics as"
            " with running statistics."
        )
        if not layer.constant:
            return self.failed(layer.name, message, float(layer.dead), 0.0, severity)
        message += f" Of {layer.constant} less than 1% of a standard deviation is left: they are constant."
        remedy = (
            "Look for the reason why channels are constant: a learning rate that was too high, weight decay, or"
            " constant inputs. Such channels do not make training and inference differ."
        )
        return self.failed(layer.name, message, float(layer.dead), 0.0, severity, remedy)
