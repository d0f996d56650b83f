"""A proof: which arms there are, what they see, and what is concluded."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bnprobe.analysis.comparison import AS_IS, CONTROL, CONTROL_RECALIBRATED, RECALIBRATED, without_training
from bnprobe.commands.experiment import Subject, best_candidate, prove
from bnprobe.config.spec import OptimizerSpec, RepairSpec, TrainSpec
from bnprobe.errors import UsageError
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.measure.scores import ScoreTable
from bnprobe.nn import BatchRenorm1d
from bnprobe.records import Plan, Proof, Run, Score, TrainingStep
from bnprobe.repairs import apply, plan
from bnprobe.repairs.held_out import HeldOut
from bnprobe.training import StateFolder

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """One BN layer; remembers the images that it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.bn, self.drop, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(self.bn(self.hidden(x))).relu())
        return out


class Counted(Dataset[Batch]):
    """Counts how often a batch is asked for."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.read = batches, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        self.read += 1
        return self.batches[index]


def batches(seed: int, count: int, size: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(size, 4, generator=generator) for _ in range(count)]
    return [(x, (x[:, 0] > 0).long()) for x in images]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def metric(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def recalibrated(model: nn.Module) -> None:
    model.bn.running_mean.fill_(0.25)


def subject(steps: int = 6, seeds: int = 2, **changes: Any) -> Subject:
    torch.manual_seed(0)
    model = Net()
    start = copy.deepcopy(model)
    start.bn.running_mean.fill_(0.25)
    held_out = HeldOut(batches(1, 8), loss, changes.pop("metric", metric), CPU, None)
    proving, choosing = held_out.halves()
    spec = OptimizerSpec(target="SGD", args={"lr": 0.1})
    found = Subject(
        model=model,
        start=start,
        copy=start,
        recalibrated=("bn",),
        recalibrate=recalibrated,
        training=as_batch_source(batches(2, 12), 4),
        choosing=choosing,
        proving=proving,
        loss=loss,
        device=CPU,
        autocast=None,
        seed=3,
        train=TrainSpec(steps=steps),
        repair=RepairSpec(seeds=seeds),
        make_optimizer=load_optimizer(spec),
        make_schedule=None,
    )
    return replace(found, **changes)


def planned(given: Subject, to: str = "batch-renorm") -> Plan:
    return plan(given.model, {"bn": "flagged"}, to, "a test")


def test_the_arms_are_the_model_its_controls_and_the_repair() -> None:
    given = subject()
    proof = prove(given, [planned(given)]).proof
    assert [(arm.name, arm.trained, len(arm.runs)) for arm in proof.arms] == [
        (AS_IS, False, 1),
        (RECALIBRATED, False, 1),
        ("batch-renorm untrained", False, 1),
        (CONTROL, True, 2),
        (CONTROL_RECALIBRATED, True, 2),
        ("batch-renorm", True, 2),
    ]
    assert proof.repaired == "batch-renorm"
    assert (proof.images_choosing, proof.images_proving) == (16, 16)
    assert [run.seed for run in proof.arms[3].runs] == [3, 4]
    scores = {arm.name: arm.metric.mean for arm in proof.arms if arm.metric}
    assert scores[proof.control] == max(scores[CONTROL], scores[CONTROL_RECALIBRATED])


def error_rate(model: nn.Module, batch: Batch) -> Tensor:
    return 1 - metric(model, batch)


def test_where_the_loss_contradicts_a_metric_of_unstated_goal_it_decides() -> None:
    def root(model: nn.Module, batch: Batch) -> Tensor:
        return loss(model, batch).sqrt()

    given = subject(metric=root, recalibrated=(), training=None, seeds=1)
    given = replace(given, proving=replace(given.proving, batches=batches(5, 64)))
    given.start.head.bias.data += torch.tensor([4.0, -4.0])
    proof = prove(given, [planned(given, "frozen")]).proof
    assert (proof.measure, proof.conclusion, proof.surely_worse) == ("loss", "worse", True)
    assert "give --goal min" in proof.message
    stated = replace(given, repair=RepairSpec(seeds=1, goal="min"))
    proof = prove(stated, [planned(stated, "frozen")]).proof
    assert (proof.measure, proof.conclusion, proof.surely_worse) == ("metric", "worse", True)
    assert "--goal" not in proof.message


def test_what_the_scan_found_of_the_metric_decides_how_arms_are_chosen() -> None:
    given = subject(metric=error_rate, by_loss=True, seeds=1)
    assert (given.measure, given.goal) == ("loss", "min")
    proof = prove(given, [planned(given)]).proof
    scores = {arm.name: arm.loss.mean for arm in proof.arms if arm.loss}
    assert scores[proof.control] == min(scores[CONTROL], scores[CONTROL_RECALIBRATED])
    assert proof.measure == "loss"
    assert "give --goal min" in proof.message


def test_plain_bn_has_the_momentum_that_it_is_held_against() -> None:
    momenta: dict[str, set[float]] = {}

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            kind = type(model.bn).__name__
            momenta.setdefault(kind, set()).add(model.bn.momentum)
        return loss(model, batch)

    given = subject(loss=watched, seeds=1)
    prove(given, [planned(given)])
    assert momenta == {"BatchNorm1d": {0.01}, "BatchRenorm1d": {0.01}}
    assert given.start.bn.momentum == 0.1


def test_a_recalibrated_control_is_the_trained_one_with_other_statistics() -> None:
    given = subject(seeds=1)
    seen: list[dict[str, Tensor]] = []
    given = replace(given, recalibrate=lambda model: seen.append(copy.deepcopy(model.state_dict())))
    proof = prove(given, [planned(given)]).proof
    assert len(seen) == 1
    assert not torch.equal(seen[0]["hidden.weight"], given.start.hidden.weight)
    scores = [arm.runs[0].score for arm in proof.arms if arm.name in (CONTROL, CONTROL_RECALIBRATED)]
    assert scores[0] == scores[1]  # nothing was changed here


def test_every_trained_arm_sees_the_same_images_in_the_same_order() -> None:
    seen: dict[tuple[str, int], list[Tensor]] = {}
    running: list[tuple[str, int]] = []

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            current.append(batch[0])
        return loss(model, batch)

    current: list[Tensor] = []

    def on_step(step: TrainingStep) -> None:
        seen.setdefault((step.arm, step.seed), []).extend(current)
        current.clear()
        running.append((step.arm, step.seed))

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*batches(2, 12), strict=True))), batch_size=4, shuffle=True
    )
    given = subject(loss=watched, training=as_batch_source(loader, 4))
    prove(given, [planned(given)], on_step=on_step)
    for seed in (3, 4):
        ours, control = (torch.cat(seen[name, seed]) for name in ("batch-renorm", CONTROL))
        assert torch.equal(ours, control)
    assert not torch.equal(torch.cat(seen[CONTROL, 3]), torch.cat(seen[CONTROL, 4]))


def test_all_trained_arms_read_the_data_once() -> None:
    data = Counted(batches(2, 12))
    loader = DataLoader(data, batch_size=None, shuffle=True)
    given = subject(steps=10, seeds=1, training=as_batch_source(loader))
    data.read = 0
    prove(given, [planned(given)])
    assert data.read == 12


def test_the_model_and_the_start_are_left_alone() -> None:
    given = subject()
    before = [copy.deepcopy(model.state_dict()) for model in (given.model, given.start)]
    prove(given, [planned(given)])
    for model, state in zip((given.model, given.start), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert type(model.bn) is nn.BatchNorm1d


def test_the_repaired_model_is_that_of_the_first_seed_with_the_weights_that_were_scored() -> None:
    given = subject()
    proven = prove(given, [planned(given)])
    assert isinstance(proven.model.bn, BatchRenorm1d)
    run = proven.proof.arms[-1].runs[0]
    assert given.proving.score(proven.model) == run.score


def test_without_training_the_repair_is_compared_with_the_model_as_loaded() -> None:
    given = subject(training=None)
    proof = prove(given, [planned(given, to="group-norm")]).proof
    assert [arm.name for arm in proof.arms] == [AS_IS, RECALIBRATED, "group-norm"]
    assert (proof.control, proof.gain) == (AS_IS, proof.over_as_is)
    scores = {arm.name: arm.runs[0].score.metric for arm in proof.arms}
    assert proof.gain.mean == pytest.approx(scores["group-norm"] - scores[AS_IS])
    assert "Nothing was trained" in proof.message


@pytest.mark.parametrize("to", ["batch-renorm", "frozen", "sync", "gated", "mabn"])
def test_a_conversion_is_not_credited_with_what_recalibrating_gives(to: str) -> None:
    start = _fitted(subject().start)
    worse = copy.deepcopy(start)
    worse.bn.running_mean += 3.0
    given = subject(training=None, model=worse, start=start, copy=start)
    proof = prove(given, [planned(given, to)]).proof
    assert proof.over_as_is is not None
    assert proof.over_as_is.interval[0] > 0  # it is better than as loaded
    assert (proof.control, proof.conclusion) == (RECALIBRATED, "same")
    assert proof.is_recalibration
    assert "recalibrated scores the same" in proof.message
    as_loaded = replace(given, start=worse, recalibrated=())  # not of recalibrated statistics: as loaded
    proof = prove(as_loaded, [planned(given, to)]).proof
    assert proof.control == AS_IS
    assert not proof.is_recalibration


def test_a_repair_that_recalibration_alone_beats_is_known() -> None:
    """Group norm with the weights of a batch norm, untrained."""
    given = subject(training=None)
    assert not prove(given, [planned(given)]).proof.below_recalibrated
    plan = planned(given, to="group-norm")
    proof = prove(given, [plan]).proof
    arms = {arm.name: arm.metric.mean for arm in proof.arms}
    assert arms[RECALIBRATED] > arms["group-norm"]
    assert proof.below_recalibrated


def test_training_is_not_credited_with_what_the_conversion_alone_gives() -> None:
    given = subject(seeds=1, steps=20)
    plan = planned(given, to="group-norm")
    proof = prove(given, [plan]).proof
    scores = {arm.name: arm.metric.mean for arm in proof.arms}
    converted = apply(given.start, plan, given.repair)
    alone = scores[without_training("group-norm")]
    assert alone == pytest.approx(given.proving.score(converted).metric)
    assert proof.over_converted is not None
    assert proof.over_converted.mean == pytest.approx(scores["group-norm"] - alone)
    adds = f"The conversion alone gives {alone:.3g}: training adds {proof.over_converted.mean:+.2g} (95%"
    assert adds in proof.message
    assert not proof.below_converted


def test_training_that_ruins_a_conversion_is_known() -> None:
    """A learning rate that ruins the weights; without held-out batches to choose by, the last ones are kept."""
    given = subject(seeds=1, steps=40)
    held_out = HeldOut(batches(1, 64), loss, metric, CPU, None)
    fitted = _fitted(given.start)
    ruinous = load_optimizer(OptimizerSpec(target="SGD", args={"lr": 30.0}))
    fitted_subject = replace(
        given, model=fitted, start=fitted, copy=None, recalibrate=None, make_optimizer=ruinous, proving=held_out
    )
    fitted_subject = replace(fitted_subject, choosing=replace(held_out, batches=()))
    proof = prove(fitted_subject, [planned(fitted_subject, to="frozen")]).proof
    assert proof.below_converted


def test_one_run_of_each_is_paired_by_sample() -> None:
    given = subject(seeds=1, steps=20, recalibrate=None)
    proven = prove(given, [planned(given)])
    proof, named = proven.proof, {arm.name: arm for arm in proven.proof.arms}
    assert (proof.measure, proof.control) == ("metric", CONTROL)
    ours, control = (named[name].runs[0].score.metric for name in ("batch-renorm", CONTROL))
    assert proof.gain.mean == pytest.approx(ours - control)
    low, high = proof.gain.interval
    assert low <= proof.gain.mean <= high
    assert "95% interval over the samples" in proof.message
    assert "--seeds 5 covers the randomness of training too" in proof.message
    as_is = named[AS_IS].runs[0].score.metric
    assert proof.over_as_is.mean == pytest.approx(ours - as_is)


def test_weights_that_score_worse_than_as_loaded_are_known() -> None:
    """A learning rate that ruins the weights; without held-out batches to choose by, the last ones are kept."""
    given = subject(seeds=1, steps=40)
    model = copy.deepcopy(given.start)
    held_out = HeldOut(batches(1, 64), loss, metric, CPU, None)
    torch.nn.init.normal_(model.hidden.weight)
    for goal, worse in (("max", True), ("min", False)):
        fitted = replace(given, proving=held_out, choosing=replace(held_out, batches=()), model=_fitted(model))
        fitted = replace(fitted, repair=RepairSpec(goal=goal), training=None, start=_ruined(fitted.model), copy=None)
        assert prove(fitted, [planned(fitted)]).proof.surely_worse is worse


def _fitted(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for batch in batches(1, 64) * 20:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model


def _ruined(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.bn.running_mean.add_(100.0)
    return model


def test_finished_runs_are_not_run_again(tmp_path: Path) -> None:
    given = subject()
    folder = StateFolder.open(tmp_path / "state", {}, resume=False)
    first = prove(given, [planned(given)], folder=folder)
    steps: list[TrainingStep] = []
    again = prove(given, [planned(given)], folder=folder, on_step=steps.append)
    assert steps == []
    assert _scores(again.proof) == _scores(first.proof)
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])
    # Only training has a schedule.
    assert first.model.state_dict().keys() - again.model.state_dict().keys() == {"bn.renorm_schedule"}


def test_the_best_candidate_is_chosen_on_a_fifth_of_the_run() -> None:
    given = subject(steps=20)
    steps: list[TrainingStep] = []
    plans = [planned(given, to) for to in ("batch-renorm", "frozen")]
    chosen, sentence = best_candidate(given, plans, on_step=steps.append)
    assert {(step.arm, step.steps) for step in steps} == {("try batch-renorm", 4), ("try frozen", 4)}
    assert sentence.startswith(
        f"--to auto chose {chosen.to} by the metric, the best within a fifth of the run: batch-renorm "
    )


def test_one_batch_cannot_choose() -> None:
    given = subject()
    with pytest.raises(UsageError, match="at least two held-out batches"):
        best_candidate(replace(given, choosing=replace(given.choosing, batches=())), [planned(given)])


@pytest.mark.parametrize(
    ("ours", "control", "goal", "conclusion", "gain"),
    [
        ([0.9, 0.92, 0.88], [0.8, 0.81, 0.79], "max", "better", 0.1),
        ([0.8, 0.81, 0.79], [0.9, 0.92, 0.88], "max", "worse", -0.1),
        ([0.8, 0.81, 0.79], [0.9, 0.92, 0.88], "min", "better", 0.1),
        ([0.9, 0.8, 0.85], [0.8, 0.9, 0.85], "max", "same", 0.0),
        ([0.9, 0.8], [0.8, 0.7], "max", "undecided", 0.1),  # the same difference twice is no certainty
        ([0.9, None], [0.8, 0.8], "max", "not_compared", None),
    ],
)
def test_what_is_concluded(
    monkeypatch: pytest.MonkeyPatch,
    ours: list[float | None],
    control: list[float],
    goal: str,
    conclusion: str,
    gain: float | None,
) -> None:
    """Training itself stands aside: its scores are given."""
    scores = {"batch-renorm": list(ours), CONTROL: list(control)}

    def run(given: Subject, name: str, made: Plan | None, seed: int, *others: Any) -> tuple[Run, nn.Module, ScoreTable]:
        score = Score(None, scores[name][seed - given.seed])
        return Run(seed, 6, 6, score, "finished", "", 0.0), given.start, given.proving.table(given.start)

    monkeypatch.setattr("bnprobe.commands.experiment._run", run)
    given = subject(seeds=len(ours))
    given = replace(given, recalibrate=None, repair=given.repair.model_copy(update={"goal": goal}))
    proof = prove(given, [planned(given)]).proof
    assert proof.conclusion == conclusion
    assert (proof.gain.mean if proof.gain else None) == pytest.approx(gain)
    assert "batch-renorm" in proof.message or gain is None


def _scores(proof: Proof) -> list[list[Score]]:
    return [[run.score for run in arm.runs] for arm in proof.arms]
