"""Train the arms, and compare the repaired model with its baseline."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from bnprobe.analysis.comparison import (
    AS_IS,
    CONTROL,
    CONTROL_RECALIBRATED,
    RECALIBRATED,
    conclude,
    control_of,
    gain_over,
    make_arm,
)
from bnprobe.distributed import ALONE, World
from bnprobe.errors import RepairError, UsageError
from bnprobe.probing.layers import ROOT
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import Arm, Plan, Proof, Run, TrainingStep
from bnprobe.repair_targets import TARGETS
from bnprobe.repairs import apply
from bnprobe.subject import Subject
from bnprobe.training import Job, StateFolder, length_of, train

OnStep = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class Proven:
    """The result of a comparison, and the repaired model.

    Attributes:
        model: The repaired model of the first seed, with the weights that were kept.
    """

    proof: Proof
    model: nn.Module


def prove(
    subject: Subject,
    plans: Sequence[Plan],
    *,
    folder: StateFolder | None = None,
    on_step: OnStep = lambda step: None,
    world: World = ALONE,
) -> Proven:
    """Score the model as loaded, recalibrated, fine-tuned as plain BN, and repaired; the first plan is the repair.

    For each seed, trained arms see the same data in the same order for the same number of steps, and start from the
    same weights and statistics. Plain BN has the momentum of the layers that it is compared with.

    Raises:
        BnprobeError: A layer cannot be converted, the user's code raised, training was stopped, ...
    """
    arms = [*_untrained(subject)]
    models: list[nn.Module] = []
    if subject.training is not None:
        arms += _controls(subject, plans, folder, on_step, world)
    for plan in plans:
        if subject.training is None:
            model = apply(subject.start, plan, subject.repair)
            arm = make_arm(plan.to, [_scored(subject, model)], trained=False)
        else:
            arm, (model, *_) = _trained(subject, plan.to, plan, folder, on_step, world)
        arms.append(arm)
        models.append(model)
    return Proven(_proof(subject, arms, plans[0].to), models[0])


def best_candidate(
    subject: Subject,
    plans: Sequence[Plan],
    *,
    on_step: OnStep = lambda step: None,
    world: World = ALONE,
) -> tuple[Plan, str]:
    """Train every candidate for a fifth of the run, and choose the best on the held-out batches for model selection.

    Returns:
        The plan, and a sentence on how the candidates did.

    Raises:
        RepairError: No candidate gave a finite score.
        UsageError: There is no held-out data to choose by.
    """
    if not subject.choosing.batches:
        raise UsageError(
            "--to auto needs at least two held-out batches, but there is one: give more, or name a repair."
        )
    found: dict[str, float] = {}
    for plan in plans:
        job, model = _job(subject, f"try {plan.to}", plan, subject.seed)
        outcome = train(_shortened(job, world), state=None, on_step=on_step, world=world)
        _load(model, outcome.weights)
        value = getattr(subject.choosing.score(model), subject.measure)
        if value is not None:
            found[plan.to] = value
    if not found:
        raise RepairError("No candidate of --to auto had a finite score after a fifth of the run: use a smaller --lr.")
    best = world.share((max if subject.goal == "max" else min)(found, key=lambda name: found[name]))
    listed = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    sentence = f"--to auto chose {best} by the {subject.measure} after a fifth of the run: {listed}."
    return next(plan for plan in plans if plan.to == best), sentence


def _untrained(subject: Subject) -> Iterator[Arm]:
    yield make_arm(AS_IS, [_scored(subject, subject.model)], trained=False)
    if subject.recalibrated:
        yield make_arm(RECALIBRATED, [_scored(subject, subject.start)], trained=False)


def _controls(
    subject: Subject, plans: Sequence[Plan], folder: StateFolder | None, on_step: OnStep, world: World
) -> Iterator[Arm]:
    """The baselines: fine-tuned plain BN, with the running statistics from training and with recalibrated ones."""
    start = copy.deepcopy(subject.start)
    momentum = subject.repair.renorm.momentum
    for plan in plans:
        for change in plan.changes if _is_renorm(plan) and momentum is not None else ():
            layer: Any = start.get_submodule("" if change.name == ROOT else change.name)
            layer.momentum = momentum
    arm, models = _trained(replace(subject, start=start), CONTROL, None, folder, on_step, world)
    yield arm
    if subject.renew is not None and all(run.ending != "diverged" for run in arm.runs):
        for model in models:
            subject.renew(model)
        scores = [subject.proving.score(model) for model in models]
        runs = [replace(run, score=score) for run, score in zip(arm.runs, scores, strict=True)]
        yield make_arm(CONTROL_RECALIBRATED, runs, trained=True)


def _trained(
    subject: Subject, name: str, plan: Plan | None, folder: StateFolder | None, on_step: OnStep, world: World
) -> tuple[Arm, list[nn.Module]]:
    """Train one run per seed; return the runs and their models."""
    runs, models = [], []
    for seed in subject.seeds:
        run, model = _run(subject, name, plan, seed, folder, on_step, world)
        runs.append(run)
        models.append(model)
    return make_arm(name, runs, trained=True), models


def _run(
    subject: Subject,
    name: str,
    plan: Plan | None,
    seed: int,
    folder: StateFolder | None,
    on_step: OnStep,
    world: World,
) -> tuple[Run, nn.Module]:
    job, model = _job(subject, name, plan, seed)
    finished = None if folder is None else folder.finished(name, seed)
    if finished is not None:
        run, weights = finished
        _load(model, weights)
        return run, model
    outcome = train(job, state=None if folder is None else folder.running(name, seed), on_step=on_step, world=world)
    _load(model, outcome.weights)
    run = Run(
        seed=seed,
        steps=outcome.steps,
        best_step=outcome.best_step,
        score=subject.proving.score(model),
        ending=outcome.ending,
        note=outcome.note,
        seconds=outcome.seconds,
        clipped_r=outcome.clipped_r if job.renorm else None,  # otherwise nothing is corrected
        clipped_d=outcome.clipped_d if job.renorm else None,
    )
    if folder is not None and world.is_main:
        folder.finish(name, seed, run, outcome.weights)
    world.wait()
    return run, model


def _is_renorm(plan: Plan) -> bool:
    """Whether the converted layers have the limits and the momentum of the spec's Batch Renorm."""
    return "renorm" in TARGETS[plan.to].settings


