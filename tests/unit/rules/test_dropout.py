"""BN204."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_path, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed


def test_the_random_layers_are_named() -> None:
    layers = [make_layer("behind", make_shares(dropout=0.2)), make_layer("before")]
    anatomy = [make_anatomy("behind", dropouts_before=("drop1", "drop2")), make_anatomy("before")]
    assert run_rule("BN204", make_evidence(*layers, anatomy=anatomy)) == [
        failed(
            "BN204",
            "behind",
            "Random layers before it (drop2, drop1) change its mean and variance in training, and are off at inference."
            " (It accounts for D = 0.200 of 0.205; its limit is 0.024, the layer's is 0.048.)",
            0.2,
            HALF,
        ),
        passed("BN204", "before", "This cause accounts for D = 0 of the layer's mismatch.", 0.0, HALF),
    ]


def test_after_recalibration_without_dropout_training_alone_is_off() -> None:
    """Noise of batches would be blamed for a mismatch of which it makes a thousandth."""
    fits = make_layer("bn", make_shares(small_batch=0.001, lag=0.0), train=make_path(1.7), eval=make_path(0.001))
    behind = make_evidence(fits, anatomy=[make_anatomy("bn", dropouts_before=("drop",))])
    [found] = run_rule("BN204", behind)
    assert (found.outcome, found.severity, found.value) == ("failed", "warning", 1.7)
    assert "only in training, with these layers on, it is off: D = 1.70." in found.message
    assert found.remedy.startswith("None is needed at inference.")
    assert [verdict.outcome for verdict in run_rule("BN201", behind)] == ["passed"]
    assert [verdict.outcome for verdict in run_rule("BN204", make_evidence(fits))] == ["passed"]
