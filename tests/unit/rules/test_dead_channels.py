"""BN106."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed, skipped


def test_more_than_half_of_the_channels_is_an_error() -> None:
    layers = [
        make_anatomy("alive"),
        make_anatomy("half", dead=8),
        make_anatomy("most", dead=9, median_variance=1e-7),
        make_anatomy("poisoned", dead=1, median_variance=None),
        make_anatomy("none kept", has_running_statistics=False),
    ]
    below = "channels have a running variance below eps = 1e-05"
    assert run_rule("BN106", make_evidence(anatomy=layers)) == [
        passed("BN106", "alive", "Every running variance is at least eps.", 0.0, 0.0),
        failed("BN106", "half", f"8 of 16 {below} (the median over channels is 0.5).", 8.0, 0.0),
        failed("BN106", "most", f"9 of 16 {below} (the median over channels is 1e-07).", 9.0, 0.0, "error"),
        failed("BN106", "poisoned", f"1 of 16 {below}.", 1.0, 0.0),
        skipped("BN106", "none kept", "the layer has no running statistics"),
    ]
