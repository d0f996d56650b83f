"""BN107."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.testing import make_anatomy, make_evidence, make_intervals, make_layer, make_shares, run_rule
from unit.rules.expect import failed, passed

NONE = "No random layer shifts its running statistics."


def test_random_layers_before_a_norm_are_named_nearest_first() -> None:
    before = ("a.drop", "b.drop", "c.drop", "d.drop")
    layers = [
        make_anatomy("first"),
        make_anatomy("behind", dropouts_before=before),
        make_anatomy("frozen", dropouts_before=before, trains_statistics=False),
    ]
    message = "Random layers that are active in training only come before it: d.drop, c.drop, b.drop and 1 more."
    assert run_rule("BN107", make_evidence(anatomy=layers)) == [
        passed("BN107", "first", NONE, 0.0, 0.0),
        failed("BN107", "behind", message, 4.0, 0.0),
        passed("BN107", "frozen", NONE, 4.0, 0.0),
    ]


def test_what_was_measured_to_be_harmless_passes() -> None:
    layers = [make_layer("harmless", make_shares(dropout=0.01)), make_layer("harmful", make_shares(dropout=0.1))]
    anatomy = [make_anatomy(layer.name, dropouts_before=("drop",)) for layer in layers]
    calm = "Random layers before it (drop) hardly change its statistics: D = 0.01."
    assert run_rule("BN107", make_evidence(*layers, anatomy=anatomy)) == [
        passed("BN107", "harmless", calm, 1.0, 0.0),
        failed(
            "BN107",
            "harmful",
            "Random layers that are active in training only come before it: drop.",
            1.0,
            0.0,
            "warning",
        ),
    ]


def test_what_was_not_measured_surely_is_a_remark() -> None:
    unsure = make_shares(dropout=0.03)
    layer = make_layer("bn", unsure, share_intervals=replace(make_intervals(unsure), dropout=(0.01, 0.05)))
    anatomy = [make_anatomy("bn", dropouts_before=("drop",))]
    for facts in (make_evidence(anatomy=anatomy), make_evidence(layer, anatomy=anatomy)):
        [verdict] = run_rule("BN107", facts)
        assert (verdict.outcome, verdict.severity) == ("failed", "info")
