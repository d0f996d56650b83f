"""Select, run, exempt, join, fold and rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bnprobe.analysis.diagnosis import diagnose, groups_of, judge
from bnprobe.config.spec import RuleExemption, RulesSpec
from bnprobe.errors import UsageError
from bnprobe.records import Composition, Diagnosis, Domains, Layer, Shares, Verdict
from bnprobe.rules import RULES
from bnprobe.rules.facts import Facts
from bnprobe.rules.selection import find_rule, model_rules, selected
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares
from unit.rules.effects import metric, tried

ALIKE = Composition(0.4, 3.8, 1e-9)


def diagnosed(facts: Facts, impacts: dict[str, float] | None = None, **rules: object) -> list[Diagnosis]:
    """The diagnoses; the impact of a group is the largest of its layers'."""
    verdicts = judge(facts, RulesSpec(**rules))
    known = impacts or {}
    groups = groups_of(verdicts, facts)
    measured = {group: max((known[name] for name in group if name in known), default=None) for group in groups}
    return list(diagnose(verdicts, facts, measured))


def causes(diagnoses: list[Diagnosis]) -> list[tuple[str, tuple[str, ...]]]:
    return [(diagnosis.cause, diagnosis.layers) for diagnosis in diagnoses]


def sorted_layer(name: str, share: float = 0.3) -> Layer:
    return make_layer(name, make_shares(composition=share), composition=ALIKE)


# Selecting


@pytest.mark.parametrize(
    ("select", "ignore", "expected"),
    [
        ((), (), [rule.code for rule in RULES]),
        (("BN30",), (), ["BN301", "BN302", "BN303"]),
        (("bn3", "BN101"), ("BN302",), ["BN101", "BN301", "BN303"]),
        (("BN3",), ("BN3",), []),
    ],
)
def test_rules_are_selected_by_code_or_prefix(
    select: tuple[str, ...], ignore: tuple[str, ...], expected: list[str]
) -> None:
    assert [rule.code for rule in selected(RulesSpec(select=select, ignore=ignore))] == expected


@pytest.mark.parametrize(
    ("rules", "nearest"),
    [
        (RulesSpec(select=("BN226",)), "BN202"),
        (RulesSpec(ignore=("N204",)), "BN204"),
        (RulesSpec(exempt=(RuleExemption(layers="*", rules=("BN9",), reason="x"),)), "BN"),
        (RulesSpec(select=("",)), "BN"),
    ],
)
def test_an_unknown_code_names_the_nearest(rules: RulesSpec, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"and no code begins with it; the nearest code is {nearest}"):
        judge(make_evidence(), rules)


def test_rules_are_found_by_code_and_cause() -> None:
    assert {find_rule(name).code for name in ("BN201", "bn201", "small_batch", "small-batch")} == {"BN201"}
    with pytest.raises(UsageError, match='There is no rule "smal_batch"; the nearest is small_batch'):
        find_rule("smal_batch")
    with pytest.raises(UsageError, match="the nearest is BN201"):
        find_rule("BN2o1")


def test_a_model_alone_needs_a_rule_that_can_judge_it() -> None:
    alone = [rule.code for rule in RULES if rule.needs == "model"]
    assert [rule.code for rule in model_rules(RulesSpec(select=("BN1", "BN2")))] == alone
    assert alone[:2] == ["BN101", "BN102"]
    with pytest.raises(UsageError, match="None of the rules selected can judge a model without data"):
        model_rules(RulesSpec(select=("BN2",)))


# Judging


def test_verdicts_have_the_layers_place_in_the_code() -> None:
    facts = make_evidence(anatomy=[make_anatomy("bn", location="model.py:7"), make_anatomy("head")])
    verdicts = judge(facts, RulesSpec(select=("BN101", "BN201")))
    assert [(verdict.layer, verdict.location) for verdict in verdicts] == [
        ("bn", "model.py:7"),
        ("head", None),
        (None, None),
    ]


