"""The planted-fault benchmark: its networks are healthy, its faults are there, and its scores count right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.faults import score
from benchmarks.faults.calibration import Check, true_figures
from benchmarks.faults.cases import Case, healthy_case
from benchmarks.faults.faults import FAULTS, NotApplicableError
from benchmarks.faults.measures import ImageStatistics, record
from benchmarks.faults.proofs import PROOFS, shown
from benchmarks.faults.samples import Samples, Sampling, batches, loader
from benchmarks.faults.trials import PAIRS, Outcome, Trial, build, control_trials, pair_trials, single_trials
from benchmarks.faults.work import tasks_of
from bnprobe.stats.theory import mismatch_iid

QUICK = "mlp"
"""The network that trains in a fraction of a second."""


def accuracy(case: Case) -> float:
    held_out = case.network.data().held_out
    with torch.no_grad():
        scores = case.model.eval()(held_out.inputs)
    return float((scores.argmax(1) == held_out.targets).float().mean())


def test_a_healthy_network_has_learnt_and_no_layer_is_below_the_threshold() -> None:
    case = healthy_case(QUICK, seed=1)
    for figures in true_figures(case, [layer.values_per_channel for layer in case.scanned(2).layers], count=60):
        assert figures["mismatch, train path"] < mismatch_iid(32)
        assert figures["mismatch, eval path"] < mismatch_iid(32)
    assert accuracy(case) > 0.9


def test_training_is_reproducible_and_cases_share_no_weights() -> None:
    one, other = healthy_case(QUICK, seed=1), healthy_case(QUICK, seed=1)
    first, second = (next(case.model.parameters()) for case in (one, other))
    assert torch.equal(first, second)
    with torch.no_grad():
        first.add_(1)
    assert not torch.equal(first, second)


def test_every_fault_has_a_proof() -> None:
    assert PROOFS.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "single_image"])
def test_a_planted_fault_shows_in_a_direct_measure_and_a_healthy_case_does_not(fault: str) -> None:
    assert not shown(fault, healthy_case(QUICK, seed=1))
    assert shown(fault, build(Trial((fault,), QUICK, 1)))


def test_what_cannot_be_planted_is_said() -> None:
    with pytest.raises(NotApplicableError, match="single_value"):
        build(Trial(("single_image",), QUICK, 1))


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


def test_there_are_as_many_cases_as_asked_for() -> None:
    assert len({trial.planted for trial in single_trials()}) >= 15
    assert len(list(control_trials())) >= 60
    assert len(PAIRS) >= 20
    assert {trial.planted for trial in pair_trials()} == set(PAIRS)


def test_every_trial_is_in_one_task() -> None:
    trials = [*single_trials(), *pair_trials(), *control_trials()]
    tasks = tasks_of(trials, {("plain", 9): 3})
    assert sorted(map(str, trials)) == sorted(str(trial) for task in tasks for trial in task.trials)
    assert [task.repeats for task in tasks if task.seed == 9] == [3]


def outcome(planted: str, named: str, *, network: str = "dense", errors: str = "", **others: object) -> Outcome:
    trial = Trial(tuple(planted.split()), network, 9)
    return replace(Outcome(trial, tuple(named.split()), errors=tuple(errors.split())), **others)


OUTCOMES = [
    outcome("lag", "lag dropout"),
    outcome("lag", "dropout lag"),
    outcome("lag", ""),
    outcome("single_image", "", not_applicable="no"),
    outcome("lag dropout", "dropout lag"),
    outcome("lag dropout", "dropout", folded=("lag",)),
    outcome("", ""),
    outcome("", "lag", errors="lag"),
    outcome("", "", problem="it broke"),
]


def test_goals_count_what_they_say() -> None:
    rows = {row.what: row for row in score.goals(OUTCOMES, [])}
    assert rows["planted cause named first"].figure.startswith("33.3% (1 of 3)")
    assert rows["planted cause named at all"].figure.startswith("66.7% (2 of 3)")
    assert rows["both causes of a pair named"].figure.startswith("50.0% (1 of 2)")
    assert rows["the same, or named as a consequence of the other"].figure.startswith("100.0% (2 of 2)")
    assert rows["healthy models with an error-level finding"].figure.startswith("66.7% (2 of 3)")
    assert not any(rows[what].met for what in ("planted cause named first", "both causes of a pair named"))


def test_cases_for_setting_thresholds_are_not_scored() -> None:
    tuned = [replace(one, trial=replace(one.trial, network="plain", seed=0)) for one in OUTCOMES]
    right = [outcome("lag", "lag")]
    row = next(row for row in score.goals([*right, *tuned], []) if row.what == "planted cause named first")
    assert row.figure == "100.0% (1 of 1); where thresholds may be set: 33.3% (1 of 3)"
    assert score.confusion([*right, *tuned]) == [["planted \\ named first", "lag"], ["lag", "1"]]
    assert len(score.misses(tuned)) == 1


def test_the_confusion_matrix_counts_what_was_named_first() -> None:
    assert score.confusion(OUTCOMES) == [
        ["planted \\ named first", "lag", "(nothing)", "dropout", "(failed)"],
        ["lag", "1", "1", "1", ""],
        ["(nothing)", "1", "1", "", "1"],
    ]


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
