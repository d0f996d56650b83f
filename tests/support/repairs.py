"""Records of repairs made up for the tests of the reports: what ``convert`` and ``recalibrate`` would return."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bnprobe.records import (
    Arm,
    Ending,
    Environment,
    Estimate,
    LayerChange,
    LayerComparison,
    Plan,
    Proof,
    Refusal,
    RepairRecord,
    RequirementResult,
    Run,
    Score,
    Tool,
    Verification,
)

TOOL = Tool("bnprobe", "0.1.0")
MODEL = "sample_configs/digits/model.py:load_model"
NAMES = ("layer2.0.bn1", "layer2.0.bn2", "layer2.0.downsample.1", "layer3.0.bn1", "layer3.0.bn2")
LAST = "layer3.0.downsample.1"
COMMAND = "bnprobe convert sample_configs/digits/model.py --batch-size 2 --finetune --output repaired.safetensors"
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t at 97.5% for n values."""


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean and interval; None if a value is."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = statistics.fmean(known)
    if len(known) == 1:
        return Estimate(mean, None)
    half = STUDENT[len(known)] * statistics.stdev(known) / len(known) ** 0.5
    return Estimate(mean, (mean - half, mean + half))


def run(seed: int, loss: float | None, metric: float | None, best_step: int = 400, **changes: Any) -> Run:
    """A run that went to its end."""
    made = Run(seed, 500, best_step, Score(loss, metric), "finished", "", 14.2 + 0.3 * seed)
    return replace(made, **changes)


def arm(name: str, runs: Sequence[Run], trained: bool = True) -> Arm:
    """An arm whose estimates follow from its runs."""
    losses = estimate([one.score.loss for one in runs])
    return Arm(name, trained, tuple(runs), losses, estimate([one.score.metric for one in runs]))


def untrained(name: str, loss: float | None, metric: float | None) -> Arm:
    """An arm of one run without a step."""
    return arm(name, [run(0, loss, metric, 0, steps=0, seconds=0.2)], trained=False)


def trained(name: str, losses: Sequence[float], metrics: Sequence[float], **changes: Any) -> Arm:
    """An arm with a run for each seed; the best steps differ."""
    pairs = enumerate(zip(losses, metrics, strict=True))
    return arm(name, [run(seed, loss, metric, 500 - 50 * (seed % 3), **changes) for seed, (loss, metric) in pairs])


AS_IS = untrained("as is", 1.9431, 0.6417)
RECALIBRATED = untrained("recalibrated", 0.2874, 0.9083)
CONTROL = trained("BN fine-tuned", (0.212, 0.198, 0.205, 0.224, 0.201), (0.944, 0.950, 0.947, 0.939, 0.950))
RENORM = trained(
    "batch-renorm",
    (0.118, 0.109, 0.121, 0.113, 0.116),
    (0.972, 0.975, 0.967, 0.972, 0.969),
    clipped_r=0.0312,
    clipped_d=0.0,
)
FROZEN = trained("frozen", (0.131, 0.142, 0.137, 0.139, 0.128), (0.967, 0.961, 0.964, 0.961, 0.967))


def changes(names: Sequence[str] = (*NAMES, LAST), to: str = "BatchRenorm2d") -> tuple[LayerChange, ...]:
    """Flagged layers, the later the worse; the one whose statistics are off says so."""
    sizes = (12.1, 9.1, 1.0, 3.0, 2.4, 2.0)
    return tuple(
        LayerChange(
            name,
            (),
            "BatchNorm2d",
            to,
            f"flagged: n_eq {sizes[index % 6]:.1f}, below 32 ({'lag' if index % 6 == 2 else 'small batch'})",
        )
        for index, name in enumerate(names)
    )


def plan(**given: Any) -> Plan:
    """Six of nine layers of the digits sample to Batch Renorm."""
    made = Plan("batch-renorm", "a scan at batch size 2", changes(), (), 3, True)
    return replace(made, **given)


def paired(repaired: Arm, control: Arm, measure: str) -> Estimate | None:
    """The gain, seed by seed; more is better."""
    pairs = zip(repaired.runs, control.runs, strict=True)
    scores = [(getattr(one.score, measure), getattr(other.score, measure)) for one, other in pairs]
    if any(value is None for pair in scores for value in pair):
        return None
    sign = -1 if measure == "loss" else 1
    return estimate([sign * (one - other) for one, other in scores])


