"""BN205."""

from __future__ import annotations

from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed


def test_what_earlier_layers_do_is_blamed_on_them() -> None:
    facts = make_evidence(make_layer("first"), make_layer("second", make_shares(propagation=0.1)))
    assert run_rule("BN205", facts) == [
        passed("BN205", "first", "It makes up D = 0 of this layer's mismatch.", 0.0, HALF),
        failed(
            "BN205",
            "second",
            "Layers before it hand it other means and variances at inference than in training."
            " (D = 0.1 of 0.11, 95%; a layer may have 0.047 in all.)",
            0.1,
            HALF,
        ),
    ]