def test_an_exemption_skips_with_the_users_reason() -> None:
    layers = [make_anatomy(name, momentum=0.99, non_finite=1) for name in ("stem.bn", "head.bn")]
    exempt = RuleExemption(layers="stem.*", rules=("BN101",), reason="ported on purpose.")
    found = judge(make_evidence(anatomy=layers), RulesSpec(select=("BN101", "BN103"), exempt=(exempt,)))
    assert [(verdict.rule, verdict.layer, verdict.outcome, verdict.reason, verdict.remedy) for verdict in found] == [
        ("BN101", "stem.bn", "skipped", "ported on purpose.", ""),
        ("BN101", "head.bn", "failed", None, find_rule("BN101").remedy),
        ("BN103", "stem.bn", "failed", None, find_rule("BN103").remedy),
        ("BN103", "head.bn", "failed", None, find_rule("BN103").remedy),
    ]
    assert found[0].message == "Exempt: ported on purpose."


def test_an_exemption_knows_a_shared_layer_by_all_its_names() -> None:
    layer = make_layer("a.bn", make_shares(lag=0.5), aliases=("b.bn",))
    exempt = RuleExemption(layers="b.*", rules=("BN2",), reason="known")
    [verdict] = judge(make_evidence(layer), RulesSpec(select=("BN203",), exempt=(exempt,)))
    assert verdict.outcome == "skipped"


@pytest.mark.parametrize("cause", ["small_batch", "composition", "lag", "dropout"])
@pytest.mark.parametrize("size", [0.15, 0.3, 2.0])
@pytest.mark.parametrize("p_value", [None, 1e-9, 0.5])
def test_every_flagged_layer_has_a_cause(cause: str, size: float, p_value: float | None) -> None:
    composition = None if p_value is None else Composition(0.1, 1.7, p_value)
    facts = make_evidence(make_layer("bn", make_shares(**{cause: size}), composition=composition))
    assert facts.layers["bn"].flagged
    found = [verdict.cause for verdict in judge(facts, RulesSpec(select=("BN20",))) if verdict.outcome == "failed"]
    assert found == ["small_batch" if cause == "composition" and p_value == 0.5 else cause]


def test_a_healthy_layer_has_none() -> None:
    facts = make_evidence(*(make_layer(name) for name in "abc"), held_out=True, images=64, drop_last=False)
    assert diagnosed(facts) == []


# Joining


def test_one_cause_is_said_once_and_the_worst_layer_named() -> None:
    layers = [sorted_layer("a", 0.2), make_layer("b"), sorted_layer("c", 0.5)]
    [found] = diagnosed(make_evidence(*layers), {"a": 0.1, "c": 0.3})
    assert found == Diagnosis(
        cause="composition",
        rule="BN202",
        severity="error",
        layers=("a", "c"),
        impact=pytest.approx(0.3, rel=0.02),
        message=(
            "2 of 3 layers: samples of a batch are more alike than samples drawn at random (sorted data, or one source"
            " per batch?). Worst is c: Two samples of a batch have a correlation of 0.40 (0: i.i.d., 1: identical;"
            " p < 0.0001), so a batch of 8 is worth 2.11 independent samples. (It accounts for D = 0.500 of 0.505;"
            " its limit is 0.024, the layer's is 0.048.)"
        ),
        remedy=find_rule("BN202").remedy,
    )


def test_a_finding_about_the_model_has_no_layers() -> None:
    [found] = diagnosed(make_evidence(make_layer(), images=9, batch_size=8))
    assert (found.cause, found.layers, found.impact) == ("last_batch", (), None)
    assert found.message.startswith("9 samples in batches of 8 leave a last batch of one sample")


# Folding


def lagging(**anatomy: object) -> Facts:
    layer = make_layer("bn", make_shares(lag=0.5))
    return make_evidence(layer, anatomy=[make_anatomy("bn", **anatomy)])


@pytest.mark.parametrize("half", ["trains_affine", "trains_statistics"])
def test_stale_statistics_of_a_half_frozen_layer_stand_on_their_own(half: str) -> None:
    """To freeze the other half as well would keep them stale; recalibration mends them."""
    facts = lagging(**{half: False})
    found = diagnosed(facts, {"bn": 0.9})
    assert [(each.cause, each.severity, each.consequences) for each in found] == [
        ("lag", "error", ()),
        ("frozen_mismatch", "warning", ()),
    ]
    assert found[1].impact is None


