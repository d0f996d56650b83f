"""Train the arms of a repair beside their baselines, all on the same data, and score them on held-out data."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.analysis.comparison import (
    AS_IS,
    CONTROL,
    CONTROL_RECALIBRATED,
    RECALIBRATED,
    conclude,
    control_of,
    gain_over,
    is_contradicted,
    is_surely_worse,
    make_arm,
    paired_gain,
    scores_the_same,
    what_training_adds,
    without_training,
)
from bnprobe.config.requirements import parse_requirement
from bnprobe.config.spec import RepairSpec, Spec, TrainSpec
from bnprobe.config.targets import TARGETS
from bnprobe.distributed import ALONE, World, launched
from bnprobe.errors import NothingToProbeError, RepairError, UsageError
from bnprobe.loading.arguments import device_named
from bnprobe.loading.data import BatchSource
from bnprobe.loading.model import BatchFunction, LoadedModel
from bnprobe.loading.optimizer import load_optimizer, load_schedule
from bnprobe.loading.source import load_source
from bnprobe.loading.workload import Workload, read_again
from bnprobe.measure.reader import RepeatedReader, lasting
from bnprobe.measure.restore import preserved_random_state, seed_everything
from bnprobe.measure.scores import ScoreTable
from bnprobe.measure.session import autocast_dtype, default_forward
from bnprobe.numbers import number
from bnprobe.records import ROOT, Arm, Goal, Measure, Plan, Proof, Run, TrainingStep
from bnprobe.repairs import apply
from bnprobe.repairs.domains import recalibrate_domains
from bnprobe.repairs.held_out import HeldOut
from bnprobe.repairs.recalibration import recalibrate_loaded, repeated
from bnprobe.rules.effect import TRIED_TARGETS, loss_decides
from bnprobe.training import Job, KeptEpochs, StateFolder, length_of, train

FEWEST_IMAGES = 100
"""With fewer held-out samples than this, a note is given."""

RECALIBRATION_IMAGES = 2**14
"""Limit on the samples for recalibration, so that a large data set is not read completely for every arm."""


@dataclass(frozen=True)
class Subject:
    """What all arms of a comparison share.

    Attributes:
        model: The model as loaded, on its device. No arm changes it.
        start: The model that is converted and trained: ``model``, or ``copy``.
        copy: A copy with recalibrated running statistics; None: there is none.
        recalibrated: Names of the layers that were recalibrated in ``start``.
        recalibrate: Recalibrates a model in place; None: this is not wanted, or not possible.
        training: Micro-batches to train on; None: nothing is trained.
        choosing: Held-out data for model selection; without batches the last weights are kept.
        proving: Held-out data for scoring.
        loss: The user's training loss.
        seed: Seed of the first run.
        make_optimizer, make_schedule: Make the optimizer and schedule that the spec names.
        by_loss: The loss decides although there is a metric, whose goal was not stated and which the loss contradicts.
        by_domain: Gives a converted model the statistics of each domain, in place; None: this is not wanted.
        kept: Micro-batches that one arm was trained on, for the next one, which sees the same.
    """

    model: nn.Module
    start: nn.Module
    copy: nn.Module | None
    recalibrated: tuple[str, ...]
    recalibrate: Callable[[nn.Module], Any] | None
    training: BatchSource | None
    choosing: HeldOut
    proving: HeldOut
    loss: BatchFunction | None
    device: torch.device
    autocast: torch.dtype | None
    seed: int
    train: TrainSpec
    repair: RepairSpec
    make_optimizer: Callable[[list[nn.Parameter]], Any] | None
    make_schedule: Callable[[Any], Any] | None
    by_loss: bool = False
    by_domain: Callable[[nn.Module], None] | None = None
    kept: KeptEpochs = field(default_factory=KeptEpochs)

    @property
    def measure(self) -> Measure:
        """The measure that arms are compared by."""
        return "loss" if self.by_loss else self.proving.measure

    @property
    def goal(self) -> Goal:
        """Whether a larger or a smaller value is better."""
        return "min" if self.measure == "loss" else self.repair.goal

    @property
    def seeds(self) -> range:
        """The seeds of the runs of a trained arm."""
        return range(self.seed, self.seed + self.repair.seeds)


def require_trainable(workload: Workload) -> None:
    """Reject fine-tuning if something that it needs is missing, before anything is measured.

    Raises:
        UsageError: There is no loss, no real data, or no held-out data.
    """
    if workload.loss is None:
        raise UsageError(
            "--finetune needs a training loss. Add a function loss(model, batch) to the model file that returns"
            " the loss as a tensor, or name one under loss in the spec."
        )
    if workload.source.synthetic:
        raise UsageError("--finetune needs real data: a model trained on synthetic inputs (--input-shape) is useless.")
    if workload.held_out is None:
        raise UsageError(
            "--finetune measures its gain on held-out data, but there is none. Add load_eval_data(batch_size) to the"
            f" model file, or name eval_data in the spec. {workload.not_held_out or ''}".rstrip()
        )


def require_unwrapped(loaded: LoadedModel | Workload) -> None:
    """Reject a wrapped model, because its repaired weights would not load into it.

    Raises:
        RepairError: load_model() returned a wrapped model.
    """
    if loaded.wrapped:
        raise RepairError("load_model() returns a wrapped model, whose keys differ: return the module inside instead.")


def require_measurable(spec: Spec, workload: Workload, finetune: bool) -> None:
    """Reject requirements that cannot be measured, so that they could only fail.

    Raises:
        UsageError: A requirement cannot be measured.
    """
    functions = {"metric": workload.metric, "loss": workload.loss}
    for requirement in map(parse_requirement, spec.repair.require):
        name = requirement.quantity
        if name in functions and (functions[name] is None or workload.held_out is None):
            raise UsageError(
                f'--require "{requirement.text}" cannot be measured: it needs {name}(model, batch) and held-out data'
                " (load_eval_data) in the model file or the spec."
            )
        if name == "gain" and not finetune:
            raise UsageError(f'--require "{requirement.text}" compares with a fine-tuned baseline: add --finetune.')


def make_subject(spec: Spec, workload: Workload, finetune: bool, by_loss: bool = False) -> tuple[Subject, list[str]]:
    """Move the model to its device, recalibrate a copy, and read the held-out data, split in two for model selection.

    The repair starts from the recalibrated copy unless its scores are surely worse than those of the model as loaded,
    which may have been trained with the running statistics that it has.

    Returns:
        The subject, and notes: what the reader should know, one sentence each.

    Raises:
        BnprobeError: The user's code raised, the device does not exist, ...
    """
    training = make_optimizer = make_schedule = None
    if finetune:  # rejects a wrong optimizer or schedule before anything takes time
        training = _training(spec, workload)
        length_of(spec.train, training, launched())
        make_optimizer = load_optimizer(spec.train.optimizer, workload.module)
        if spec.train.schedule is not None:
            make_schedule = load_schedule(spec.train.schedule, workload.module, make_optimizer)
    device = device_named(spec.scan.device, workload.model)
    model = workload.model.to(device)
    start, twin, recalibrated, notes = model, None, tuple[str, ...](), list[str]()
    recalibrated_at_all = spec.repair.recalibrate and not workload.source.synthetic
    recalibrate = _recalibration(spec, workload) if recalibrated_at_all else None
    # The blend may be that which a scan has chosen, on the other half of the held-out data.
    held_out = HeldOut.of(spec, workload, half=not finetune and spec.repair.to in TRIED_TARGETS)
    notes += _few(held_out) if finetune else []
    proving, choosing = held_out.halves() if finetune else (held_out, replace(held_out, batches=()))
    if recalibrate is not None:
        twin = copy.deepcopy(model)
        try:
            recalibrated = recalibrate(twin)
        except (NothingToProbeError, RepairError) as error:
            recalibrate = twin = None
            notes.append(f"No running statistics were recalibrated. {error}")
    if twin is not None:
        refused = _why_as_is(spec, model, twin, choosing if choosing.batches else proving)
        notes += refused
        start, recalibrated = (model, ()) if refused else (twin, recalibrated)
    subject = Subject(
        model=model,
        start=start,
        copy=twin,
        recalibrated=recalibrated,
        recalibrate=recalibrate,
        training=training,
        choosing=choosing,
        proving=proving,
        loss=workload.loss,
        device=device,
        autocast=autocast_dtype(spec.scan.autocast),
        seed=spec.data.seed,
        train=spec.train,
        repair=spec.repair,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
        by_loss=by_loss,
        by_domain=_by_domain(spec, workload, device) if recalibrated_at_all else None,
    )
    return subject, [*notes, *held_out.notes]


def _why_as_is(spec: Spec, model: nn.Module, twin: nn.Module, held_out: HeldOut) -> list[str]:
    """Why the repair starts from the model as loaded and not from its recalibrated twin, a sentence; else nothing."""
    tables = [held_out.table(each) for each in (model, twin)] if held_out.batches else []
    if not tables or not is_surely_worse(tables[1], tables[0], spec.repair.goal, spec.repair.assumes_goal):
        return []
    before, after = (getattr(table.score("eval"), held_out.measure) for table in tables)
    scores = f"{held_out.measure} {_number(before)} against {_number(after)} on {held_out.described}"
    return [f"The running statistics were not recalibrated first, because as loaded they score better: {scores}."]


def _number(score: float | None) -> str:
    return "not finite" if score is None else number(score)


def _few(held_out: HeldOut) -> list[str]:
    """What a small amount of held-out data cannot show, one sentence each."""
    notes = []
    if len(held_out.batches) < 2:
        notes.append("There is only one held-out batch and none for model selection, so the last weights are kept.")
    if held_out.images < FEWEST_IMAGES:
        notes.append(
            f"{held_out.images} held-out samples are too few for a reliable comparison: give at least a few hundred."
        )
    return notes


def _recalibration(spec: Spec, workload: Workload) -> Callable[[nn.Module], tuple[str, ...]]:
    """A function that recalibrates a model on all data, or on a large enough part, and returns the layers' names.

    What it reads it keeps for the next model, if that fits into memory.
    """
    most = -(-RECALIBRATION_IMAGES // workload.source.batch_size)
    settings = workload.settings(spec.settings()).model_copy(update={"batches": most})

    batches: RepeatedReader | None = None

    def recalibrate(model: nn.Module) -> tuple[str, ...]:
        nonlocal batches
        if batches is None or not batches.kept:
            batches = repeated(read_again(spec, workload).source, settings)
        found = recalibrate_loaded(
            model, workload.source, workload.forward, settings=settings, track=False, batches=batches
        )
        return found.layers

    return recalibrate


def _by_domain(spec: Spec, workload: Workload, device: torch.device) -> Callable[[nn.Module], None]:
    """A function that gives layers with statistics per domain those of the training data, or of a large part of it.

    What it reads it keeps for the next model, if that fits into memory.
    """
    most = -(-RECALIBRATION_IMAGES // workload.source.batch_size)
    forward, kept = workload.forward or default_forward, KeptEpochs()

    def read() -> Iterator[Any]:
        return islice(lasting(read_again(spec, workload).source.batches), most)

    def gather(model: nn.Module) -> None:
        with preserved_random_state():
            seed_everything(spec.data.seed)
            recalibrate_domains(model, kept.epoch(spec.data.seed, read), forward, device)

    return gather


def _converted(subject: Subject, plan: Plan) -> nn.Module:
    """A copy of the model at the start, converted."""
    model = apply(subject.start, plan, subject.repair)
    if TARGETS[plan.to].needs_domains and subject.by_domain is not None:
        subject.by_domain(model)
    return model


def _training(spec: Spec, workload: Workload) -> BatchSource:
    """The training data at the batch size of training."""
    size = spec.train.batch_size
    if size is None or size == workload.source.batch_size:
        return workload.source
    return load_source(spec.data.model_copy(update={"batch_size": size}), workload.module)


OnStep = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class _Scored:
    """An arm, the models of its runs, and their scores by sample."""

    arm: Arm
    models: Sequence[nn.Module]
    tables: Sequence[ScoreTable]


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
    """Score the model as loaded, recalibrated, converted, fine-tuned as plain BN, and repaired.

    The first plan is the repair. Where plans are trained, the same conversions without training are scored, too, so
    that training is not credited with what they give.

    For each seed, trained arms see the same data in the same order for the same number of steps, and start from the
    same weights and statistics. Plain BN has the momentum of the layers that it is compared with.

    Raises:
        BnprobeError: A layer cannot be converted, the user's code raised, training was stopped, ...
    """
    arms = [_untrained(subject, AS_IS, subject.model)]
    if subject.copy is not None:
        arms.append(_untrained(subject, RECALIBRATED, subject.copy))
    if subject.training is not None:
        arms += [_untrained(subject, without_training(plan.to), _converted(subject, plan)) for plan in plans]
        arms += _controls(subject, plans, folder, on_step, world)
    repairs = [
        _untrained(subject, plan.to, _converted(subject, plan))
        if subject.training is None
        else _trained(subject, plan.to, plan, folder, on_step, world)
        for plan in plans
    ]
    return Proven(_proof(subject, [*arms, *repairs], plans[0].to), repairs[0].models[0])


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
        job, model = job_of(subject, f"try {plan.to}", plan, subject.seed)
        outcome = train(_shortened(job, world), state=None, on_step=on_step, world=world)
        _load(model, outcome.weights)
        value = getattr(subject.choosing.score(model), subject.measure)
        if value is not None:
            found[plan.to] = value
    if not found:
        raise RepairError("No candidate of --to auto had a finite score after a fifth of the run: use a smaller --lr.")
    best = world.share((max if subject.goal == "max" else min)(found, key=lambda name: found[name]))
    listed = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    sentence = f"--to auto chose {best} by the {subject.measure}, the best within a fifth of the run: {listed}."
    return next(plan for plan in plans if plan.to == best), sentence


def _controls(
    subject: Subject, plans: Sequence[Plan], folder: StateFolder | None, on_step: OnStep, world: World
) -> Iterator[_Scored]:
    """The baselines: fine-tuned plain BN, with the running statistics from training and with recalibrated ones."""
    start = copy.deepcopy(subject.start)
    momentum = subject.repair.renorm.momentum
    for plan in plans:
        for change in plan.changes if _is_renorm(plan) and momentum is not None else ():
            layer: Any = start.get_submodule("" if change.name == ROOT else change.name)
            layer.momentum = momentum
    control = _trained(replace(subject, start=start), CONTROL, None, folder, on_step, world)
    yield control
    if subject.recalibrate is not None and all(run.ending != "diverged" for run in control.arm.runs):
        for model in control.models:
            subject.recalibrate(model)
        tables = [subject.proving.table(model) for model in control.models]
        runs = [replace(run, score=table.score("eval")) for run, table in zip(control.arm.runs, tables, strict=True)]
        yield _Scored(make_arm(CONTROL_RECALIBRATED, runs, trained=True), control.models, tables)


def _trained(
    subject: Subject, name: str, plan: Plan | None, folder: StateFolder | None, on_step: OnStep, world: World
) -> _Scored:
    """Train one run per seed."""
    runs, models, tables = zip(
        *(_run(subject, name, plan, seed, folder, on_step, world) for seed in subject.seeds), strict=True
    )
    return _Scored(make_arm(name, runs, trained=True), models, tables)


def _run(
    subject: Subject,
    name: str,
    plan: Plan | None,
    seed: int,
    folder: StateFolder | None,
    on_step: OnStep,
    world: World,
) -> tuple[Run, nn.Module, ScoreTable]:
    job, model = job_of(subject, name, plan, seed)
    finished = None if folder is None else folder.finished(name, seed)
    if finished is not None:
        run, weights = finished
        _load(model, weights)
        return run, model, subject.proving.table(model)
    outcome = train(job, state=None if folder is None else folder.running(name, seed), on_step=on_step, world=world)
    _load(model, outcome.weights)
    table = subject.proving.table(model)
    run = Run(
        seed=seed,
        steps=outcome.steps,
        best_step=outcome.best_step,
        score=table.score("eval"),
        ending=outcome.ending,
        note=outcome.note,
        seconds=outcome.seconds,
        clipped_r=outcome.clipped_r if job.renorm else None,  # otherwise nothing is corrected
        clipped_d=outcome.clipped_d if job.renorm else None,
        curve=outcome.curve,
    )
    if folder is not None and world.is_main:
        folder.finish(name, seed, run, outcome.weights)
    world.wait()
    return run, model, table


def _is_renorm(plan: Plan) -> bool:
    """Whether the converted layers have the limits and the momentum of the spec's Batch Renorm."""
    return "renorm" in TARGETS[plan.to].settings


