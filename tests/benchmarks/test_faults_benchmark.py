"""The planted-fault benchmark: its networks are healthy, its faults are there, and its scores count right."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.faults import score
from benchmarks.faults.__main__ import main, render
from benchmarks.faults.calibration import QUICK as FEW
from benchmarks.faults.calibration import Check, true_figures
from benchmarks.faults.cases import healthy_case
from benchmarks.faults.controls import CONTROLS
from benchmarks.faults.damage import Damage, damage_of, served
from benchmarks.faults.faults import FAULTS, STRENGTHS
from benchmarks.faults.follow import ACTIONS, follow
from benchmarks.faults.measures import ImageStatistics, record
from benchmarks.faults.proofs import PROOFS, shown
from benchmarks.faults.samples import Samples, Sampling, batches, loader
from benchmarks.faults.trials import (
    LOOKED_AT,
    PAIRS,
    UNSEEN,
    Advice,
    Outcome,
    Trial,
    build,
    control_trials,
    pair_trials,
    run,
    single_trials,
)
from benchmarks.faults.work import Result, tasks_of
from bnprobe.stats.theory import mismatch_iid

QUICK = "mlp"
"""The network that trains in a fraction of a second."""


def test_a_healthy_network_has_learnt_and_no_layer_is_below_the_threshold() -> None:
    case = healthy_case(QUICK, seed=1)
    for figures in true_figures(case, [layer.values_per_channel for layer in case.scanned(2).layers], FEW):
        assert figures["mismatch, train path"] < mismatch_iid(32)
        assert figures["mismatch, eval path"] < mismatch_iid(32)
    assert float(served(case).points.mean()) > 0.9


def test_training_is_reproducible_and_cases_share_no_weights() -> None:
    one, other = healthy_case(QUICK, seed=1), healthy_case(QUICK, seed=1)
    first, second = (next(case.model.parameters()) for case in (one, other))
    assert torch.equal(first, second)
    with torch.no_grad():
        first.add_(1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("fault", [name for name in PROOFS if QUICK in FAULTS[name].networks])
def test_a_planted_fault_shows_in_a_direct_measure_and_a_healthy_case_does_not(fault: str) -> None:
    assert not shown(fault, healthy_case(QUICK, seed=1))
    assert shown(fault, build(Trial((fault,), QUICK, 1)))


def test_a_healthy_case_lost_nothing_and_a_stronger_fault_costs_more() -> None:
    healthy = damage_of(healthy_case(QUICK, seed=1))
    assert healthy is not None
    assert healthy.lost == 0
    assert not healthy.is_damaged
    mild, strong = (damage_of(build(Trial(("brightness",), QUICK, 1, strength))) for strength in (0, 2))
    assert mild is not None
    assert strong is not None
    assert strong.is_damaged
    assert strong.lost > mild.lost


def test_what_a_network_lost_to_other_data_is_not_counted() -> None:
    assert damage_of(build(Trial(("single_value",), "plain", 1))) is None


def test_damage_is_more_than_two_points_and_more_than_chance() -> None:
    assert Damage(0.9, 0.87, error=0.01).is_damaged
    assert not Damage(0.9, 0.89, error=0.001).is_damaged
    assert not Damage(0.9, 0.87, error=0.02).is_damaged
    assert Damage(0.9, float("nan"), error=0.01).is_damaged
    assert Damage(0.9, 0.9, 0.01, healthy_loss=0.3, faulty_loss=0.32).is_harmless
    assert not Damage(0.9, 0.9, 0.01, healthy_loss=0.3, faulty_loss=0.4).is_harmless


def test_scored_samples_are_none_that_a_scan_sees() -> None:
    case = healthy_case(QUICK, seed=1)
    seen, unseen = ({row.numpy().tobytes() for row in side.inputs} for side in (case.held_out(), case.unseen()))
    assert not seen & unseen


def test_recalibration_is_carried_out_where_the_first_diagnosis_asks_for_it() -> None:
    case = build(Trial(("statistics_of_other_data",), QUICK, 1))
    before = damage_of(case)
    followed = follow(case, case.scanned(16))
    assert followed.action == "recalibrate"
    assert followed.case is not None
    after = damage_of(followed.case)
    assert before is not None
    assert after is not None
    assert before.is_damaged
    assert not after.is_damaged
    assert damage_of(case) == before  # a copy was repaired


def test_of_several_actions_the_first_in_the_text_is_carried_out() -> None:
    case = build(Trial(("small_batch",), QUICK, 1))
    report = case.scanned(16)
    assert follow(case, report).action == "larger batches"
    assert {"recalibrate", "recalibrate on held-out data", "larger batches"} <= set(ACTIONS)


def test_without_a_diagnosis_nothing_is_done() -> None:
    case = healthy_case(QUICK, seed=1)
    assert follow(case, case.scanned(16)).action == "nothing"


def test_recorded_statistics_are_those_of_the_batches_and_leave_the_model_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    samples = Samples(torch.randn(64, 3), torch.zeros(64), torch.zeros(64))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "batches" not in name}
    found = record(model, samples, Sampling(16), 4, training=True)[0]
    drawn = torch.stack(
        [batch for (batch, _), _ in zip(batches(samples, Sampling(16)), range(4), strict=False)]
    ).double()
    torch.testing.assert_close(found.mean, drawn.mean(1))
    torch.testing.assert_close(found.variance, drawn.var(1, correction=0))
    mean, variance = found.population()
    torch.testing.assert_close(mean, samples.inputs.double().mean(0))
    torch.testing.assert_close(variance, samples.inputs.double().var(0, correction=0))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if name in before)


def test_mismatch_agrees_with_the_definition() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, eps=0.1))
    samples = Samples(torch.randn(8, 2), torch.zeros(8), torch.zeros(8))
    norm, values = model[0], samples.inputs.double()
    mean, variance = torch.tensor([0.5, -1.0]).double(), torch.tensor([2.0, 0.3]).double()
    found = record(model, samples, Sampling(8), 1, training=True)[0].mismatch(mean, variance, norm.eps)
    trained = (values - values.mean(0)) / (values.var(0, correction=0) + norm.eps).sqrt()
    inferred = (values - mean) / (variance + norm.eps).sqrt()
    assert found == pytest.approx(float((trained - inferred).square().mean()))


def test_the_expected_mismatch_is_the_mean_over_many_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4096, 5, 2, generator=generator).double().exp()  # far from Gaussian
    statistics = ImageStatistics(images.mean(1), images.square().mean(1))
    mean, variance = statistics.population()
    rows = torch.randint(4096, (400_000,), generator=generator)
    drawn = statistics.regrouped(rows, 16).mismatch(mean + 0.1, 1.2 * variance, 0.01)
    assert statistics.expected_mismatch(16, mean + 0.1, 1.2 * variance, 0.01) == pytest.approx(drawn, rel=0.02)


def test_grouped_batches_hold_one_group_each() -> None:
    groups = torch.arange(40) % 3
    samples = Samples(torch.zeros(40, 1), groups, groups)
    sizes = [(len(targets), len(targets.unique())) for _, targets in loader(samples, Sampling(4, order="grouped"))]
    assert sizes == [(4, 1)] * 9


def test_runs_of_groups_fill_a_batch() -> None:
    groups = torch.arange(64) % 4
    samples = Samples(torch.zeros(64, 1), groups, groups)
    parts = [targets.unflatten(0, (2, 4)) for _, targets in loader(samples, Sampling(8, order="grouped", runs=2))]
    assert len(parts) == 8
    assert all(len(run.unique()) == 1 for part in parts for run in part)


def test_there_are_as_many_cases_as_asked_for() -> None:
    singles, pairs, controls = list(single_trials()), list(pair_trials()), list(control_trials())
    assert {trial.planted[0] for trial in singles} == FAULTS.keys()
    assert {trial.strength for trial in singles} == set(range(len(STRENGTHS)))
    assert {trial.control for trial in controls} == CONTROLS.keys()
    assert {trial.planted for trial in pairs if trial.is_scored} == set(PAIRS)
    assert len({trial.network for trial in singles}) >= 10
    assert len(singles) >= 300
    assert len(controls) >= 120
    for trial in (*singles, *controls):
        place = FAULTS[trial.planted[0]].networks if trial.planted else CONTROLS[trial.control].networks
        assert trial.network in place
    assert len(set(singles)) == len(singles)
    assert not set(LOOKED_AT) & set(UNSEEN)


def test_every_trial_is_in_one_task() -> None:
    trials = [*single_trials(), *pair_trials(), *control_trials()]
    tasks = tasks_of(trials, {("plain", 9): 3})
    assert sorted(map(str, trials)) == sorted(str(trial) for task in tasks for trial in task.trials)
    assert [task.repeats for task in tasks if task.seed == 9] == [3]


def outcome(planted: str, named: str, *, seed: int = UNSEEN[0], lost: float = 0.3, **others: object) -> Outcome:
    trial = Trial(tuple(planted.split()), "dense", seed, control="" if planted else "as trained")
    given = {"failed": True, "damage": Damage(0.9, 0.9 - lost, 0.005), **others}
    return replace(Outcome(trial, tuple(named.split())), **given)


OUTCOMES = [
    outcome("pruned", "lag dropout", advice=Advice("recalibrate", 0.895, 0.001)),
    outcome("pruned", "dropout lag", advice=Advice("recalibrate", 0.7, 0.001, promised=0.71)),
    outcome("pruned", "", failed=False, advice=Advice("nothing", 0.6)),
    outcome("pruned", "dropout", advice=Advice("recalibrate", None, problem="it broke")),
    outcome("pruned", "", lost=0.01, failed=False),
    outcome("pruned", "lag", lost=0.01),
    outcome("last_batch", "last_batch", lost=0.0),
    outcome("pruned dropout", "dropout lag"),
    outcome("pruned dropout", "dropout", folded=("lag",)),
    outcome("", "", lost=0.0, failed=False),
    outcome("", "lag", lost=0.0, errors=("lag",)),
]


def test_goals_count_what_they_say() -> None:
    rows = {row.what: row for row in score.goals(OUTCOMES, [])}
    figures = {
        "the metric fell: planted cause named first": "25.0% (1 of 4)",
        "the metric fell: planted cause named at all": "50.0% (2 of 4)",
        "the metric fell: no error (silent)": "25.0% (1 of 4)",
        "the metric fell: it comes back": "25.0% (1 of 4)",
        "the metric fell: it comes back, or the report said how much": "50.0% (2 of 4)",
        "the fault is in the structure: named first": "100.0% (1 of 1)",
        "no damage: false error": "50.0% (2 of 4)",
        "the same, in healthy controls alone": "50.0% (1 of 2)",
        "both causes of a pair named": "50.0% (1 of 2)",
        "the same, or named as a consequence of the other": "100.0% (2 of 2)",
    }
    for what, figure in figures.items():
        assert rows[what].figure.startswith(figure), what


def test_cases_for_setting_thresholds_are_not_scored() -> None:
    tuned = [outcome("pruned", "dropout", seed=LOOKED_AT[0])]
    right = [outcome("pruned", "lag")]
    rows = {row.what: row for row in score.goals([*right, *tuned], [])}
    row = rows["the metric fell: planted cause named first"]
    assert row.figure == "100.0% (1 of 1); where thresholds may be set: 0.0% (0 of 1)"
    both = render(Result([*right, *tuned], [], []), 1.0)
    assert "| pruned  | lag 1       |" in both
    assert "dropout 1" not in both
    assert "Scored cases: not run" not in both
    alone = {row.what: row for row in score.goals(tuned, [])}["the metric fell: planted cause named first"]
    assert alone.figure == "not run; where thresholds may be set: 0.0% (0 of 1)"
    mended = render(Result(tuned, [], []), 1.0)
    assert "Scored cases: not run. The tables below are of cases on which thresholds may be set." in mended
    assert "| pruned  | dropout 1   |" in mended


def test_every_kind_of_miss_is_listed() -> None:
    missed = [row[4] for row in score.misses(OUTCOMES)[1:]]
    assert missed == ["cause", "cause, silent, remedy", "cause, remedy", "false error", "pair", "false error"]


def test_what_came_back_is_the_part_of_what_was_lost() -> None:
    assert [score.won_back(one) for one in OUTCOMES[:4]] == pytest.approx([0.295 / 0.3, 0.1 / 0.3, 0.0, 0.0])
    table = score.by_remedy(OUTCOMES)
    assert [row[0] for row in table[1:]] == ["nothing", "recalibrate"]
    assert table[2][1:3] == ["3", "1"]


def test_blame_for_what_batch_normalization_did_not_do_is_counted() -> None:
    trial = Trial((), QUICK, UNSEEN[0], control="hardly trained")
    assert score.blames_nothing(Outcome(trial, failed=True))
    assert score.blames_nothing(Outcome(trial, named=("lag",)))  # a remark
    assert not score.blames_nothing(Outcome(trial, named=("lag",), errors=("lag",), failed=True))


@pytest.mark.parametrize(("fault", "cause"), [("brightness", "data_shift"), ("statistics_of_other_data", "lag")])
def test_a_trial_runs_from_the_fault_to_what_the_remedy_gives(fault: str, cause: str) -> None:
    found = run(Trial((fault,), QUICK, 1))
    assert found.problem is None
    assert found.is_damaged
    assert found.failed
    assert found.named[0] == cause
    assert score.is_back(found)


def test_coverage_tells_on_which_side_the_truth_was_missed() -> None:
    sides = [(False, False), (False, False), (True, False), (False, True)]
    checks = [Check("share: lag", "mlp", 1, below, above) for below, above in sides]
    assert score.coverage(checks)[1] == ["share: lag", "4", "50.0%", "25.0%", "25.0%", "mlp 50.0%"]
    assert [row.met for row in score.goals([], checks) if "share: lag" in row.what] == [False]


def test_a_scan_of_a_healthy_case_gives_an_interval_for_every_layer() -> None:
    report = healthy_case(QUICK, seed=1).scanned(8)
    assert [layer.name for layer in report.layers] == [f"units.{index}.norm" for index in range(4)]
    assert all(layer.eval is not None and layer.eval.interval[1] is not None for layer in report.layers)


def test_the_model_file_functions_take_a_batch() -> None:
    case = healthy_case(QUICK, seed=1)
    value: Tensor = case.loss(case.model, next(iter(case.batches())))
    assert value.shape == ()


def test_the_quick_run_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--quick", "--processes", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.faults", *arguments])
    assert main() == 0
    results = (tmp_path / "RESULTS.md").read_text()
    for heading in ("Goals", "By fault", "By remedy", "Controls", "What was named first", "Misses", "Calibration"):
        assert f"\n## {heading}" in results
    outcomes = json.loads((tmp_path / "results.json").read_text())["outcomes"]
    trials = [one["trial"] for one in outcomes]
    assert {trial["network"] for trial in trials} == {"mlp", "audio"}
    assert any(trial["planted"] for trial in trials)
    assert any(trial["control"] for trial in trials)
    assert [one["problem"] for one in outcomes] == [None] * len(outcomes)
    healthy = [one for one in outcomes if one["trial"]["control"] and CONTROLS[one["trial"]["control"]].healthy]
    assert not any(one["failed"] for one in healthy)
