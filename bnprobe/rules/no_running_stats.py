"""BN104: a layer without running statistics."""

from __future__ import annotations

from bnprobe.numbers import percent
from bnprobe.records import Verdict
from bnprobe.rules.effect import MOVES
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule


class NoRunningStats(AnatomyRule):
    """The layer has no running statistics, so it uses batch statistics at inference too.

    What:
        Whether the layer has running_mean and running_var (track_running_stats=True, the default). It is an error where
        a scan finds that the outputs for the same samples in other batches differ by 2% or more (relative L2).

    Why:
        Without them, the prediction for a sample depends on the other samples of its batch, and a batch of one sample
        is normalized with its own statistics. Training and inference compute the same thing, so a scan finds no
        mismatch.

    Example:
        A service gives different scores for the same picture: alone it is classified differently than in a batch.

    Remedy:
        Create running statistics from training data with `bnprobe recalibrate`, and build the model with
        track_running_stats=True to load them; or use group norm, which does not look at other samples, if the batch was
        never meant to matter.

    Reference:
        PyTorch documentation of torch.nn.BatchNorm2d, track_running_stats. Wu and He 2018, arXiv 1803.08494, section 3
        (group norm).
    """

    code = "BN104"
    title = "no running statistics"
    cause = "no_running_stats"
    severity = "warning"
    unit = ""
    finding = "there are no running statistics: a prediction depends on the other samples of its batch"
    remedy = (
        "Create the running statistics from training data (bnprobe recalibrate), and build the model with"
        " track_running_stats=True to load them."
    )
    commands = ("recalibrate",)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if layer.has_running_statistics:
            return self.passed(layer.name, "The layer has running statistics.")
        message = "track_running_stats is False: the layer uses batch statistics at inference too."
        moved = None if facts.output is None else facts.output.batch_dependence
        if moved is None:
            return self.failed(layer.name, message)
        message += f" In other batches, the outputs for the same samples are {percent(moved)} apart."
        return self.failed(layer.name, message, severity="error" if moved >= MOVES else self.severity)
