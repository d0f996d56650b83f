"""BN206: held-out data with other statistics."""

from __future__ import annotations

from bnprobe.numbers import number
from bnprobe.records import Layer, Remedy, Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.effect import Effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Link, MeasuredRule
from bnprobe.rules.shares import NOISE_FACTOR, SUSPICIOUS, lower_end, mismatch_limit, why_no_shares
from bnprobe.stats.theory import mismatch_iid

MOST = 0.5
"""Where no layer is beyond its limit, those are named whose shift is at least this part of the largest."""

FEWEST = 8
"""Of fewer held-out samples, mean and variance say nothing."""

CLEARLY = 4.0
"""Floors (2 points of a metric between 0 and 1) by which held-out data of another kind is worse than training data."""

_PREPROCESSING = "Make the preprocessing of both datasets the same."


def _is_no_further_than_batches(layer: Layer) -> bool:
    """Held-out data that differs from the training data no more than its batches do is of the kind of some of them."""
    shares, intervals = layer.shares, layer.share_intervals
    if shares is None or shares.data_shift is None or shares.composition is None:
        return False
    interval = None if intervals is None else intervals.data_shift
    least = shares.data_shift if interval is None else interval[0]
    return least <= shares.composition + shares.small_batch


class DataShift(MeasuredRule):
    """The held-out data has other means and variances than the training data.

    What:
        The mismatch D of the held-out data, taken as one batch, against the statistics of the training data at
        inference. Without a loss or metric it fails where the lower end of its 95% interval exceeds the layer's limit.
        With one, the effect decides: it fails where the statistics of the held-out data make the network surely better
        on it, from a tenth of the limit on; and beyond the limit, where held-out data is surely worse than training
        data. Other classes in other proportions also move the statistics; that costs nothing, and is no fault. It also
        fails where held-out data is worse by 8 points or more, and the statistics of every layer have moved
        significantly, however little: what a network does not know of data of the same kind shows in later layers only;
        and it is a warning beyond the limit where inference is worse on training data already, which hides what a shift
        does. Where non-i.i.d. training batches differ from each other as much, it is reported as a consequence of
        these.

    Why:
        The layer standardizes data that is like the training data. Data from another camera, or scaled or augmented
        differently, reaches the next weights shifted and scaled. Training cannot show it: on training data everything
        is fine.

    Example:
        Held-out images are not divided by 255, or training crops are larger in scale than evaluation crops. On the
        training set the model is perfect, in eval mode too.

    Remedy:
        First make the preprocessing the same. If the new data is meant to differ, recalibrate the running statistics on
        unlabelled samples of it (`bnprobe recalibrate` with these as the data), and compare on held-out samples. The
        scan tries that: where the statistics of the held-out data do not help, something else is hurt by the shift.

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
        f"{_PREPROCESSING} If the data is meant to differ, recalibrate the running statistics on samples of the new"
        " kind."
    )
    reports_impact = False
    follows_from = (Link("composition", _is_no_further_than_batches),)
    free_remedy = "evaluation statistics"
    other_remedy = _PREPROCESSING

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        share, limit = None if layer.shares is None else layer.shares.data_shift, mismatch_limit(layer)
        if share is None:
            return self.skipped(layer.name, why_no_shares(layer))
        low = lower_end(None if layer.share_intervals is None else layer.share_intervals.data_shift)
        sure = f" (95%: at least {number(low)})" if low > 0 else ""
        message = f"The mismatch of held-out against training data is D = {number(share)}{sure}"
        severity = _severity(layer, facts)
        if severity is None:
            why_not = _why_not(facts) if low > limit else ""
            return self.passed(layer.name, f"{message}{why_not}.", share, limit)
        against = f"; the limit is {number(limit)}" if share > limit else f", within the limit of {number(limit)}"
        little = _gain(facts).is_no_gain or _wins_little(facts)
        remedy = self.other_remedy if little else None
        return self.failed(
            layer.name, f"{message}{against}.{_at_the_output(facts)}", share, limit, severity, remedy=remedy
        )


def _severity(layer: Layer, facts: Facts) -> Severity | None:
    """How much harm it does that the layer's statistics have moved on held-out data; None: they have not, or none."""
    share = None if layer.shares is None else layer.shares.data_shift
    if share is None:
        return None
    beyond, gap = _is_beyond(layer, facts), _gap(facts)
    if not gap.is_worse and effect.surely_worse(facts):
        # What is wrong at inference is wrong on training data already, and hides what a shift does.
        return "warning" if beyond and gap.changes else None
    if _is_won_back(facts):
        suspected = share >= MOST * _largest(facts) and share > SUSPICIOUS * mismatch_limit(layer)
        return "error" if beyond or (suspected and not _any_beyond(facts)) else None
    if all(change.harm <= change.floor for change in gap.changes) and gap.changes:
        return None  # measured, and no worse
    if _gain(facts).is_worse and not _is_much(gap):
        return None
    return "error" if beyond or (_moves(layer) and _is_other_data(gap, facts)) else None


