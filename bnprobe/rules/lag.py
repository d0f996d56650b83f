"""BN203: running statistics that do not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator

from bnprobe.facts import Anatomy, Facts
from bnprobe.records import Layer, Verdict
from bnprobe.rules.interface import anatomy_of
from bnprobe.rules.shares import ShareRule
from bnprobe.rules.wording import number, percent

LEFT_ON_START = 0.01
"""Above this weight on the initial mean 0 and variance 1, these still show in the average."""

SLOW = 500.0
"""An average over more batches than this is slower than the weights move through most of training."""

NOISY = 0.5
"""An average with at least this weight on the newest batch is the average of fewer than three batches."""


class Lag(ShareRule):
    """Running statistics differ from those that the training batches give with these weights.

    What:
        How much of the layer's mismatch D goes away when the running statistics are replaced by the mean and variance
        of all training batches, run as in training. It fails on a flagged layer where it is the largest share, or from
        half of the layer's limit on unless the layer would be within its limit without its larger causes; and where
        values overflow at inference only.

    Why:
        Running statistics are an average over past batches, taken while the weights changed. They lag if the average
        is slow (small momentum), young (few updates) or noisy (large momentum); and they are simply wrong if they come
        from other data or weights, or were reset. The weights are fine: only what inference normalizes with is not.

    Example:
        A model is fine-tuned for 50 steps and evaluates worse than before; evaluated in training mode it is good.
        Averaged weights (EMA, SWA) with the statistics of the last weights do the same.

    Remedy:
        Take the running statistics anew from training images, without training: `bnprobe recalibrate`. Then mend the
        cause: the momentum, or the checkpoint.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, section 3 (population statistics instead of moving averages). Izmailov
        et al. 2018, arXiv 1803.05407, section 3.2 (statistics of averaged weights).
    """

    code = "BN203"
    title = "running statistics lag"
    cause = "lag"
    real_data = True
    finding = "the running statistics do not fit what this loader and these weights give"
    remedy = "Take the running statistics anew over training batches (recalibrate); the weights need no training."

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        reason = "" if anatomy is None else f" Likeliest reason: {likeliest_reason(anatomy)}."
        return f"The running statistics are not those of the training batches{_direction(layer)}.{reason}"

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """A layer that overflows at inference and not in training has been given statistics that are far off."""
        if not layer.flagged or layer.eval is not None or layer.train is None or not layer.running_statistics:
            return super().without_share(layer, facts)
        return self.failed(
            layer.name,
            "At inference the layer's values overflow, and in training they do not: its running statistics, or those of"
            " a layer before it, are far from what the training batches give.",
        )


def likeliest_reason(layer: Anatomy) -> str:
    """Why running statistics may not fit, from what the layer is set to and how often it was updated; a clause."""
    return next(_reasons(layer))


def _reasons(layer: Anatomy) -> Iterator[str]:
    weight, updates = layer.momentum, layer.batches_tracked
    scale = min(1.0, layer.median_variance or 1.0)
    if not layer.trains_statistics:
        yield "training leaves them as they are (eval mode), while the weights before the layer may have moved"
    if weight == 0:
        yield "momentum=0, with which they never move"
    if updates == 0:
        yield "no update is counted, so that they were reset or never trained"
    if weight is not None and 0 < weight < 1:
        yield from _reasons_of_average(weight, updates, scale)
    if weight is not None and weight >= NOISY:
        yield f"momentum={weight:g} keeps only the last few batches, so that chance decides"
    known = "" if updates is None else f"; {updates:,} updates are counted, enough to settle"
    yield (
        "the weights moved on faster than the average follows (a high learning rate to the end), or it belongs to other"
        f" data or weights (a copy, an average of weights, a fine-tuned model){known}"
    )


def _reasons_of_average(weight: float, updates: int | None, scale: float) -> Iterator[str]:
    """``scale``: of the running variance, beside which what is left of the initial one must be small."""
    left = 0.0 if updates is None else (1 - weight) ** updates
    settled = -1 / math.log1p(-weight)
    if left > LEFT_ON_START * scale:
        yield (
            f"too few updates: after {updates:,} with momentum={weight:g}, {percent(left)} of their weight is still on"
            " the initial mean 0 and variance 1"
        )
    if settled > SLOW:
        batches = number(float(f"{settled:.2g}"))
        yield f"momentum={weight:g} averages over the last {batches} or so batches, slower than weights move"


def _direction(layer: Layer) -> str:
    """Which way they are off, from the eval path: r and d of batch against running statistics."""
    if layer.eval is None:
        return ""
    spread, shift = layer.eval.r.quantiles["0.5"], math.hypot(layer.eval.d.mean, layer.eval.d.std)
    return (
        f": at inference a typical batch spreads {number(spread)} times as much as they say, and its mean lies"
        f" {number(shift)} of their standard deviations away"
    )