def record(**given: Any) -> RepairRecord:
    """A record of the digits sample."""
    made = RepairRecord(
        schema_version=1,
        tool=TOOL,
        environment=Environment("3.11.9", "2.13.0+cpu", "Linux-6.1-x86_64", "x86_64", 2),
        action="convert",
        command=COMMAND,
        model=MODEL,
        checkpoint="sample_configs/digits/batch2.safetensors",
        weights="repaired.safetensors",
        weights_sha256="3fa4c1d09be7725a6e1c80f3b2d94517a8c6e0f1d2b3a4958677c8d9eafb0c1d",
        settings={
            "data": {"batch_size": 2, "seed": 0},
            "train": {
                "optimizer": {"target": "SGD", "args": {"lr": 0.01, "momentum": 0.9}},
                "schedule": None,
                "accumulate": 1,
                "batch_size": None,
            },
            "repair": {"to": "batch-renorm", "recalibrate": True, "groups": 32},
        },
        seeds=(0, 1, 2, 3, 4),
        plan=plan(),
        recalibrated=(),
        proof=None,
        flagged_before=6,
        flagged_after=0,
        requirements=(),
        notes=(),
    )
    return replace(made, **given)


def better() -> RepairRecord:
    """Batch Renorm beats its control, over five seeds."""
    proof = Proof(
        measure="metric",
        arms=(AS_IS, RECALIBRATED, CONTROL, RENORM, FROZEN),
        repaired="batch-renorm",
        control="BN fine-tuned",
        gain=paired(RENORM, CONTROL, "metric"),
        conclusion="better",
        message=(
            "Held-out metric: batch-renorm 0.971, BN fine-tuned 0.946, recalibrated 0.9083, as is 0.6417. The repair is"
            " better than plain BN fine-tuned in the same way, by 0.025 (95% interval +0.0184 to +0.0316)."
        ),
        images_choosing=180,
        images_proving=180,
    )
    held = (RequirementResult("metric>=0.96", 0.971, True), RequirementResult("flagged==0", 0.0, True))
    return record(
        proof=proof,
        requirements=held,
        recalibrated=changes_names(),
        notes=("The running statistics were recalibrated on 1,408 images before training.",),
    )


def changes_names() -> tuple[str, ...]:
    """The converted layers."""
    return (*NAMES, LAST)


def same() -> RepairRecord:
    """The control does as well; nothing but a loss is given."""
    renorm = arm("batch-renorm", [run(seed, loss, None) for seed, loss in enumerate((0.199, 0.211, 0.204))])
    control = arm("BN fine-tuned", [run(seed, loss, None) for seed, loss in enumerate((0.203, 0.206, 0.207))])
    proof = Proof(
        measure="loss",
        arms=(untrained("as is", 1.9431, None), untrained("recalibrated", 0.2874, None), control, renorm),
        repaired="batch-renorm",
        control="BN fine-tuned",
        gain=paired(renorm, control, "loss"),
        conclusion="same",
        message=(
            "Held-out loss: batch-renorm 0.2047, BN fine-tuned 0.2053, recalibrated 0.2874, as is 1.943. No gain of the"
            " repair over plain BN fine-tuned in the same way is shown (+0.000667, 95% interval -0.0109 to +0.0122):"
            " fine-tuning alone does as well."
        ),
        images_choosing=180,
        images_proving=180,
    )
    return record(proof=proof, seeds=(0, 1, 2))


