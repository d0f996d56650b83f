"""The harder task from scratch: BN, BN with recalibrated statistics, Batch Renorm and group norm in three regimes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.faults.samples import Samples
from benchmarks.repairs import task
from benchmarks.repairs.arms import SETTINGS, Choice, Table, arm_of, choose, plan_for_all
from benchmarks.repairs.task import REGIMES, Regime
from bnprobe.config.spec import OptimizerSpec, RenormSpec, TrainSpec
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.measure.restore import seed_everything
from bnprobe.records import Run, Score
from bnprobe.repairs import apply
from bnprobe.repairs.recalibration import recalibrate
from bnprobe.training import Job, TrainingOutcome, evaluate, train

RATES = (0.00125, 0.0025, 0.005, 0.01)
TRAINED = ("BN", "batch-renorm", "group-norm")
RECALIBRATED = "BN, then recalibrated"
STEPS, LONGER, LONGER_SEEDS = 100, 4, 3

REMEMBERED = 10
"""Optimizer steps that Batch Renorm's running averages remember: they begin at (0, 1), and a run has 100."""


def tables(steps: int = STEPS, quick: bool = False) -> Iterator[Table]:
    """Two for each regime: at the rate of the control, chosen on i.i.d. batches; and each arm at its own.

    And one of a longer run without harm, since Batch Renorm needs time for its averages.
    """
    common = common_rate(steps, quick)
    how = f"BN on {REGIMES[0].name}, accuracy on the images for choosing: {common.words()}."
    for regime in REGIMES:
        seeds = range(1 if quick else regime.seeds)
        at_common = dict.fromkeys(TRAINED, common.rate)
        yield _table(f"{regime.name}, one rate for all", f"Rate: {how}", regime, at_common, seeds, steps)
        if not quick:
            yield _at_own_rates(regime, seeds, steps)
    if not quick:
        yield _longer(REGIMES[0], how, common.rate, steps)


def common_rate(steps: int = STEPS, quick: bool = False) -> Choice:
    """That of the control on batches that do no harm, with one seed."""
    rates = RATES[2:3] if quick else RATES
    return choose(rates, lambda rate: _choosing(*trained("BN", REGIMES[0], rate, 0, steps)))


def start(regime: Regime, rate: float, seed: int, steps: int) -> nn.Module:
    """The BN network of a run, to be fine-tuned."""
    return trained("BN", regime, rate, seed, steps)[0]


@functools.cache
def trained(name: str, regime: Regime, rate: float, seed: int, steps: int) -> tuple[nn.Module, TrainingOutcome]:
    """One arm from scratch; every arm begins with the same weights and sees the same images in the same order."""
    seed_everything(seed)
    model: nn.Module = task.DeepNet()
    renorm = RenormSpec(momentum=1 / (REMEMBERED * regime.accumulate))
    if name != "BN":
        model = apply(model, plan_for_all(model, name), SETTINGS.model_copy(update={"renorm": renorm}))
    outcome = train(_job(name, model, regime, rate, seed, steps, renorm), state=None, on_step=lambda step: None)
    model.load_state_dict(outcome.weights)
    return model, outcome


def _job(name: str, model: nn.Module, regime: Regime, rate: float, seed: int, steps: int, renorm: RenormSpec) -> Job:
    spec = train_spec(regime, rate, steps)
    return Job(
        model=model,
        loss=task.loss,
        source=as_batch_source(task.loader(regime)),
        spec=spec,
        seed=seed,
        device=torch.device("cpu"),
        autocast=None,
        make_optimizer=load_optimizer(spec.optimizer),
        make_schedule=falling(steps),
        score=None,
        measure="metric",
        goal="max",
        renorm=renorm if name == "batch-renorm" else None,
        arm=name,
    )


def train_spec(regime: Regime, rate: float, steps: int) -> TrainSpec:
    """Steps of 32 images in micro-batches; kept weights are looked for four times in a run."""
    return TrainSpec(
        optimizer=OptimizerSpec(target="AdamW", args={"lr": rate, "weight_decay": 0.01}),
        steps=steps,
        accumulate=regime.accumulate,
        evaluate_every=max(1, steps // 4),
    )


def falling(steps: int) -> functools.partial[torch.optim.lr_scheduler.CosineAnnealingLR]:
    """A rate that falls to zero over the run."""
    return functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)


def scored(model: nn.Module, samples: Samples) -> Score:
    """Loss and accuracy at inference."""
    return evaluate(model, task.held_out(samples), task.loss, task.accuracy, torch.device("cpu"), None)


def _choosing(model: nn.Module, outcome: TrainingOutcome) -> Score:
    """A run that diverged gives no rate."""
    return Score(None, None) if outcome.ending == "diverged" else scored(model, task.parts().choosing)


def _at_own_rates(regime: Regime, seeds: range, steps: int) -> Table:
    choices = {
        name: choose(RATES, lambda rate, name=name: _choosing(*trained(name, regime, rate, 0, steps)))
        for name in TRAINED
    }
    words = "; ".join(f"{name} {choice.words()}" for name, choice in choices.items())
    rates = {name: choice.rate for name, choice in choices.items()}
    how = f"Rates: each arm's best on the images for choosing (seed 0): {words}."
    return _table(f"{regime.name}, each arm at its own rate", how, regime, rates, seeds, steps)


def _longer(regime: Regime, how: str, rate: float, steps: int) -> Table:
    title = f"{regime.name}, {LONGER} times as many steps, one rate for all"
    return _table(title, f"Rate: {how}", regime, dict.fromkeys(TRAINED, rate), range(LONGER_SEEDS), LONGER * steps)


def _table(title: str, words: str, regime: Regime, rates: dict[str, float], seeds: range, steps: int) -> Table:
    runs: dict[str, list[Run]] = {"BN": [], RECALIBRATED: [], "batch-renorm": [], "group-norm": []}
    for seed in seeds:
        for name in TRAINED:
            model, outcome = trained(name, regime, rates[name], seed, steps)
            runs[name].append(_run(seed, model, outcome))
            if name == "BN":
                anew = recalibrated(model, regime)
                runs[RECALIBRATED].append(_run(seed, anew, outcome))
    arms = tuple(arm_of(name, found) for name, found in runs.items())
    return Table(title, words, arms, "BN", {**rates, RECALIBRATED: rates["BN"]})


def recalibrated(model: nn.Module, regime: Regime) -> nn.Module:
    """A copy whose running statistics are those of the training images, in the micro-batches of the training."""
    return recalibrate(copy.deepcopy(model), task.loader(regime))


def _run(seed: int, model: nn.Module, outcome: TrainingOutcome) -> Run:
    score = scored(model, task.parts().proving)
    return Run(
        seed=seed,
        steps=outcome.steps,
        best_step=outcome.best_step,
        score=score,
        ending=outcome.ending,
        note=outcome.note,
        seconds=outcome.seconds,
        clipped_r=outcome.clipped_r,
        clipped_d=outcome.clipped_d,
    )
