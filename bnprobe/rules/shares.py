"""What the rules on the shares of a layer's mismatch have in common: when a share is large enough to name its cause.

A flagged layer always gets at least one cause. A layer that is not flagged gets one only where no layer is, and loss or
metric are surely worse at inference, or recalibrated statistics surely better: then the cause that is largest, and
significant, is the best that is known.

How serious a finding is follows from the effect: it is a warning where inference is known to be no worse than training,
and other statistics are no gain: recalibrated ones; for small and non-i.i.d. batches any that were tried. Then, if
anything suffers from these, it is training.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from bnprobe.numbers import mismatch
from bnprobe.records import (
    DEFAULT_THRESHOLD,
    SOURCES,
    Cause,
    Composition,
    FreeRemedy,
    Interval,
    Layer,
    Severity,
    Shares,
    Verdict,
)
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts, Need
from bnprobe.rules.interface import MeasuredRule
from bnprobe.stats.theory import equivalent_batch_size, mismatch_iid, standing

Screened = Literal["flagged", "undecided", "clean"]

SHARES: tuple[Cause, ...] = tuple(source.field for source in SOURCES if source.adds_up)
"""The measured shares that add up to the mismatch at inference."""

STATISTICS_CAUSES: tuple[Cause, ...] = ("lag", "dropout", "propagation")
"""The shares of wrong running statistics; they can offset each other."""

OTHER_STATISTICS: tuple[FreeRemedy, ...] = (
    "recalibrated",
    "evaluation statistics",
    "batch statistics",
    "instance statistics",
)
"""Remedies whose gain says that the statistics are to blame: with all of other data, or of none but batch or sample.

What frozen layers gain says nothing of those that training updates."""

PART_OF_LIMIT = 0.5
"""A cause is named from half of the layer's limit on: two such causes flag a layer."""

NOISE_THRESHOLD = 14.0
"""The equivalent batch size below which noise alone flags a layer, where the threshold is the default of 32. None of
the usual batch sizes sits on it: batches of 16 and of 32 rows in front of BatchNorm1d have n_eq 16 and 32 by
definition, and with that as the limit chance would decide. A threshold that the user sets is the limit of both."""

LEAST_PART = 0.05
"""A cause that holds less of the mismatch of a layer is not named beside those that hold the rest."""

ROUNDING = 0.005
"""A share that is larger than the mismatch by less than this part of it is written as all of it."""

SUSPICIOUS = 0.1
"""Where inference is surely worse and no layer is flagged, a share is suspected from this part of the limit on."""

OF_ONE_KIND = 2.0
"""Statistics of one kind of samples are off by what kinds differ in, which differs from kind to kind."""

LEAST_NOISE = 0.01
"""Noise of batches is no reason for a mismatch in training of which it makes less than this part."""

NOISE_FACTOR = 3.0
"""A figure that is one random draw, as a running average or a mismatch without an interval: three times its expected
noise is still noise."""

COMPOSITION_P = 0.01
"""Significance level for non-i.i.d. batches, after correction for all layers and channels of the model."""


def mismatch_limit(layer: Layer) -> float:
    """The limit of all that is no noise of batches, in D: that of the layer's threshold."""
    return mismatch_iid(layer.threshold)


def flagging_limit(layer: Layer) -> float:
    """The mismatch D above which a layer is flagged."""
    if layer.shares is None:
        return mismatch_limit(layer)
    if layer.only_in == "train":  # nothing uses its running statistics
        return noise_limit(layer.threshold)
    return deciding_limit(*noise_and_others(layer.shares, layer.composition), layer.threshold)


def flagging_size(layer: Layer) -> float:
    """The equivalent batch size below which a layer is flagged."""
    return equivalent_batch_size(flagging_limit(layer)) or layer.threshold


def noise_threshold(threshold: float) -> float:
    """The equivalent batch size below which noise alone flags a layer."""
    return NOISE_THRESHOLD if threshold == DEFAULT_THRESHOLD else threshold


def noise_limit(threshold: float) -> float:
    """The limit of the noise of i.i.d. batches, in D."""
    return mismatch_iid(noise_threshold(threshold))


def share_limit(layer: Layer, cause: Cause | None = None) -> float:
    """The share of D above which its cause is named."""
    return noise_limit(layer.threshold) if cause == "small_batch" else PART_OF_LIMIT * mismatch_limit(layer)


