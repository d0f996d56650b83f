"""Compare a repair with its control: which control counts, what was gained, and whether the gain is significant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from bnprobe.config.targets import TARGETS
from bnprobe.measure.scores import ScoreTable
from bnprobe.records import MEASURES, Arm, Conclusion, Estimate, Goal, Interval, Measure, Proof, RepairRecord, Run
from bnprobe.stats.intervals import CONFIDENCE, t_quantile
from bnprobe.stats.scores import paired_difference

AS_IS, RECALIBRATED = "as is", "recalibrated"
CONTROL, CONTROL_RECALIBRATED = "BN fine-tuned", "BN recalibrated after"
"""Names of the arms beside the repair. The last two are baselines: plain BN, trained like the repair."""

_ROUNDING = 1e-4
"""Relative difference of two scores up to which they are the same: layers round in their own ways."""


def without_training(to: str) -> str:
    """Name of the arm of a repair without its training."""
    return f"{to} untrained"


def mean_estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95% interval by Student's t over independent values; None if a value is missing.

    Values that are all the same give no interval: scores on few samples often are, and then say nothing about chance.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    if max(known) - min(known) <= 1e-9 * max(map(abs, known)):
        return Estimate(known[0], None)
    variance = sum((value - mean) ** 2 for value in known) / (len(known) - 1)
    half = t_quantile(len(known) - 1, CONFIDENCE) * math.sqrt(variance / len(known))
    return Estimate(mean, (mean - half, mean + half))


def make_arm(name: str, runs: Sequence[Run], trained: bool) -> Arm:
    """An arm of these runs."""
    loss, metric = (mean_estimate([getattr(run.score, measure) for run in runs]) for measure in ("loss", "metric"))
    return Arm(name, trained, tuple(runs), loss, metric)


def control_of(arms: Mapping[str, Arm], measure: Measure, goal: Goal) -> Arm | None:
    """The better one of the baselines, which a repair must beat. None if nothing was trained."""
    controls = [arms[name] for name in (CONTROL, CONTROL_RECALIBRATED) if name in arms]
    scored = [arm for arm in controls if getattr(arm, measure) is not None]
    sign = 1.0 if goal == "max" else -1.0
    return max(scored, key=lambda arm: sign * getattr(arm, measure).mean, default=controls[0] if controls else None)


def gain_over(repaired: Arm, control: Arm, measure: Measure, goal: Goal) -> Estimate | None:
    """Repaired minus baseline, for pairs of runs with the same seed; positive is better."""
    sign = 1.0 if goal == "max" else -1.0
    pairs = zip(repaired.runs, control.runs, strict=True)
    scores = [(getattr(one.score, measure), getattr(other.score, measure)) for one, other in pairs]
    return mean_estimate([None if one is None or other is None else sign * (one - other) for one, other in scores])


def paired_gain(after: ScoreTable, before: ScoreTable, measure: Measure, goal: Goal) -> Estimate | None:
    """After minus before on the same samples, at inference; positive is better. None: a score is missing."""
    one, other = after.scores(measure, "eval"), before.scores(measure, "eval")
    if one is None or other is None:
        return None
    found = paired_difference(one, other, shared=False)
    if goal == "max" or found.interval is None:
        return found if goal == "max" else Estimate(-found.mean, None)
    low, high = found.interval
    return Estimate(-found.mean, (-math.inf if high is None else -high, -low))


def scores_the_same(one: ScoreTable, other: ScoreTable) -> bool:
    """Whether two models give the same on every micro-batch at inference, but for rounding."""
    pairs = [(one.scores(measure, "eval"), other.scores(measure, "eval")) for measure in MEASURES]
    known = [(left, right) for left, right in pairs if left is not None and right is not None]
    return bool(known) and all(torch.allclose(left.batches, right.batches, rtol=_ROUNDING) for left, right in known)


def unit_of(after: ScoreTable, before: ScoreTable, measure: Measure) -> Literal["sample", "batch"]:
    """What ``paired_gain`` pairs by."""
    sides = [table.scores(measure, "eval") for table in (after, before)]
    return "sample" if all(side is not None and side.samples is not None for side in sides) else "batch"


def is_surely_worse(after: ScoreTable, before: ScoreTable, goal: Goal, assumed: bool = False) -> bool:
    """Whether a model is significantly worse (95%) than another one on the same samples.

    In the metric, or in the loss while the metric is no better. A score that is no longer finite is worse.

    Args:
        after, before: Scores at inference.
        goal: Whether a larger or a smaller metric is better.
        assumed: The user did not say so: where the loss surely moves the other way than the metric, the loss decides.
    """
    if any(_is_lost(after, before, measure) for measure in MEASURES):
        return True
    metric, loss = (_standing(paired_gain(after, before, *each)) for each in (("metric", goal), ("loss", "min")))
    if assumed and {metric, loss} == {"better", "worse"}:
        return loss == "worse"
    return metric == "worse" or (loss == "worse" and metric != "better")


def is_contradicted(after: ScoreTable, before: ScoreTable, goal: Goal) -> bool:
    """Whether of loss and metric one is surely better and the other surely worse, with the metric's goal as given."""
    found = {_standing(paired_gain(after, before, *each)) for each in (("metric", goal), ("loss", "min"))}
    return found == {"better", "worse"}


