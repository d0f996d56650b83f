"""BN207."""

from __future__ import annotations

from bnprobe.records import Domains
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed, skipped


def test_calls_on_different_data_fail() -> None:
    apart = Domains(0.3, (0.2, 0.4))
    layers = [
        make_layer("once"),
        make_layer("alike", calls_per_forward=2, domains=Domains(0.03, (0.01, 0.05))),
        make_layer("apart", calls_per_forward=2, domains=apart),
        make_layer("flagged", make_shares(lag=0.3), calls_per_forward=3, domains=apart),
        make_layer("unknown", calls_per_forward=2),
    ]
    far = "times, on data that lies D = 0.3 from what all calls have in common (the limit is 0.024)."
    assert run_rule("BN207", make_evidence(*layers)) == [
        passed("BN207", "once", "The layer is called once.", None, HALF),
        passed("BN207", "alike", "Its calls are D = 0.03 apart.", 0.03, HALF),
        failed("BN207", "apart", f"One forward pass calls the layer 2 {far}", 0.3, HALF, "warning"),
        failed("BN207", "flagged", f"One forward pass calls the layer 3 {far}", 0.3, HALF, "error"),
        skipped("BN207", "unknown", "the populations of its calls were not measured"),
    ]
