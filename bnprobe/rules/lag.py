"""BN203: stale running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bnprobe.numbers import joined, mismatch, number, percent
from bnprobe.records import Layer, Severity, Verdict
from bnprobe.rules import effect
from bnprobe.rules.double_update import has_extra_updates
from bnprobe.rules.facts import EXPLAINED, Anatomy, Facts
from bnprobe.rules.interface import Link, anatomy_of
from bnprobe.rules.shares import NOISE_FACTOR, ShareRule, is_of_composition, share_limit

LEFT_ON_START = 0.03
"""Above this weight on the initial mean 0 and variance 1, these still show in the average."""

FAR = 2.0
"""Standard deviations that the mean of a channel is away from 0, seldom more."""

EXPLAINS = 0.25
"""A reason that gives less than this part of the measured share is not the reason."""

SLOW = 500.0
"""An average over more batches than this is slower than the weights move through most of training."""

NOISY = 0.5
"""An average with at least this weight on the newest batch is an average of fewer than three batches."""

USUAL_RATE = 0.1
"""The default momentum: a running average that is noisier than with this one has a cause of its own."""

PADDED = 0.05
"""Less padding than this hardly moves a mean or variance."""

PRUNED = 0.2
"""No training gives this many weights that are exactly 0."""

QUANTIZED = 256
"""The number of values of eight bits."""


def _is_no_more_than_domains(layer: Layer) -> bool:
    """A running average that alternates between two domains is off by no more than their distance."""
    shares, domains = layer.shares, layer.domains
    return shares is None or domains is None or shares.lag - domains.mismatch <= share_limit(layer)


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
        belong to other data or weights, or were reset. A reason is named where the scan has evidence for it: the
        settings and the updates counted, another eps with which the statistics fit, padding in the data, pruned or
        quantized weights, statistics kept in bfloat16, processes that differ. It is a warning where loss and metric are
        known to be no worse at inference and recalibrated statistics are no gain; and where these are surely better,
        it is named even if no layer is beyond its limit.

        A layer that training leaves in eval mode is never flagged, since it does the same in both modes. It fails where
        new statistics in these layers are better on held-out data than new ones in the other layers alone, and is an
        error from 99% confidence on, or where the outputs are at chance level. A frozen part whose weights belong to
        its statistics passes.

    Example:
        A model is fine-tuned for 50 steps and evaluates worse than before, but evaluated in train mode it is good.
        Averaged weights (EMA, SWA) with the statistics of the last weights show the same.

    Remedy:
        Recalibrate the running statistics on training data, without training: `bnprobe recalibrate`, with
        `--include-frozen` those of layers in eval mode, too. Then fix the cause: the momentum, or the checkpoint.

    Reference:
        Wu and Johnson 2021, arXiv 2105.07576, section 3 (population statistics instead of moving averages). Izmailov
        et al. 2018, arXiv 1803.05407, section 3.2 (statistics of averaged weights).
    """

    code = "BN203"
    title = "stale running statistics"
    cause = "lag"
    real_data = True
    finding = "the running statistics differ from those of the training data with these weights"
    remedy = "Recalibrate the running statistics on training data (bnprobe recalibrate)."
    follows_from = (
        Link("non_finite"),
        Link("never_trained"),
        Link("momentum_convention"),
        Link("double_update"),
        Link("shared_domains", _is_no_more_than_domains),
        Link("composition", is_of_composition),
        Link("small_batch", _is_noise_of_batches),
    )
    upstream_order = 80
    adds_up = "what their running statistics are off by"
    free_remedy = "recalibrated"
    also_tried = (effect.WITH_FROZEN,)
    commands = ("recalibrate --include-frozen", "recalibrate")
    other_remedy = (
        "Find out which data or weights the running statistics belong to: recalibrating them was tried, and {gain}."
    )
    mended_first = ("composition",)

    def explain(self, layer: Layer, facts: Facts) -> str:
        anatomy = anatomy_of(facts, layer.name)
        reason = "" if anatomy is None else f" {_in_words(anatomy, layer, facts)}"
        return f"The running statistics are not those of the training data{_direction(layer)}.{reason}"

    def advise(self, layer: Layer, facts: Facts) -> str:
        found = _first(anatomy_of(facts, layer.name), layer, facts)
        usual = _OF_FROZEN if effect.gain(facts, effect.WITH_FROZEN).standing == "better" else self.remedy
        return usual if found is None or found.remedy is None else found.remedy

    def without_share(self, layer: Layer, facts: Facts) -> Verdict:
        """A frozen layer is judged by what new statistics do.

        A layer that overflows at inference and not in training has running statistics that are far off.
        """
        if layer.name in facts.frozen_lag:
            return self._of_frozen(layer, facts)
        unmeasured = layer.eval is None and layer.train is not None and layer.only_in is None
        overflows = unmeasured and layer.name not in facts.batch_at_inference
        if not layer.flagged or not overflows or not layer.running_statistics:
            return super().without_share(layer, facts)
        return self.failed(
            layer.name,
            "The layer's values overflow at inference but not in training: its running statistics, or those of an"
            " earlier layer, are far from those of the training data.",
        )

    def _of_frozen(self, layer: Layer, facts: Facts) -> Verdict:
        """New statistics in all frozen layers were tried together: a gain is put down to those that are far off."""
        lag, limit, words = facts.frozen_lag[layer.name], share_limit(layer), effect.of_frozen(facts)
        told = f"D = {mismatch(lag)} away from those of the training data{'' if words is None else f'; {words}'}"
        gain, is_far = effect.gain(facts, effect.WITH_FROZEN), lag >= min(limit, max(facts.frozen_lag.values()))
        if not is_far or gain.standing != "better":
            return self.passed(layer.name, f"Training leaves the running statistics as they are; they are {told}.")
        useless = effect.is_at_chance(facts.chance)
        severity: Severity = "info" if facts.is_new else "error" if gain.is_sure_gain or useless else "warning"
        message = f"{self.explain(layer, facts)} (They are {told}.)"
        remedy = self.advise(layer, facts)
        if useless:
            message += " With them the outputs are at chance level, or close to it."
            remedy += " Then train the layers behind them again."
        return self.failed(layer.name, message, lag, limit, severity, remedy)


