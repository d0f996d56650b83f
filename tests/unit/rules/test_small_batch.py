"""BN201."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.numbers import mismatch
from bnprobe.records import BatchSizePoint, Composition, Domains, Layer
from bnprobe.rules import RULES
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.theory import mismatch_iid
from bnprobe.testing import make_anatomy, make_evidence, make_intervals, make_layer, make_path, make_shares, run_rule
from unit.rules.effects import metric, tried
from unit.rules.expect import failed, passed, skipped

NOISE = mismatch_iid(14)
"""The limit of noise."""


def test_noise_of_few_values_is_blamed_on_flagged_layers_only() -> None:
    few = make_layer("few", make_shares(small_batch=0.2), values_per_channel=8)
    facts = make_evidence(few, make_layer("many"), batch_size=2)
    assert run_rule("BN201", facts) == [
        failed(
            "BN201",
            "few",
            "The layer gets 8 values per channel from a batch of 2. They are as noisy as 7.79 independent values, and"
            " the limit of noise is n_eq 14. (It accounts for D = 0.200 of 0.201; the layer's limit is 0.109.)",
            0.2,
            NOISE,
        ),
        passed("BN201", "many", "This cause accounts for D = 0.004 of the layer's mismatch.", 0.004, NOISE),
    ]


def test_values_that_are_all_independent_are_not_told_to_be_more() -> None:
    layer = make_layer("few", make_shares(small_batch=0.2), values_per_channel=4)
    [verdict] = run_rule("BN201", make_evidence(layer, batch_size=2))
    assert "4 values per channel from a batch of 2. They are as noisy as independent ones, and the" in verdict.message


def test_a_layer_that_is_off_in_training_only_has_small_batches() -> None:
    layer = make_layer("bn", train=make_path(0.2), eval=make_path(0.005), values_per_channel=20)
    [verdict] = run_rule("BN201", make_evidence(layer))
    assert verdict.outcome == "failed"
    assert verdict.message.endswith(
        "(D = 0.004 at inference; the layer is flagged in training, where its limit is 0.087.)"
    )


def test_unless_another_share_is_surely_large() -> None:
    shares = make_shares(small_batch=0.005, lag=0.04)
    layer = make_layer("bn", shares, train=make_path(0.1))
    facts = make_evidence(layer)
    assert [verdict.outcome for verdict in run_rule("BN201", facts)] == ["passed"]
    assert [verdict.outcome for verdict in run_rule("BN203", facts)] == ["failed"]


def test_without_shares_it_is_blamed_only_where_no_data_would_do() -> None:
    off = make_path(0.5)
    few = replace(make_layer("few", train=off, eval=off, values_per_channel=8), shares=None)
    many = replace(make_layer("many", train=off, eval=off, values_per_channel=64), shares=None)
    found = run_rule("BN201", make_evidence(few, many))
    reason = "the layer's mismatch could not be decomposed (it was not measured at inference)"
    assert [verdict.outcome for verdict in found] == ["failed", "skipped"]
    assert (found[0].value, found[0].limit) == (mismatch_iid(8), NOISE)
    assert found[1] == skipped("BN201", "many", reason)


def test_without_data_it_says_what_it_needs() -> None:
    facts = make_evidence(anatomy=[make_anatomy()])
    assert run_rule("BN201", facts) == [skipped("BN201", None, "needs data: run bnprobe scan")]


def test_unsure_composition_counts_as_chance() -> None:
    uneven = make_layer("bn", make_shares(composition=0.3, lag=0.022), composition=Composition(0.1, 1.7, 0.5))
    facts = make_evidence(uneven)
    found = {code: run_rule(code, facts)[0].outcome for code in ("BN201", "BN202", "BN203")}
    assert found == {"BN201": "failed", "BN202": "passed", "BN203": "passed"}


def test_a_share_that_would_not_flag_the_layer_by_itself_is_not_blamed() -> None:
    within = make_layer("bn", make_shares(small_batch=0.035, lag=0.3))
    beyond = make_layer("bn", make_shares(small_batch=0.14, lag=0.3))
    healthy = make_layer("bn", make_shares(small_batch=0.035))
    found = [run_rule("BN201", make_evidence(layer))[0] for layer in (within, beyond, healthy)]
    assert [verdict.outcome for verdict in found] == ["passed", "failed", "passed"]
    assert found[2].message == "This cause accounts for D = 0.035 of the layer's mismatch."


def test_a_share_that_may_be_small_is_not_blamed_beside_a_larger_one() -> None:
    shares = make_shares(small_batch=0.12, lag=0.3)
    outcomes = []
    for low in (NOISE * 0.9, NOISE * 1.1):
        layer = make_layer("bn", shares, share_intervals=replace(make_intervals(shares), small_batch=(low, 0.2)))
        outcomes += [verdict.outcome for verdict in run_rule("BN201", make_evidence(layer))]
    assert outcomes == ["passed", "failed"]


def test_batches_of_16_and_32_rows_are_within_the_limit_and_one_of_8_is_not() -> None:
    for rows, flagged in ((32, False), (16, False), (8, True)):
        noise = mismatch_iid(rows)
        sure = make_path(noise), (noise * 1.001, noise * 1.1)  # the whole interval above what i.i.d. values give
        path = replace(sure[0], interval=sure[1])
        layer = make_layer("bn", make_shares(small_batch=noise), train=path, eval=path, values_per_channel=rows)
        assert layer.flagged == flagged
        assert (run_rule("BN201", make_evidence(layer))[0].outcome == "failed") == flagged
    # A threshold that was set is the limit of both.
    assert make_layer("bn", make_shares(small_batch=mismatch_iid(50)), threshold=100.0).flagged


def test_noise_and_wrong_statistics_each_count_in_their_own_limit() -> None:
    limit = mismatch_iid(32)
    for noise, lag, flagged in (
        (0.0, 1.2, True),  # of the limit of each
        (0.0, 0.9, False),
        (0.9, 0.0, False),
        (0.6, 0.3, False),  # together beyond the limit of wrong statistics, but mostly noise
        (0.6, 0.6, True),
        (0.2, 1.0, True),
    ):
        shares = make_shares(small_batch=noise * NOISE, lag=lag * limit)
        assert make_layer("bn", shares).flagged == flagged
        chance = make_shares(small_batch=0.0, composition=noise * NOISE, lag=lag * limit)
        assert make_layer("bn", chance, composition=Composition(0.1, 1.7, 0.5)).flagged == flagged


def test_a_trace_of_noise_is_no_second_finding() -> None:
    mostly = make_layer("bn", make_shares(small_batch=0.12, lag=3.0))
    assert run_rule("BN201", make_evidence(mostly))[0].outcome == "passed"


def test_it_is_a_warning_where_inference_surely_does_not_suffer() -> None:
    """Small and non-i.i.d. batches alike: an error where the effect is measured, or cannot be."""
    small = make_layer("bn", make_shares(small_batch=0.5))
    sorted_ = make_layer("bn", make_shares(composition=0.5), composition=Composition(0.7, 6.0, 1e-9))
    better, unsure = metric(0.8, 0.9), metric(0.8, 0.9, width=0.2)
    for layer, code in ((small, "BN201"), (sorted_, "BN202")):
        for gaps, remedies, severity in (
            ((better,), (), "warning"),
            ((better,), (tried(0.9, 0.9),), "warning"),
            ((better,), (tried(0.85, 0.9),), "error"),
            ((better,), (tried(0.9, 0.9), tried(0.85, 0.9, "batch statistics")), "error"),
            ((metric(0.9, 0.8),), (), "error"),
            ((unsure,), (), "error"),
            ((), (), "error"),
        ):
            [verdict] = run_rule(code, make_evidence(layer, gaps=gaps, remedies=remedies))
            assert (verdict.outcome, verdict.severity) == ("failed", severity)
            no_cost = (
                "Inference is no worse for it (the metric is 0.8 with batch statistics and 0.9 with running"
                " statistics): if anything suffers"
            )
            assert (no_cost in verdict.message) == (severity == "warning")


def test_the_limit_that_is_said_is_the_one_that_was_applied() -> None:
    noisy = make_layer("bn", make_shares(small_batch=0.2), values_per_channel=8)
    custom = make_layer("bn", make_shares(small_batch=0.2), values_per_channel=8, threshold=20.0)
    in_training = make_layer("bn", train=make_path(0.2), eval=make_path(0.005), values_per_channel=20)
    noise, own = "independent values, and the limit of noise is", "independent values, and the layer's limit is"
    for layer, said in ((noisy, f"{noise} n_eq 14."), (custom, f"{noise} n_eq 20."), (in_training, f"{own} n_eq 17.")):
        [verdict] = run_rule("BN201", make_evidence(layer))
        assert said in verdict.message
    enough = make_layer("bn", make_shares(small_batch=0.1, lag=0.2), values_per_channel=16)
    [verdict] = run_rule("BN201", make_evidence(enough))
    assert "and the limit of noise" not in verdict.message


def test_statistics_of_every_sample_are_advised_where_they_are_surely_better() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.2), values_per_channel=8)
    remedies = {}
    for after in (0.9, 0.4):
        facts = make_evidence(layer, gaps=(metric(0.9, 0.4),), remedies=(tried(0.4, after, "instance statistics"),))
        [verdict] = run_rule("BN201", facts)
        remedies[after] = verdict.remedy
    assert remedies[0.9].endswith(remedies[0.4])
    assert "(bnprobe convert --to instance-renorm --blend 1), which is surely better on held-out data." in remedies[0.9]
    assert "instance" not in remedies[0.4]


def test_other_causes_name_them_too() -> None:
    """BN202 and BN207 keep their own remedy, and say what was tried."""
    composed = make_layer("bn", make_shares(composition=0.3), composition=Composition(0.43, 4.01, 1e-9))
    domains = make_layer("bn", calls_per_forward=2, domains=Domains(0.3, (0.2, 0.4)))
    for code, layer in (("BN202", composed), ("BN207", domains)):
        for after, end in ((0.9, "which is surely better on held-out data."), (0.4, "then continue training.")):
            remedies = (tried(0.4, after, "instance statistics"),)
            [verdict] = run_rule(code, make_evidence(layer, gaps=(metric(0.9, 0.4),), remedies=remedies))
            assert verdict.remedy.startswith(RULES[code].remedy)
            assert verdict.remedy.endswith(end)


def test_they_are_not_advised_where_recalibrated_statistics_do_as_well() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.2), values_per_channel=8)
    for usual, advised in ((0.89, False), (0.6, True)):
        remedies = (tried(0.4, usual), tried(0.4, 0.9, "instance statistics"))
        [verdict] = run_rule("BN201", make_evidence(layer, gaps=(metric(0.9, 0.4),), remedies=remedies))
        assert ("instance-renorm" in verdict.remedy) == advised


def test_the_message_names_the_limit_that_the_verdict_has() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.3, lag=0.01))
    [verdict] = run_rule("BN201", make_evidence(layer))
    assert verdict.limit == NOISE
    assert f"its limit is {mismatch(NOISE)}, the layer's is {mismatch(flagging_limit(layer))}.)" in verdict.message


def test_larger_batches_are_not_advised_where_they_were_measured_without_effect() -> None:
    def sized(*mismatches: float) -> Layer:
        points = [
            BatchSizePoint(2 << step, 8, value, (value, value), 1.0, 0.1) for step, value in enumerate(mismatches)
        ]
        return make_layer("bn", make_shares(small_batch=0.3), batch_sizes=tuple(points))

    for mismatches, start in (
        ((0.3, 0.2, 0.15), "Larger normalization batches are not enough: at every size measured, up to 8,"),
        ((0.3, 0.2, 0.05), "Train with larger"),
        ((0.3,), "Train with larger"),
        ((), "Train with larger"),
    ):
        [verdict] = run_rule("BN201", make_evidence(sized(*mismatches), batch_size=2))
        assert verdict.remedy.startswith(start)


def test_of_several_conversions_the_best_is_advised_and_a_blend_before_the_sample_alone() -> None:
    layer, gaps = make_layer("bn", make_shares(small_batch=0.2), values_per_channel=8), (metric(0.9, 0.4),)
    every = {"instance statistics": 0.9, "instance renorm": 0.7, "example weighing": 0.8}
    for names, advised in (
        (tuple(every), "example-weighing --blend 0.25"),
        (("instance statistics", "instance renorm"), "instance-renorm --blend 0.5"),
        (("instance statistics",), "instance-renorm --blend 1"),
    ):
        remedies = tuple(tried(0.4, every[name], name) for name in names)
        [verdict] = run_rule("BN201", make_evidence(layer, gaps=gaps, remedies=remedies))
        assert f"(bnprobe convert --to {advised})" in verdict.remedy
    for unsure in (tried(0.4, 0.45, "example weighing", 0.06), tried(0.4, 0.41, "example weighing", 0.005)):
        [verdict] = run_rule("BN201", make_evidence(layer, gaps=gaps, remedies=(unsure,)))
        assert "Without training" not in verdict.remedy
