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
        failed("BN103", "nan", "Its running statistics hold 2 values of NaN or Inf, of 16 channels.", 2.0, 0.0),
        failed(
            "BN103",
            "both",
            "Its running statistics hold 1 value of NaN or Inf and 3 variances below 0, of 16 channels.",
            4.0,
            0.0,
        ),
        skipped("BN103", "none kept", "the layer keeps no running statistics"),
    ]
