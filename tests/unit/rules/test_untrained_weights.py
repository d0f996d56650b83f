"""BN214."""

from __future__ import annotations

import pytest

from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import chance, loss

AT_CHANCE = chance((2.12, 2.34), (2.31, 2.31))


def test_the_weights_are_named_and_not_their_statistics() -> None:
    facts = make_evidence(make_layer("bn", make_shares(lag=0.6)), gaps=(loss(2.12, 2.31),), chance=(AT_CHANCE,))
    [found] = diagnose(judge(facts, RulesSpec()), facts)
    assert (found.cause, found.severity) == ("untrained_weights", "error")
    assert found.consequences == ("lag in 1 layer", "inconsistency in the outputs")
    assert "recalibrate" not in found.remedy


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([AT_CHANCE], "failed"),
        ([AT_CHANCE, chance((0.9, 0.1), (0.1, 0.1), "metric")], "passed"),  # training has learned
        ([chance((0.1, 2.3), (9.0, 9.0))], "passed"),  # inference alone is at chance
        ([chance((2.1, 2.3), (2.1, 2.3))], "passed"),  # a hard task, of which something was learned
        ([chance((0.1, 2.3), (0.1, 2.3))], "passed"),
        ([], "skipped"),
    ],
)
def test_both_modes_must_be_at_chance(values: list[object], outcome: str) -> None:
    assert [each.outcome for each in run_rule("BN214", make_evidence(make_layer(), chance=tuple(values)))] == [outcome]


def test_a_new_network_is_only_remarked_on() -> None:
    new = make_anatomy("bn", untouched=True, affine_moved=False, batches_tracked=0)
    [verdict] = run_rule("BN214", make_evidence(make_layer("bn"), anatomy=[new], chance=(AT_CHANCE,)))
    assert (verdict.outcome, verdict.severity) == ("failed", "info")
