"""Train the arms, and hold the repaired model against its control."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy import stats
from torch import Tensor, nn

from bnprobe.distributed import ALONE, World
from bnprobe.errors import RepairError, UsageError
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import Arm, Conclusion, Estimate, Plan, Proof, Run, TrainingStep
from bnprobe.repairs import apply
from bnprobe.subject import Subject
from bnprobe.training import Job, StateFolder, length_of, train

AS_IS, RECALIBRATED, CONTROL = "as is", "recalibrated", "BN fine-tuned"

OnStep = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class Proven:
    """A proof, and the model that it speaks of.

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
    """Score the model as it is, recalibrated, fine-tuned as plain BN and repaired; the first plan is the repair.

    Trained arms see the same data in the same order for the same number of steps, seed by seed, and begin with the same
    weights and statistics.

    Raises:
        BnprobeError: A layer cannot be converted, the user's code raised, training was told to stop, ...
    """
    arms = [*_untrained(subject)]
    models: list[nn.Module] = []
    if subject.training is not None:
        arms.append(_trained(subject, CONTROL, None, folder, on_step, world)[0])
    for plan in plans:
        if subject.training is None:
            model = apply(subject.start, plan, subject.repair)
            arm = _arm(plan.to, [_scored(subject, model)], trained=False)
        else:
            arm, model = _trained(subject, plan.to, plan, folder, on_step, world)
        arms.append(arm)
        models.append(model)
    return Proven(_proof(subject, tuple(arms), plans[0].to), models[0])


def best_candidate(
    subject: Subject,
    plans: Sequence[Plan],
    *,
    on_step: OnStep = lambda step: None,
    world: World = ALONE,
) -> tuple[Plan, str]:
    """Train every candidate for a fifth of the run, and pick by the batches set apart for choosing.

    Returns:
        The plan, and a sentence on how the candidates did.

    Raises:
        RepairError: No candidate gave a finite score.
        UsageError: There is nothing to choose by.
    """
    if not subject.choosing.batches:
        raise UsageError("--to auto chooses by held-out data, and there is but one batch: give more, or name a repair.")
    found: dict[str, float] = {}
    for plan in plans:
        job, model = _job(subject, f"try {plan.to}", plan, subject.seed)
        outcome = train(_shortened(job, world), state=None, on_step=on_step, world=world)
        _load(model, outcome.weights)
        value = getattr(subject.choosing.score(model), subject.measure)
        if value is not None:
            found[plan.to] = value
    if not found:
        raise RepairError("No candidate of --to auto gave a finite score after a fifth of the run: lower the rate.")
    best = (max if subject.goal == "max" else min)(found, key=lambda name: found[name])
    listed = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    sentence = f"--to auto chose {best} by the {subject.measure} after a fifth of the run: {listed}."
    return next(plan for plan in plans if plan.to == best), sentence


def _untrained(subject: Subject) -> Iterator[Arm]:
    yield _arm(AS_IS, [_scored(subject, subject.model)], trained=False)
    if subject.recalibrated:
        yield _arm(RECALIBRATED, [_scored(subject, subject.start)], trained=False)


def _trained(
    subject: Subject, name: str, plan: Plan | None, folder: StateFolder | None, on_step: OnStep, world: World
) -> tuple[Arm, nn.Module]:
    """One run for each seed; and the model of the first."""
    runs, models = [], []
    for seed in subject.seeds:
        run, model = _run(subject, name, plan, seed, folder, on_step, world)
        runs.append(run)
        models.append(model)
    return _arm(name, runs, trained=True), models[0]


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
        clipped_r=outcome.clipped_r if job.renorm else None,  # else the limits are BN's, and nothing is corrected
        clipped_d=outcome.clipped_d if job.renorm else None,
    )
    if folder is not None and world.is_main:
        folder.finish(name, seed, run, outcome.weights)
    world.wait()
    return run, model


def _job(subject: Subject, name: str, plan: Plan | None, seed: int) -> tuple[Job, nn.Module]:
    """What one run trains, on a copy."""
    assert subject.training is not None  # else nothing is trained
    with preserved_random_state():
        seed_everything(seed)
        model = copy.deepcopy(subject.start) if plan is None else apply(subject.start, plan, subject.repair)
    renorm = subject.repair.renorm if plan is not None and plan.to == "batch-renorm" else None
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
    """Put back the tensors of the model's own state; what it keeps beside them stays as it is."""
    others = {name: value for name, value in model.state_dict().items() if not isinstance(value, Tensor)}
    model.load_state_dict({**others, **weights})


