"""From the scores of arms to a conclusion."""

from __future__ import annotations

import pytest
from scipy import stats

from bnprobe.analysis.comparison import (
    CONTROL,
    CONTROL_RECALIBRATED,
    Goal,
    conclude,
    control_of,
    gain_over,
    make_arm,
    mean_estimate,
)
from bnprobe.records import Arm, Run, Score


@pytest.mark.parametrize("values", [[0.9, 0.95, 0.93], [1.0, 3.0]])
def test_an_estimate_is_students_interval(values: list[float]) -> None:
    found = mean_estimate(values)
    assert found is not None
    assert found.interval is not None
    spread = stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=spread)
    assert found.interval == pytest.approx(expected)


def test_a_missing_value_is_no_estimate() -> None:
    assert mean_estimate([0.5, None]) is None
    assert mean_estimate([]) is None
    for same in ([0.5], [0.5] * 4):  # counts of few images are often alike: that is no certainty
        one = mean_estimate(same)
        assert one is not None
        assert (one.mean, one.interval) == (0.5, None)


@pytest.mark.parametrize(("goal", "better"), [("max", 0.6), ("min", 0.5)])
@pytest.mark.parametrize("scores", [(0.5, 0.6), (0.6, 0.5)])
def test_a_repair_must_beat_the_better_control(goal: Goal, better: float, scores: tuple[float, float]) -> None:
    trained = zip((CONTROL, CONTROL_RECALIBRATED, "batch-renorm"), (*scores, 0.55), strict=True)
    arms = {
        name: make_arm(name, [Run(0, 6, 6, Score(None, score), "finished", "", 0.0)], True) for name, score in trained
    }
    control = control_of(arms, "metric", goal)
    assert control is not None
    assert control.name == (CONTROL, CONTROL_RECALIBRATED)[scores.index(better)]
    gain = gain_over(arms["batch-renorm"], control, "metric", goal)
    assert gain is not None
    assert gain.mean == pytest.approx(-0.05)  # over the other control it would be a gain


@pytest.mark.parametrize(
    ("gain", "said"), [([0.1, 0.2], "More runs (--seeds)"), ([-0.1, -0.2], "95% interval -0.79 to +0.49).")]
)
def test_a_gain_whose_interval_contains_zero_is_not_significant(gain: list[float], said: str) -> None:
    def arm(name: str, scores: list[float]) -> Arm:
        return make_arm(name, [Run(0, 6, 6, Score(None, score), "finished", "", 0.0) for score in scores], True)

    ours, control = arm("batch-renorm", [0.5 + each for each in gain]), arm(CONTROL, [0.5, 0.5])
    found = gain_over(ours, control, "metric", "max")
    conclusion, message = conclude({CONTROL: control, ours.name: ours}, ours, control, found, "metric")
    assert conclusion == "same"
    assert "No significant gain over BN fine-tuned" in message
    assert said in message


@pytest.mark.parametrize("diverged", ["batch-renorm", CONTROL])
def test_a_diverged_arm_is_not_compared(diverged: str) -> None:
    def arm(name: str) -> Arm:
        ending, note = ("diverged", "NaN at step 3.") if name == diverged else ("finished", "")
        return make_arm(name, [Run(0, 6, 6, Score(None, 0.5), ending, note, 0.0)], True)

    ours, control = arm("batch-renorm"), arm(CONTROL)
    found = conclude({CONTROL: control, ours.name: ours}, ours, control, mean_estimate([0.0]), "metric")
    assert found == ("not_compared", f"Training of {diverged} diverged: NaN at step 3.")
