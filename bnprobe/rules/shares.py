"""What the rules on the shares of a layer's mismatch have in common: when a share is large enough to name its cause.

Only a flagged layer gets a cause, and a flagged layer always gets at least one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from bnprobe.numbers import number, percent
from bnprobe.records import SOURCES, Cause, Interval, Layer, Verdict
from bnprobe.rules.facts import Facts, Need
from bnprobe.rules.interface import Rule
from bnprobe.stats.theory import mismatch_iid

SHARES: tuple[Cause, ...] = tuple(source.field for source in SOURCES if source.adds_up)
"""The measured shares that add up to the mismatch at inference."""

STATISTICS_CAUSES: tuple[Cause, ...] = ("lag", "dropout", "propagation")
"""The shares of wrong running statistics; they can offset each other."""

PART_OF_LIMIT = 0.5
"""A cause is named from half of the layer's limit on: two such causes flag a layer."""

COMPOSITION_P = 0.01
"""Significance level for non-i.i.d. batches, after correction for all layers and channels of the model."""


def mismatch_limit(layer: Layer) -> float:
    """The limit of a layer: the mismatch D above which it is flagged."""
    return mismatch_iid(layer.threshold)


def share_limit(layer: Layer) -> float:
    """The share of D above which its cause is named."""
    return PART_OF_LIMIT * mismatch_limit(layer)


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
    if layer.only_in == "train" and cause in STATISTICS_CAUSES:
        return False  # nothing uses its running statistics
    if not layer.flagged or share_of(layer, cause) is None or not _is_possible(layer, cause):
        return False
    return _main_cause(layer) == cause or (_is_large(layer, cause) and _is_needed(layer, cause))


def is_off_at_inference(layer: Layer) -> bool:
    """Whether the layer is flagged at inference, and not in training only."""
    return layer.eval is not None and layer.eval.interval[0] > mismatch_limit(layer)


def _main_cause(layer: Layer) -> Cause | None:
    """The cause to name even if its share is not significantly large; in training alone it is the noise of batches."""
    held = {cause: share_of(layer, cause) or 0.0 for cause in SHARES if _is_possible(layer, cause)}
    if "composition" not in held:
        # For a layer with several domains it is the distance between them; otherwise it is noise of small batches.
        composed = share_of(layer, "composition") or 0.0
        apart = 0.0 if layer.domains is None else min(layer.domains.mismatch, composed)
        held["small_batch"] += composed - apart
        if apart > max(held.values()):
            return None
    largest = max(held, key=lambda cause: held[cause])
    if is_off_at_inference(layer) or largest == "composition":
        return largest
    return None if any(_is_large(layer, cause) for cause in held) else "small_batch"


def _is_large(layer: Layer, cause: Cause) -> bool:
    interval: Interval | None = None if layer.share_intervals is None else getattr(layer.share_intervals, cause)
    share = share_of(layer, cause)
    return share is not None and min(lower_end(interval), share) > share_limit(layer)


def _is_needed(layer: Layer, cause: Cause) -> bool:
    """Whether the layer would still be flagged at inference without its larger causes."""
    held = [share_of(layer, other) or 0.0 for other in SHARES]
    own = share_of(layer, cause) or 0.0
    left = sum(share for share in held if 0 < share <= own)
    return left > mismatch_limit(layer) or not is_off_at_inference(layer)


def _is_possible(layer: Layer, cause: Cause) -> bool:
    """Composition is no cause where batches do not differ significantly from i.i.d. ones: what it adds is chance."""
    return cause != "composition" or layer.composition is None or layer.composition.p_value < COMPOSITION_P


def _wrong_statistics(layer: Layer) -> float:
    shares = layer.shares
    return 0.0 if shares is None else shares.lag + shares.dropout + shares.propagation


class ShareRule(Rule):
    """A rule on one share of the mismatch at inference."""

    severity = "error"
    unit = "D"
    needs: ClassVar[Need] = "data"

    def check(self, facts: Facts) -> Iterator[Verdict]:
        for layer in facts.layers.values():
            yield self._judge(layer, facts)

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
        share, limit = share_of(layer, self.cause), share_limit(layer)
        if share is None:
            return self.without_share(layer, facts)
        if not is_cause(layer, self.cause):
            message = f"This cause accounts for D = {number(share)}{_although(layer, self.cause, share)}."
            return self.passed(layer.name, message, share, limit)
        message = f"{self.explain(layer, facts)} {in_words(layer, share)}"
        return self.failed(layer.name, message, share, limit, remedy=self.advise(layer, facts))


def why_no_shares(layer: Layer) -> str:
    """Why the mismatch of a layer has no shares, a clause."""
    known = layer.note.rstrip(".") if layer.note else "it was not measured at inference"
    return f"the layer's mismatch could not be decomposed ({known})"


def _although(layer: Layer, cause: Cause, share: float) -> str:
    """Why a share is not named as a cause, a clause."""
    if share <= share_limit(layer):
        return " of the layer's mismatch"
    if not layer.flagged:
        return ", and the layer is within its limit"
    if not _is_possible(layer, cause):
        return ", but batches do not differ significantly from i.i.d. ones"
    if not _is_large(layer, cause):
        return ", which is not significantly above the limit (95%)"
    return ", which is too small to flag the layer by itself"


def in_words(layer: Layer, share: float) -> str:
    """How much of the mismatch a share is, a sentence."""
    total, limit = None if layer.eval is None else layer.eval.mismatch, number(mismatch_limit(layer))
    if layer.only_in == "train":
        return f"(D = {number(share)}; the layer runs in training only, and its limit is {limit}.)"
    if total is None or not is_off_at_inference(layer):
        return f"(D = {number(share)} at inference; the layer is flagged in training, where its limit is {limit}.)"
    if share > total:
        return f"(It adds D = {number(share)}, partly offset by other causes; the layer's limit is {limit}.)"
    return f"(It accounts for D = {number(share)} of {number(total)}, {percent(share / total)}; the limit is {limit}.)"
