"""BN214."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.rules.effect import WITH_FROZEN
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_path, make_shares, run_rule
from unit.rules.effects import chance, loss, metric, tried

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


@pytest.mark.parametrize(("after", "first"), [(0.4, "lag"), (0.22, "untrained_weights")])
def test_frozen_statistics_that_keep_the_outputs_at_chance_come_first_where_others_are_better(
    after: float, first: str
) -> None:
    layer = replace(make_layer("bn", train=None, eval=make_path(0.9), flagged=False), shares=None)
    facts = make_evidence(
        layer,
        anatomy=[make_anatomy("bn", trains_statistics=False, trains_affine=False)],
        gaps=(metric(0.2, 0.2),),
        remedies=(tried(0.2, after, WITH_FROZEN, width=0.03),),
        chance=(AT_CHANCE,),
        frozen_lag={"bn": 0.9},
    )
    [found] = diagnose(judge(facts, RulesSpec()), facts)
    assert (found.cause, found.severity) == (first, "error")
    if first == "lag":
        assert "With them the outputs are at chance level" in found.message
        assert found.remedy.endswith("(bnprobe recalibrate --include-frozen). Then train the layers behind them again.")
    else:
        assert "The statistics of frozen layers are up to D = 0.900 away from those of this data" in found.remedy
