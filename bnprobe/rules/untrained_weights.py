"""BN214: outputs that say nothing about their samples."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import mismatch, number
from bnprobe.records import Chance, Severity, Verdict, leading
from bnprobe.rules import effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.interface import Rule
from bnprobe.rules.shares import COMPOSITION_P, STATISTICS_CAUSES, mismatch_limit


class UntrainedWeights(Rule):
    """With batch statistics and with running statistics alike, the outputs say nothing about their own samples.

    What:
        Loss and metric with every sample's own output, against those with the output of another sample. It fails where
        in one mode the own output is not surely better, by 2 points of a metric between 0 and 1 or 5% of the value, and
        in the other by less than 15% of what is possible. A loss that does not depend on which sample an output belongs
        to cannot be judged, nor can batches that are not i.i.d. It passes where recalibrated statistics in frozen
        layers are better: then these are to be mended first (BN203). For a network that is as it was made it is a
        remark.

    Why:
        No statistics can help weights that predict nothing: what a scan finds beside it is real, but it is not the
            reason.
        Weights that were averaged for too short a time, a checkpoint that was not loaded, or one of another network
        look like this.

    Example:
        An exponential moving average of the weights with decay 0.999 is evaluated after 200 steps: 82% of it are still
        the initial weights. Accuracy is 0.10, with and without running statistics.

    Remedy:
        Look at the weights: evaluate those that were trained, not their average; or average with a smaller decay at the
        start; check that the checkpoint was loaded.

    Reference:
        Kingma and Ba 2015, arXiv 1412.6980, section 3 (bias of an average that starts at an initial value). Ojala and
        Garriga 2010, JMLR 11 (permutation tests of classifiers).
    """

    code = "BN214"
    title = "weights at chance level"
    cause = "untrained_weights"
    severity = "error"
    unit = ""
    needs = "data"
    real_data = True
    finding = "the outputs say nothing about their samples"
    remedy = (
        "Look at the weights, not at BN: was the checkpoint loaded, are these averaged weights that are still close to"
        " the initial ones, do the labels belong to the samples?"
    )
    reports_impact = False
    explains_layers = STATISTICS_CAUSES

    def check(self, facts: Facts) -> Iterator[Verdict]:
        known = [each for each in facts.chance if each.training is not None and each.inference is not None]
        if not known:
            yield self.skipped(
                None,
                "not measured: that takes a loss or metric by which an output belongs to a sample, and a reason to ask",
            )
            return
        message = f"{_words(known)}."
        if _is_one_kind_per_batch(facts) or not effect.is_at_chance(facts.chance):
            yield self.passed(None, message)
            return
        if effect.gain(facts, effect.WITH_FROZEN).standing == "better":
            yield self.passed(None, f"{message} Recalibrated statistics in the frozen layers are better: see BN203.")
            return
        severity: Severity = "info" if facts.is_new else "error"
        new = (
            " The network is as it was made."
            if facts.is_new
            else " That is chance level, or close to it, in both modes."
        )
        yield self.failed(None, message + new, severity=severity, remedy=self.remedy + _frozen(facts))


def _frozen(facts: Facts) -> str:
    """That frozen layers may keep the weights from learning, a sentence; empty where their statistics fit the data."""
    beyond = [
        apart
        for name, apart in facts.frozen_lag.items()
        if name in facts.layers and apart > mismatch_limit(facts.layers[name])
    ]
    if not beyond:
        return ""
    return (
        f" The statistics of frozen layers are up to D = {mismatch(max(beyond))} away from those of this data: do the"
        " layers get it in the form that they were trained on?"
    )


def _is_one_kind_per_batch(facts: Facts) -> bool:
    """Whether the samples of a batch are alike: then batch statistics tell of the batch, and hide what weights know."""
    tested = [layer.composition for layer in facts.layers.values() if layer.composition is not None]
    return any(found.p_value < COMPOSITION_P for found in tested)


def _words(known: list[Chance]) -> str:
    """Own against other outputs, by the metric where there is one; a sentence without a full stop."""
    first = leading([each.measure for each in known])
    best = next(each for each in known if each.measure == first)
    train, inference = best.training, best.inference
    assert train is not None
    assert inference is not None
    return (
        f"With their own outputs the samples have a {best.measure} of {number(train.own)} on batch statistics and"
        f" {number(inference.own)} on running statistics; with the outputs of other samples, {number(train.other)} and"
        f" {number(inference.other)}"
    )
