"""BN202: batches that are not drawn at random."""

from __future__ import annotations

from bnprobe.facts import Facts
from bnprobe.records import Layer
from bnprobe.rules.shares import ShareRule
from bnprobe.rules.wording import number


class BatchComposition(ShareRule):
    """Images of a batch are more alike than images drawn at random.

    What:
        How much of the layer's mismatch D goes away when the same images are regrouped at random. It fails on a flagged
        layer where it is the largest share, or from half of the layer's limit on unless the layer would be within its
        limit without its larger causes; and only if batches differ more than chance allows (analysis of variance of the
        images' means; p below 0.01 after correction for all channels and layers).

    Why:
        The statistics of a batch of like images are those of its kind: the network learns them from the company an
        image is in, which tells it the answer. At inference there is no such company. Sorted files, one patient or
        video per batch, and samplers that draw by class all do this.

    Example:
        A data set is read in the order of its folders, one per class, without shuffle=True: training accuracy is 100%
        within an epoch, evaluation is at chance.

    Remedy:
        Shuffle: shuffle=True, or a sampler that mixes classes, patients or clips within a batch. For streams, use a
        shuffle buffer that is larger than a run of like images. Then train on, since the weights have adapted. Where
        the order is given, `bnprobe convert --finetune` measures what frozen statistics, Batch Renorm and others gain.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, sections 5 and 6 (domains, leakage). Ioffe 2017, arXiv 1702.03275,
        section 4.3 (batches that are not i.i.d.). Kish 1965, Survey Sampling (design effect).
    """

    code = "BN202"
    title = "batches not drawn at random"
    cause = "composition"
    real_data = True
    finding = "images in a batch are more alike than images drawn at random (sorted, or one source per batch?)"
    remedy = "Shuffle the loader, so that each batch mixes classes and sources; then train on with it."

    def explain(self, layer: Layer, facts: Facts) -> str:
        composition = layer.composition
        if composition is None or facts.scan is None:
            return "Regrouped at random, the same images would give steadier batches."
        size = facts.scan.batch_size
        worth = size / max(composition.design_effect, 1.0)
        chance = "less than 1 in 10,000" if composition.p_value < 1e-4 else f"{composition.p_value:.2g}"
        return (
            f"Two images of a batch correlate {composition.intraclass_correlation:.2f}"
            f" (0 if drawn at random, 1 if the same), so that a batch of {size} stands for {number(worth)} independent"
            f" images; the chance of that with shuffled batches is {chance}."
        )