_OF_FROZEN = (
    "Recalibrate the running statistics on training data, those of the frozen layers, too (bnprobe recalibrate"
    " --include-frozen)."
)


@dataclass(frozen=True)
class Reason:
    """Why running statistics are stale, with the evidence, a clause; what to do where that is not to recalibrate."""

    words: str
    remedy: str | None = None


def reasons(layer: Anatomy, measured: Layer, facts: Facts) -> Iterator[Reason]:
    """Reasons that there is evidence for, the strongest first."""
    weight, updates = layer.momentum, layer.batches_tracked
    if not layer.trains_statistics:
        yield Reason("training does not update them (eval mode), while the data or earlier weights may have changed")
    if weight == 0:
        yield Reason("momentum=0, with which they are never updated")
    if updates == 0 and layer.untouched:
        yield Reason("num_batches_tracked is 0, so they were reset or never updated")
    if weight is not None and 0 < weight < 1 and (found := _too_few(weight, updates, layer.median_variance, measured)):
        yield found
    yield from _of_the_computation(layer, measured, facts)
    yield from _of_the_weights(layer, facts)
    if weight is not None and 0 < weight < 1 and -1 / math.log1p(-weight) > SLOW:
        batches = number(float(f"{-1 / math.log1p(-weight):.2g}"))
        yield Reason(f"momentum={weight:g} averages over about the last {batches} batches, slower than weights change")
    if weight is not None and (weight >= NOISY or _is_noise(measured, weight)):
        noise = ", each of them noisy" if _is_noise(measured, weight) else ""
        yield Reason(f"momentum={weight:g} averages over the last few batches only{noise}, so they are noisy")


def _of_the_computation(layer: Anatomy, measured: Layer, facts: Facts) -> Iterator[Reason]:
    """The layer computes, or gets, something else than it did when the statistics were taken."""
    other = facts.other_eps
    if other is not None and (left := other.left.get(layer.name)) is not None and left <= EXPLAINED:
        yield Reason(
            f"eps is {layer.eps:g}, and was {other.eps:g} when the weights were trained: with eps={other.eps:g} in all"
            f" layers, {percent(left)} of the mismatch is left",
            f"Set eps={other.eps:g} in all BN layers; the running statistics and weights fit that.",
        )
    padding = facts.padding
    if padding is not None and padding.training > PADDED:
        held_out = "" if padding.held_out is None else f", and {percent(padding.held_out)} of the held-out data"
        yield Reason(
            f"padding counts as data: the ends of samples that hold one value are {percent(padding.training)} of a"
            f" training batch{held_out}, and how much it is differs between batches",
            "Keep padding out of the statistics (mask it, or batch samples of like size), or pad at inference as in"
            " training; then recalibrate the running statistics (bnprobe recalibrate).",
        )
    apart = facts.rank_mismatch.get(layer.name)
    if apart is not None and apart > share_limit(measured):
        yield Reason(f"each process keeps its own statistics, which differ by up to D = {number(apart)}")
    updates = measured.updates
    if updates is not None and has_extra_updates(measured):
        yield Reason(f"a training step updates them {number(updates.per_step)} times, also on other data")