@pytest.mark.parametrize(
    ("facts", "cause", "consequence"),
    [
        (lagging(momentum=0.99), "momentum_convention", "lag in 1 layer"),
        (lagging(untouched=True), "never_trained", "lag in 1 layer"),
        (lagging(non_finite=1), "non_finite", "lag in 1 layer"),
        (
            make_evidence(
                make_layer("bn", make_shares(lag=0.5), calls_per_forward=2, domains=Domains(0.5, (0.4, 0.6)))
            ),
            "shared_domains",
            "lag in 1 layer",
        ),
        (
            make_evidence(
                make_layer(
                    "bn",
                    make_shares(composition=0.4, small_batch=0.2),
                    calls_per_forward=2,
                    domains=Domains(0.4, (0.3, 0.5)),
                    composition=Composition(0.0, 1.0, 0.9),
                )
            ),
            "shared_domains",
            "small_batch in 1 layer",
        ),
        (
            make_evidence(make_layer("bn", make_shares(composition=0.4, lag=0.3), composition=ALIKE)),
            "composition",
            "lag in 1 layer",
        ),
        (make_evidence(make_layer("bn", make_shares(small_batch=0.8, lag=0.1))), "small_batch", "lag in 1 layer"),
        (lagging(dead=9), "lag", "dead_channels in 1 layer"),
        (
            make_evidence(make_layer("bn", make_shares(small_batch=0.8)), batch_size=1),
            "single_image",
            "small_batch in 1 layer",
        ),
        (
            make_evidence(make_layer("bn", make_shares(small_batch=0.8), values_per_channel=1)),
            "single_value",
            "small_batch in 1 layer",
        ),
        (
            make_evidence(
                make_layer("bn", make_shares(dropout=0.3)), anatomy=[make_anatomy("bn", dropouts_before=("drop",))]
            ),
            "dropout",
            "dropout_before_norm in 1 layer",
        ),
    ],
)
def test_what_follows_is_named_under_its_cause(facts: Facts, cause: str, consequence: str) -> None:
    [found] = diagnosed(facts)
    assert (found.cause, found.severity, found.consequences) == (cause, "error", (consequence,))


def test_lag_beyond_what_the_batches_explain_stands_on_its_own() -> None:
    facts = make_evidence(make_layer("bn", make_shares(composition=0.4, lag=0.9), composition=ALIKE))
    assert causes(diagnosed(facts)) == [("lag", ("bn",)), ("composition", ("bn",))]
    facts = make_evidence(make_layer("bn", make_shares(small_batch=0.8, lag=0.3)))
    assert causes(diagnosed(facts)) == [("small_batch", ("bn",)), ("lag", ("bn",))]


def test_propagation_follows_from_causes_upstream_only() -> None:
    root = make_layer("b", make_shares(lag=0.5))
    handed = [make_layer(name, make_shares(propagation=0.2)) for name in ("a", "c", "d")]
    found = diagnosed(make_evidence(handed[0], root, *handed[1:]))
    assert causes(found) == [("lag", ("a", "b"))]
    assert found[0].consequences == ("propagation in 2 layers",)


def test_propagation_without_a_root_is_staleness() -> None:
    within = make_layer("a", make_shares(lag=0.02))
    facts = make_evidence(within, make_layer("b", make_shares(propagation=0.2, lag=0.001)))
    [found] = diagnosed(facts)
    assert (found.cause, found.rule, found.layers, found.remedy) == ("lag", "BN203", ("b",), find_rule("lag").remedy)
    assert "adds up in its input. (It accounts for D = 0.200 of " in found.message
    outcomes = {verdict.rule: verdict.outcome for verdict in judge(facts, RulesSpec()) if verdict.layer == "b"}
    assert (outcomes["BN203"], outcomes["BN205"]) == ("failed", "passed")
    beside = make_evidence(within, make_layer("b", make_shares(propagation=0.2, lag=0.1)))
    assert [(one.cause, one.consequences) for one in diagnosed(beside)] == [("lag", ("propagation in 1 layer",))]


def test_propagation_without_a_root_is_what_dropout_adds_up_to_where_that_is_more() -> None:
    before = [make_layer(name, make_shares(dropout=0.02)) for name in ("a", "b")]
    [found] = diagnosed(make_evidence(*before, make_layer("c", make_shares(propagation=0.2, lag=0.002))))
    assert (found.cause, found.layers) == ("dropout", ("c",))
    assert "what dropout changes in them adds up in its input" in found.message
    assert found.remedy.startswith("Move dropout behind the last BN layer")


def test_propagation_keeps_its_name_where_the_rule_on_its_root_was_not_run() -> None:
    facts = make_evidence(make_layer("a", make_shares(lag=0.02)), make_layer("b", make_shares(propagation=0.2)))
    verdicts = judge(facts, RulesSpec(ignore=("BN203",)))
    assert [found.cause for found in diagnose(verdicts, facts)] == ["propagation"]