def diverged() -> RepairRecord:
    """One arm blew up, and one of three runs of another."""
    where = "The loss was NaN at step {}: the output of layer3.0.bn2 was the first that was not finite."
    broken: Ending = "diverged"
    lost = [run(seed, None, None, 0, steps=41 + seed, ending=broken, note=where.format(41 + seed)) for seed in range(3)]
    renorm = trained("batch-renorm", (0.118, 0.109, 0.121), (0.972, 0.975, 0.967), clipped_r=0.21, clipped_d=0.004)
    last = replace(renorm.runs[2], steps=212, best_step=200, ending=broken, note=where.format(212))
    renorm = replace(renorm, runs=(*renorm.runs[:2], last))
    control = trained("BN fine-tuned", (0.212, 0.198, 0.205), (0.944, 0.950, 0.947), ending="early_stop", steps=450)
    proof = Proof(
        measure="metric",
        arms=(AS_IS, RECALIBRATED, control, renorm, arm("gated", lost)),
        repaired="batch-renorm",
        control="BN fine-tuned",
        gain=paired(renorm, control, "metric"),
        conclusion="not_compared",
        message=(
            "Training of batch-renorm diverged: The loss was NaN at step 212: the output of layer3.0.bn2 was the first"
            " that was not finite."
        ),
        images_choosing=180,
        images_proving=180,
    )
    return record(proof=proof, seeds=(0, 1, 2), flagged_after=1)


def recalibrated() -> RepairRecord:
    """Recalibrated statistics, nothing trained."""
    proof = Proof(
        measure="metric",
        arms=(AS_IS, RECALIBRATED),
        repaired="recalibrated",
        control="as is",
        gain=Estimate(0.2666, None),
        conclusion="better",
        message="Held-out metric: recalibrated 0.9083, as is 0.6417.",
        images_choosing=0,
        images_proving=360,
    )
    return record(
        action="recalibrate",
        command="bnprobe recalibrate sample_configs/digits/model.py --output repaired.safetensors",
        plan=None,
        proof=proof,
        seeds=(0,),
        recalibrated=("bn1", "layer1.0.bn1", "layer1.0.bn2", *NAMES, LAST),
        flagged_before=6,
        flagged_after=5,
        notes=("Pooled over 1,437 images; the 1 image of the last batch counts like any other.",),
    )


def group_norm() -> RepairRecord:
    """A repair that does not deploy as BN, with one seed and two layers refused."""
    made = plan(
        to="group-norm",
        changes=tuple(replace(change, note="its running statistics are dropped") for change in changes(to="GroupNorm")),
        refused=(
            Refusal("head.bn", "BatchNorm1d", "its input has no spatial positions and 10 channels, one per group."),
            Refusal("aux.bn", "FancyBatchNorm", "its class does more than normalize."),
        ),
        untouched=1,
        deploys=False,
    )
    group = arm("group-norm", [run(0, 0.171, 0.9556, 500)])
    control = arm("BN fine-tuned", [run(0, 0.212, 0.9444, 450)])
    proof = Proof(
        measure="metric",
        arms=(AS_IS, RECALIBRATED, control, group),
        repaired="group-norm",
        control="BN fine-tuned",
        gain=paired(group, control, "metric"),
        conclusion="undecided",
        message=(
            "Held-out metric: group-norm 0.9556, BN fine-tuned 0.9444, recalibrated 0.9083, as is 0.6417. The repair is"
            " ahead of plain BN fine-tuned in the same way, but one run of each does not tell a gain from chance: add"
            " --seeds 5."
        ),
        images_choosing=180,
        images_proving=180,
    )
    return record(plan=made, proof=proof, seeds=(0,), flagged_after=None)


def failed() -> RepairRecord:
    """Requirements that do not hold, one by a hair and one for want of a figure; worse than the baseline."""
    frozen = trained("frozen", (0.231, 0.242, 0.237), (0.934, 0.939, 0.935))
    control = trained("BN fine-tuned", (0.212, 0.198, 0.205), (0.944, 0.950, 0.947))
    proof = Proof(
        measure="metric",
        arms=(AS_IS, RECALIBRATED, control, frozen),
        repaired="frozen",
        control="BN fine-tuned",
        gain=paired(frozen, control, "metric"),
        conclusion="worse",
        message=(
            "Held-out metric: frozen 0.936, BN fine-tuned 0.947, recalibrated 0.9083, as is 0.6417. The repair is worse"
            " than plain BN fine-tuned in the same way, by 0.011 (95% interval -0.0135 to -0.0085)."
        ),
        images_choosing=180,
        images_proving=180,
    )
    required = (
        RequirementResult("metric>=0.935", 0.93497, False),
        RequirementResult("loss<=0.25", 0.2366, True),
        RequirementResult("flagged==0", None, False),
    )
    return record(
        plan=plan(to="frozen", changes=changes(to="FrozenBatchNorm2d")),
        proof=proof,
        seeds=(0, 1, 2),
        requirements=required,
        weights=None,
        weights_sha256=None,
    )


