"""BN207: one layer for several kinds of input."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Layer, Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import MeasuredRule
from bnprobe.rules.shares import is_mendable, lower_end, share_limit

MOVES_MUCH = 0.5
"""From here on the layer moves the outputs so far (relative L2) that it is an error, whatever D is."""


class SharedDomains(MeasuredRule):
    """One layer is called several times per forward pass, on data of different domains.

    What:
        For a layer that is called more than once: the mismatch D between the statistics of the data of each call and
        those of all calls together, averaged over calls. It fails where the lower end of its 95% interval exceeds half
        of the layer's limit; and, where loss or metric are surely worse at inference and no layer is flagged, where it
        differs significantly at all. It is an error where loss or metric are surely worse, or other statistics surely
        better on held-out data, and, where they do not say, where the layer is flagged or moves the outputs by half or
        more; otherwise a warning.

    Why:
        In training each call is normalized with its own batch. The running statistics average over the calls and fit
        none of them. Examples are a discriminator that sees real and generated images in turn, two modalities in one
        encoder, or pyramid levels in one head.

    Example:
        A detector's head, shared by five pyramid levels, works in train mode and fails in eval mode on the coarsest
        level.

    Remedy:
        Give each domain its own BN layer (other layers stay shared), or call the layer once on all domains together, so
        that training mixes them too; then continue training. Without training, every domain may have statistics of its
        own (`bnprobe convert --to per-domain`; your code says the domain, `with bnprobe.nn.domain(index):`), or every
        sample's own statistics may take part at inference (`--to example-weighing`, or `--to instance-renorm`): a scan
        tries all of them, and names what is surely better on held-out data.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, section 5 (batch from different domains). Chang et al. 2019, arXiv
        1906.03950, section 3 (domain-specific BN). Xie et al. 2020, arXiv 1911.09665, section 4 (auxiliary BN).
    """

    code = "BN207"
    title = "one layer, several domains"
    cause = "shared_domains"
    severity = "warning"
    unit = "D"
    needs = "data"
    real_data = True
    finding = "calls on different data share one set of running statistics, which fits none of them"
    remedy = (
        "Give each domain its own BN layer, or pass all domains through the layer in one call; then continue training."
    )
    accounts_for = ("composition",)
    also_tried = (*effect.ADVISED, "batch statistics")
    upstream_order = 60

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        limit = share_limit(layer)
        if layer.calls_per_forward < 2:
            return self.passed(layer.name, "The layer is called once per forward pass.", None, limit)
        if layer.domains is None:
            return self.skipped(layer.name, "the statistics of its separate calls were not measured")
        apart = layer.domains.mismatch
        calls = f"The layer is called {layer.calls_per_forward} times per forward pass, and the data of a call differs"
        message = f"{calls} from that of all calls by D = {number(apart)} on average."
        low = lower_end(layer.domains.interval)
        # What a network reads from the statistics of a call need not be large, only there.
        flagged = any(other.flagged for other in facts.layers.values())
        unexplained = None if flagged else effect.surely_worse(facts)
        if low <= (limit if unexplained is None else 0):
            return self.passed(layer.name, message, apart, limit)
        if low <= limit and unexplained is not None:
            message = (
                f"{calls} significantly from that of all calls (D = {number(apart)}). That is little, but a network can"
                f" read from the statistics of a call what it holds: {unexplained.words(*effect.STATISTICS)}."
            )
        remedy = f"{self.remedy} {effect.without_training(facts) or _if_said(facts)}".rstrip()
        return self.failed(layer.name, message, apart, limit, _severity(layer, facts), remedy)


def _if_said(facts: Facts) -> str:
    """What could be done without training if the user's code said what its calls are of, a sentence; else empty."""
    found = effect.tried(facts.remedies, "statistics per call")
    if found is None or found.domains is not None or not effect.gain(facts, "statistics per call").is_sure_gain:
        return ""
    return (
        f"Without training, statistics of its own for every call are surely better on {found.scored_on} data: say in"
        " the model what a call is of (with bnprobe.nn.domain(index):), and scan again."
    )


def _severity(layer: Layer, facts: Facts) -> Severity:
    found = effect.inconsistency(facts.gaps, facts.chance)
    if found.is_worse or is_mendable("shared_domains", facts):
        return "error"
    if found.is_no_worse:
        return "warning"
    moved = 0.0 if layer.impact is None else layer.impact.exact or layer.impact.estimate or 0.0
    return "error" if layer.flagged or moved >= MOVES_MUCH else "warning"