def _is_lost(after: ScoreTable, before: ScoreTable, measure: Measure) -> bool:
    return before.scores(measure, "eval") is not None and after.scores(measure, "eval") is None


def _standing(gain: Estimate | None) -> Conclusion:
    return "undecided" if gain is None or gain.interval is None else verdict(gain.mean, gain.interval)


def conclude(
    arms: Mapping[str, Arm], repaired: Arm, control: Arm, gain: Estimate | None, measure: Measure
) -> tuple[Conclusion, str]:
    """The conclusion, and a sentence or two that explain it."""
    for arm in (repaired, control):
        note = next((run.note for run in arm.runs if run.ending == "diverged"), None)
        if note is not None:
            return "not_compared", f"Training of {arm.name} diverged: {note}"
    names = dict.fromkeys(
        (repaired.name, CONTROL, CONTROL_RECALIBRATED, without_training(repaired.name), RECALIBRATED, AS_IS)
    )
    means = {name: getattr(arms[name], measure) for name in names if name in arms}
    listed = ", ".join(f"{name} {value.mean:.3g}" for name, value in means.items() if value is not None)
    conclusion, sentence = _judge(gain, control, len(repaired.runs))
    if control.name == RECALIBRATED and conclusion != "not_compared":  # it is the same model, but for rounding
        conclusion, sentence = _single(0.0, control, len(repaired.runs))
    trained = [arm for arm in (repaired, control) if arm.trained]
    start = [arm.name for arm in trained if all(run.best_step == 0 for run in arm.runs)]
    stood = f" {' and '.join(start)}: training did not improve the held-out score." if start else ""
    untrained = "" if repaired.trained else " Nothing was trained: --finetune measures what that gains."
    return conclusion, f"{measure.capitalize()}: {listed}. {sentence}{stood}{untrained}"


def what_training_adds(converted: Arm, gain: Estimate | None, measure: Measure) -> str:
    """What the weights to be written gain over the same conversion without training, a sentence; empty if not known.

    Args:
        converted: The conversion without training.
        gain: Of the weights to be written over it, on the same samples.
        measure: What arms are compared by.
    """
    score = getattr(converted, measure)
    if gain is None or score is None:
        return ""
    interval = ""
    if gain.interval is not None:
        low, high = gain.interval
        interval = f" (95% interval over the samples {low:+.2g} to {gain.mean if high is None else high:+.2g})"
    return f" The conversion alone gives {score.mean:.3g}: training adds {gain.mean:+.2g}{interval}."


def verdict(gain: float, interval: Interval) -> Literal["better", "same", "worse"]:
    """Whether a gain is significant (95%), and in which direction."""
    low, high = interval
    if high is None or low <= 0 <= high:
        return "same"
    return "better" if gain > 0 else "worse"


def _judge(gain: Estimate | None, control: Arm, runs: int) -> tuple[Conclusion, str]:
    if gain is None:
        return "not_compared", "A score is not finite, so the models cannot be compared."
    if gain.interval is None:
        return _single(gain.mean, control, runs)
    low, high = gain.interval
    over = "" if runs > 1 else " over the samples"
    interval = f"95% interval{over} {low:+.2g} to {gain.mean if high is None else high:+.2g}"
    word = verdict(gain.mean, gain.interval)
    chance = (
        " One run of each: --seeds 5 covers the randomness of training too." if runs == 1 and control.trained else ""
    )
    if word == "same":
        more = " More runs (--seeds) would narrow the interval." if gain.mean > 0 and runs > 1 else chance
        return word, f"No significant gain over {control.name} ({gain.mean:+.2g}, {interval}).{more}"
    return (
        word,
        f"The repair is significantly {word} than {control.name}, by {abs(gain.mean):.2g} ({interval}).{chance}",
    )


def _single(gain: float, control: Arm, runs: int) -> tuple[Conclusion, str]:
    """The conclusion without an interval: all samples, or all runs, differ by the same."""
    if gain == 0:
        return "same", f"{control.name} scores the same."
    what = "runs" if runs > 1 else "samples"
    return "undecided", (
        f"All {what} differ from {control.name} by exactly {gain:+.2g}, so no interval can be computed. Use more"
        " held-out samples or more --seeds."
    )


def remarks(to: str, flagged: int | None, proof: Proof) -> Iterator[str]:
    """What else the reader of a comparison should know, a sentence each."""
    arm = next(arm for arm in proof.arms if arm.name == proof.repaired)
    if arm.trained and arm.runs[0].best_step == 0:
        yield "Training did not improve the held-out score: the weights written are those that training began with."
    remark = TARGETS[to].unflagged_remark
    if remark and flagged == 0:
        yield remark


def is_proven(record: RepairRecord) -> bool:
    """Whether all requirements hold and the training of the repaired model did not diverge."""
    arms = record.proof.arms if record.proof else ()
    repaired = [run for arm in arms for run in arm.runs if record.proof and arm.name == record.proof.repaired]
    return all(result.held for result in record.requirements) and all(run.ending != "diverged" for run in repaired)
