"""The sample ``digits``: two checkpoints that were trained on harmful batches, repaired and fine-tuned on the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.repairs.arms import GROUPS, Table, choose, plan_for_all
from benchmarks.repairs.finetuned import at_rate, control_score
from bnprobe.analysis.comparison import CONTROL, CONTROL_RECALIBRATED
from bnprobe.commands.experiment import Subject, make_subject, prove
from bnprobe.config.load import build_spec
from bnprobe.config.spec import OptimizerSpec, RepairSpec, ScheduleSpec, Spec, TrainSpec
from bnprobe.loading.workload import load_workload

FOLDER = Path(__file__).parents[2] / "sample_configs" / "digits"
CHECKPOINTS = {"batch2": "trained at batch size 2", "sorted": "trained on batches of 8 of one class each"}
RATES = (0.003, 0.01, 0.03, 0.1)
REPAIRS = ("batch-renorm", "frozen", "group-norm", "instance-renorm", "gated", "mabn")
STEPS, SEEDS = 200, 5


def tables(steps: int = STEPS, quick: bool = False) -> Iterator[Table]:
    """One for each checkpoint."""
    for name, words in CHECKPOINTS.items():
        subject = subject_of(name, steps, 1 if quick else SEEDS)
        choice = choose(RATES[1:2] if quick else RATES, lambda rate, subject=subject: control_score(subject, rate))
        found = prove(at_rate(subject, choice.rate), [plan_for_all(subject.start, repair) for repair in REPAIRS])
        how = (
            f"Rate: {CONTROL}, accuracy on the {found.proof.images_choosing} images for choosing (seed 0):"
            f" {choice.words()}. Held out for the proof: {found.proof.images_proving} images."
        )
        rates = dict.fromkeys((CONTROL, CONTROL_RECALIBRATED, *REPAIRS), choice.rate)
        yield Table(f"{name}.yaml, {words}", how, found.proof.arms, found.proof.control or CONTROL, rates)


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
    repair = RepairSpec(groups=GROUPS, seeds=seeds)
    return build_spec(str(FOLDER / f"{name}.yaml"), {}).model_copy(update={"train": train, "repair": repair})
