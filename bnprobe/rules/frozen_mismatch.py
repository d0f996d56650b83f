"""BN105: a layer of which one half is frozen and the other is not."""

from __future__ import annotations

from bnprobe.records import Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import AnatomyRule


class FrozenMismatch(AnatomyRule):
    """Weight and bias are frozen while the running statistics are still updated, or the reverse.

    What:
        Whether, after model.train(), the layer's weight and bias (requires_grad) and its running statistics (train
        mode) are either both trained or both frozen. A copy of another part that is trained, as the momentum encoder of
        contrastive learning is, passes: its weights follow the other's, and its statistics its own. Fixed statistics
        with trained weight and bias are a remark where loss or metric are known to be no worse at inference, and
        recalibrated statistics were no gain, or not tried.

    Why:
        requires_grad=False only stops the optimizer. In train mode the layer still normalizes with batch statistics and
        still updates its running statistics, so a backbone that is frozen this way drifts with every batch, while its
        weights stay the same. The reverse, training weight and bias with the statistics in eval mode, is sometimes
        intended; then earlier weights must not move much, since the statistics cannot follow.

    Example:
        A frozen backbone is fine-tuned with a new head. Its features at inference get worse with every epoch, although
        "nothing in it is trained".

    Remedy:
        To freeze a layer, also call eval() on it after every model.train() (override train() of the model). To train
        it, set requires_grad=True and leave it in train mode. Freezing statistics keeps what is wrong with them, so a
        scan with a loss or metric advises it only where inference is no worse for them, or after recalibration where
        that was tried and is better.

    Reference:
        PyTorch documentation, "Autograd mechanics", section on evaluation mode and requires_grad. Wu and Johnson 2021,
        arXiv 2105.07576, section 4 (freezing the statistics).
    """

    code = "BN105"
    title = "layer only half frozen"
    cause = "frozen_mismatch"
    severity = "warning"
    unit = ""
    finding = "only the running statistics, or only weight and bias, are frozen"
    remedy = (
        "If the layer is to be frozen, set requires_grad=False and also call eval() on it after every model.train(); if"
        " it is to be trained, do neither."
    )
    reports_impact = False
    commands = ("recalibrate --include-frozen",)

    def _judge(self, layer: Anatomy, facts: Facts) -> Verdict:
        if layer.trains_affine is None:
            return self.skipped(layer.name, "the layer has no weight and bias (affine=False)")
        if not layer.has_running_statistics:
            return self.without_statistics(layer)
        if layer.copy_of is not None:
            return self.passed(layer.name, f"It belongs to a copy of {layer.copy_of} that is not trained by gradients.")
        if layer.trains_affine == layer.trains_statistics:
            state = "trained" if layer.trains_affine else "frozen"
            return self.passed(layer.name, f"Running statistics, weight and bias are all {state}.")
        if layer.trains_statistics:
            return self.failed(
                layer.name,
                "Weight and bias are frozen (requires_grad=False), but training updates the running statistics.",
                remedy=_of_moving_statistics(facts),
            )
        remedy = _of_fixed_statistics(facts)
        harmless = remedy is None and effect.inconsistency(facts.gaps, facts.chance).is_no_worse
        return self.failed(
            layer.name,
            "The running statistics are frozen (eval mode during training), but weight and bias are trained.",
            severity="info" if harmless else None,
            remedy=_AS_INTENDED if harmless else remedy,
        )


_AS_INTENDED = (
    "None is needed: inference is no worse, and weight and bias are trained on the statistics that it uses. Earlier"
    " weights must not move much from here on, since these statistics cannot follow."
)


def _of_moving_statistics(facts: Facts) -> str | None:
    """Whether to freeze them too, by what they do at inference; None: not known."""
    found, gain = effect.inconsistency(facts.gaps, facts.chance), effect.gain(facts, "recalibrated")
    freeze = "to freeze the layer, also call eval() on it after every model.train()"
    if gain.standing == "better":
        return f"First recalibrate the running statistics on training data (bnprobe recalibrate). Then, {freeze}."
    if found.main is None:
        return None
    words = f"on training batches {found.main.words(*effect.STATISTICS)}"
    if found.is_worse:
        return f"Do not freeze the running statistics as they are: {words}. First mend what makes inference worse."
    return f"{freeze[0].upper()}{freeze[1:]}: {words}." if found.is_no_worse else None


def _of_fixed_statistics(facts: Facts) -> str | None:
    """Whether to take statistics of the data instead, by what recalibrated ones do; None: not known."""
    standing, words = effect.gain(facts, effect.WITH_FROZEN).standing, effect.of_frozen(facts)
    if standing == "better":
        return f"Recalibrate these statistics on training data (bnprobe recalibrate --include-frozen): {words}."
    return f"Keep the running statistics as they are: {words}." if standing == "worse" else None