def test_earlier_layers_that_were_not_measured_are_not_called_within_their_limit() -> None:
    layer = make_layer("b", make_shares(propagation=0.2))
    [found] = diagnosed(make_evidence(layer, anatomy=[make_anatomy("a"), make_anatomy("b")]))
    assert found.message.startswith("b: Of earlier layers, what their running statistics are off by adds up")


def test_propagation_is_told_under_the_strongest_cause_upstream() -> None:
    layers = [
        make_layer("a", make_shares(lag=0.9)),
        make_layer("b", make_shares(small_batch=0.2)),
        make_layer("c", make_shares(propagation=0.3)),
    ]
    found = {diagnosis.cause: diagnosis.consequences for diagnosis in diagnosed(make_evidence(*layers))}
    assert found == {"lag": ("propagation in 1 layer",), "small_batch": ()}


def test_a_chain_of_consequences_is_told_under_its_root() -> None:
    layers = [make_layer("a", make_shares(lag=0.5)), make_layer("b", make_shares(propagation=0.2))]
    anatomy = [make_anatomy("a", momentum=0.99), make_anatomy("b")]
    [found] = diagnosed(make_evidence(*layers, anatomy=anatomy))
    assert (found.cause, found.layers) == ("momentum_convention", ("a",))
    assert found.consequences == ("lag in 1 layer", "propagation in 1 layer")


def test_a_cause_that_is_partly_explained_keeps_the_rest() -> None:
    layers = [make_layer(name, make_shares(lag=0.5)) for name in "ab"]
    anatomy = [make_anatomy("a", untouched=True), make_anatomy("b")]
    found = diagnosed(make_evidence(*layers, anatomy=anatomy))
    assert {(*pair, diagnosis.consequences) for pair, diagnosis in zip(causes(found), found, strict=True)} == {
        ("never_trained", ("a",), ("lag in 1 layer",)),
        ("lag", ("b",), ()),
    }


def test_what_is_exempted_explains_nothing() -> None:
    exempt = RuleExemption(layers="*", rules=("BN101",), reason="on purpose")
    assert causes(diagnosed(lagging(momentum=0.99), exempt=(exempt,))) == [("lag", ("bn",))]


def test_rules_do_not_explain_each_other_in_a_circle() -> None:
    def reaches(cause: str, seen: tuple[str, ...] = ()) -> None:
        assert cause not in seen
        for link in find_rule(cause).follows_from:
            reaches(link.cause, (*seen, cause))

    for rule in RULES:
        reaches(rule.cause)
        assert not (rule.follows_upstream and rule.upstream_order is not None)


def test_the_groups_to_measure_are_those_of_the_diagnoses() -> None:
    layers = [make_layer(name, make_shares(lag=0.5)) for name in "ab"]
    facts = make_evidence(*layers, anatomy=[make_anatomy("a", dead=1), make_anatomy("b")], images=9, batch_size=8)
    verdicts = judge(facts, RulesSpec())
    assert groups_of(verdicts, facts) == (("a", "b"),)
    assert {found.layers for found in diagnose(verdicts, facts)} == {("a", "b"), ()}
    assert [found.impact for found in diagnose(verdicts, facts, {("a", "b"): 0.25, ("a",): 9.0})] == [
        pytest.approx(0.25, rel=0.02),
        None,
    ]


# Ranking


def test_errors_come_first_then_effect_on_the_output() -> None:
    few, many = make_layer("few", make_shares(lag=0.5)), [sorted_layer(name) for name in ("x", "y", "z")]
    anatomy = [make_anatomy("few", dropouts_before=("drop",)), *(make_anatomy(name) for name in "xyz")]
    facts = make_evidence(few, *many, anatomy=anatomy)
    ranked = diagnosed(facts, {"few": 0.9, "x": 0.1, "y": 0.1, "z": 0.1})
    assert [found.cause for found in ranked] == ["lag", "composition"]
    assert [found.impact for found in ranked] == pytest.approx([0.9, 0.1], rel=0.02)
    ranked = diagnosed(facts, {"few": 0.1, "x": 0.9, "y": 0.1, "z": 0.1})
    assert [found.cause for found in ranked] == ["composition", "lag"]
    assert [found.impact for found in diagnosed(facts, {"few": 1e-6})] == [pytest.approx(1e-6, rel=0.02), None]


