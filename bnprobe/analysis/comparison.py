"""Compare a repair with its control: which control counts, what was gained, and whether the gain is significant."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from bnprobe.config.targets import TARGETS
from bnprobe.records import Arm, Conclusion, Estimate, Interval, Proof, RepairRecord, Run
from bnprobe.stats.intervals import CONFIDENCE, t_quantile

AS_IS, RECALIBRATED = "as is", "recalibrated"
CONTROL, CONTROL_RECALIBRATED = "BN fine-tuned", "BN recalibrated after"
"""Names of the arms without a repair. The last two are baselines: plain BN, trained like the repair."""

Measure = Literal["loss", "metric"]
Goal = Literal["max", "min"]


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


def conclude(
    arms: Mapping[str, Arm], repaired: Arm, control: Arm | None, gain: Estimate | None, measure: Measure
) -> tuple[Conclusion, str]:
    """The conclusion, and a sentence or two that explain it."""
    if control is None:
        return (
            "not_compared",
            "Nothing was trained, so there is no baseline. Add --finetune to measure a gain.",
        )
    for arm in (repaired, control):
        note = next((run.note for run in arm.runs if run.ending == "diverged"), None)
        if note is not None:
            return "not_compared", f"Training of {arm.name} diverged: {note}"
    names = dict.fromkeys((repaired.name, CONTROL, CONTROL_RECALIBRATED, RECALIBRATED, AS_IS))
    means = {name: getattr(arms[name], measure) for name in names if name in arms}
    listed = ", ".join(f"{name} {value.mean:.3g}" for name, value in means.items() if value is not None)
    conclusion, sentence = _judge(gain, control, len(repaired.runs))
    start = [arm.name for arm in (repaired, control) if all(run.best_step == 0 for run in arm.runs)]
    stood = f" {' and '.join(start)}: training did not improve the held-out score." if start else ""
    return conclusion, f"Held-out {measure}: {listed}. {sentence}{stood}"


def verdict(gain: float, interval: Interval) -> Literal["better", "same", "worse"]:
    """Whether a gain is significant (95%), and in which direction."""
    low, high = interval
    if high is None or low <= 0 <= high:
        return "same"
    return "better" if gain > 0 else "worse"


def _judge(gain: Estimate | None, control: Arm, runs: int) -> tuple[Conclusion, str]:
    if gain is None:
        return "not_compared", "A score is not finite, so the arms cannot be compared."
    if gain.interval is None:
        return _single(gain.mean, control, runs)
    low, high = gain.interval
    interval = f"95% interval {low:+.2g} to {gain.mean if high is None else high:+.2g}"
    word = verdict(gain.mean, gain.interval)
    if word == "same":
        more = "" if gain.mean <= 0 else " More runs (--seeds) would narrow the interval."
        return word, f"No significant gain over {control.name} ({gain.mean:+.2g}, {interval}).{more}"
    return word, f"The repair is significantly {word} than {control.name}, by {abs(gain.mean):.2g} ({interval})."


def _single(gain: float, control: Arm, runs: int) -> tuple[Conclusion, str]:
    """The conclusion without an interval: from one run, or runs that all differ by the same."""
    if gain == 0:
        return "same", f"{control.name} scores the same. More runs (--seeds) would show how certain that is."
    if runs > 1:
        return "undecided", (
            f"All runs differ from {control.name} by exactly {gain:+.2g}, so no interval can be computed. Use more"
            " held-out samples or more --seeds."
        )
    direction = "ahead of" if gain > 0 else "behind"
    return "undecided", (
        f"The repair is {direction} {control.name}, but one run of each cannot distinguish a gain from chance. Add"
        " --seeds 5."
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