def _job(subject: Subject, name: str, plan: Plan | None, seed: int) -> tuple[Job, nn.Module]:
    """The job of one run, and the copy of the model that it trains."""
    assert subject.training is not None  # else nothing is trained
    with preserved_random_state():
        seed_everything(seed)
        model = copy.deepcopy(subject.start) if plan is None else apply(subject.start, plan, subject.repair)
    renorm = subject.repair.renorm if plan is not None and _is_renorm(plan) else None
    assert subject.loss is not None  # the caller refuses to train without
    assert subject.make_optimizer is not None
    job = Job(
        model=model,
        loss=subject.loss,
        source=subject.training,
        spec=subject.train,
        seed=seed,
        device=subject.device,
        autocast=subject.autocast,
        make_optimizer=subject.make_optimizer,
        make_schedule=subject.make_schedule,
        score=subject.choosing.score if subject.choosing.batches else None,
        measure=subject.measure,
        goal=subject.goal,
        renorm=renorm,
        arm=name,
    )
    return job, model


def _load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Restore the tensors of the model's state dict; anything else that it stores is unchanged."""
    others = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict({**others, **weights})


def _shortened(job: Job, world: World) -> Job:
    """The same job with a fifth of its steps."""
    steps = max(1, length_of(job.spec, job.source, world).steps // 5)
    return replace(job, spec=job.spec.model_copy(update={"steps": steps, "epochs": None}))


def _scored(subject: Subject, model: nn.Module) -> Run:
    started = time.perf_counter()
    score = subject.proving.score(model)
    return Run(subject.seed, 0, 0, score, "finished", "", time.perf_counter() - started)


def _proof(subject: Subject, arms: Sequence[Arm], to: str) -> Proof:
    named = {arm.name: arm for arm in arms}
    repaired, control = named[to], control_of(named, subject.measure, subject.goal)
    gain = None if control is None else gain_over(repaired, control, subject.measure, subject.goal)
    conclusion, message = conclude(named, repaired, control, gain, subject.measure)
    return Proof(
        measure=subject.measure,
        arms=tuple(arms),
        repaired=to,
        control=None if control is None else control.name,
        gain=gain,
        conclusion=conclusion,
        message=message,
        images_choosing=subject.choosing.images,
        images_proving=subject.proving.images,
    )
