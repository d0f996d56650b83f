"""BN215: held-out data that is worse for reasons other than its statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.records import Verdict
from bnprobe.rules import effect
from bnprobe.rules.data_shift import is_moved
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule


class Generalization(Rule):
    """Held-out data is worse than training data, and its means and variances hardly differ: BN is not the reason.

    What:
        The change of the metric (without one, of the loss) from training to held-out data, both with running
        statistics. It is a remark where the change is surely for the worse, by 10 points of a metric between 0 and 1 or
        10%, the statistics of no layer have moved (BN206), and inference is not worse than training in the first place.

    Why:
        The same running statistics are used for both, and fit both. What is left is what every network has: it knows
        its training data better, or the new data differs in a way that means and variances do not show.

    Example:
        Accuracy is 0.99 on training data and 0.71 on held-out data, with D of the data shift below 0.01 in every layer.

    Remedy:
        Nothing about BN: more data, augmentation, regularization, or a check of the labels.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, section 3 (the gap to held-out data, step by step).
    """

    code = "BN215"
    title = "generalization gap"
    cause = "generalization"
    severity = "info"
    unit = ""
    needs = "held-out data"
    real_data = True
    finding = "held-out data is worse, and not because of its statistics"
    remedy = "Nothing about BN helps here: look at the amount of data, augmentation, regularization and labels."
    reports_impact = False

    def check(self, facts: Facts) -> Iterator[Verdict]:
        found = effect.generalization(facts.gaps, facts.chance)
        change = found.main
        if change is None:
            yield self.skipped(None, "needs a loss or metric")
            return
        words = f"With the same running statistics, {change.words('on training data', 'on held-out data')}"
        moved = [is_moved(layer, facts) for layer in facts.layers.values()]
        unsure = not found.is_worse or change.weight < effect.MUCH or any(layer is not False for layer in moved)
        # Where inference is worse already, there is something to mend before anything is said about the rest.
        if unsure or effect.surely_worse(facts):
            yield self.passed(None, f"{words}.", change.harm, change.floor)
            return
        message = f"{words}. The statistics of the held-out data are those of the training data: BN is not the reason."
        yield self.failed(None, message, change.harm, change.floor)
