"""BN212."""

from __future__ import annotations

from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.records import Composition, Estimate, Remedy, Score
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import loss, metric

STALE = make_layer("bn", make_shares(lag=9.0))
BETTER = (loss(1.46, 0.06), metric(0.92, 0.99))


def outcome(*layers: object, **facts: object) -> str:
    [verdict] = run_rule("BN212", make_evidence(*(layers or (STALE,)), **facts))  # type: ignore[arg-type]
    return verdict.outcome


def test_the_weights_belong_to_the_running_statistics() -> None:
    facts = make_evidence(STALE, make_layer("next", make_shares(propagation=5.0)), gaps=BETTER)
    [found] = diagnose(judge(facts, RulesSpec()), facts)
    assert (found.cause, found.severity) == ("trained_in_eval", "warning")
    assert found.consequences == ("lag in 1 layer", "propagation in 1 layer")
    assert "recalibrate" not in found.remedy
    assert "the metric is 0.92 with batch statistics and 0.99 with running statistics" in found.message


def test_noise_of_small_batches_is_worse_in_training_too() -> None:
    assert outcome(gaps=BETTER) == "failed"
    assert outcome(make_layer("bn", make_shares(small_batch=0.5)), gaps=BETTER) == "passed"
    assert outcome(gaps=(metric(0.92, 0.921),)) == "passed"
    assert outcome() == "skipped"


def test_batches_that_are_not_iid_are_worse_in_training_too() -> None:
    last_class = make_shares(composition=0.1, lag=0.14, small_batch=0.01)
    layer = make_layer("bn", last_class, composition=Composition(0.4, 13.0, 1e-9))
    facts = make_evidence(layer, gaps=BETTER)
    [found] = diagnose(judge(facts, RulesSpec()), facts)
    assert (found.cause, found.consequences) == ("composition", ("lag in 1 layer",))


def test_recalibration_that_does_as_well_says_otherwise() -> None:
    for change, expected in ((0.1, "passed"), (0.0, "passed"), (-0.1, "failed")):
        estimate = Estimate(change, (change - 0.01, change + 0.01))
        tried = Remedy("recalibrated", (), Score(None, 0.8), Score(None, 0.8 + change), None, 99, "", None, estimate)
        assert outcome(gaps=BETTER, remedies=(tried,)) == expected


def test_statistics_that_were_never_taken_are_another_matter() -> None:
    assert outcome(gaps=BETTER, anatomy=[make_anatomy("bn", untouched=True)]) == "passed"


def test_a_network_that_is_better_as_it_is_does_not_fail_a_build() -> None:
    facts = make_evidence(STALE, gaps=BETTER)
    assert {v.severity for v in judge(facts, RulesSpec()) if v.outcome == "failed"} == {"warning"}
