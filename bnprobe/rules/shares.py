"""What the rules on the shares of a layer's mismatch have in common: when a share is large enough to blame its cause.

Only a flagged layer can be blamed on anything, and a flagged layer always is, on one cause at least.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from bnprobe.facts import Facts, Need
from bnprobe.records import Cause, Interval, Layer, Verdict
from bnprobe.rules.interface import Rule
from bnprobe.rules.wording import number, percent
from bnprobe.stats.theory import mismatch_iid

SHARES: tuple[Cause, ...] = ("small_batch", "composition", "lag", "dropout", "propagation")
"""The shares that add up to the mismatch at inference."""

STATISTICS: tuple[Cause, ...] = ("lag", "dropout", "propagation")
"""Those that say how the running statistics came to be wrong; they can offset each other."""

PART_OF_LIMIT = 0.5
"""A cause is blamed from half the mismatch that a layer may have in all: two such causes flag a layer."""

COMPOSITION_P = 0.01
"""Batches drawn at random look this uneven in one of a hundred healthy models, all layers and channels considered."""


def mismatch_limit(layer: Layer) -> float:
    """The mismatch D from which on a layer is flagged."""
    return mismatch_iid(layer.threshold)


def share_limit(layer: Layer) -> float:
    """The share of D from which on its cause is blamed."""
    return PART_OF_LIMIT * mismatch_limit(layer)


def lower_end(interval: Interval | None) -> float:
    """Lower end of an interval; without one nothing is sure."""
    return -math.inf if interval is None else interval[0]


def share_of(layer: Layer, cause: Cause) -> float | None:
    """The share of a cause; None if it is not known.

    Of wrong running statistics a cause has at most what is wrong with them in all: where they were taken anew
    (recalibrated) after training with dropout, a large share of dropout is offset by a negative one of lag, and both
    mean that nothing is wrong.
    """
    share: float | None = None if layer.shares is None else getattr(layer.shares, cause)
    return share if share is None or cause not in STATISTICS else min(share, _wrong_statistics(layer))


def is_blamed(layer: Layer, cause: Cause) -> bool:
    """Whether a cause explains, alone or with others, why the layer is flagged."""
    if not layer.flagged or share_of(layer, cause) is None or not _is_possible(layer, cause):
        return False
    return _main_cause(layer) == cause or (_is_large(layer, cause) and _is_needed(layer, cause))


def is_off_at_inference(layer: Layer) -> bool:
    """Whether the layer is flagged on the eval path, not only on the train path."""
    return layer.eval is not None and layer.eval.interval[0] > mismatch_limit(layer)


def _main_cause(layer: Layer) -> Cause | None:
    """The cause to name where no share is surely large; on the train path alone it is the noise of the batches."""
    held = {cause: share_of(layer, cause) or 0.0 for cause in SHARES if _is_possible(layer, cause)}
    if "composition" not in held:
        # Of several domains it is their distance; else chance, like the noise of batches that are drawn at random.
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
    """Whether the layer would be off at inference without its larger causes, too."""
    held = [share_of(layer, other) or 0.0 for other in SHARES]
    own = share_of(layer, cause) or 0.0
    left = sum(share for share in held if 0 < share <= own)
    return left > mismatch_limit(layer) or not is_off_at_inference(layer)


def _is_possible(layer: Layer, cause: Cause) -> bool:
    """Batches that pass for drawn at random are not blamed: what they add is chance."""
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
        """What is wrong with a layer that fails, one or two sentences."""

    def advise(self, layer: Layer, facts: Facts) -> str:
        """What to do about a layer that fails."""
        return self.remedy

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """The verdict on a layer whose share is not known."""
        return self.skipped(layer.name, why_not_apart(layer))

    def _judge(self, layer: Layer, facts: Facts) -> Verdict:
        share, limit = share_of(layer, self.cause), share_limit(layer)
        if share is None:
            return self.without_share(layer, facts)
        if not is_blamed(layer, self.cause):
            return self.passed(layer.name, f"It makes up D = {number(share)}{_although(layer, share)}.", share, limit)
        message = f"{self.explain(layer, facts)} {in_words(layer, share)}"
        return self.failed(layer.name, message, share, limit, remedy=self.advise(layer, facts))


def why_not_apart(layer: Layer) -> str:
    """Why the mismatch of a layer has no shares, a clause."""
    known = layer.note.rstrip(".") if layer.note else "it was not measured on the eval path"
    return f"the layer's mismatch could not be taken apart ({known})"


def _although(layer: Layer, share: float) -> str:
    """Why a share above its limit is not blamed, a clause."""
    if share <= share_limit(layer):
        return " of this layer's mismatch"
    if not layer.flagged:
        return ", and the layer is within its limit"
    return ", but is not sure to matter, or would not without the larger causes"


def in_words(layer: Layer, share: float) -> str:
    """How much of the mismatch a share is, a sentence."""
    total, limit = None if layer.eval is None else layer.eval.mismatch, number(mismatch_limit(layer))
    if total is None or not is_off_at_inference(layer):
        return f"(D = {number(share)} at inference; the layer is flagged in training, its limit is {limit}.)"
    if share > total:
        return f"(D = {number(share)}, of which other causes offset some; a layer may have {limit} in all.)"
    return f"(D = {number(share)} of {number(total)}, {percent(share / total)}; a layer may have {limit} in all.)"