def _of_the_weights(layer: Anatomy, facts: Facts) -> Iterator[Reason]:
    """The weights are not those that the statistics were taken with."""
    if layer.zeros is not None and layer.zeros >= PRUNED:
        yield Reason(f"weights were pruned afterwards: {percent(layer.zeros)} of those before the layer are exactly 0")
    if layer.levels is not None and layer.levels <= QUANTIZED:
        yield Reason(f"weights were quantized afterwards: those before the layer have {layer.levels} different values")
    if layer.bfloat16:
        yield Reason("they were kept in bfloat16, whose 8 bits lose small updates")
    if facts.averaged is not None:
        yield Reason(facts.averaged)


def _too_few(weight: float, updates: int | None, variance: float | None, measured: Layer) -> Reason | None:
    """``variance``: the median running variance, compared with which the remainder of the initial one must be small."""
    left = 0.0 if updates is None else (1 - weight) ** updates
    if not updates or left <= LEFT_ON_START * min(1.0, variance or 1.0):
        return None
    if measured.shares is not None and _of_start(left, variance or 1.0) < EXPLAINS * measured.shares.lag:
        return None
    return Reason(
        f"too few updates: after {updates:,} with momentum={weight:g}, {percent(left)} of their weight is still on the"
        " initial mean 0 and variance 1"
    )


def _of_start(left: float, variance: float) -> float:
    """The most D that the weight on the initial mean 0 and variance 1 gives a channel of this running variance.

    The running variance is (1 - left) times that of the data, plus left; the running mean is 1 - left times that of the
    data, which is seldom further than ``FAR`` standard deviations from 0.
    """
    of_data = max(variance - left, 0.0) / (1 - left)
    return (math.sqrt(of_data / variance) - 1) ** 2 + (FAR * left) ** 2


def _is_noise(layer: Layer, weight: float) -> bool:
    """Whether a running average of this weight is expected to be this noisy."""
    shares = layer.shares
    if shares is None or not 0 < weight < 1 or weight <= USUAL_RATE:
        return False
    return shares.lag <= NOISE_FACTOR * (shares.small_batch + (shares.composition or 0.0)) * weight / (2 - weight)


def _first(layer: Anatomy | None, measured: Layer, facts: Facts) -> Reason | None:
    return None if layer is None else next(reasons(layer, measured, facts), None)


def _in_words(layer: Anatomy, measured: Layer, facts: Facts) -> str:
    found = _first(layer, measured, facts)
    if found is not None:
        return f"Most likely reason: {found.words}."
    tested = list(_ruled_out(layer, measured, facts))
    ruled_out = f" Ruled out: {joined(tested)}." if tested else ""
    guesses = "a high learning rate until the end, or statistics of other weights or data"
    guesses += f"; {facts.averaged_beside}" if facts.averaged_beside else ""
    return f"Why is not known ({guesses}).{ruled_out}"


def _ruled_out(layer: Anatomy, measured: Layer, facts: Facts) -> Iterator[str]:
    """Reasons that were tested and are not it."""
    if layer.batches_tracked:
        yield f"too few updates ({layer.batches_tracked:,} counted)"
    if layer.momentum is not None:
        yield f"the momentum ({layer.momentum:g})"
    if facts.other_eps is not None and layer.name in facts.other_eps.left:
        yield "another eps"
    if measured.updates is not None:
        yield "extra updates per step"
    if layer.zeros is not None and layer.levels is not None:
        yield "pruned or quantized weights"
    if layer.bfloat16 is not None:
        yield "statistics in bfloat16"


def _direction(layer: Layer) -> str:
    """How they are off, from the eval path: r and d of batch against running statistics."""
    if layer.eval is None:
        return ""
    spread, shift = layer.eval.r.quantiles["0.5"], math.hypot(layer.eval.d.mean, layer.eval.d.std)
    return (
        f": at inference the standard deviation of a typical batch is {number(spread)} times theirs, and its mean is"
        f" {number(shift)} of their standard deviations away"
    )