def many_names() -> list[str]:
    """Sixty layers of a deep network."""
    return [
        f"features.denseblock{block}.denselayer{index}.norm{norm}"
        for block, size in ((1, 6), (2, 10), (3, 14))
        for index in range(1, size + 1)
        for norm in (1, 2)
    ]


def large() -> RepairRecord:
    """All of sixty layers converted, and scanned again."""
    made = plan(changes=changes(many_names()), untouched=0)
    names = tuple(many_names())
    return replace(
        better(), model="torchvision:densenet121", checkpoint=None, plan=made, recalibrated=names, flagged_before=9
    )


def unscored() -> RepairRecord:
    """Converted without fine-tuning: nothing was scored."""
    return record(command=COMMAND.replace(" --finetune", ""), seeds=(0,))


RECORDS = {
    "better": better,
    "same": same,
    "diverged": diverged,
    "recalibrated": recalibrated,
    "group_norm": group_norm,
    "failed": failed,
    "large": large,
    "unscored": unscored,
}


def mixed_plan() -> Plan:
    """Layers of two kinds, a shared one, and others that are refused."""
    first = replace(changes()[0], aliases=("critic.bn",))
    dense = LayerChange(
        "head.bn", (), "BatchNorm1d", "BatchRenorm1d", "matches --layers 'head.*'", "momentum 0.1 -> 0.01"
    )
    refusals = tuple(
        Refusal(f"stages.{index}.bn", "BatchNormAct2d", "its class applies an activation after normalizing.")
        for index in range(9)
    )
    return plan(source="report.json", changes=(first, *changes()[1:3], dense), refused=refusals, untouched=1)


PLANS = {
    "convert": plan,
    "mixed": mixed_plan,
    "group_norm": lambda: plan(to="group-norm", deploys=False, changes=changes(to="GroupNorm"), source="--layers"),
    "large": lambda: plan(changes=changes(many_names()), untouched=0),
    "nothing": lambda: plan(changes=(), untouched=9),
    "refused": lambda: plan(
        changes=(), refused=(Refusal("bn", "FancyNorm", "its class is not known to bnprobe."),), untouched=0
    ),
}


def verified() -> Verification:
    """Every flagged layer is mended."""
    layers = [LayerComparison(name, 0.3 + 0.1 * index, 0.02, True, False) for index, name in enumerate((*NAMES, LAST))]
    layers = [LayerComparison("bn1", 0.0173, 0.0171, False, False), *layers]
    return Verification(TOOL, MODEL, True, (), tuple(layers), (), (), 0.382, 0.021, ())


def not_verified() -> Verification:
    """One layer is flagged still, one anew, and the two reports are not of the same layers."""
    layers = (
        LayerComparison("bn1", 0.0173, 0.0812, False, True),
        LayerComparison("layer1.0.bn1", 0.0252, 0.0248, False, False),
        LayerComparison("layer2.0.bn1", 0.127, 0.0331, True, False),
        LayerComparison("layer3.0.bn1", 38.9, 0.412, True, True),
        LayerComparison("layer3.0.bn2", None, 0.0113, True, False),
    )
    problems = (
        "1 layer is newly flagged: bn1.",
        "1 layer is flagged still: layer3.0.bn1.",
        "The outputs disagree more than before: 0.41 against 0.38.",
    )
    notes = ("The batch sizes differ: 2 before, 4 after.",)
    return Verification(TOOL, MODEL, False, problems, layers, ("head.bn",), ("head.gn",), 0.382, 0.41, notes)


def many_verified() -> Verification:
    """Sixty layers, nine mended."""
    layers = tuple(
        LayerComparison(name, 0.4 if index > 50 else 0.01, 0.012, index > 50, False)
        for index, name in enumerate(many_names())
    )
    return Verification(TOOL, MODEL, True, (), layers, (), (), None, None, ())


VERIFICATIONS = {"passed": verified, "failed": not_verified, "large": many_verified}
