"""BN105."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed, skipped


def test_both_halves_must_be_trained_or_frozen() -> None:
    layers = [
        make_anatomy("trained"),
        make_anatomy("frozen", trains_statistics=False, trains_affine=False),
        make_anatomy("drifting", trains_affine=False),
        make_anatomy("standing", trains_statistics=False),
        make_anatomy("plain", trains_affine=None),
        make_anatomy("none kept", has_running_statistics=False, trains_statistics=False),
    ]
    assert run_rule("BN105", make_evidence(anatomy=layers)) == [
        passed("BN105", "trained", "Running statistics, weight and bias are all trained."),
        passed("BN105", "frozen", "Running statistics, weight and bias are all frozen."),
        failed(
            "BN105",
            "drifting",
            "Weight and bias are frozen (requires_grad=False), but training updates the running statistics.",
        ),
        failed(
            "BN105",
            "standing",
            "The running statistics are frozen (eval mode during training), but weight and bias are trained.",
        ),
        skipped("BN105", "plain", "the layer has no weight and bias (affine=False)"),
        skipped("BN105", "none kept", "the layer has no running statistics"),
    ]
