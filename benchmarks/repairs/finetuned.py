"""The harder task fine-tuned: the BN networks from scratch, repaired and trained on, on the batches they came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.faults.samples import Samples
from benchmarks.repairs import scratch, task
from benchmarks.repairs.arms import SETTINGS, Table, choose, joined, plan_for_all, repairs_for
from benchmarks.repairs.task import REGIMES, TWO_CAMERAS, Regime
from bnprobe.analysis.comparison import CONTROL, CONTROL_RECALIBRATED, control_of
from bnprobe.commands.experiment import Subject, job_of, prove
from bnprobe.config.spec import TrainSpec
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.records import Arm, Score
from bnprobe.repairs.domains import recalibrate_domains
from bnprobe.repairs.held_out import HeldOut
from bnprobe.repairs.recalibration import recalibrate
from bnprobe.training import train

RATES = (0.001, 0.003, 0.01)
STEPS = 40


def tables(rate: float, steps: int = STEPS, from_scratch: int = scratch.STEPS, quick: bool = False) -> Iterator[Table]:
    """One for each regime; ``rate`` and ``from_scratch`` say which networks to begin with."""
    for regime in (*REGIMES, TWO_CAMERAS):
        subjects = [subject_of(regime, seed, rate, steps, from_scratch) for seed in range(1 if quick else regime.seeds)]
        yield _table(regime, subjects, RATES[1:2] if quick else RATES)


def _table(regime: Regime, subjects: list[Subject], rates: tuple[float, ...]) -> Table:
    choice = choose(rates, lambda rate: control_score(subjects[0], rate))
    repairs = repairs_for(regime.batch_size, regime.cameras)
    proofs = [_arms(at_rate(subject, choice.rate), repairs) for subject in subjects]
    how = f"Rate: {CONTROL}, accuracy on the images for choosing (seed 0): {choice.words()}."
    arms = joined(proofs)
    control = control_of({arm.name: arm for arm in arms}, "metric", "max")
    rates_shown = dict.fromkeys((CONTROL, CONTROL_RECALIBRATED, *repairs), choice.rate)
    return Table(regime.name, how, arms, control.name if control else CONTROL, rates_shown)


def at_rate(subject: Subject, rate: float) -> Subject:
    """The same, trained at another rate."""
    optimizer = subject.train.optimizer
    optimizer = optimizer.model_copy(update={"args": {**optimizer.args, "lr": rate}})
    spec = subject.train.model_copy(update={"optimizer": optimizer})
    return replace(subject, train=spec, make_optimizer=load_optimizer(optimizer))


def control_score(subject: Subject, rate: float) -> Score:
    """Plain BN fine-tuned at a rate, on the images for choosing."""
    subject = at_rate(subject, rate)
    job, model = job_of(subject, CONTROL, None, subject.seed)
    outcome = train(job, state=None, on_step=lambda step: None)
    model.load_state_dict(outcome.weights)
    return Score(None, None) if outcome.ending == "diverged" else subject.choosing.score(model)


def subject_of(regime: Regime, seed: int, rate: float, steps: int, from_scratch: int) -> Subject:
    """A BN network from scratch, and the batches that it came from."""
    model = scratch.start(regime, rate, seed, from_scratch)
    start = scratch.recalibrated(model, regime)
    spec: TrainSpec = scratch.train_spec(regime, RATES[0], steps)
    return Subject(
        model=model,
        start=start,
        copy=start,
        recalibrated=tuple(change.name for change in plan_for_all(model, "frozen").changes),
        recalibrate=lambda trained: recalibrate(trained, task.loader(regime)),
        training=as_batch_source(task.loader(regime)),
        choosing=_held_out(task.parts().choosing, regime),
        proving=_held_out(task.parts().proving, regime),
        loss=task.loss,
        device=torch.device("cpu"),
        autocast=None,
        seed=seed,
        train=spec,
        repair=SETTINGS,
        make_optimizer=load_optimizer(spec.optimizer),
        make_schedule=scratch.falling(steps),
        by_domain=lambda model: recalibrate_domains(model, task.loader(regime), task.forward, torch.device("cpu")),
    )


def _held_out(samples: Samples, regime: Regime) -> HeldOut:
    return HeldOut(task.held_out(samples, regime.cameras), task.loss, task.accuracy, torch.device("cpu"), None)


def _arms(subject: Subject, repairs: list[str]) -> tuple[Arm, ...]:
    return prove(subject, [plan_for_all(subject.start, name) for name in repairs]).proof.arms