def screened(
    intervals: Sequence[Interval], shares: Shares | None, composition: Composition | None, threshold: float
) -> Screened:
    """Whether a layer is flagged, by the intervals of its mismatch on the measured paths.

    Args:
        intervals: Of D, one for each path.
        shares: Of D at inference, where known: noise of batches has a limit of its own, and what else there is counts
            in its own, too. A layer that is half noise and half stale is beyond its limit if the two together are.
        composition: What batches that do not differ significantly from i.i.d. ones add is noise, too.
        threshold: The equivalent batch size below which the layer is flagged.
    """
    if shares is None:
        return standing(intervals, mismatch_iid(threshold))
    noise, others = noise_and_others(shares, composition)
    return standing(intervals, deciding_limit(noise, others, threshold))


def noise_and_others(shares: Shares, composition: Composition | None) -> tuple[float, float]:
    """What is noise of i.i.d. batches, and what is not: composition where batches differ significantly from these."""
    composed, is_noise = shares.composition or 0.0, composition is not None and not is_significant(composition)
    noise = shares.small_batch + (composed if is_noise else 0.0)
    return noise, shares.lag + shares.dropout + shares.propagation + (0.0 if is_noise else composed)


def deciding_limit(noise: float, others: float, threshold: float) -> float:
    """The D above which a layer is flagged: between the limits of noise and of all else, in proportion to its parts.

    Args:
        noise: Of i.i.d. batches, in D.
        others: All else, in D.
        threshold: The equivalent batch size below which the layer is flagged.
    """
    noise, others = max(noise, 0.0), max(others, 0.0)
    used = noise / noise_limit(threshold) + others / mismatch_iid(threshold)
    return (noise + others) / used if used > 0 else mismatch_iid(threshold)


def is_significant(composition: Composition) -> bool:
    return composition.p_value < COMPOSITION_P


def lower_end(interval: Interval | None) -> float:
    """Lower end of an interval; minus infinity without one."""
    return -math.inf if interval is None else interval[0]


def share_of(layer: Layer, cause: Cause) -> float | None:
    """The share of a cause; None if it is not known.

    A cause of wrong running statistics has at most the sum of their shares. After recalibration of a model that was
    trained with dropout, for example, a large share of dropout is offset by a negative share of lag: together they
    mean that the running statistics are right.
    """
    share: float | None = None if layer.shares is None else getattr(layer.shares, cause)
    return share if share is None or cause not in STATISTICS_CAUSES else min(share, _wrong_statistics(layer))


def is_cause(layer: Layer, cause: Cause) -> bool:
    """Whether a cause explains, alone or together with others, why the layer is flagged."""
    if not layer.flagged or share_of(layer, cause) is None or not _is_possible(layer, cause):
        return False
    return _main_cause(layer) == cause or (_is_large(layer, cause) and _is_needed(layer, cause))


def is_suspect(layer: Layer, cause: Cause, facts: Facts) -> bool:
    """Whether a cause is the best that is known for an effect that was measured although no layer is flagged.

    It is if no layer is shared by data that differs, and it is the largest significant share of the layer. Wrong
    statistics are suspected where recalibrated ones are surely better; any cause where inference is surely worse than
    training, unless recalibration was tried and contradicts it.
    """
    if any(other.flagged for other in facts.layers.values()) or are_domains_apart(facts):
        return False
    if cause == "small_batch" or not _is_possible(layer, cause) or not _is_largest(layer, cause):
        return False
    if cause in STATISTICS_CAUSES and effect.tried(facts.remedies, "recalibrated") is not None:
        return effect.gain(facts, "recalibrated").is_sure_gain
    return effect.surely_worse(facts) is not None


def are_domains_apart(facts: Facts) -> bool:
    """Whether some layer is called several times in a forward pass, on data that differs significantly."""
    return any(layer.domains and lower_end(layer.domains.interval) > 0 for layer in facts.layers.values())


def severity_of(cause: Cause, facts: Facts) -> Severity:
    """How serious a finding is, by what it does to loss and metric; an error where these do not say."""
    if cause in STATISTICS_CAUSES and facts.is_new:
        return "info"
    harmless = effect.inconsistency(facts.gaps, facts.chance).is_no_worse and not is_mendable(cause, facts)
    return "warning" if harmless else "error"


def is_mendable(cause: Cause, facts: Facts) -> bool:
    """Whether other statistics are surely better on held-out data: recalibrated ones, where statistics are to blame."""
    remedies: Sequence[FreeRemedy] = ("recalibrated",) if cause in STATISTICS_CAUSES else OTHER_STATISTICS
    return any(effect.gain(facts, name).is_sure_gain for name in remedies)


