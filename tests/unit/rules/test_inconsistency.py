"""BN211."""

from __future__ import annotations

from dataclasses import replace

from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.records import Domains, Output
from bnprobe.rules.effect import UNSCORED
from bnprobe.rules.facts import Facts
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import loss, metric, tried
from unit.rules.expect import skipped

WORSE = metric(0.94, 0.46)
STEADY = Output(0.1, None, None, None, None, repeat=0.0)


def found(facts: Facts) -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    diagnoses = diagnose(judge(facts, RulesSpec()), facts)
    return [(each.cause, each.severity, each.layers, each.consequences) for each in diagnoses]


def test_what_was_ruled_out_is_said_where_no_cause_is_found() -> None:
    facts = make_evidence(make_layer("a"), make_layer("b"), gaps=(WORSE,), output=STEADY)
    assert found(facts) == [("inconsistency", "error", (), ())]
    [verdict] = run_rule("BN211", facts)
    assert verdict.message == (
        "On training batches the metric is 0.94 with batch statistics and 0.46 with running statistics. No cause was"
        " found. Ruled out: randomness at inference (two passes agree); stale statistics (at most D = 0.001 in a"
        " layer); small batches (at most D = 0.004 in a layer); dropout (at most D = 0 in a layer); layers shared by"
        " several inputs (every layer is called once)."
    )


def test_an_error_that_explains_it_takes_it_in() -> None:
    facts = make_evidence(make_layer("bn", make_shares(lag=0.5)), gaps=(WORSE,))
    assert found(facts) == [("lag", "error", ("bn",), ("inconsistency in the outputs",))]


def test_shared_layers_are_the_cause_where_their_calls_differ_at_all() -> None:
    shared = make_layer("bn", calls_per_forward=2, domains=Domains(0.001, (0.0008, 0.0012)))
    assert found(make_evidence(shared, gaps=(WORSE,))) == [
        ("shared_domains", "error", ("bn",), ("inconsistency in the outputs",))
    ]
    alike = replace(shared, domains=Domains(0.001, (-0.001, 0.003)))
    assert found(make_evidence(alike, gaps=(WORSE,)))[0][0] == "inconsistency"


def test_only_what_is_sure_and_matters_counts() -> None:
    layer = make_layer("bn")
    for gap in (metric(0.94, 0.93), metric(0.94, 0.9, width=0.1), metric(0.9, 0.95), loss(1.0, 1.01, 0.005)):
        assert [verdict.outcome for verdict in run_rule("BN211", make_evidence(layer, gaps=(gap,)))] == ["passed"]
    percent = metric(36.0, 35.1, 0.2)  # of an unknown scale, as an IoU in percent or a PSNR
    contrastive = loss(6.80, 6.94, 0.05)
    for gap in (percent, contrastive):
        [verdict] = run_rule("BN211", make_evidence(layer, gaps=(gap,)))
        assert verdict.outcome == "passed"
    for gaps in ((loss(1.0, 1.1),), (metric(0.9, 0.95), loss(1.0, 1.5)), (percent, loss(1.0, 1.5))):
        assert [verdict.outcome for verdict in run_rule("BN211", make_evidence(layer, gaps=gaps))] == ["failed"]
    one_batch = make_evidence(layer, gaps=(WORSE,), batch_size=256)
    [verdict] = run_rule("BN211", one_batch)
    assert (verdict.outcome, "fewer than 5 micro-batches" in verdict.message) == ("passed", True)
    assert run_rule("BN211", make_evidence(layer)) == [skipped("BN211", None, UNSCORED)]


def test_only_a_trial_that_shows_no_gain_rules_stale_statistics_out() -> None:
    for width, said in ((0.01, True), (0.3, False)):
        facts = make_evidence(make_layer("bn"), gaps=(WORSE,), remedies=(tried(0.46, 0.46, width=width),))
        [verdict] = run_rule("BN211", facts)
        assert verdict.outcome == "failed"
        assert ("stale statistics" in verdict.message) == said