def job_of(subject: Subject, name: str, plan: Plan | None, seed: int) -> tuple[Job, nn.Module]:
    """The job of one run, and the copy of the model that it trains; without a plan that of plain BN."""
    assert subject.training is not None  # else nothing is trained
    with preserved_random_state():
        seed_everything(seed)
        model = copy.deepcopy(subject.start) if plan is None else _converted(subject, plan)
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
        kept=subject.kept,
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


def _untrained(subject: Subject, name: str, model: nn.Module) -> _Scored:
    started = time.perf_counter()
    table = subject.proving.table(model)
    run = Run(subject.seed, 0, 0, table.score("eval"), "finished", "", time.perf_counter() - started)
    return _Scored(make_arm(name, [run], trained=False), [model], [table])


def _proof(subject: Subject, scored: Sequence[_Scored], to: str) -> Proof:
    """Of several seeds the gain is paired by seed, of one by sample."""
    named = {each.arm.name: each.arm for each in scored}
    tables = {each.arm.name: each.tables[0] for each in scored}
    aim, assumed = subject.repair.goal, subject.repair.assumes_goal
    others = [table for name, table in tables.items() if name != to]
    contradicted = subject.by_loss or (assumed and any(is_contradicted(tables[to], other, aim) for other in others))
    measure: Measure = "loss" if contradicted else subject.measure
    goal: Goal = "min" if contradicted else subject.goal
    repaired, control = named[to], control_of(named, measure, goal) or named[AS_IS]
    alone = tables.get(RECALIBRATED) if subject.recalibrated and TARGETS[to].deploys else None
    if not repaired.trained and alone is not None and scores_the_same(tables[to], alone):
        control = named[RECALIBRATED]  # the conversion is not credited with what recalibrating gives
    over_as_is = paired_gain(tables[to], tables[AS_IS], measure, goal)
    gain = paired_gain(tables[to], tables[control.name], measure, goal)
    if len(repaired.runs) > 1:
        gain = gain_over(repaired, control, measure, goal)
    conclusion, message = conclude(named, repaired, control, gain, measure)
    converted = without_training(to)
    over_converted = None if converted not in tables else paired_gain(tables[to], tables[converted], measure, goal)
    if conclusion != "not_compared" and converted in named:
        message += what_training_adds(named[converted], over_converted, measure)
    if contradicted:
        message = f"{message} {loss_decides()}"

    def is_below(name: str) -> bool:
        return name in tables and is_surely_worse(tables[to], tables[name], aim, assumed)

    return Proof(
        measure=measure,
        arms=tuple(each.arm for each in scored),
        repaired=to,
        control=control.name,
        gain=gain,
        conclusion=conclusion,
        message=message,
        images_choosing=subject.choosing.images,
        images_proving=subject.proving.images,
        over_as_is=over_as_is,
        surely_worse=is_below(AS_IS),
        below_recalibrated=is_below(RECALIBRATED),
        over_converted=over_converted,
        below_converted=is_below(converted),
        scored_on=subject.proving.data,
        which=subject.proving.which,
    )
