"""BN203."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bnprobe.records import Domains, Estimate, Gap, Layer, Remedy, Score, Updates
from bnprobe.rules.effect import WITH_FROZEN
from bnprobe.rules.facts import OtherEps, Padding
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_path, make_shares, run_rule
from unit.rules.effects import loss, metric, tried
from unit.rules.expect import HALF, failed, passed


def test_the_message_says_which_way_and_why() -> None:
    stale = make_layer("bn", make_shares(lag=0.6), eval=make_path(0.605, r=2.0, d=1.5))
    anatomy = [make_anatomy("bn", momentum=0.001, batches_tracked=100)]
    assert run_rule("BN203", make_evidence(stale, anatomy=anatomy)) == [
        failed(
            "BN203",
            "bn",
            "The running statistics are not those of the training data: at inference the standard deviation of a"
            " typical batch is 2 times theirs, and its mean is 1.5 of their standard deviations away. Most likely"
            " reason: too few updates: after 100 with momentum=0.001, 90% of their weight is still on the initial mean"
            " 0 and variance 1. (It accounts for D = 0.600 of 0.605; its limit is 0.024, the layer's is 0.047.)",
            0.6,
            HALF,
        )
    ]


def test_a_share_that_another_offsets_means_that_nothing_is_wrong() -> None:
    recalibrated = make_layer("bn", make_shares(small_batch=0.2, lag=-0.3, dropout=0.3))
    facts = make_evidence(recalibrated)
    assert [verdict.outcome for verdict in run_rule("BN204", facts)] == ["passed"]
    assert [verdict.outcome for verdict in run_rule("BN201", facts)] == ["failed"]


def test_an_unsure_share_passes_unless_it_is_the_largest() -> None:
    unsure = make_layer("bn", make_shares(small_batch=0.2, lag=0.025))
    # Noise within its own limit is no cause: whatever adds to it is.
    largest = make_layer("bn", make_shares(small_batch=0.06, lag=0.035))
    message = "This cause accounts for D = 0.025, which is not significantly above the limit (95%)."
    told = passed("BN203", "bn", message, 0.025, HALF)
    assert run_rule("BN203", make_evidence(unsure)) == [told]
    assert [verdict.outcome for verdict in run_rule("BN203", make_evidence(largest))] == ["failed"]


def test_values_that_overflow_at_inference_only() -> None:
    layer = replace(make_layer("bn", train=make_path(0.01), eval=None, flagged=True), shares=None)
    message = (
        "The layer's values overflow at inference but not in training: its running statistics, or those of an earlier"
        " layer, are far from those of the training data."
    )
    assert run_rule("BN203", make_evidence(layer)) == [failed("BN203", "bn", message)]


STALE = make_layer("bn", make_shares(lag=0.6))


def reason(anatomy: dict[str, object], layer: Layer = STALE, **facts: object) -> str:
    """What the message says of the reason."""
    known = make_evidence(layer, anatomy=[make_anatomy("bn", **anatomy)], **facts)
    [verdict] = run_rule("BN203", known)
    return verdict.message.partition("away. ")[2].partition(" (It accounts")[0]


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"trains_statistics": False}, "training does not update them (eval mode)"),
        ({"momentum": 0.0}, "momentum=0, with which they are never updated"),
        ({"batches_tracked": 0, "untouched": True}, "num_batches_tracked is 0"),
        ({"batches_tracked": 10}, "too few updates: after 10 with momentum=0.1, 35% of their weight"),
        ({"momentum": 1e-3, "batches_tracked": 9000}, "momentum=0.001 averages over about the last 1,000 batches"),
        ({"momentum": 0.9}, "momentum=0.9 averages over the last few batches only"),
        ({"zeros": 0.6}, "weights were pruned afterwards: 60% of those before the layer are exactly 0"),
        ({"levels": 16}, "weights were quantized afterwards: those before the layer have 16 different values"),
        ({"bfloat16": True}, "they were kept in bfloat16"),
    ],
)
def test_reasons_that_the_layer_shows(changes: dict[str, object], start: str) -> None:
    assert reason(changes).startswith(f"Most likely reason: {start}")


def test_reasons_that_were_measured() -> None:
    other = OtherEps(1e-3, {"bn": 0.01})
    assert "eps is 1e-05, and was 0.001 when the weights were trained" in reason({}, other_eps=other)
    assert "eps" in run_rule("BN203", make_evidence(STALE, other_eps=other))[0].remedy
    assert "eps is" not in reason({}, other_eps=OtherEps(1e-3, {"bn": 0.6}))
    padded = reason({}, padding=Padding(0.4, 0.0))
    assert "padding counts as data: the ends of samples that hold one value are 40% of a training batch" in padded
    assert "padding" not in reason({}, padding=Padding(0.01))
    assert "each process keeps its own" in reason({}, rank_mismatch={"bn": 0.5})
    twice = replace(STALE, updates=Updates(2.0, 0.19, 0.1, 0.1))
    assert "a training step updates them 2 times" in reason({}, twice)
    noisy = make_layer("bn", make_shares(small_batch=0.5, lag=0.3))
    assert "momentum=0.4 averages over the last few batches only, each of them noisy" in reason(
        {"momentum": 0.4}, noisy
    )
    assert "Most likely reason: averaged weights, by a name." in reason({}, averaged="averaged weights, by a name")
    assert "of other weights or data; w.pt has more)" in reason({}, averaged_beside="w.pt has more")


def test_too_few_updates_are_the_reason_only_where_they_give_that_much() -> None:
    """After 25 updates 7% of the weight is on the start: D = 0.02 at most, of a channel with variance 0.5."""
    for lag, named in ((0.06, True), (0.6, False)):
        told = reason({"batches_tracked": 25}, make_layer("bn", make_shares(lag=lag)))
        assert ("too few updates: after 25" in told) is named


@pytest.mark.parametrize("changes", [{}, {"momentum": None}, {"batches_tracked": None}])
def test_a_reason_without_evidence_is_not_named(changes: dict[str, object]) -> None:
    told = reason({**changes, "zeros": 0.0, "levels": 9000, "bfloat16": False}, other_eps=OtherEps(1e-3, {"bn": 0.9}))
    assert (
        "Why is not known (a high learning rate until the end, or statistics of other weights or data). Ruled" in told
    )
    assert told.endswith("another eps, pruned or quantized weights and statistics in bfloat16.")
    assert ("too few updates (1,200 counted)" in told) == ("batches_tracked" not in changes)


def of_frozen(after: float, lag: dict[str, float], width: float = 0.01) -> list[tuple[str, str]]:
    """Outcome and severity for each layer, where training leaves all in eval mode."""
    layers = [make_layer(name, eval=make_path(9.0), train=None, flagged=False) for name in lag]
    layers = [replace(layer, shares=None, share_intervals=None) for layer in layers]
    anatomy = [make_anatomy(name, trains_statistics=False) for name in lag]
    remedies = (tried(0.6, after, WITH_FROZEN, width),)
    known = make_evidence(*layers, anatomy=anatomy, gaps=(metric(0.6, 0.6),), remedies=remedies, frozen_lag=lag)
    return [(verdict.outcome, verdict.severity) for verdict in run_rule("BN203", known)]


def test_frozen_layers_are_stale_where_new_statistics_in_them_are_better() -> None:
    passes, fails, warns = ("passed", "error"), ("failed", "error"), ("failed", "warning")
    assert of_frozen(0.9, {"one": 9.0, "other": 0.001}) == [fails, passes]
    assert of_frozen(0.9, {"one": 0.002, "other": 0.001}) == [fails, passes]
    assert of_frozen(0.65, {"one": 9.0}, width=0.045) == [warns]
    for after in (0.3, 0.6, 0.61):
        assert of_frozen(after, {"one": 9.0, "other": 0.001}) == [passes, passes]
    assert of_frozen(0.9, {"one": 9.0}, width=0.6) == [passes]


def test_what_frozen_layers_gain_is_told_with_the_command_that_does_it() -> None:
    layer = replace(make_layer("bn", eval=make_path(9.0), train=None, flagged=False), shares=None)
    remedy = replace(tried(0.6, 0.9, WITH_FROZEN), control=Score(None, 0.6))
    facts = make_evidence(
        layer, anatomy=[make_anatomy("bn", trains_statistics=False)], remedies=(remedy,), frozen_lag={"bn": 9.0}
    )
    [verdict] = run_rule("BN203", facts)
    assert "Most likely reason: training does not update them (eval mode)" in verdict.message
    assert verdict.message.endswith(
        "(They are D = 9.00 away from those of the training data; on held-out data the metric is 0.6 with the other"
        " layers recalibrated and 0.9 with recalibrated statistics in the frozen layers.)"
    )
    assert "bnprobe recalibrate --include-frozen" in verdict.remedy
    assert (verdict.value, verdict.limit) == (9.0, HALF)


def test_nothing_is_ruled_out_that_was_not_tested() -> None:
    untested = reason({"momentum": None, "batches_tracked": None}, other_eps=OtherEps(1e-3, {"another": 0.9}))
    assert untested.startswith("Why is not known (")
    assert "Ruled out" not in untested


def test_what_costs_nothing_is_a_warning() -> None:
    same = Gap("loss", 0.5, 0.5, 0.5, None, 0.0, 0.0, None, inconsistency_interval=(-0.005, 0.005))
    worse = replace(same, inference=0.6, inconsistency=0.1, inconsistency_interval=(0.08, 0.12))
    unsure = replace(worse, inconsistency_interval=(-0.2, 0.4))
    for gap, severity in ((same, "warning"), (worse, "error"), (unsure, "error")):
        assert run_rule("BN203", make_evidence(STALE, gaps=(gap,)))[0].severity == severity
        noise = make_evidence(make_layer("bn", make_shares(small_batch=0.5)), gaps=(gap,))
        assert run_rule("BN201", noise)[0].severity == severity
    new = make_anatomy("bn", untouched=True, affine_moved=False, batches_tracked=0)
    assert run_rule("BN203", make_evidence(STALE, anatomy=[new]))[0].severity == "info"


def test_an_unflagged_layer_is_suspected_where_inference_is_surely_worse() -> None:
    worse = Gap("metric", 0.9, 0.9, 0.7, None, 0.0, -0.2, None, "max", inconsistency_interval=(-0.25, -0.15))
    layers = [make_layer(name, make_shares(lag=0.02)) for name in "ab"]
    told = run_rule("BN203", make_evidence(*layers, gaps=(worse,)))
    assert [(verdict.outcome, verdict.severity) for verdict in told] == [("failed", "error")] * 2
    helps = Remedy("recalibrated", (), Score(None, 0.7), Score(None, 0.9), None, 9, "", None, Estimate(0.2, (0.1, 0.3)))
    no_use = replace(helps, after=Score(None, 0.7), metric_change=Estimate(0.0, (-0.01, 0.01)))
    for remedy, outcome in ((helps, "failed"), (no_use, "passed")):
        told = run_rule("BN203", make_evidence(*layers, gaps=(worse,), remedies=(remedy,)))
        assert {verdict.outcome for verdict in told} == {outcome}
    assert {verdict.outcome for verdict in run_rule("BN203", make_evidence(*layers))} == {"passed"}


@pytest.mark.parametrize(("gap", "batch_size"), [(loss(1.0, 1.03), 8), (metric(0.94, 0.46), 256)])
def test_what_is_too_little_to_be_a_finding_casts_no_suspicion_on_a_layer(gap: Gap, batch_size: int) -> None:
    shared = make_layer("bn", make_shares(lag=0.02), calls_per_forward=2, domains=Domains(0.001, (0.0008, 0.0012)))
    for layer, code in ((make_layer("bn", make_shares(lag=0.02)), "BN203"), (shared, "BN207")):
        facts = make_evidence(layer, gaps=(gap,), batch_size=batch_size)
        outcomes = [verdict.outcome for each in (code, "BN211") for verdict in run_rule(each, facts)]
        assert outcomes == ["passed", "passed"]


def test_statistics_that_recalibration_surely_mends_are_an_error_whatever_the_two_modes_say() -> None:
    same, gains, no_use = metric(0.9, 0.9), tried(0.8, 0.9), tried(0.8, 0.8)
    flagged, within = STALE, make_layer("bn", make_shares(lag=0.02))
    for layer, remedy, found in (
        (flagged, gains, ("failed", "error")),
        (flagged, no_use, ("failed", "warning")),
        (within, gains, ("failed", "error")),
        (within, no_use, ("passed", "error")),
    ):
        [verdict] = run_rule("BN203", make_evidence(layer, gaps=(same,), remedies=(remedy,)))
        assert (verdict.outcome, verdict.severity) == found
    [verdict] = run_rule("BN203", make_evidence(within, gaps=(same,), remedies=(gains,)))
    assert verdict.message.endswith(
        "(It accounts for D = 0.020, which is within the limit, but the metric is 0.8 as loaded and 0.9 with"
        " recalibrated statistics on held-out data.)"
    )
    # Noise of batches within its limit is no better explanation; next to nothing is none.
    noisy = make_layer("bn", make_shares(small_batch=0.06, lag=0.02))
    assert run_rule("BN203", make_evidence(noisy, gaps=(same,), remedies=(gains,)))[0].outcome == "failed"
    tiny = make_layer("bn", make_shares(lag=0.002))
    assert run_rule("BN203", make_evidence(tiny, gaps=(same,), remedies=(gains,)))[0].outcome == "passed"


def test_no_part_is_written_as_larger_than_the_whole() -> None:
    for lag, offset, said in (
        (0.1848, -0.0008, "(It accounts for D = 0.184 of 0.184; its limit is 0.024, the layer's is 0.04"),
        (0.35, -0.05, "(It adds D = 0.350, which other causes offset in part: the layer has D = 0.300;"),
    ):
        layer = make_layer("bn", make_shares(small_batch=offset, lag=lag))
        [verdict] = run_rule("BN203", make_evidence(layer))
        assert (verdict.outcome, said in verdict.message) == ("failed", True)
