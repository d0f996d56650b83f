"""BN201: batches too small."""

from __future__ import annotations

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.shares import ShareRule, is_off_at_inference, why_not_apart
from bnprobe.rules.wording import number
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid


class SmallBatch(ShareRule):
    """Batches hold too few values for their mean and variance to be stable.

    What:
        What is left of the layer's mismatch D when batches are made of images drawn at random and the running
        statistics have settled on them: the chance in the statistics of a batch. It fails on a flagged layer where it
        is the largest share, or from half of the layer's limit on unless the layer would be within its limit without
        its larger causes; a layer that is off in training only is off for this reason unless the composition of batches
        is.

    Why:
        In training each image is normalized with the mean and variance of its batch. Of few values these are noise,
        which the network learns to live with; at inference the noise is gone, and so is the relation between an image
        and its own statistics.

    Example:
        A detector or a volume network that only fits 2 images per GPU trains well and evaluates badly; with batches of
        32 the gap is gone.

    Remedy:
        Larger batches; or synchronized BN across processes; or fine-tune with frozen statistics, with Batch Renorm or
        with group norm: `bnprobe convert --finetune --to auto` tries them beside plain BN. Gradient accumulation does
        not help: it leaves the normalization batch as it is.

    Reference:
        Ioffe 2017, arXiv 1702.03275, sections 2 and 3. Wu and He 2018, arXiv 1803.08494, section 4.1 (error against
        batch size). Wu and Johnson 2021, arXiv 2105.07576, section 4.
    """

    code = "BN201"
    title = "batches too small"
    cause = "small_batch"
    finding = "batches hold too few values, so that their mean and variance are noise"
    remedy = (
        "Train with larger normalization batches (or synchronized BN), or fine-tune with frozen statistics, Batch"
        " Renorm or group norm."
    )

    def explain(self, layer: Layer, facts: Facts) -> str:
        images = "" if facts.scan is None else f" from a batch of {facts.scan.batch_size}"
        size = _equivalent(layer)
        worth = "" if size is None else f" These count as {number(size)} independent values"
        healthy = f", where {number(layer.threshold)} would do." if size is not None and size < layer.threshold else "."
        return f"The layer gets {layer.values_per_channel} values per channel{images}.{worth}{healthy if worth else ''}"

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """So few values that not even ideal data would do."""
        ideal, limit = mismatch_iid(layer.values_per_channel), mismatch_iid(layer.threshold)
        if not layer.flagged or ideal <= limit or layer.eval is None:
            return self.skipped(layer.name, why_not_apart(layer))
        return self.failed(layer.name, self.explain(layer, facts), ideal, limit)


def _equivalent(layer: Layer) -> float | None:
    """Independent values that give the noise of batches drawn at random, or in training all that was measured there."""
    if layer.shares is not None and is_off_at_inference(layer):
        return equivalent_batch_size(layer.shares.small_batch)
    return None if layer.train is None else layer.train.equivalent_batch_size
