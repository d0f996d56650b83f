"""BN215."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.records import Gap, Layer
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import metric
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
    assert outcome(make_layer("bn", make_shares(data_shift=0.005)), worse)[0] == "passed"
    assert run_rule("BN215", make_evidence(make_layer(), held_out=True)) == [
        skipped("BN215", None, "needs a loss or metric")
    ]
