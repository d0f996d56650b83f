"""BN207."""

from __future__ import annotations

from bnprobe.records import Domains
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric, tried
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
    start, end = (
        "The layer is called",
        "times per forward pass, and the data of a call differs from that of all calls by",
    )
    far = f"{end} D = 0.3 on average."
    assert run_rule("BN207", make_evidence(*layers)) == [
        passed("BN207", "once", "The layer is called once per forward pass.", None, HALF),
        passed("BN207", "alike", f"{start} 2 {end} D = 0.03 on average.", 0.03, HALF),
        failed("BN207", "apart", f"{start} 2 {far}", 0.3, HALF, "warning"),
        failed("BN207", "flagged", f"{start} 3 {far}", 0.3, HALF, "error"),
        skipped("BN207", "unknown", "the statistics of its separate calls were not measured"),
    ]


def test_it_is_an_error_where_other_statistics_are_surely_better() -> None:
    layer = make_layer("bn", calls_per_forward=2, domains=Domains(0.3, (0.2, 0.4)))
    for after, severity in ((0.9, "warning"), (0.95, "error")):
        remedies = (tried(0.9, after, "batch statistics"),)
        [found] = run_rule("BN207", make_evidence(layer, gaps=(metric(0.9, 0.9),), remedies=remedies))
        assert found.severity == severity
