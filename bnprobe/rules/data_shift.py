"""BN206: held-out data with other statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import number
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import lower_end, mismatch_limit, why_no_shares


class DataShift(Rule):
    """The held-out data has other means and variances than the training data.

    What:
        The mismatch D of the held-out data, taken as one batch, against the statistics of the training data at
        inference. It fails where the lower end of its 95% interval exceeds the layer's limit.

    Why:
        The layer standardizes data that is like the training data. Data from another camera, or scaled or augmented
        differently, reaches the next weights shifted and scaled. Training cannot show it: on training data everything
        is fine.

    Example:
        Held-out images are not divided by 255, or training crops are larger in scale than evaluation crops. On the
        training set the model is perfect, in eval mode too.

    Remedy:
        First make the preprocessing the same. If the new data is meant to differ, recalibrate the running statistics on
        unlabelled samples of it (`bnprobe recalibrate` with these as the data), and compare on held-out samples.

    Reference:
        Schneider et al. 2020, arXiv 2006.16971, section 2. Nado et al. 2020, arXiv 2006.10963. Touvron et al. 2019,
        arXiv 1906.06423 (train and test crops).
    """

    code = "BN206"
    title = "shift in the held-out data"
    cause = "data_shift"
    severity = "error"
    unit = "D"
    needs = "held-out data"
    real_data = True
    finding = "held-out data has other means and variances than training data"
    remedy = (
        "Make the preprocessing of both datasets the same. If the data is meant to differ, recalibrate the running"
        " statistics on samples of the new kind."
    )
    reports_impact = False
    free_remedy = "evaluation statistics"

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer)

    def _judge(self, layer: Layer) -> Verdict:
        share, limit = None if layer.shares is None else layer.shares.data_shift, mismatch_limit(layer)
        if share is None:
            return self.skipped(layer.name, why_no_shares(layer))
        low = lower_end(None if layer.share_intervals is None else layer.share_intervals.data_shift)
        if low <= limit:
            message = f"The mismatch of held-out against training data is D = {number(share)}."
            return self.passed(layer.name, message, share, limit)
        message = (
            f"The mismatch of held-out against training data is D = {number(share)} (95%: at least {number(low)}); the"
            f" limit is {number(limit)}."
        )
        return self.failed(layer.name, message, share, limit)
