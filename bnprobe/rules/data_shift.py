"""BN206: evaluation data of another kind."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.facts import Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import lower_end, mismatch_limit, why_not_apart
from bnprobe.rules.wording import number


class DataShift(Rule):
    """The evaluation data has other statistics than the training data.

    What:
        The mismatch D of the evaluation data, taken as one batch, against the statistics of the training data at
        inference. It fails where the lower end of its interval exceeds the layer's limit.

    Why:
        Normalization makes the layer's input standard normal for data like the training data. Data from another
        camera, scaled or augmented differently, arrives shifted and scaled at the weights behind. Training cannot show
        it: the training data is fine.

    Example:
        Evaluation images are not divided by 255, or training crops are larger in scale than evaluation crops; the
        model is perfect on the training set in evaluation mode too.

    Remedy:
        First make the preprocessing the same. If the new data is meant to differ, take the running statistics over
        unlabelled images of it (`bnprobe recalibrate`, with these as the data), and compare on held-out ones.

    Reference:
        Schneider et al. 2020, arXiv 2006.16971, section 2. Nado et al. 2020, arXiv 2006.10963. Touvron et al. 2019,
        arXiv 1906.06423 (train and test crops).
    """

    code = "BN206"
    title = "evaluation data shifted"
    cause = "data_shift"
    severity = "error"
    unit = "D"
    needs = "evaluation data"
    real_data = True
    finding = "evaluation data has other means and variances than training data"
    remedy = (
        "Make the preprocessing of both data sets the same; if the data is meant to differ, take the running statistics"
        " over images of the new kind."
    )

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer)

    def _judge(self, layer: Layer) -> Verdict:
        share, limit = None if layer.shares is None else layer.shares.data_shift, mismatch_limit(layer)
        if share is None:
            return self.skipped(layer.name, why_not_apart(layer))
        sure = lower_end(None if layer.share_intervals is None else layer.share_intervals.data_shift)
        if sure <= limit:
            return self.passed(layer.name, f"Evaluation data is D = {number(share)} away.", share, limit)
        message = (
            f"Evaluation data as a whole lies D = {number(share)} from the training data (at least {number(sure)}, 95%;"
            f" the limit is {number(limit)})."
        )
        return self.failed(layer.name, message, share, limit)
