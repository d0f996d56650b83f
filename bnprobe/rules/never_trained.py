"""BN102: running statistics that were never updated."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.records import Severity, Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import Rule


class NeverTrained(Rule):
    """The running statistics are those of a new layer: mean 0 and variance 1 in every channel.

    What:
        Whether all running means are exactly 0 and all running variances exactly 1, as in a new layer. It is an error
        where other layers were trained, or where a scan flags the layer; a warning where a scan finds that the values
        fit the data; and only information where the whole model is new and there is no data, since it may not have
        been trained yet.

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
        " training data."
    )
    upstream_order = 20
    free_remedy = "recalibrated"

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer, facts)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer has no running statistics")
        updates = None if layer.batches_tracked is None else float(layer.batches_tracked)
        if not layer.untouched:
            return self.passed(layer.name, "The running statistics differ from mean 0 and variance 1.", updates)
        remedy = "None is needed, unless the model was meant to use the layer." if facts.unused(layer.name) else None
        return self.failed(layer.name, _message(layer, facts), updates, None, _severity(layer, facts), remedy)


def _message(layer: Anatomy, facts: Facts) -> str:
    start = "All running means are 0 and all running variances 1, as in a new layer"
    if facts.unused(layer.name):
        return f"{start}, and the forward pass never calls the layer."
    if layer.batches_tracked:
        return f"{start}, although num_batches_tracked is {layer.batches_tracked:,}. Is momentum 0?"
    return f"{start}, and no update is counted. Was the checkpoint not loaded, or loaded without buffers?"


def _severity(layer: Anatomy, facts: Facts) -> Severity:
    if facts.unused(layer.name):
        return "info"
    measured = facts.layers.get(layer.name)
    if measured is not None:
        return "info" if measured.only_in == "train" else "error" if measured.flagged else "warning"
    is_new = all(other.untouched and not other.batches_tracked for other in facts.anatomy)
    return "info" if is_new and facts.scan is None else "error"
