"""BN104."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed


def test_a_layer_without_running_statistics_fails() -> None:
    layers = [make_anatomy("kept"), make_anatomy("none", has_running_statistics=False)]
    assert run_rule("BN104", make_evidence(anatomy=layers)) == [
        passed("BN104", "kept", "The layer has running statistics."),
        failed("BN104", "none", "track_running_stats is False: the layer uses batch statistics at inference too."),
    ]
