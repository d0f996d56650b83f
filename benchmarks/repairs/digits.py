"""The sample ``digits``: two checkpoints that were trained on harmful batches, repaired and fine-tuned on the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.repairs.arms import SETTINGS, Table, choose, plan_for_all, repairs_for
from benchmarks.repairs.finetuned import at_rate, control_score
from bnprobe.analysis.comparison import AS_IS, CONTROL, CONTROL_RECALIBRATED, RECALIBRATED, paired_gain
from bnprobe.commands.experiment import Subject, make_subject, prove
from bnprobe.config.load import build_spec
from bnprobe.config.spec import OptimizerSpec, ScheduleSpec, Spec, TrainSpec
from bnprobe.loading.workload import load_workload
from bnprobe.measure.scores import ScoreTable
from bnprobe.measure.trial import WEIGHTS
from bnprobe.repairs import apply

FOLDER = Path(__file__).parents[2] / "sample_configs" / "digits"
CHECKPOINTS = {"batch2": "trained at batch size 2", "sorted": "trained on batches of 8 of one class each"}
RATES = (0.003, 0.01, 0.03, 0.1)
STEPS, SEEDS = 200, 5


def tables(steps: int = STEPS, quick: bool = False) -> Iterator[Table]:
    """One for each checkpoint."""
    for name, words in CHECKPOINTS.items():
        subject = subject_of(name, steps, 1 if quick else SEEDS)
        choice = choose(RATES[1:2] if quick else RATES, lambda rate, subject=subject: control_score(subject, rate))
        repairs = _repairs(subject)
        found = prove(at_rate(subject, choice.rate), [plan_for_all(subject.start, repair) for repair in repairs])
        how = (
            f"Rate: {CONTROL}, accuracy on the {found.proof.images_choosing} images for choosing (seed 0):"
            f" {choice.words()}. Held out for the proof: {found.proof.images_proving} images."
        )
        rates = dict.fromkeys((CONTROL, CONTROL_RECALIBRATED, *repairs), choice.rate)
        yield Table(f"{name}.yaml, {words}", how, found.proof.arms, found.proof.control or CONTROL, rates)


def untrained_rows() -> dict[str, list[list[str]]]:
    """For each checkpoint a heading, and a row for every conversion without training, on the half that scores.

    The weight of example weighing is chosen on the other half; instance renorm blends half and half.
    """
    return {f"{name}.yaml, {words}": _untrained(subject_of(name, 1, 1)) for name, words in CHECKPOINTS.items()}


def _repairs(subject: Subject) -> list[str]:
    return repairs_for(subject.training.batch_size) if subject.training is not None else []


def _untrained(subject: Subject) -> list[list[str]]:
    models = {AS_IS: subject.model, RECALIBRATED: subject.start}
    for to in _repairs(subject):
        models[to] = apply(subject.start, plan_for_all(subject.start, to), subject.repair)
    weigh = partial(_weighed, subject)
    chosen = max(WEIGHTS, key=lambda weight: subject.choosing.score(weigh(weight)).metric or 0.0)
    del models["example-weighing"]
    models[f"example-weighing, blend {chosen:g} of {', '.join(f'{weight:g}' for weight in WEIGHTS)}"] = weigh(chosen)
    scored = {name: subject.proving.table(model) for name, model in models.items()}
    head = ["model", "held-out accuracy", "held-out loss", "accuracy minus as is", "minus recalibrated"]
    return [head, *(_untrained_row(name, scored) for name in scored)]


def _untrained_row(name: str, scored: dict[str, ScoreTable]) -> list[str]:
    found, gains = scored[name].score("eval"), []
    for control in (AS_IS, RECALIBRATED):
        gain = None if name in (AS_IS, control) else paired_gain(scored[name], scored[control], "metric", "max")
        low, high = (None, None) if gain is None or gain.interval is None else gain.interval
        gains.append("" if gain is None else f"{gain.mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return [name, f"{found.metric:.3f}", f"{found.loss:.3f}", *gains]


def _weighed(subject: Subject, weight: float) -> nn.Module:
    spec = subject.repair.model_copy(update={"blend": weight})
    return apply(subject.start, plan_for_all(subject.start, "example-weighing"), spec)


def subject_of(name: str, steps: int, seeds: int) -> Subject:
    """A checkpoint with its data, as ``bnprobe convert --finetune`` would have it."""
    spec = _spec(name, steps, seeds)
    return make_subject(spec, load_workload(spec), finetune=True)[0]


def _spec(name: str, steps: int, seeds: int) -> Spec:
    train = TrainSpec(
        optimizer=OptimizerSpec(target="SGD", args={"lr": RATES[0], "momentum": 0.9, "weight_decay": 1e-4}),
        schedule=ScheduleSpec(target="CosineAnnealingLR", args={"T_max": steps}),
        steps=steps,
        evaluate_every=max(1, steps // 4),
    )
    repair = SETTINGS.model_copy(update={"seeds": seeds})
    return build_spec(str(FOLDER / f"{name}.yaml"), {}).model_copy(update={"train": train, "repair": repair})
