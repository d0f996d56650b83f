"""BN202: batches that are not i.i.d."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import count, mismatch, number
from bnprobe.records import Layer, Scan, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Link
from bnprobe.rules.shares import ShareRule, is_significant, lower_end, share_limit, share_of


def _is_of_domains(layer: Layer) -> bool:
    """Batches of one domain each add the distance between the domains to the mismatch; more has another cause."""
    shares, domains = layer.shares, layer.domains
    return shares is None or domains is None or (shares.composition or 0.0) - domains.mismatch <= share_limit(layer)


def _is_most(layer: Layer) -> bool:
    """Whether most of the noise of batches comes from samples that are alike, significantly."""
    shares, intervals, found = layer.shares, layer.share_intervals, layer.composition
    if shares is None or shares.composition is None or found is None or not is_significant(found):
        return False
    low = lower_end(None if intervals is None else intervals.composition)
    return low > 0 and shares.small_batch < shares.composition <= share_limit(layer, "composition")


def _too_few(layer: Layer, scan: Scan | None) -> str:
    """That so few samples fill too few batches to regroup them, a clause; empty where that is not the reason."""
    if scan is None or scan.self_check is None or not scan.self_check.passed:
        return ""  # samples of a batch cannot be told apart
    needed = FEWEST_GROUPS * scan.batch_size
    if scan.images * layer.calls_per_forward >= needed:
        return ""
    return (
        f"{count(scan.images, scan.sample)} are too few to regroup at random in batches of {scan.batch_size}"
        f" (at least {needed})"
    )


FEWEST_GROUPS = 4
"""The samples must suffice for so many micro-batches, for random regrouping to say something."""

_NOT_REGROUPED = "the samples of its batches could not be regrouped at random"

_NO_NEED = "None is needed at this batch size; unless the order has a reason, shuffle the training data all the same."

_COMPOSED = (
    "The loader's batch sampler puts like samples together. If that is a mistake, mix classes and sources within a"
    " batch, and continue training. If the loss needs it (metric learning), keep it, and train with statistics that do"
    " not depend on the batch: `bnprobe convert --finetune` measures what frozen statistics and Batch Renorm gain."
)


class BatchComposition(ShareRule):
    """Samples of a batch are more alike than samples drawn at random.

    What:
        The part of the layer's mismatch D that disappears when the same samples are regrouped at random. It fails on a
        flagged layer where it is the largest share, or from half of the layer's limit on, unless the layer would be
        within its limit without its larger causes; and only if batches differ significantly (analysis of variance of
        the samples' means, p below 0.01 after correction for all channels and layers). It is a warning where inference
        is known to be no worse than training, and other statistics are no gain; and a remark within the limit, where
        batches differ significantly and most of their noise comes from that.

    Why:
        The statistics of a batch of similar samples are those of their kind, and tell the network what kind that is. In
        training it learns to rely on them; at inference they are not there. Sorted files, batches of one patient or one
        video, and samplers that draw by class all have this effect.

    Example:
        A dataset is read in the order of its folders, one per class, without shuffle=True. Training accuracy is 100%
        within an epoch, and validation accuracy is at chance level.

    Remedy:
        Shuffle: shuffle=True, or a sampler that mixes classes, patients or clips within a batch. For streams, use a
        shuffle buffer that is larger than a run of similar samples. Then continue training, since the weights have
        adapted. Where the order is fixed, or the loss needs like samples (metric learning), `bnprobe convert
        --finetune` measures what frozen statistics, Batch Renorm and others gain. Without training, every sample's own
        statistics may take part at inference (`bnprobe convert --to example-weighing`, or `--to instance-renorm`): a
        scan tries both, and names what is surely better on held-out data.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, sections 5 and 6 (domains, leakage). Ioffe 2017, arXiv 1702.03275,
        section 4.3 (non-i.i.d. batches). Kish 1965, Survey Sampling (design effect).
    """

    code = "BN202"
    title = "non-i.i.d. batches"
    cause = "composition"
    real_data = True
    finding = "samples of a batch are more alike than samples drawn at random (sorted data, or one source per batch?)"
    remedy = "Shuffle the training data so that each batch mixes classes and sources; then continue training."
    follows_from = (Link("shared_domains", _is_of_domains),)
    upstream_order = 70
    free_remedy = "recalibrated"
    also_tried = (*effect.ADVISED, "batch statistics")

    def advise(self, layer: Layer, facts: Facts) -> str:
        """Statistics of every sample are only named where they were tried, and are surely better."""
        usual = _COMPOSED if facts.composed else self.remedy
        return f"{usual} {effect.without_training(facts)}".rstrip()

    def check(self, facts: Facts) -> Iterator[Verdict]:
        if not facts.own_order:
            yield self.skipped(None, "a Dataset was given, whose order is bnprobe's own; give a loader to judge yours")
            return
        found = list(super().check(facts))
        clean = all(verdict.outcome != "failed" for verdict in found)
        for verdict, layer in zip(found, facts.layers.values(), strict=True):
            # What is beyond its limit in one layer is said of that one alone.
            yield self._remark(layer, facts) if clean and _is_most(layer) else verdict

    def _remark(self, layer: Layer, facts: Facts) -> Verdict:
        share, limit = share_of(layer, self.cause) or 0.0, share_limit(layer, self.cause)
        remedy = self.advise(layer, facts) if effect.surely_worse(facts) else _NO_NEED
        message = f"{self.explain(layer, facts)} (It accounts for D = {mismatch(share)}, which is within the limit.)"
        return self.failed(layer.name, message, share, limit, "info", remedy)

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        if layer.shares is None:
            return super().without_share(layer, facts)
        return self.skipped(layer.name, _too_few(layer, facts.scan) or _NOT_REGROUPED)

    def explain(self, layer: Layer, facts: Facts) -> str:
        composition = layer.composition
        if composition is None or facts.scan is None:
            return "The statistics of batches vary more than those of the same samples regrouped at random."
        size = facts.scan.batch_size
        worth = size / max(composition.design_effect, 1.0)
        p_value = "p < 0.0001" if composition.p_value < 1e-4 else f"p = {composition.p_value:.2g}"
        return (
            f"Two samples of a batch have a correlation of {composition.intraclass_correlation:.2f} (0: i.i.d.,"
            f" 1: identical; {p_value}), so a batch of {size} is worth {number(worth)} independent samples."
        )
