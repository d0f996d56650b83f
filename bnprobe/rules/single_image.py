"""BN209: one sample at a time."""

from __future__ import annotations

from bnprobe.numbers import score
from bnprobe.records import Layer, Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule, anatomy_of


class SingleImage(MeasuredRule):
    """Normalizing one sample at a time, the layer is an instance norm in training, but not at inference.

    What:
        The number of samples that a layer normalizes together, for layers that get several values of each sample; 1
        fails: batches of one sample, or a network that is called for each sample of a larger batch. It is an error
        where the layer is flagged, or the two modes surely differ in loss or metric, otherwise a warning. A layer that
        stays in eval mode during training passes.

    Why:
        With one sample, batch statistics are those of the sample itself: training removes its mean and scale in every
        channel, and inference with running statistics does not. Nothing raises an error, so this is hard to find.

    Example:
        Segmentation of volumes with one volume per GPU is fine in train mode and useless in eval mode. A detector loops
        over the images of its batch, which have different sizes.

    Remedy:
        Train with larger batches or synchronized BN, or fine-tune with frozen statistics (`bnprobe convert --to frozen
        --finetune`). Where the network is called for each sample, call it once on all of them, padded to one size. A
        model that was trained on batches of one sample from the start has weights for an instance norm:
        `bnprobe convert --to instance-renorm --blend 1` makes it one in both modes, which a scan tries ("instance
        statistics"), as it tries blends with the running statistics. If this is not training but inference one
        sample at a time, call eval() first: that is what is advised where the network is surely better with its running
        statistics, and recalibrated ones are no gain.

    Reference:
        Ulyanov, Vedaldi and Lempitsky 2016, arXiv 1607.08022 (instance norm). Wu and He 2018, arXiv 1803.08494,
        section 3.
    """

    code = "BN209"
    title = "one sample at a time"
    cause = "single_image"
    severity = "warning"
    unit = "samples per batch"
    needs = "data"
    finding = "with one sample at a time the layers act as instance norms in training, but not at inference"
    remedy = (
        "Train with larger batches or synchronized BN, or fine-tune with frozen statistics (bnprobe convert --to frozen"
        " --finetune)."
    )
    accounts_for = ("small_batch", "composition")
    upstream_order = 110
    also_tried = effect.ADVISED
    commands = ("convert --to frozen --finetune",)

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        size = 0 if facts.scan is None else facts.scan.batch_size
        anatomy = anatomy_of(facts, layer.name)
        trained = anatomy is None or anatomy.trains_statistics
        alone = layer.name in facts.samples_alone
        if (size > 1 and not alone) or layer.values_per_channel == 1 or not trained:
            return self.passed(layer.name, "The layer is not an instance norm in training.", float(size), 1.0)
        message = "A batch is one sample, which is normalized with its own mean and variance in training."
        if alone:
            message = (
                f"The layer is called once for each of the {size} samples of a batch, which is normalized with its own"
                " mean and variance in training."
            )
        differ = effect.surely_worse(facts) or effect.surely_better(facts)
        severity: Severity = "error" if layer.flagged or differ else self.severity
        remedy = _TOGETHER if alone else self.remedy
        return self.failed(layer.name, message, 1.0, 1.0, severity, _remedy(remedy, facts))


_TOGETHER = (
    "Call the network once on all samples of a batch (padded to one size where they differ), or fine-tune with frozen"
    " statistics (bnprobe convert --to frozen --finetune)."
)


_OF_SERVING = (
    "If this is not training (serving or evaluating one sample at a time), call model.eval() first: the likeliest"
    " mistake, since the network is better with its running statistics, and recalibrated ones are no gain. For training"
    " use larger batches or synchronized BN."
)


def _remedy(usual: str, facts: Facts) -> str:
    """Statistics of every sample are only named where they were tried, on held-out data.

    Running statistics that need no mending and beat those of single samples are those of larger batches, on which the
    weights were trained.
    """
    if converted := effect.without_training(facts):
        return f"{converted} Or {usual[0].lower()}{usual[1:]}"
    better = effect.inconsistency(facts.gaps, facts.chance).standing == "better"
    if not better or not effect.gain(facts, "recalibrated").is_no_gain:
        return usual
    return _of_the_loss(usual, facts) or _OF_SERVING


def _of_the_loss(usual: str, facts: Facts) -> str:
    """What to do where only the loss is better with running statistics; empty where the metric does not say less."""
    if effect.doubt_of_goal(facts.gaps, facts.remedies, facts.chance) != "contradicted":
        return ""
    metric = next(gap for gap in facts.gaps if gap.measure == "metric")
    before, after = score(metric.without_noise), score(metric.inference)
    return (
        "First say which metric is better (--goal): with running statistics the loss is better, and the metric goes"
        f" from {before} to {after}. If a smaller one is better, and this is not training (serving or evaluating one"
        " sample at a time), call model.eval(): the network is better with its running statistics, and recalibrated"
        f" ones are no gain. If a larger one is better, {usual[0].lower()}{usual[1:]}"
    )