def _why_not(facts: Facts) -> str:
    """Why a shift beyond the limit is no finding, a clause."""
    gap = _gap(facts)
    if not gap.changes and effect.surely_worse(facts):
        return ", but inference is worse on training data already, which hides what it does"
    if not gap.changes:
        return ", but held-out data could not be scored"
    if all(change.harm <= change.floor for change in gap.changes):
        return ", but held-out data is not worse for it"
    return ", but with statistics of its own held-out data is worse still"


def is_moved(layer: Layer, facts: Facts) -> bool | None:
    """Whether the layer's statistics have surely moved on held-out data, or surely not; None: not known."""
    if _is_beyond(layer, facts) or _severity(layer, facts) is not None:
        return True
    interval = None if layer.share_intervals is None else layer.share_intervals.data_shift
    high = None if interval is None else interval[1]
    return False if high is not None and high <= mismatch_limit(layer) else None


def is_to_blame(layer: Layer, facts: Facts) -> bool:
    """Whether this rule fails on the layer."""
    return _severity(layer, facts) is not None


def _moves(layer: Layer) -> bool:
    """Whether the layer's statistics differ significantly on held-out data, however little."""
    return layer.share_intervals is not None and lower_end(layer.share_intervals.data_shift) > 0


def _is_other_data(gap: Effect, facts: Facts) -> bool:
    """Whether held-out data is clearly worse, and differs from the training data in every layer, from the first one on.

    What a network does not know of data of the same kind shows in later layers only. What statistics of the training
    data mend is no shift, and other proportions of classes show by statistics of their own, which are worse.
    """
    if not gap.is_worse or gap.main is None or gap.main.weight < CLEARLY or _any_beyond(facts):
        return False
    if effect.gain(facts, "recalibrated").standing == "better":
        return False
    tried = _gain(facts)
    return bool(tried.changes) and not tried.is_worse and all(map(_moves, facts.layers.values()))


def _is_beyond(layer: Layer, facts: Facts) -> bool:
    interval = None if layer.share_intervals is None else layer.share_intervals.data_shift
    if interval is not None:
        return interval[0] > mismatch_limit(layer)
    share = None if layer.shares is None else layer.shares.data_shift
    samples = max((gap.held_out_samples or 0 for gap in facts.gaps), default=0)
    # One micro-batch has no interval: as many values as samples is the least that a layer gets, and the noisiest.
    if share is None or samples < FEWEST or not _gap(facts).is_worse:
        return False
    return share - NOISE_FACTOR * mismatch_iid(samples) > mismatch_limit(layer)


def _is_much(gap: Effect) -> bool:
    """Whether held-out data is worse by more than what it always is: statistics of its own do not help it."""
    return gap.is_worse and gap.main is not None and gap.main.weight >= effect.MUCH


def _gap(facts: Facts) -> Effect:
    return effect.generalization(facts.gaps, facts.chance)


def _is_won_back(facts: Facts) -> bool:
    """Whether statistics of the held-out data surely help on it, and more than those of the training data."""
    if not _gain(facts).is_sure_gain:
        return False
    shifted, usual = _tried(facts), effect.tried(facts.remedies, "recalibrated")
    return shifted is not None and (usual is None or effect.advantage(shifted, usual, facts.gaps, facts.chance) > 1.0)


def _any_beyond(facts: Facts) -> bool:
    return any(_is_beyond(layer, facts) for layer in facts.layers.values())


def _largest(facts: Facts) -> float:
    return max((layer.shares.data_shift or 0.0 for layer in facts.layers.values() if layer.shares), default=0.0)


def _tried(facts: Facts) -> Remedy | None:
    return effect.tried(facts.remedies, "evaluation statistics")


def _gain(facts: Facts) -> Effect:
    remedy = _tried(facts)
    return Effect(()) if remedy is None else effect.of_remedy(remedy, facts.gaps, facts.chance)


def _wins_little(facts: Facts) -> bool:
    """Whether statistics of the held-out data surely help, but win back less than half of what is lost."""
    return effect.wins_back_most(facts, "evaluation statistics") is False


def _at_the_output(facts: Facts) -> str:
    """What it does to loss and metric, and whether other statistics bring that back: sentences, or nothing."""
    change, gain = _gap(facts).main, _gain(facts)
    if change is None:
        return ""
    said = f" With the same running statistics {change.words('on training data', 'on held-out data')}"
    if gain.standing == "better" and gain.main is not None:
        rest = ", which is less than half of what is lost: the rest is not BN's" if _wins_little(facts) else ""
        return (
            f"{said}; with statistics of the held-out data the {gain.main.measure} is {number(gain.main.after)}{rest}."
        )
    if gain.is_no_gain:
        return f"{said}. Statistics of the held-out data do not bring it back: the shift hurts, but not through BN."
    return f"{said}."
