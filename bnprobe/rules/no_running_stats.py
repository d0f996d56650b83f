"""BN104: no running statistics at all."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Verdict
from bnprobe.rules.interface import Rule


class NoRunningStats(Rule):
    """No running statistics: the layer normalizes with the batch at inference too.

    What:
        Whether the layer keeps running_mean and running_var (track_running_stats=True, the default).

    Why:
        Without them the answer to one image depends on the images that it is served with, and a batch of one image is
        normalized with itself. There is no difference between training and inference that a scan could measure.

    Example:
        A service gives different scores for the same picture; alone it is classified differently than in a batch.

    Remedy:
        Set track_running_stats=True and take the running statistics from training images (`bnprobe.recalibrate`); or
        use group norm, which does not look at other images, if the batch was never meant to matter.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, track_running_stats. Wu and He 2018, arXiv 1803.08494, section 3
        (group norm).
    """

    code = "BN104"
    title = "no running statistics"
    cause = "no_running_stats"
    severity = "warning"
    unit = ""
    finding = "there are no running statistics: at inference too an answer depends on the other images of its batch"
    remedy = "Set track_running_stats=True and take the running statistics over training batches, or use group norm."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer)

    def _judge(self, layer: Anatomy) -> Verdict:
        if layer.has_running_statistics:
            return self.passed(layer.name, "The layer keeps running statistics.")
        message = "track_running_stats is False: the batch's own statistics are used at inference too."
        return self.failed(layer.name, message)
