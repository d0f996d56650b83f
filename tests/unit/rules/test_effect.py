"""What loss and metric mean."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.records import Chance, ChanceValues, Estimate, FreeRemedy, Remedy, Score
from bnprobe.rules import effect
from bnprobe.testing import make_evidence, make_layer
from unit.rules.effects import chance, loss, metric, tried


def test_what_was_learned_is_what_the_better_mode_knows() -> None:
    in_training, at_inference = chance((2.3, 2.3), (0.1, 4.1)), chance((0.1, 4.1), (2.3, 2.3))
    for found in (in_training, at_inference):
        assert abs((effect.learned((found,), "loss") or 0) - 4.0) < 1e-9
        assert effect.learned((found,), "metric") is None
    half = Chance("loss", ChanceValues(0.5, 1.5, Estimate(-1.0, None)), None)
    assert effect.learned((half,), "loss") == 1.0


def test_no_gain_is_known_only_where_the_interval_excludes_one() -> None:
    gaps = (metric(0.9, 0.8),)
    for after, width, known in ((0.8, 0.01, True), (0.7, 0.01, True), (0.8, 0.2, False), (0.9, 0.01, False)):
        found = effect.of_remedy(tried(0.8, after, width=width), gaps)
        assert (after, width, found.is_no_gain) == (after, width, known)
    assert not effect.Effect(()).is_no_gain


def test_values_are_written_as_in_tables() -> None:
    [change] = effect.inconsistency((metric(0.966, 0.995),)).changes
    assert change.words("before", "after") == "the metric is 0.966 before and 0.995 after"
    [same] = effect.inconsistency((metric(0.9951, 0.9949),)).changes
    assert same.words("with this", "with that") == "the metric is 0.995 with this and with that"


def test_inference_is_blamed_with_99_percent_confidence() -> None:
    """0.1 ± 0.09 excludes zero at 95%, and not at 99%."""
    for width, sure in ((0.09, False), (0.07, True)):
        worse, better = metric(0.9, 0.8, width), metric(0.8, 0.9, width)
        assert effect.inconsistency((worse,)).is_worse
        facts = [make_evidence(make_layer("bn"), gaps=(gap,)) for gap in (worse, better)]
        assert [effect.surely_worse(known) is not None for known in facts] == [sure, False]
        assert [effect.surely_better(known) is not None for known in facts] == [False, sure]


def test_a_gain_is_sure_with_99_percent_confidence() -> None:
    for width, sure in ((0.09, False), (0.07, True)):
        found = effect.of_remedy(tried(0.8, 0.9, width=width), (metric(0.9, 0.8),))
        assert (found.standing, found.is_sure_gain) == ("better", sure)


def test_what_is_too_little_to_act_on_is_not_clean_from_2_percent_of_a_loss_on() -> None:
    for after, clean in ((1.01, True), (1.03, False)):
        found = effect.inconsistency((loss(1.0, after, 0.005),))
        assert (found.standing, found.blemish is None) == ("same", clean)


def test_floors_are_those_of_the_scale() -> None:
    assert abs(effect.floors_better("metric", "max", 0.8, 0.9) - 5.0) < 1e-9
    assert abs(effect.floors_better("metric", "max", 24.95, 25.0) - 0.04) < 1e-9  # PSNR
    assert effect.floors_better("loss", "min", 1.0, 1.05) < 0


# --- A metric whose goal was not stated -------------------------------------------------------------------------------

RMSE = replace(metric(0.128, 0.043), goal_is_known=False, held_out=0.61, generalization=0.57)
RMSE = replace(RMSE, generalization_interval=(0.52, 0.62))
MSE = replace(loss(0.0165, 0.0019, 0.004), held_out=0.38, generalization=0.38, generalization_interval=(0.3, 0.46))
ACCURACY = replace(metric(0.94, 0.46), goal_is_known=False)


def test_a_metric_that_the_loss_contradicts_is_judged_by_nobody() -> None:
    assert effect.judged((MSE, RMSE)) == (MSE,)
    assert effect.doubt_of_goal((MSE, RMSE)) == "contradicted"
    assert effect.inconsistency((MSE, RMSE)).standing == "better"
    assert effect.inconsistency((MSE, RMSE)).blemish is None
    assert [change.measure for change in effect.generalization((MSE, RMSE)).changes] == ["loss"]
    assert effect.generalization((MSE, RMSE)).is_worse


def test_a_stated_goal_holds_whatever_the_loss_says() -> None:
    stated = replace(RMSE, goal="min", goal_is_known=True)
    assert effect.judged((MSE, stated)) == (MSE, stated)
    assert effect.doubt_of_goal((MSE, stated)) is None
    assert effect.generalization((MSE, stated)).changes[0].measure == "metric"


def test_a_metric_that_the_loss_bears_out_judges_without_a_goal() -> None:
    gaps = (loss(0.2, 1.9), ACCURACY)
    assert (effect.judged(gaps), effect.doubt_of_goal(gaps)) == (gaps, None)
    slightly = (loss(0.2, 0.19, 0.005), replace(metric(0.94, 0.93, 0.005), goal_is_known=False))
    assert effect.judged(slightly) == slightly[:1]
    unsure = (loss(0.2, 0.19, 0.05), slightly[1])
    assert effect.judged(unsure) == unsure


def test_without_a_loss_a_larger_metric_is_taken_to_be_better() -> None:
    assert effect.judged((ACCURACY,)) == (ACCURACY,)
    assert effect.doubt_of_goal((ACCURACY,)) == "no loss"
    assert effect.inconsistency((ACCURACY,)).standing == "worse"
    assert effect.goal_of((ACCURACY,)) == "max"


def test_a_remedy_that_moves_loss_and_metric_against_each_other_is_judged_by_the_loss() -> None:
    gaps = (loss(0.1, 0.1), replace(metric(0.34, 0.34), goal_is_known=False))
    remedy = tried(0.34, 0.294)
    change = Estimate(-0.02, (-0.03, -0.01))
    remedy = replace(remedy, before=Score(0.11, 0.34), after=Score(0.09, 0.294), loss_change=change)
    found = effect.of_remedy(remedy, gaps)
    assert (found.standing, [each.measure for each in found.changes]) == ("better", ["loss"])
    assert effect.doubt_of_goal(gaps, (remedy,)) == "contradicted"
    assert effect.doubt_of_goal(gaps) is None
    stated = (gaps[0], replace(gaps[1], goal="min", goal_is_known=True))
    assert [each.measure for each in effect.of_remedy(remedy, stated).changes] == ["loss", "metric"]


def test_where_loss_and_metric_of_a_remedy_contradict_each_other_a_stated_goal_decides() -> None:
    remedy = replace(
        tried(0.7, 0.9), before=Score(1.0, 0.7), after=Score(2.0, 0.9), loss_change=Estimate(1.0, (0.9, 1.1))
    )
    gaps = (loss(1.0, 1.0), metric(0.9, 0.7))
    assumed = (gaps[0], replace(gaps[1], goal_is_known=False))
    assert effect.of_remedy(remedy, gaps).standing == "better"
    assert effect.of_remedy(remedy, assumed).standing == "worse"
    worse = replace(remedy, after=Score(2.0, 0.7), metric_change=Estimate(0.0, (-0.01, 0.01)))
    assert effect.of_remedy(worse, gaps).standing == "worse"


def test_the_best_gain_is_that_of_the_metric_if_it_can_judge() -> None:
    def both(name: FreeRemedy, loss_after: float, metric_after: float) -> Remedy:
        change = Estimate(loss_after - 1.0, (loss_after - 1.1, loss_after - 0.9))
        made = tried(0.5, metric_after, name)
        return replace(made, before=Score(1.0, 0.5), after=Score(loss_after, metric_after), loss_change=change)

    remedies = (both("recalibrated", 0.3, 0.6), both("instance statistics", 0.5, 0.8), tried(0.5, 0.5, "x"))  # type: ignore[arg-type]
    gaps = (loss(0.1, 1.0), metric(0.9, 0.5))
    names = [remedy.name for remedy in remedies]
    best = effect.best_gain(names, remedies, gaps)
    assert best is remedies[1]
    assert effect.best_gain(names[:1], remedies, gaps) is remedies[0]
    assert effect.best_gain(names[2:], remedies, gaps) is None
    assert (
        effect.best_gain(names, remedies, gaps[:1]) is remedies[1]
    )  # a metric of no gap: larger is taken to be better