def test_a_warning_comes_last_whatever_its_effect() -> None:
    layers = [make_layer("a", make_shares(lag=0.5)), make_layer("b")]
    anatomy = [make_anatomy("a"), make_anatomy("b", dead=1, constant=1)]
    ranked = diagnosed(make_evidence(*layers, anatomy=anatomy), {"a": 0.01, "b": 5.0})
    assert [(found.cause, found.severity) for found in ranked] == [("lag", "error"), ("dead_channels", "warning")]


@pytest.mark.parametrize(
    ("shares", "first"),
    [
        (make_shares(composition=0.5, small_batch=0.15), "composition"),
        (make_shares(composition=0.15, small_batch=0.5), "small_batch"),
    ],
)
def test_of_two_causes_of_the_same_layers_the_larger_share_comes_first(shares: Shares, first: str) -> None:
    layers = [make_layer(name, shares, composition=ALIKE) for name in "ab"]
    ranked = diagnosed(make_evidence(*layers), {"a": 0.3, "b": 0.2})
    assert ranked[0].cause == first
    # The effect of the layers is told in proportion to what each cause holds of their mismatch.
    assert [found.impact for found in ranked] == pytest.approx([0.3 * 0.876, 0.3 * 0.48], rel=0.01)
    assert diagnosed(make_evidence(*layers))[0].cause == first


def test_a_remedy_that_was_tried_without_a_gain_is_not_advised() -> None:
    layer, worse = make_layer("bn", make_shares(lag=0.6)), metric(0.9, 0.8)
    of_one_batch = replace(tried(0.8, 0.9), metric_change=None)
    for remedies, advised in (
        ((), True),
        ((of_one_batch,), True),  # without an interval nothing is known
        ((tried(0.8, 0.9),), True),
        ((tried(0.8, 0.81),), False),
        ((tried(0.8, 0.85, width=0.1),), True),  # it may well help; the report says that it does not surely
        ((tried(0.8, 0.5),), False),
    ):
        facts = make_evidence(layer, gaps=(worse,), remedies=remedies)
        first = diagnose(judge(facts, RulesSpec()), facts)[0]
        assert first.cause == "lag"
        assert ("recalibrate" in first.remedy) == advised


def test_held_out_data_that_is_like_some_of_the_batches_is_told_under_their_composition() -> None:
    """Two domains by turns, of which the held-out data is one: the running statistics fit neither."""
    for shift, apart in ((0.31, []), (0.9, [("data_shift", ("bn",))])):
        layer = make_layer("bn", make_shares(composition=0.3, data_shift=shift), composition=ALIKE)
        found = causes(diagnosed(make_evidence(layer, held_out=True)))
        assert sorted(found) == sorted([("composition", ("bn",)), *apart])
    mixed = make_layer("bn", make_shares(data_shift=0.31))
    assert causes(diagnosed(make_evidence(mixed, held_out=True))) == [("data_shift", ("bn",))]


def test_earlier_layers_are_called_within_their_limit_only_where_they_are() -> None:
    within, beyond = make_layer("a"), make_layer("a", make_shares(small_batch=0.5))
    undecided = make_layer("a", undecided=True)
    adds_up = "Of earlier layers, what their running statistics"
    for first, said in ((within, "Earlier layers are each within"), (beyond, adds_up), (undecided, adds_up)):
        facts = make_evidence(first, make_layer("b", make_shares(propagation=0.5)))
        [found] = diagnose(judge(facts, RulesSpec(ignore=("BN201",))), facts)
        assert (found.cause, found.layers) == ("lag", ("b",))
        assert found.message.startswith(f"b: {said}")


@pytest.mark.parametrize("known", [True, False])
def test_a_metric_of_unknown_direction_contradicts_no_remedy(known: bool) -> None:
    layer = make_layer("bn", make_shares(lag=5.0))
    gap = replace(metric(0.5, 0.5), goal_is_known=known)
    untouched = [make_anatomy("bn", untouched=True)]
    facts = make_evidence(layer, anatomy=untouched, remedies=(tried(0.5, 0.3),), gaps=(gap,))
    [found] = [verdict for verdict in judge(facts, RulesSpec(select=("BN102",))) if verdict.outcome == "failed"]
    rule = RULES["BN102"]
    assert found.remedy == (rule.other_remedy if known else rule.remedy)