def _shortened(job: Job, world: World) -> Job:
    """The job with a fifth of its length."""
    steps = max(1, length_of(job.spec, job.source, world).steps // 5)
    return replace(job, spec=job.spec.model_copy(update={"steps": steps, "epochs": None}))


def _scored(subject: Subject, model: nn.Module) -> Run:
    started = time.perf_counter()
    score = subject.proving.score(model)
    return Run(subject.seed, 0, 0, score, "finished", "", time.perf_counter() - started)


def _arm(name: str, runs: Sequence[Run], trained: bool) -> Arm:
    loss, metric = (estimate([getattr(run.score, measure) for run in runs]) for measure in ("loss", "metric"))
    return Arm(name, trained, tuple(runs), loss, metric)


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and 95% interval by Student's t over independent runs; None if a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    if len(known) == 1:
        return Estimate(mean, None)
    variance = sum((value - mean) ** 2 for value in known) / (len(known) - 1)
    half = float(stats.t.ppf(0.975, len(known) - 1)) * math.sqrt(variance / len(known))
    return Estimate(mean, (mean - half, mean + half))


def _proof(subject: Subject, arms: tuple[Arm, ...], repaired: str) -> Proof:
    named = {arm.name: arm for arm in arms}
    control = named.get(CONTROL)
    gain = None if control is None else _gain(named[repaired], control, subject)
    conclusion, message = _conclude(named, repaired, gain, subject)
    return Proof(
        measure=subject.measure,
        arms=arms,
        repaired=repaired,
        control=None if control is None else CONTROL,
        gain=gain,
        conclusion=conclusion,
        message=message,
        images_choosing=subject.choosing.images,
        images_proving=subject.proving.images,
    )


def _gain(repaired: Arm, control: Arm, subject: Subject) -> Estimate | None:
    """Repaired minus control, run by run of the same seed, signed so that more is better."""
    sign = 1.0 if subject.goal == "max" else -1.0
    pairs = [
        (getattr(one.score, subject.measure), getattr(other.score, subject.measure))
        for one, other in zip(repaired.runs, control.runs, strict=True)
    ]
    return estimate([None if one is None or other is None else sign * (one - other) for one, other in pairs])


def _conclude(
    arms: Mapping[str, Arm], repaired: str, gain: Estimate | None, subject: Subject
) -> tuple[Conclusion, str]:
    """The verdict, and a sentence or two."""
    if CONTROL not in arms:
        return "not_compared", "Nothing was trained, so there is no control: add --finetune to prove a gain."
    if any(run.ending == "diverged" for run in arms[repaired].runs):
        return "not_compared", f"Training of {repaired} diverged: {_first_note(arms[repaired])}"
    figures = _figures(arms, repaired, subject.measure)
    if gain is None:
        return "not_compared", f"{figures} One of them is not finite, so that they cannot be compared."
    if gain.interval is None:
        return _single(gain.mean, figures)
    low, high = gain.interval
    if high is not None and low <= 0 <= high:
        return "same", (
            f"{figures} No gain of the repair over plain BN fine-tuned in the same way is shown"
            f" ({gain.mean:+.2g}, 95% interval {low:+.2g} to {high:+.2g}): fine-tuning alone does as well."
        )
    better = gain.mean > 0
    word = "better" if better else "worse"
    return ("better" if better else "worse"), (
        f"{figures} The repair is {word} than plain BN fine-tuned in the same way, by {abs(gain.mean):.2g}"
        f" (95% interval {low:+.2g} to {high:+.2g})."
    )


def _single(gain: float, figures: str) -> tuple[Conclusion, str]:
    if gain == 0:
        return "same", f"{figures} Fine-tuning alone does as well; more runs (--seeds 5) would say how sure that is."
    direction = "ahead of" if gain > 0 else "behind"
    return "undecided", (
        f"{figures} The repair is {direction} plain BN fine-tuned in the same way, but one run of each does not tell a"
        " gain from chance: add --seeds 5."
    )


def _figures(arms: Mapping[str, Arm], repaired: str, measure: Literal["loss", "metric"]) -> str:
    """The means side by side, a sentence."""
    shown = []
    for name in (repaired, CONTROL, RECALIBRATED, AS_IS):
        value = getattr(arms[name], measure) if name in arms else None
        if value is not None:
            shown.append(f"{name} {value.mean:.3g}")
    return f"Held-out {measure}: {', '.join(shown)}."


def _first_note(arm: Arm) -> str:
    return next(run.note for run in arm.runs if run.ending == "diverged")
