"""BN215."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bnprobe.records import Gap, Layer
from bnprobe.rules.effect import UNSCORED
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric, tried
from unit.rules.expect import skipped

FALLEN = replace(metric(0.99, 0.99), held_out=0.7, generalization=-0.29, generalization_interval=(-0.35, -0.23))


def outcome(layer: Layer, gap: Gap = FALLEN) -> tuple[str, str]:
    [verdict] = run_rule("BN215", make_evidence(layer, held_out=True, gaps=(gap,)))
    return verdict.outcome, verdict.severity


def test_held_out_data_that_is_worse_with_the_same_statistics_is_remarked_on() -> None:
    assert outcome(make_layer("bn", make_shares(data_shift=0.005))) == ("failed", "info")


def test_not_where_statistics_moved_or_may_have() -> None:
    assert outcome(make_layer("bn", make_shares(data_shift=0.3)))[0] == "passed"
    unknown = make_layer("bn", make_shares(data_shift=0.01), share_intervals=None)
    assert outcome(unknown)[0] == "passed"


def test_not_where_inference_is_worse_in_the_first_place() -> None:
    worse = replace(FALLEN, inconsistency=-0.2, inconsistency_interval=(-0.25, -0.15))
    little = replace(FALLEN, inconsistency=-0.05, inconsistency_interval=(-0.06, -0.04))
    assert outcome(make_layer("bn", make_shares(data_shift=0.005)), little)[0] == "failed"
    assert outcome(make_layer("bn", make_shares(data_shift=0.005)), worse)[0] == "passed"
    assert run_rule("BN215", make_evidence(make_layer(), held_out=True)) == [skipped("BN215", None, UNSCORED)]


@pytest.mark.parametrize(("after", "width", "found"), [(0.7, 0.01, True), (0.74, 0.01, True), (0.95, 0.01, False)])
def test_where_a_shift_is_not_sure_the_trial_decides(after: float, width: float, found: bool) -> None:
    """A layer may be undecided: what statistics of the held-out data do not bring back is not theirs."""
    unsure = make_layer("bn", make_shares(data_shift=0.001), share_intervals=None, undecided=True)
    remedy = tried(0.7, after, "evaluation statistics", width)
    facts = make_evidence(unsure, held_out=True, gaps=(FALLEN,), remedies=(remedy,))
    [verdict] = run_rule("BN215", facts)
    assert (verdict.outcome == "failed") == found
    assert (f"do not bring it back (with them, the metric is {after:.3g})" in verdict.message) == found
