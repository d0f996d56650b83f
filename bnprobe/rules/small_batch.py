"""BN201: batches that are too small."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Layer, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Link
from bnprobe.rules.shares import (
    ShareRule,
    flagging_size,
    is_off_at_inference,
    noise_limit,
    noise_threshold,
    why_no_shares,
)
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid


def _is_mostly_composition(layer: Layer) -> bool:
    """Batches of one domain each differ between domains; within a domain they may well be i.i.d."""
    shares = layer.shares
    return shares is not None and shares.composition is not None and shares.small_batch <= shares.composition


class SmallBatch(ShareRule):
    """Batches have too few values for a stable mean and variance.

    What:
        What remains of the layer's mismatch D with i.i.d. batches and converged running statistics: the sampling noise
        of batch statistics. It has a limit of its own, D = 0.11 or n_eq 14 (a threshold that you set is the limit
        itself), which no usual batch size sits on. It fails on a flagged layer where it exceeds that limit and
        holds more than 5% of the mismatch, or where nothing else adds to it. A layer that is flagged in training only
        has this cause, unless the batches are not i.i.d. It is a warning where inference is known to be no worse than
        training, and other statistics are no gain: then it is training that suffers from the noise.

    Why:
        In training each sample is normalized with the mean and variance of its batch. With few values these are noisy,
        and the network learns to live with the noise. At inference the noise is gone, and so is the relation between a
        sample and the statistics that it is normalized with.

    Example:
        A detector or a volume network that only fits 2 images per GPU trains well and evaluates badly. With batches of
        32 the gap is gone.

    Remedy:
        Use larger batches, or synchronized BN across processes. Where that is impossible, fine-tune with frozen
        statistics (`bnprobe convert --to frozen --finetune`). On networks trained at batch size 2 on purpose, larger
        batches won back 14 to 95% of what was lost, frozen statistics 50%, and Batch Renorm 25% at 40% of the training
        steps. `--to auto` tries them next to plain BN. Gradient accumulation does not help: it leaves the normalization
        batch as it is. Without training, a network may do better if every sample's own statistics take part at
        inference (`bnprobe convert --to example-weighing`, or `--to instance-renorm`), or with batch statistics at
        inference: a scan tries them, and names what is surely better on held-out data. Larger batches are not advised
        where `--batch-sizes` shows that every layer stays beyond its limit with them.

    Reference:
        Ioffe 2017, arXiv 1702.03275, sections 2 and 3. Wu and He 2018, arXiv 1803.08494, section 4.1 (error against
        batch size). Wu and Johnson 2021, arXiv 2105.07576, section 4.
    """

    code = "BN201"
    title = "batches too small"
    cause = "small_batch"
    finding = "batches have too few values, so their mean and variance are noisy"
    remedy = (
        "Train with larger normalization batches (or synchronized BN). Where that is impossible, fine-tune with frozen"
        " statistics (bnprobe convert --to frozen --finetune)."
    )
    follows_from = (Link("single_value"), Link("single_image"), Link("shared_domains", _is_mostly_composition))
    upstream_order = 120
    larger_batches = True
    also_tried = (*effect.ADVISED, "batch statistics")
    commands = ("convert --to frozen --finetune",)

    def explain(self, layer: Layer, facts: Facts) -> str:
        samples = "" if facts.scan is None else f" from a batch of {facts.scan.batch_size}"
        values = f"The layer gets {layer.values_per_channel} values per channel{samples}"
        size = _equivalent(layer)
        if size is None:
            return f"{values}."
        whose, limit = _limit(layer)
        against = f", and {whose} is n_eq {number(limit)}" if float(f"{size:.3g}") < limit else ""
        mixed = layer.shares is None or layer.shares.composition is not None or not is_off_at_inference(layer)
        unmixed = "" if mixed else " The batches are too small or not mixed: which of the two was not judged."
        # Fewer values than these would be independent: the estimate says that they all are.
        own = f"{number(size)} independent values" if size < layer.values_per_channel else "independent ones"
        return f"{values}. They are as noisy as {own}{against}.{unmixed}"

    def advise(self, layer: Layer, facts: Facts) -> str:
        """Statistics of every sample are only named where they were tried, and are surely better."""
        largest = _largest_without_effect(facts)
        usual = self.remedy if largest is None else _beyond_batches(largest)
        return f"{effect.without_training(facts)} {usual}".lstrip()

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """Where there are so few values that not even i.i.d. data would be within the limit, this is the cause."""
        ideal, limit = mismatch_iid(layer.values_per_channel), noise_limit(layer.threshold)
        if not layer.flagged or ideal <= limit or layer.eval is None:
            return self.skipped(layer.name, why_no_shares(layer))
        return self.failed(layer.name, self.explain(layer, facts), ideal, limit, remedy=self.advise(layer, facts))


def _largest_without_effect(facts: Facts) -> int | None:
    """The largest batch size measured, where every flagged layer is beyond its limit at all sizes; None otherwise."""
    flagged = [layer for layer in facts.layers.values() if layer.flagged and layer.batch_sizes]
    points = [point for layer in flagged for point in layer.batch_sizes]
    largest = max((point.batch_size for point in points), default=0)
    if facts.scan is None or largest <= facts.scan.batch_size:
        return None
    return largest if all(point.mismatch > point.limit for point in points) else None


def _beyond_batches(largest: int) -> str:
    """What to do where larger batches were measured and are not enough."""
    return (
        f"Larger normalization batches are not enough: at every size measured, up to {largest}, every flagged layer is"
        " beyond its limit with these weights and running statistics. Fine-tune with frozen statistics (bnprobe convert"
        " --to frozen --finetune)."
    )


def _limit(layer: Layer) -> tuple[str, float]:
    """The limit of what ``_equivalent`` gives, and whose it is: of noise alone, or of all that flags the layer."""
    if layer.only_in == "train" or (layer.shares is not None and is_off_at_inference(layer)):
        return "the limit of noise", noise_threshold(layer.threshold)
    return "the layer's limit", flagging_size(layer)


def _equivalent(layer: Layer) -> float | None:
    """The number of independent values with the noise of i.i.d. batches, or with all of the mismatch in training."""
    if layer.shares is not None and is_off_at_inference(layer):
        return equivalent_batch_size(layer.shares.small_batch)
    return None if layer.train is None else layer.train.equivalent_batch_size
