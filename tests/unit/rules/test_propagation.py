"""BN205."""

from __future__ import annotations

from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed


def test_what_earlier_layers_do_is_blamed_on_them() -> None:
    facts = make_evidence(make_layer("first"), make_layer("second", make_shares(propagation=0.1)))
    assert run_rule("BN205", facts) == [
        passed("BN205", "first", "This cause accounts for D = 0 of the layer's mismatch.", 0.0, HALF),
        failed(
            "BN205",
            "second",
            "Because of earlier layers, the mean and variance of its input differ between training and inference."
            " (It accounts for D = 0.100 of 0.105; its limit is 0.024, the layer's is 0.048.)",
            0.1,
            HALF,
        ),
    ]
