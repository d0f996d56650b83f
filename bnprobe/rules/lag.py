"""BN203: stale running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bnprobe.numbers import number, percent
from bnprobe.records import Layer, Verdict
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.interface import Link, anatomy_of
from bnprobe.rules.shares import ShareRule, share_limit

LEFT_ON_START = 0.01
"""Above this weight on the initial mean 0 and variance 1, these still show in the average."""

SLOW = 500.0
"""An average over more batches than this is slower than the weights move through most of training."""

NOISY = 0.5
"""An average with at least this weight on the newest batch is an average of fewer than three batches."""

USUAL_RATE = 0.1
"""The default momentum: a running average that is noisier than with this one has a cause of its own."""

NOISE_FACTOR = 3.0
"""A running average is one random draw: three times its expected noise is still noise."""


def _is_no_more_than_domains(layer: Layer) -> bool:
    """A running average that alternates between two domains is off by no more than their distance."""
    shares, domains = layer.shares, layer.domains
    return shares is None or domains is None or shares.lag - domains.mismatch <= share_limit(layer)


def _is_no_more_than_composition(layer: Layer) -> bool:
    """A running average of non-i.i.d. batches is off by no more than these are."""
    shares = layer.shares
    return shares is not None and shares.composition is not None and shares.lag <= shares.composition


def _is_noise_of_batches(layer: Layer) -> bool:
    """A running average of noisy batches is noisy itself, by a / (2 - a) of their noise at the rate a."""
    shares, rate = layer.shares, min(layer.momentum or 0.0, USUAL_RATE)
    if shares is None:
        return False
    noise = (shares.small_batch + (shares.composition or 0.0)) * rate / (2 - rate)
    return shares.lag <= NOISE_FACTOR * noise


class Lag(ShareRule):
    """The running statistics differ from those of the training data with the current weights.

    What:
        The part of the layer's mismatch D that disappears when the running statistics are replaced by the mean and
        variance of all training batches, computed as in training. It fails on a flagged layer where it is the largest
        share, or from half of the layer's limit on, unless the layer would be within its limit without its larger
        causes; and where values overflow at inference only.

    Why:
        Running statistics are an average over past batches, taken while the weights changed. They are stale if the
        average is slow (small momentum), young (few updates) or noisy (large momentum); and they are wrong if they
        belong to other data or weights, or were reset. The weights are fine: only the statistics used at inference are
        not.

    Example:
        A model is fine-tuned for 50 steps and evaluates worse than before, but evaluated in train mode it is good.
        Averaged weights (EMA, SWA) with the statistics of the last weights show the same.

    Remedy:
        Recalibrate the running statistics on training data, without training: `bnprobe recalibrate`. Then fix the
        cause: the momentum, or the checkpoint.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, section 3 (population statistics instead of moving averages). Izmailov
        et al. 2018, arXiv 1803.05407, section 3.2 (statistics of averaged weights).
    """

    code = "BN203"
    title = "stale running statistics"
    cause = "lag"
    real_data = True
    finding = "the running statistics differ from those of the training data with these weights"
    remedy = "Recalibrate the running statistics on training data (bnprobe recalibrate); the weights need no training."
    follows_from = (
        Link("non_finite"),
        Link("never_trained"),
        Link("momentum_convention"),
        Link("double_update"),
        Link("frozen_mismatch"),
        Link("shared_domains", _is_no_more_than_domains),
        Link("composition", _is_no_more_than_composition),
        Link("small_batch", _is_noise_of_batches),
    )
    upstream_order = 80
    free_remedy = "recalibrated"

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        reason = "" if anatomy is None else f" Most likely reason: {likeliest_reason(anatomy)}."
        return f"The running statistics are not those of the training data{_direction(layer)}.{reason}"

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """A layer that overflows at inference and not in training has running statistics that are far off."""
        overflows = layer.eval is None and layer.train is not None and layer.only_in is None
        if not layer.flagged or not overflows or not layer.running_statistics:
            return super().without_share(layer, facts)
        return self.failed(
            layer.name,
            "The layer's values overflow at inference but not in training: its running statistics, or those of an"
            " earlier layer, are far from those of the training data.",
        )


def likeliest_reason(layer: Anatomy) -> str:
    """Why running statistics may be stale, from the layer's settings and its number of updates; a clause."""
    return next(_reasons(layer))


def _reasons(layer: Anatomy) -> Iterator[str]:
    weight, updates = layer.momentum, layer.batches_tracked
    scale = min(1.0, layer.median_variance or 1.0)
    if not layer.trains_statistics:
        yield "training does not update them (eval mode), while earlier weights may have changed"
    if weight == 0:
        yield "momentum=0, with which they are never updated"
    if updates == 0:
        yield "num_batches_tracked is 0, so they were reset or never updated"
    if weight is not None and 0 < weight < 1:
        yield from _reasons_of_average(weight, updates, scale)
    if weight is not None and weight >= NOISY:
        yield f"momentum={weight:g} averages over the last few batches only, so they are noisy"
    known = "" if updates is None else f"; the {updates:,} updates counted are enough to converge"
    yield (
        "the weights changed faster than the average follows (a high learning rate until the end), or the statistics"
        f" belong to other data or weights (a copy, averaged weights, a fine-tuned model){known}"
    )


def _reasons_of_average(weight: float, updates: int | None, scale: float) -> Iterator[str]:
    """``scale``: of the running variance, compared with which the remainder of the initial one must be small."""
    left = 0.0 if updates is None else (1 - weight) ** updates
    settled = -1 / math.log1p(-weight)
    if left > LEFT_ON_START * scale:
        yield (
            f"too few updates: after {updates:,} with momentum={weight:g}, {percent(left)} of their weight is still on"
            " the initial mean 0 and variance 1"
        )
    if settled > SLOW:
        batches = number(float(f"{settled:.2g}"))
        yield f"momentum={weight:g} averages over about the last {batches} batches, slower than weights change"


def _direction(layer: Layer) -> str:
    """How they are off, from the eval path: r and d of batch against running statistics."""
    if layer.eval is None:
        return ""
    spread, shift = layer.eval.r.quantiles["0.5"], math.hypot(layer.eval.d.mean, layer.eval.d.std)
    return (
        f": at inference the standard deviation of a typical batch is {number(spread)} times theirs, and its mean is"
        f" {number(shift)} of their standard deviations away"
    )
