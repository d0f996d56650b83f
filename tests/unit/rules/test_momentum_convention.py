"""BN101."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric, tried
from unit.rules.expect import failed, passed, skipped

PORTED = (
    "momentum=0.99 is the weight of the newest batch, so the running statistics average over about 1.02 batches. Did"
    " you mean 0.01?"
)


def test_only_a_weight_of_the_new_batch_near_one_fails() -> None:
    layers = [
        make_anatomy("usual", momentum=0.1),
        make_anatomy("cumulative", momentum=None),
        make_anatomy("just below", momentum=0.899),
        make_anatomy("ported", momentum=0.99),
        make_anatomy("last batch", momentum=1.0),
        make_anatomy("frozen", momentum=0.99, trains_statistics=False),
        make_anatomy("none kept", momentum=0.99, has_running_statistics=False),
    ]
    assert run_rule("BN101", make_evidence(anatomy=layers)) == [
        passed("BN101", "usual", "Momentum is 0.1.", 0.1, 0.9),
        passed("BN101", "cumulative", "momentum=None gives every batch the same weight.", None, 0.9),
        passed("BN101", "just below", "Momentum is 0.899.", 0.899, 0.9),
        failed("BN101", "ported", PORTED, 0.99, 0.9),
        failed(
            "BN101",
            "last batch",
            "momentum=1 keeps the statistics of the last training batch and nothing else.",
            1.0,
            0.9,
        ),
        passed("BN101", "frozen", "Momentum is 0.99, and training does not update the running statistics.", 0.99, 0.9),
        skipped("BN101", "none kept", "the layer has no running statistics"),
    ]


def test_it_is_an_error_where_a_scan_flags_the_layer() -> None:
    layers = [make_layer("flagged", make_shares(lag=0.5)), make_layer("fine")]
    anatomy = [make_anatomy(layer.name, momentum=0.99) for layer in layers]
    found = run_rule("BN101", make_evidence(*layers, anatomy=anatomy))
    assert found == [
        failed("BN101", "flagged", PORTED, 0.99, 0.9, "error"),
        failed("BN101", "fine", PORTED, 0.99, 0.9, "warning"),
    ]


def test_a_momentum_of_0_fails_for_trained_layers_and_new_ones_alike() -> None:
    message = (
        "momentum=0 never updates the running statistics: they stay what they were, while training uses the statistics"
        " of batches. To freeze a layer, call eval() on it after every model.train()."
    )
    remedy = (
        "Use another momentum (0.1 is the default); then recalibrate the running statistics on training data (bnprobe"
        " recalibrate)."
    )
    layers = [
        make_anatomy("trained", momentum=0.0),
        make_anatomy("new", momentum=0.0, untouched=True, batches_tracked=0),
        make_anatomy("frozen", momentum=0.0, trains_statistics=False),
    ]
    assert run_rule("BN101", make_evidence(anatomy=layers)) == [
        replace(failed("BN101", "trained", message, 0.0, 0.9), remedy=remedy),
        replace(failed("BN101", "new", message, 0.0, 0.9), remedy=remedy),
        passed("BN101", "frozen", "Momentum is 0, and training does not update the running statistics.", 0.0, 0.9),
    ]


def test_the_effect_decides_where_it_was_measured() -> None:
    flagged, fine = make_layer("bn", make_shares(lag=0.5)), make_layer("bn")
    anatomy = [make_anatomy("bn", momentum=0.99)]
    for layer, remedies, severity in (
        (flagged, (), "warning"),
        (flagged, (tried(0.9, 0.9),), "warning"),
        (flagged, (tried(0.8, 0.9),), "error"),
        (fine, (tried(0.8, 0.9),), "error"),
    ):
        facts = make_evidence(layer, anatomy=anatomy, gaps=(metric(0.9, 0.9),), remedies=remedies)
        assert run_rule("BN101", facts)[0].severity == severity
