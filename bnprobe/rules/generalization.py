"""BN215: held-out data that is worse for reasons other than its statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import score
from bnprobe.records import Remedy, Verdict
from bnprobe.rules import effect
from bnprobe.rules.data_shift import is_moved, is_to_blame
from bnprobe.rules.effect import Change
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule

LITTLE = 0.25
"""Less than this part of the step to held-out data explains little of it."""


class Generalization(Rule):
    """Held-out data is worse than training data, and its means and variances hardly differ: BN is not the reason.

    What:
        The change of the metric (without one, of the loss) from training to held-out data, both with running
        statistics. It is a remark where the change is surely for the worse, by 10 points of a metric between 0 and 1 or
        25%, statistics of no layer are to blame (BN206: none has moved, or those of the held-out data were tried and
        win back less than a quarter), and inference on training data is not worse, or by less than a quarter of it.

    Why:
        The same running statistics are used for both, and fit both. What is left is what every network has: it knows
        its training data better, or the new data differs in a way that means and variances do not show. It does not
        matter whether a layer is undecided: statistics that are wrong would show in the other steps.

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
            yield self.skipped(None, effect.UNSCORED)
            return
        words = f"With the same running statistics, {change.words('on training data', 'on held-out data')}"
        why = None if not found.is_worse or change.weight < effect.MUCH else _why_not_statistics(change, facts)
        if why is None or not _is_the_larger_part(change, facts):
            yield self.passed(None, f"{words}.", change.harm, change.floor)
            return
        yield self.failed(None, f"{words}. {why}: BN's statistics are not the reason.", change.harm, change.floor)


def _why_not_statistics(lost: Change, facts: Facts) -> str | None:
    """Why the statistics of the held-out data are not to blame, a clause; None where they are, or may be."""
    layers = facts.layers.values()
    if any(is_to_blame(layer, facts) for layer in layers):
        return None
    if all(is_moved(layer, facts) is False for layer in layers):
        return "The means and variances of the held-out data hardly differ from those of the training data"
    tried = effect.tried(facts.remedies, "evaluation statistics")
    if tried is None or not _is_not_won_back(tried, facts):
        return None
    changes = effect.of_remedy(tried, facts.gaps, facts.chance).changes
    given = [
        f" (with them, the {each.measure} is {score(each.after)})" for each in changes if each.measure == lost.measure
    ]
    return f"Statistics of the held-out data were tried, and do not bring it back{''.join(given)}"


def _is_not_won_back(tried: Remedy, facts: Facts) -> bool:
    """Whether statistics of the held-out data are no gain on it, or win back little of what it loses."""
    gain = effect.of_remedy(tried, facts.gaps, facts.chance)
    part = effect.recovered(tried, facts.gaps)
    return gain.is_no_gain or (gain.standing in ("better", "same") and part is not None and part < LITTLE)


def _is_the_larger_part(change: Change, facts: Facts) -> bool:
    """Whether running statistics hardly add to it: what they cost on training data is to be mended first."""
    found = effect.inconsistency(facts.gaps, facts.chance)
    harms = [each.harm for each in found.changes if each.measure == change.measure]
    return not found.is_worse or all(harm < LITTLE * change.harm for harm in harms)
