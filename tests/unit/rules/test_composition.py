"""BN202."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.records import Composition, SelfCheck
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric
from unit.rules.expect import HALF, failed, passed, skipped

SORTED = make_shares(composition=0.3)


def test_similar_samples_are_expressed_as_a_number_of_samples() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.43, 4.01, 1e-9))
    assert run_rule("BN202", make_evidence(layer, batch_size=8)) == [
        failed(
            "BN202",
            "bn",
            "Two samples of a batch have a correlation of 0.43 (0: i.i.d., 1: identical; p < 0.0001), so a batch of 8"
            " is worth 2 independent samples. (It accounts for D = 0.300 of 0.305; its limit is 0.024, the"
            " layer's is 0.048.)",
            0.3,
            HALF,
        )
    ]


def test_what_chance_explains_passes_and_small_batches_are_blamed() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.02, 1.1, 0.01))
    facts = make_evidence(layer)
    unsure = "This cause accounts for D = 0.300, but batches do not differ significantly from i.i.d. ones."
    told = passed("BN202", "bn", unsure, 0.3, HALF)
    assert run_rule("BN202", facts) == [told]
    assert [verdict.outcome for verdict in run_rule("BN201", facts)] == ["failed"]


def test_samples_that_could_not_be_regrouped_are_skipped() -> None:
    layer = make_layer("bn", make_shares(composition=None), note="what its family says of it")
    reason = "the samples of its batches could not be regrouped at random"
    assert run_rule("BN202", make_evidence(layer)) == [skipped("BN202", "bn", reason)]


def test_too_few_samples_to_regroup_are_the_reason() -> None:
    layer, check = make_layer("bn", make_shares(composition=None)), SelfCheck(0.0, 0.0, 1e-6, True, None)
    found = make_evidence(layer, batch_size=20)
    reasons = [
        run_rule("BN202", replace(found, scan=replace(found.scan, images=images, self_check=each)))[0].message
        for images, each in ((60, check), (80, check), (60, replace(check, passed=False)))
    ]
    other = "Not judged: the samples of its batches could not be regrouped at random."
    assert reasons == [
        "Not judged: 60 samples are too few to regroup at random in batches of 20 (at least 80).",
        other,
        other,
    ]


def test_synthetic_inputs_have_no_order() -> None:
    facts = make_evidence(make_layer("bn", SORTED), synthetic=True)
    assert run_rule("BN202", facts) == [
        skipped("BN202", None, "needs real data: the inputs of this scan are synthetic")
    ]


def test_alike_samples_within_the_limit_are_a_remark() -> None:
    layer = make_layer("bn", make_shares(composition=0.01), composition=Composition(0.2, 2.4, 1e-9))
    found = run_rule("BN202", make_evidence(layer, batch_size=8))
    assert [(each.outcome, each.severity) for each in found] == [("failed", "info")]
    assert "a batch of 8 is worth 3.33 independent samples. (It accounts for D = 0.010, which is" in found[0].message
    assert found[0].remedy.startswith("None is needed")


def test_a_batch_sampler_that_puts_like_samples_together_may_do_so_on_purpose() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.43, 4.01, 1e-9))
    [found] = run_rule("BN202", replace(make_evidence(layer, batch_size=8), composed=True))
    assert found.remedy.startswith("The loader's batch sampler puts like samples together. If that is a mistake, mix")
    assert "If the loss needs it (metric learning), keep it" in found.remedy


def test_inference_that_is_surely_a_little_worse_is_not_called_no_worse() -> None:
    layer = make_layer("bn", SORTED, composition=Composition(0.43, 4.01, 1e-9))
    for after, said in ((0.89, "worse for it by too little to count"), (0.9, "no worse for it")):
        gap = replace(metric(0.9, after), inconsistency_interval=(after - 0.905, after - 0.895))
        [found] = run_rule("BN202", make_evidence(layer, batch_size=8, gaps=(gap,)))
        assert f"Inference is {said} (the metric is 0.9 with" in found.message


def test_no_remark_is_made_where_chance_or_the_batch_size_adds_more() -> None:
    for composition, p_value in ((0.003, 1e-9), (0.01, 0.02)):
        layer = make_layer("bn", make_shares(composition=composition), composition=Composition(0.2, 2.4, p_value))
        assert [each.outcome for each in run_rule("BN202", make_evidence(layer))] == ["passed"]


def test_no_remark_says_that_nothing_is_needed_where_something_is_wrong() -> None:
    alike = make_layer("bn", make_shares(composition=0.01), composition=Composition(0.2, 2.4, 1e-9))
    worse = make_evidence(alike, gaps=(metric(0.94, 0.46),))
    [found] = run_rule("BN202", worse)
    assert found.severity == "error"
    little = make_layer(
        "bn", make_shares(small_batch=0.001, composition=0.004), composition=Composition(0.2, 2.4, 1e-9)
    )
    for gap, start in ((metric(0.94, 0.46), "Shuffle the training data"), (metric(0.94, 0.94), "None is needed")):
        [found] = run_rule("BN202", make_evidence(little, gaps=(gap,)))
        assert (found.severity, found.remedy.startswith(start)) == ("info", True)
    beyond = make_layer("far", make_shares(composition=0.3), composition=Composition(0.2, 2.4, 1e-9))
    outcomes = {each.layer: each.outcome for each in run_rule("BN202", make_evidence(alike, beyond))}
    assert outcomes == {"bn": "passed", "far": "failed"}
    almost = make_layer("bn", make_shares(composition=0.035), composition=Composition(0.2, 2.4, 1e-9))
    assert [each.outcome for each in run_rule("BN202", make_evidence(almost))] == ["passed"]