def is_off_at_inference(layer: Layer) -> bool:
    """Whether the layer is flagged at inference, and not in training only."""
    return layer.eval is not None and layer.eval.interval[0] > flagging_limit(layer)


def is_of_composition(layer: Layer) -> bool:
    """A running average of non-i.i.d. batches is one random draw of these: of its last batches, all of one kind."""
    shares = layer.shares
    return shares is not None and shares.composition is not None and shares.lag <= OF_ONE_KIND * shares.composition


def is_noisy_in_training(layer: Layer) -> bool:
    """Whether noise of batches may explain the mismatch in training, which holds more than the layer's own noise.

    The noise of earlier layers adds to it; what random layers change in training may be a thousand times that.
    """
    if layer.train is None or layer.shares is None:
        return True
    return noise_and_others(layer.shares, layer.composition)[0] >= LEAST_NOISE * layer.train.mismatch


def _main_cause(layer: Layer) -> Cause | None:
    """The cause to name even if its share is not significantly large; in training alone it is the noise of batches.

    Where noise is within its limit, each share counts in its own limit, as in ``screened``.
    """
    held = {cause: share_of(layer, cause) or 0.0 for cause in SHARES if _is_possible(layer, cause)}
    if "composition" not in held:
        # For a layer with several domains it is the distance between them; otherwise it is noise of small batches.
        composed = share_of(layer, "composition") or 0.0
        apart = 0.0 if layer.domains is None else min(layer.domains.mismatch, composed)
        held["small_batch"] += composed - apart
        if apart > max(held.values()):
            return None
    elif "lag" in held and is_of_composition(layer):
        held["composition"] += max(held.pop("lag"), 0.0)
    if not is_off_at_inference(layer) and max(held, key=lambda cause: held[cause]) != "composition":
        explained = any(_is_large(layer, cause) for cause in held) or not is_noisy_in_training(layer)
        return None if explained else "small_batch"
    if held["small_batch"] <= noise_limit(layer.threshold):
        limit = mismatch_limit(layer)
        held = {
            cause: share / (noise_limit(layer.threshold) if cause == "small_batch" else limit)
            for cause, share in held.items()
        }
    return max(held, key=lambda cause: held[cause])


def _is_large(layer: Layer, cause: Cause) -> bool:
    share = share_of(layer, cause)
    return share is not None and min(_lower_end(layer, cause), share) > share_limit(layer, cause)


def _is_largest(layer: Layer, cause: Cause) -> bool:
    """Whether it is the largest share of the layer but for noise within its limit, and large enough to suspect it."""
    held = {other: share_of(layer, other) or 0.0 for other in SHARES if other != "small_batch"}
    low = _lower_end(layer, cause)
    return held[cause] == max(held.values()) and min(low, held[cause]) > SUSPICIOUS * mismatch_limit(layer)


def _lower_end(layer: Layer, cause: Cause) -> float:
    return lower_end(None if layer.share_intervals is None else getattr(layer.share_intervals, cause))


def _is_needed(layer: Layer, cause: Cause) -> bool:
    """Whether the layer would still be flagged at inference without its larger causes."""
    held = [share_of(layer, other) or 0.0 for other in SHARES]
    own = share_of(layer, cause) or 0.0
    left = sum(share for share in held if 0 < share <= own)
    if not is_off_at_inference(layer):
        return True
    return left > mismatch_limit(layer) and own > LEAST_PART * sum(share for share in held if share > 0)


def _is_possible(layer: Layer, cause: Cause) -> bool:
    """Composition is no cause where batches do not differ significantly from i.i.d. ones: what it adds is chance.

    Nor are the running statistics, where nothing uses them.
    """
    if cause in STATISTICS_CAUSES:
        return layer.only_in != "train"
    return cause != "composition" or layer.composition is None or is_significant(layer.composition)


def _wrong_statistics(layer: Layer) -> float:
    shares = layer.shares
    return 0.0 if shares is None else shares.lag + shares.dropout + shares.propagation


