"""BN302: processes with different running statistics."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule
from bnprobe.rules.shares import share_limit


class RankDivergence(MeasuredRule):
    """The running statistics of the processes of a distributed run differ.

    What:
        The mismatch D between the running statistics of the two processes that differ most; more than half of the
        layer's limit fails.

    Why:
        Without synchronized BN, each process normalizes with its own part of the batch and has its own running
        statistics. Checkpoints are usually written by process 0, so the deployed model has the statistics of one
        process's data. Where the data is split by source, that is another distribution.

    Example:
        Evaluation on process 0 is worse than on the others, or results depend on which process saves the checkpoint.

    Remedy:
        Synchronize the buffers (broadcast_buffers=True), or pool the statistics of all processes before saving, or use
        SyncBatchNorm; shuffle before splitting the data.

    Reference:
        Goyal et al. 2017, arXiv 1706.02677, section 3 (statistics per worker). PyTorch documentation of
        DistributedDataParallel, broadcast_buffers.
    """

    code = "BN302"
    title = "processes disagree"
    cause = "rank_divergence"
    severity = "error"
    unit = "D"
    needs = "several processes"
    finding = "the running statistics differ between processes"
    remedy = (
        "Pool the running statistics of all processes before saving, or use SyncBatchNorm; shuffle the data before"
        " splitting it."
    )

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        apart = facts.rank_mismatch.get(layer.name)
        if apart is None:
            return self.skipped(layer.name, "the statistics of the processes were not compared")
        limit = share_limit(layer)
        message = f"The running statistics of two processes differ by up to D = {number(apart)}."
        judged = self.failed if apart > limit else self.passed
        return judged(layer.name, message, apart, limit)