def test_stale_statistics_beside_batches_that_are_not_mixed_say_to_mend_these_first() -> None:
    """Recalibration alone does not help there; to keep the statistics would contradict the first remedy."""
    stale, sorted_ = make_layer("a", make_shares(lag=0.5)), sorted_layer("b", 0.3)
    known = {"gaps": (metric(0.9, 0.5),), "remedies": (tried(0.5, 0.5),)}
    [first, second] = diagnosed(make_evidence(stale, sorted_, **known), {"a": 0.1, "b": 0.9})
    assert (first.cause, second.cause) == ("composition", "lag")
    assert second.remedy.startswith("Mend the non-i.i.d. batches first (BN202)")
    alike = replace(make_layer("b", make_shares(composition=0.01)), composition=Composition(0.2, 2.4, 1e-9))
    [_, remark] = diagnosed(make_evidence(stale, alike, gaps=(metric(0.9, 0.9),), remedies=(tried(0.5, 0.5),)))
    assert (remark.cause, remark.severity) == ("composition", "info")
    [alone] = diagnosed(make_evidence(stale, **known))
    assert alone.remedy == find_rule("BN203").other_remedy.format(gain="is no gain")


def test_a_remedy_that_surely_gains_a_little_is_not_called_no_gain() -> None:
    """Where the same report shows that it is better, however little."""
    stale, known = make_layer("a", make_shares(lag=0.5)), {"gaps": (metric(0.9, 0.5),)}
    [found] = diagnosed(make_evidence(stale, **known, remedies=(tried(0.5, 0.51, width=0.005),)))
    assert found.remedy.endswith("recalibrating them was tried, and gains too little to count.")
    remedies = (tried(0.5, 0.51, width=0.005),)
    both = diagnosed(make_evidence(stale, sorted_layer("b", 0.3), **known, remedies=remedies))
    [found] = [each for each in both if each.cause == "lag"]
    assert found.remedy.endswith("recalibrating alone was tried, and gains too little to count.")


def test_what_is_no_share_gets_its_part_of_the_effect_on_the_output() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.3, lag=0.1))
    anatomy = [make_anatomy("bn", momentum=0.99)]
    ranked = diagnosed(make_evidence(layer, anatomy=anatomy), {"bn": 1.0})
    [found] = [found for found in ranked if found.rule == "BN101"]
    assert found.impact == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(("momentum", "found"), [(0.0, ["BN101"]), (0.99, ["BN101", "BN102"])])
def test_statistics_that_a_momentum_of_0_never_updated_are_one_fault(
    measured: bool, momentum: float, found: list[str]
) -> None:
    layers = [make_layer("bn", make_shares(lag=0.5), momentum=momentum)] if measured else []
    facts = make_evidence(*layers, anatomy=[make_anatomy("bn", momentum=momentum, untouched=True)])
    assert sorted(diagnosis.rule for diagnosis in diagnosed(facts)) == found


def test_no_layer_is_called_the_worst_of_layers_that_are_alike() -> None:
    alike = [make_anatomy(name, momentum=0.99) for name in "ab"]
    [found] = diagnosed(make_evidence(anatomy=alike))
    assert ". For example a: momentum=0.99" in found.message
    [found] = diagnosed(make_evidence(anatomy=[alike[0], make_anatomy("b", momentum=0.95)]))
    assert ". Worst is a: momentum=0.99" in found.message


def test_the_worst_shift_is_the_largest_also_where_none_is_surely_beyond_the_limit() -> None:
    shifts = {"little": 0.029, "much": 0.051}
    verdicts = [
        Verdict("BN206", "data_shift", name, "failed", "error", f"D = {shift}.", shift, 0.047, "D", "")
        for name, shift in shifts.items()
    ]
    [found] = diagnose(verdicts, make_evidence(*(make_layer(name) for name in shifts)))
    assert found.message.endswith("Worst is much: D = 0.051.")


def test_a_cause_without_a_share_has_no_part_in_the_effect_on_the_output() -> None:
    offset = make_layer("bn", make_shares(dropout=-0.1, propagation=0.3))
    verdict = Verdict("BN107", "dropout_before_norm", "bn", "failed", "warning", "Dropout.", 1.0, 0.0, "", "")
    [found] = diagnose([verdict], make_evidence(offset), {("bn",): 0.2})
    assert found.impact is None
