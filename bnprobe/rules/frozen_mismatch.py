"""BN105: one half of a layer frozen, the other not."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Verdict
from bnprobe.rules.interface import Rule


class FrozenMismatch(Rule):
    """Scale and shift frozen while the running statistics move, or the reverse.

    What:
        Whether, after model.train(), the layer's weight and bias (requires_grad) and its running statistics (training
        mode) are both trained or both frozen.

    Why:
        requires_grad=False stops the optimizer and nothing else: in training mode the layer still normalizes with the
        batch and still updates its running statistics. A backbone frozen that way drifts with every batch, under
        weights that stay. The reverse, training weight and bias over statistics in eval mode, is at times meant; then
        earlier weights must not move much, for the statistics cannot follow.

    Example:
        A frozen backbone is fine-tuned with a new head; its features at inference get worse with every epoch although
        "nothing in it is trained".

    Remedy:
        To freeze a layer, also call eval() on it after every model.train() (override train() of the model). To train
        it, set requires_grad=True and leave it in training mode.

    Reference:
        PyTorch documentation, "Autograd mechanics", section on evaluation mode against requires_grad. Wu and Johnson
        2021, arXiv 2105.07576, section 4 (freezing the statistics).
    """

    code = "BN105"
    title = "half frozen"
    cause = "frozen_mismatch"
    severity = "warning"
    unit = ""
    finding = "one half is frozen and the other is trained: running statistics against scale and shift"
    remedy = (
        "To freeze the layer, set requires_grad=False and call eval() on it after every model.train(); to train it, do"
        " neither."
    )

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.anatomy:
            yield self._judge(layer)

    def _judge(self, layer: Anatomy) -> Verdict:
        if layer.trains_affine is None:
            return self.skipped(layer.name, "the layer has no weight and bias (affine=False)")
        if not layer.has_running_statistics:
            return self.skipped(layer.name, "the layer keeps no running statistics")
        if layer.trains_affine == layer.trains_statistics:
            state = "trained" if layer.trains_affine else "frozen"
            return self.passed(layer.name, f"Running statistics, weight and bias are all {state}.")
        if layer.trains_statistics:
            return self.failed(
                layer.name,
                "Weight and bias are frozen (requires_grad=False), but training moves the running statistics.",
            )
        return self.failed(
            layer.name, "The running statistics are frozen (eval mode in training), but weight and bias are trained."
        )
