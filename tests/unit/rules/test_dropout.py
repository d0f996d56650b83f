"""BN204."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed


def test_the_random_layers_are_named() -> None:
    layers = [make_layer("behind", make_shares(dropout=0.2)), make_layer("before")]
    anatomy = [make_anatomy("behind", dropouts_before=("drop1", "drop2")), make_anatomy("before")]
    assert run_rule("BN204", make_evidence(*layers, anatomy=anatomy)) == [
        failed(
            "BN204",
            "behind",
            "Random layers before it (drop2, drop1) change its mean and variance in training, and are off at inference."
            " (It accounts for D = 0.200 of 0.205; the layer's limit is 0.048.)",
            0.2,
            HALF,
        ),
        passed("BN204", "before", "This cause accounts for D = 0 of the layer's mismatch.", 0.0, HALF),
    ]
