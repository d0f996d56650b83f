"""The helpers for authors of rules give what a scan would."""

from __future__ import annotations

import pytest

from bnprobe.errors import UsageError
from bnprobe.rules import RULES
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_path, make_shares, run_rule, total


def test_the_defaults_are_a_healthy_model() -> None:
    facts = make_evidence(make_layer("a"), make_layer("b"), images=64, drop_last=False)
    assert [anatomy.name for anatomy in facts.anatomy] == list(facts.layers) == ["a", "b"]
    outcomes = {verdict.outcome for rule in RULES for verdict in rule.judge(facts)}
    assert outcomes == {"passed", "skipped"}


def test_without_layers_there_is_no_scan() -> None:
    facts = make_evidence(anatomy=[make_anatomy("bn")])
    assert (facts.scan, facts.layers) == (None, {})


def test_flags_follow_from_shares() -> None:
    layer = make_layer("bn", make_shares(lag=0.5))
    assert layer.eval is not None
    assert layer.shares is not None
    assert layer.eval.mismatch == pytest.approx(total(layer.shares)) == pytest.approx(0.504)
    assert layer.flagged
    assert not make_layer("bn", make_shares(lag=0.5), threshold=2.0).flagged
    assert make_layer("bn", train=make_path(0.2)).flagged


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="the nearest code is BN20"):
        run_rule("BN2O3", make_evidence())
