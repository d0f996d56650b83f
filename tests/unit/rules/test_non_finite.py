"""BN103."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed, skipped


def test_values_that_are_no_statistics_are_counted() -> None:
    layers = [
        make_anatomy("fine"),
        make_anatomy("nan", non_finite=2),
        make_anatomy("both", non_finite=1, negative=3),
        make_anatomy("none kept", has_running_statistics=False),
    ]
    assert run_rule("BN103", make_evidence(anatomy=layers)) == [
        passed("BN103", "fine", "All running statistics are finite.", 0.0, 0.0),
        failed("BN103", "nan", "The running statistics of its 16 channels contain 2 NaN or Inf values.", 2.0, 0.0),
        failed(
            "BN103",
            "both",
            "The running statistics of its 16 channels contain 1 NaN or Inf value and 3 negative variances.",
            4.0,
            0.0,
        ),
        skipped("BN103", "none kept", "the layer has no running statistics"),
    ]
