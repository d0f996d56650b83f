"""BN206."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.records import Estimate, Gap, Remedy, Score, Verdict
from bnprobe.testing import make_evidence, make_intervals, make_layer, make_shares, run_rule
from unit.rules.expect import LIMIT, failed, passed, skipped

NEAR = "The mismatch of held-out against training data is D = 0.05 (95%: at least 0.045)."

TRAINING, FALLEN = Gap("metric", 0.95, 0.95, 0.95, 0.95, 0.0, 0.0, 0.0, "max", None, (-0.01, 0.01), (-0.01, 0.01)), -0.3


def gap(change: float, interval: tuple[float, float] | None = None) -> Gap:
    """The metric on held-out data, ``change`` from that on training data."""
    interval = interval or (change - 0.01, change + 0.01)
    return replace(TRAINING, held_out=0.95 + change, generalization=change, generalization_interval=interval)


def tried(name: str, before: float, change: float) -> Remedy:
    estimate = Estimate(change, (change - 0.01, change + 0.01))
    return Remedy(name, (), Score(None, before), Score(None, before + change), None, 256, "", None, estimate)


def judged(shift: float, *remedies: Remedy, change: float = FALLEN) -> Verdict:
    layer = make_layer("bn", make_shares(data_shift=shift))
    [verdict] = run_rule("BN206", make_evidence(layer, held_out=True, gaps=(gap(change),), remedies=remedies))
    return verdict


def test_statistics_that_win_it_back_are_a_shift_whatever_the_mismatch() -> None:
    for shift in (0.2, 0.02):
        found = judged(shift, tried("recalibrated", 0.65, 0.0), tried("evaluation statistics", 0.65, 0.25))
        assert (found.outcome, found.severity) == ("failed", "error")
        assert (
            "the metric is 0.95 on training data and 0.65 on held-out data; with statistics of the held-out"
            in found.message
        )
        assert "recalibrate the running statistics on samples of the new kind" in found.remedy
        assert ("; the limit is 0.047." if shift > 0.1 else ", within the limit of 0.047.") in found.message
    # What statistics of the training data win back as well is no shift.
    stale = judged(0.02, tried("recalibrated", 0.65, 0.25), tried("evaluation statistics", 0.65, 0.25))
    assert stale.outcome == "passed"


def test_a_shift_that_its_own_statistics_do_not_mend_is_said_to_hurt_elsewhere() -> None:
    found = judged(0.2, tried("evaluation statistics", 0.65, 0.0))
    assert found.outcome == "failed"
    assert "the shift hurts, but not through BN" in found.message
    assert "recalibrate" not in found.remedy


def test_where_its_own_statistics_win_back_little_the_rest_is_not_bns() -> None:
    found = judged(0.2, tried("evaluation statistics", 0.65, 0.05))
    assert "the metric is 0.7, which is less than half of what is lost: the rest is not BN's." in found.message
    assert "recalibrate" not in found.remedy
    most = judged(0.2, tried("evaluation statistics", 0.65, 0.2))
    assert "not BN's" not in most.message
    assert "recalibrate the running statistics" in most.remedy


def test_other_classes_in_other_proportions_are_no_fault() -> None:
    assert judged(0.2, tried("evaluation statistics", 0.97, -0.4), change=0.02).outcome == "passed"
    assert judged(0.2, change=0.0).outcome == "passed"


def test_one_small_batch_of_held_out_data_is_judged() -> None:
    shares = make_shares(data_shift=0.6)
    unknown = replace(make_intervals(shares), data_shift=None)
    for samples, outcome in ((32, "failed"), (4, "passed")):
        known = replace(gap(FALLEN), held_out_samples=samples)
        layer = make_layer("bn", shares, share_intervals=unknown)
        [verdict] = run_rule("BN206", make_evidence(layer, held_out=True, gaps=(known,)))
        assert verdict.outcome == outcome


def test_held_out_data_must_differ_significantly() -> None:
    layers = [make_layer(name, make_shares(data_shift=shift)) for name, shift in [("far", 0.2), ("near", 0.05)]]
    assert run_rule("BN206", make_evidence(*layers, held_out=True)) == [
        failed(
            "BN206",
            "far",
            "The mismatch of held-out against training data is D = 0.2 (95%: at least 0.18); the limit is 0.047.",
            0.2,
            LIMIT,
        ),
        passed("BN206", "near", NEAR, 0.05, LIMIT),
    ]


def test_held_out_data_is_required() -> None:
    reason = "needs held-out data: give load_eval_data(batch_size) in the model file, or eval_data in the spec"
    assert run_rule("BN206", make_evidence(make_layer())) == [skipped("BN206", None, reason)]


def test_data_that_differs_in_every_layer_and_is_clearly_worse_is_named_though_it_differs_little() -> None:
    """As noise is. Statistics of its own do not help; and what an overfit does shows in later layers alone."""
    useless, harmful = tried("evaluation statistics", 0.65, 0.0), tried("evaluation statistics", 0.65, -0.3)
    little = make_shares(data_shift=0.004)
    first, last = make_layer("first", little), make_layer("last", little)
    same = replace(first, share_intervals=replace(make_intervals(little), data_shift=(-0.001, 0.004)))
    for layers, remedy, change, outcome in (
        ((first, last), useless, FALLEN, "failed"),
        ((first, last), useless, -0.09, "failed"),
        ((same, last), useless, FALLEN, "passed"),
        ((last, same), useless, FALLEN, "passed"),
        ((first, last), harmful, FALLEN, "passed"),  # other proportions of classes
        ((first, last), useless, -0.06, "passed"),
    ):
        facts = make_evidence(*layers, held_out=True, gaps=(gap(change),), remedies=(remedy,))
        found = run_rule("BN206", facts)
        assert {verdict.outcome for verdict in found} == {outcome}
        if outcome == "failed":
            assert "the shift hurts, but not through BN" in found[0].message
            assert "recalibrate" not in found[0].remedy
            assert run_rule("BN215", facts)[0].outcome == "passed"


def test_where_inference_is_worse_already_a_shift_is_a_warning() -> None:
    worse = replace(gap(0.0), inference=0.6, held_out=0.6, inconsistency=-0.35, inconsistency_interval=(-0.4, -0.3))
    for shift, outcome in ((0.2, "failed"), (0.02, "passed")):
        layer = make_layer("bn", make_shares(data_shift=shift))
        [verdict] = run_rule("BN206", make_evidence(layer, held_out=True, gaps=(worse,)))
        assert verdict.outcome == outcome
        assert verdict.severity == ("warning" if outcome == "failed" else "error")


def test_what_is_said_of_a_shift_without_a_finding_was_measured() -> None:
    layer = make_layer("bn", make_shares(data_shift=0.2))
    behind = replace(gap(0.0), inconsistency=-0.35, inconsistency_interval=(-0.4, -0.3))
    unlabelled = replace(behind, held_out=None, generalization=None, generalization_interval=None)
    harmful = tried("evaluation statistics", 0.9, -0.2)
    for found, remedies, said in (
        (gap(0.0), (), "but held-out data is not worse for it"),
        (unlabelled, (), "but inference is worse on training data already"),
        (gap(-0.05), (harmful,), "but with statistics of its own held-out data is worse still"),
    ):
        [verdict] = run_rule("BN206", make_evidence(layer, held_out=True, gaps=(found,), remedies=remedies))
        assert (verdict.outcome, said in verdict.message) == ("passed", True)
