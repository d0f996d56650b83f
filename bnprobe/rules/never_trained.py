"""BN102: running statistics that were never updated."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Severity, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.wording import count


class NeverTrained(Rule):
    """Running statistics of a new layer: mean 0 and variance 1 in every channel.

    What:
        Whether all running means are exactly 0 and all running variances exactly 1, as when the layer was made. An
        error where other layers were trained, or where a scan flags the layer; a warning where a scan finds that they
        fit; merely information where the whole model is new and there is no data: then it may not have been trained
        yet.

    Why:
        At inference the layer normalizes with these numbers. Unless the data happens to have them, every activation
        is shifted and scaled wrongly, although training (which uses the batch) went well.

    Example:
        A checkpoint was loaded with strict=False and its buffers were dropped without a word; or it was saved from
        named_parameters(), which has no buffers. Training loss 0.1, evaluation at chance.

    Remedy:
        Load a checkpoint that holds running_mean and running_var, or take the running statistics anew from training
        images (`bnprobe recalibrate`).

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, running_mean and running_var. Ioffe and Szegedy 2015, arXiv
        1502.03167, algorithm 2.
    """

    code = "BN102"
    title = "statistics never updated"
    cause = "never_trained"
    severity = "error"
    unit = "updates"
    finding = "the running statistics are those of a new layer (mean 0, variance 1)"
    remedy = (
        "Load a checkpoint that holds running_mean and running_var, or take the running statistics anew over training"
        " batches."
    )

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer, facts)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer keeps no running statistics")
        updates = None if layer.batches_tracked is None else float(layer.batches_tracked)
        if not layer.untouched:
            return self.passed(layer.name, "The running statistics have moved from 0 and 1.", updates)
        return self.failed(layer.name, _message(layer), updates, None, _severity(layer, facts))


def _message(layer: Anatomy) -> str:
    start = "Its running means are all 0 and its running variances all 1, as in a new layer"
    if layer.batches_tracked:
        return f"{start}, although the layer counts {count(layer.batches_tracked, 'update')} (is momentum 0?)."
    return f"{start}: no update is counted. Was a checkpoint forgotten, or loaded without its buffers?"


def _severity(layer: Anatomy, facts: Facts) -> Severity:
    measured = facts.layers.get(layer.name)
    if measured is not None:
        return "error" if measured.flagged else "warning"
    is_new = all(other.untouched and not other.batches_tracked for other in facts.anatomy)
    return "info" if is_new and facts.scan is None else "error"