class ShareRule(MeasuredRule):
    """A rule on one share of the mismatch at inference.

    Attributes:
        adds_up: What earlier layers ("they") pass on to later ones by this cause, a clause; empty: nothing.
    """

    adds_up: ClassVar[str] = ""

    severity = "error"
    unit = "D"
    needs: ClassVar[Need] = "data"

    @abstractmethod
    def explain(self, layer: Layer, facts: Facts) -> str:
        """What is wrong with a failing layer, one or two sentences."""

    def advise(self, layer: Layer, facts: Facts) -> str:
        """What to do about a failing layer."""
        return self.remedy

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """The verdict on a layer whose share is not known."""
        return self.skipped(layer.name, why_no_shares(layer))

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        share, limit = share_of(layer, self.cause), share_limit(layer, self.cause)
        if share is None:
            return self.without_share(layer, facts)
        found = found_against(layer, self.cause, facts)
        if found is None:
            message = f"This cause accounts for D = {mismatch(share)}{_although(layer, self.cause, share)}."
            return self.passed(layer.name, message, share, limit)
        amount, severity = found
        message = f"{self.explain(layer, facts)} {amount}"
        return self.failed(layer.name, message, share, limit, severity, self.advise(layer, facts))


def found_against(layer: Layer, cause: Cause, facts: Facts) -> tuple[str, Severity] | None:
    """How much a share is and what that costs, in sentences, and how serious it is; None where it is no finding."""
    share = share_of(layer, cause)
    if share is not None and is_cause(layer, cause):
        severity = severity_of(cause, facts)
        told = in_words(layer, share, share_limit(layer, cause))
        return f"{told}{_at_no_cost(cause, facts) if severity == 'warning' else ''}", severity
    if share is not None and is_suspect(layer, cause, facts):
        return _suspected(cause, share, facts), "error"
    return None


def _at_no_cost(cause: Cause, facts: Facts) -> str:
    """What was measured of a cause that is a warning, a sentence behind another one."""
    change = effect.inconsistency(facts.gaps, facts.chance).main
    if change is None:
        return ""
    trains = "" if cause in STATISTICS_CAUSES else ": if anything suffers, it is training"
    surely = change.interval is not None and change.interval[0] > 0
    how = "worse for it by too little to count" if surely else "no worse for it"
    return f" Inference is {how} ({change.words(*effect.STATISTICS)}){trains}."


def _suspected(cause: Cause, share: float, facts: Facts) -> str:
    """Why a share within the limit is named all the same, a sentence."""
    remedy = effect.tried(facts.remedies, "recalibrated") if cause in STATISTICS_CAUSES else None
    change = effect.surely_worse(facts) if remedy is None else effect.gain(facts, "recalibrated").main
    ends = effect.STATISTICS if remedy is None else ("as loaded", "with recalibrated statistics")
    on = "" if remedy is None else f" on {remedy.scored_on} data"
    why = "" if change is None else f", but {change.words(*ends)}{on}"
    return f"(It accounts for D = {mismatch(share)}, which is within the limit{why}.)"


def why_no_shares(layer: Layer) -> str:
    """Why the mismatch of a layer has no shares, a clause."""
    known = layer.note.rstrip(".") if layer.note else "it was not measured at inference"
    return f"the layer's mismatch could not be decomposed ({known})"


def _although(layer: Layer, cause: Cause, share: float) -> str:
    """Why a share is not named as a cause, a clause."""
    if share <= share_limit(layer, cause):
        return " of the layer's mismatch"
    if not layer.flagged:
        return ", and the layer is within its limit"
    if not _is_possible(layer, cause):
        if cause in STATISTICS_CAUSES:
            return ", but nothing uses its running statistics"
        return ", but batches do not differ significantly from i.i.d. ones"
    if not _is_large(layer, cause):
        return ", which is not significantly above the limit (95%)"
    return ", which is too small to flag the layer by itself"


def in_words(layer: Layer, share: float, own_limit: float) -> str:
    """How much of the mismatch a share is, and the limits of both, a sentence."""
    total, limit = None if layer.eval is None else layer.eval.mismatch, mismatch(flagging_limit(layer))
    if layer.only_in == "train":
        return f"(D = {mismatch(share)}; the layer runs in training only, and its limit is that of noise, {limit}.)"
    if total is None or not is_off_at_inference(layer):
        return f"(D = {mismatch(share)} at inference; the layer is flagged in training, where its limit is {limit}.)"
    if share > total * (1 + ROUNDING):
        part = f"It adds D = {mismatch(share)}, which other causes offset in part: the layer has D = {mismatch(total)}"
    else:
        part = f"It accounts for D = {mismatch(min(share, total))} of {mismatch(total)}"
    own = mismatch(own_limit)
    limits = f"the layer's limit is {limit}" if own == limit else f"its limit is {own}, the layer's is {limit}"
    return f"({part}; {limits}.)"
