"""BN102: running statistics that were never updated."""

from __future__ import annotations

from bnprobe.records import Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule, Link


class NeverTrained(AnatomyRule):
    """The running statistics are those of a new layer: mean 0 and variance 1 in every channel.

    What:
        Whether all running means are exactly 0 and all running variances exactly 1, as in a new layer. It is an error
        where the layer's weight or bias, or other layers, were trained; a warning where a scan finds that the values
        fit the data, or cost nothing; and only a remark where forward never calls the layer, or the whole network is as
        it was made, unless a scan flags the layer and neither loss nor metric shows that it costs nothing.
        num_batches_tracked alone says nothing: not every layer counts its updates.

    Why:
        At inference the layer normalizes with these values. Unless the data happens to have mean 0 and variance 1,
        every activation is shifted and scaled wrongly, although training, which uses batch statistics, went well.

    Example:
        A checkpoint was loaded with strict=False, which ignored that its buffers were missing; or it was saved from
        named_parameters(), which does not include buffers. The training loss is 0.1, and validation is at chance level.

    Remedy:
        Load a checkpoint that contains running_mean and running_var, or recalibrate the running statistics on training
        data (`bnprobe recalibrate`).

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, running_mean and running_var. Ioffe and Szegedy 2015, arXiv
        1502.03167, algorithm 2.
    """

    code = "BN102"
    title = "running statistics never updated"
    cause = "never_trained"
    severity = "error"
    unit = "updates"
    finding = "the running statistics are those of a new layer (mean 0, variance 1)"
    remedy = (
        "Load a checkpoint that contains running_mean and running_var, or recalibrate the running statistics on"
        " training data (bnprobe recalibrate)."
    )
    follows_from = (Link("momentum_convention", fits=lambda layer: layer.momentum == 0),)
    accounts_for = ("lag",)
    upstream_order = 20
    free_remedy = "recalibrated"
    other_remedy = (
        "Load a checkpoint that contains running_mean and running_var; keep these values if it was trained so."
    )
    commands = ("recalibrate",)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.without_statistics(layer)
        updates = None if layer.batches_tracked is None else float(layer.batches_tracked)
        if not layer.untouched:
            return self.passed(layer.name, "The running statistics differ from mean 0 and variance 1.", updates)
        remedy = "None is needed, unless the model was meant to use the layer." if facts.unused(layer.name) else None
        return self.failed(layer.name, _message(layer, facts), updates, None, _severity(layer, facts), remedy)


_START = "All running means are 0 and all running variances 1, as in a new layer"


def _message(layer: Anatomy, facts: Facts) -> str:
    if facts.unused(layer.name):
        return f"{_START}, and the forward pass never calls it."
    if layer.momentum == 0:
        return f"{_START}: momentum=0 never updates them."
    if layer.batches_tracked:
        return f"{_START}, although num_batches_tracked is {layer.batches_tracked:,}. Was momentum 0, or a reset?"
    if layer.affine_moved:
        return f"{_START}, but weight or bias were trained. Was the checkpoint loaded, or averaged, without buffers?"
    return f"{_START}, and no update is counted. Was the checkpoint not loaded, or loaded without buffers?"


def _severity(layer: Anatomy, facts: Facts) -> Severity:
    measured = facts.layers.get(layer.name)
    if facts.unused(layer.name) or (measured is not None and measured.only_in == "train"):
        return "info"
    if facts.is_new:
        accepted = measured is None or not measured.flagged
        return "info" if accepted or effect.inconsistency(facts.gaps, facts.chance).is_no_worse else "error"
    if measured is None:
        return "error"
    # A metric may be one of which smaller values are better without its goal being set: only the loss excuses a layer.
    losses = [gap for gap in facts.gaps if gap.measure == "loss"]
    harmless = not measured.flagged or effect.inconsistency(losses, facts.chance).is_no_worse
    gains = effect.gain(facts, "recalibrated").is_sure_gain
    return "warning" if harmless and not gains else "error"
