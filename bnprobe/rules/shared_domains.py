"""BN207: one layer for several kinds of input."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import lower_end, share_limit
from bnprobe.rules.wording import number


class SharedDomains(Rule):
    """One layer is called several times per forward pass, on data of different kinds.

    What:
        For a layer that is called more than once: the mismatch D between the statistics of each call's data and those
        of all calls together, mean over calls. It fails where the lower end of its interval exceeds half of the
        layer's limit.

    Why:
        In training each call is normalized with its own batch; the running statistics average over the calls, and fit
        none. A discriminator that sees real and generated images in turn, two modalities through one encoder, or
        pyramid levels through one head do this.

    Example:
        A detector's head shared by five pyramid levels works in training and fails in evaluation mode for the coarsest
        level.

    Remedy:
        Give each domain its own BN layer (the convolutions stay shared), or call the layer once on all domains
        together, so that training mixes them too.

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
    finding = "calls with different data share one set of running statistics, which fits none of them"
    remedy = "Give each kind of input a BN layer of its own, or pass all kinds through the layer in one call."

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer)

    def _judge(self, layer: Layer) -> Verdict:
        limit = share_limit(layer)
        if layer.calls_per_forward < 2:
            return self.passed(layer.name, "The layer is called once.", None, limit)
        if layer.domains is None:
            return self.skipped(layer.name, "the populations of its calls were not measured")
        apart = layer.domains.mismatch
        if lower_end(layer.domains.interval) <= limit:
            return self.passed(layer.name, f"Its calls are D = {number(apart)} apart.", apart, limit)
        message = (
            f"One forward pass calls the layer {layer.calls_per_forward} times, on data that lies D = {number(apart)}"
            f" from what all calls have in common (the limit is {number(limit)})."
        )
        return self.failed(layer.name, message, apart, limit, "error" if layer.flagged else self.severity)
