"""BN302."""

from __future__ import annotations

from bnprobe.testing import make_evidence, make_layer, run_rule
from unit.rules.expect import HALF, failed, passed, skipped


def test_processes_must_agree() -> None:
    layers = [make_layer(name) for name in ("alike", "apart", "unknown")]
    facts = make_evidence(*layers, processes=2, rank_mismatch={"alike": 0.01, "apart": 0.5})
    assert run_rule("BN302", facts) == [
        passed("BN302", "alike", "The running statistics of two processes differ by up to D = 0.01.", 0.01, HALF),
        failed("BN302", "apart", "The running statistics of two processes differ by up to D = 0.5.", 0.5, HALF),
        skipped("BN302", "unknown", "the statistics of the processes were not compared"),
    ]


def test_one_process_has_nothing_to_compare() -> None:
    assert run_rule("BN302", make_evidence(make_layer())) == [
        skipped("BN302", None, "one process: nothing to compare"),
    ]
