"""Repair a model and prove the gain: a table of contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.analysis.comparison import remarks
from bnprobe.describe import environment
from bnprobe.distributed import ALONE, World, launched
from bnprobe.errors import NothingToProbeError, RepairError, SpecError, UsageError
from bnprobe.loading.workload import Workload, load_model_only, load_workload, read_anew
from bnprobe.pipeline import no_progress, scan_workload, whole
from bnprobe.probing.scan_loop import Progress
from bnprobe.proof import OnStep, best_candidate, prove
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import SCHEMA_VERSION, Plan, Proof, RepairRecord, Report, RequirementResult, Tool, TrainingStep
from bnprobe.repair_targets import AUTO, TARGETS
from bnprobe.repairs import (
    deployable_state,
    left_out,
    on_host,
    plan,
    wanted_by_globs,
    wanted_from_report,
)
from bnprobe.report.json import load_report
from bnprobe.requirement import check, parse_requirement
from bnprobe.spec import Spec
from bnprobe.subject import Subject, make_subject, require_measurable, require_trainable, require_unwrapped
from bnprobe.training import StateFolder, StepLog


@dataclass(frozen=True)
class Repaired:
    """What a repair gives.

    Attributes:
        record: Without the weights' file, which is not written yet.
        weights: Of the repaired model, in the order of its state dict.
        before, after: Reports of the scans of the model as loaded and repaired; None where there was none.
    """

    record: RepairRecord
    weights: dict[str, Tensor]
    before: Report | None
    after: Report | None


@dataclass(frozen=True)
class Wish:
    """What is asked for beyond the spec.

    Attributes:
        finetune: Train, and prove the gain.
        state: Folder of the state to resume from; None: nothing is saved.
        resume: Go on from it.
        force: Drop a state that is there.
        tensorboard: Write the steps for TensorBoard too, in the state's folder.
        command: As typed.
    """

    finetune: bool = False
    state: Path | None = None
    resume: bool = False
    force: bool = False
    tensorboard: bool = False
    command: str | None = None


def plan_spec(spec: Spec, progress: Progress = no_progress) -> Plan:
    """What ``repair_spec`` would change; nothing is changed.

    The data is needed only where a scan has to say which layers are flagged.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        if spec.repair.layers or spec.repair.report:
            loaded = load_model_only(spec)
            require_unwrapped(loaded.notes)
            plans = _plans(spec, loaded.model, None)
        else:
            workload = load_workload(spec)
            require_unwrapped(workload.notes)
            plans = _plans(spec, workload.model, whole(scan_workload(workload, spec.settings(), progress)))
    return plans[0] if spec.repair.to != AUTO else replace(plans[0], to=AUTO)


def repair_spec(
    spec: Spec,
    wish: Wish,
    progress: Progress = no_progress,
    on_step: OnStep = lambda step: None,
    world: World = ALONE,
) -> Repaired | None:
    """Load what a spec names, convert its layers, fine-tune if asked for, and scan again.

    Returns:
        None if no layer needs repair.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    for text in spec.repair.require:
        parse_requirement(text)
    if spec.repair.to == AUTO and not wish.finetune:
        raise UsageError("--to auto chooses by training every target for a while: add --finetune, or name a target.")
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        if wish.finetune:
            require_trainable(workload)
        require_unwrapped(workload.notes)
        require_measurable(spec, workload, wish.finetune)
        before = whole(scan_workload(workload, spec.settings(), progress, world))
        plans = _plans(spec, workload.model, before)
        if not plans[0].changes:
            _require_nothing_refused(plans[0])
            return None
        seed_everything(spec.data.seed)
        workload = read_anew(spec, workload)
        subject, notes = make_subject(spec, workload, wish.finetune)
        folder = _folder(spec, wish, workload, plans, subject, world)
        with _logged(folder, wish.tensorboard, on_step, world) as log:
            made = plans[0]
            if len(plans) > 1:
                made, sentence = best_candidate(subject, plans, on_step=log, world=world)
                notes.append(sentence)
            proven = prove(subject, [made], folder=folder, on_step=log, world=world)
        weights = _weights(proven.model, subject.model, made)
        after, flagged = _second_scan(spec, workload, proven.model, made, progress, world)
        notes += [*left_out(proven.model), *remarks(made.to, flagged, proven.proof)]
        if after is None:
            notes.append("There is no second scan, since no layer is left that a scan could measure.")
    record = _record(spec, wish, workload, subject, made, proven.proof, (before.summary.flagged, flagged), notes)
    return Repaired(record, weights, before, after)


@contextmanager
def _logged(folder: StateFolder | None, tensorboard: bool, on_step: OnStep, world: World) -> Iterator[OnStep]:
    """``on_step``, and a row in the log."""
    if folder is None or not world.is_main:
        yield on_step
        return
    with closing(StepLog(folder.log, tensorboard)) as log:

        def both(step: TrainingStep) -> None:
            log.write(step)
            on_step(step)

        yield both


def _require_nothing_refused(made: Plan) -> None:
    if made.refused:
        reasons = "; ".join(f"{layer.name} ({layer.kind}) {layer.reason}" for layer in made.refused)
        raise RepairError(f"No layer can be converted to {made.to}: {reasons}.")


def _plans(spec: Spec, model: nn.Module, before: Report | None) -> list[Plan]:
    """What would be changed; for "auto" a plan for each target that changes something."""
    wanted, source = _wanted(spec, model, before)
    if spec.repair.to != AUTO:
        return [plan(model, wanted, spec.repair.to, source)]
    several = launched().size > 1
    plans = [plan(model, wanted, target.name, source) for target in TARGETS if several or not target.needs_processes]
    return [each for each in plans if each.changes] or plans[:1]


def _wanted(spec: Spec, model: nn.Module, before: Report | None) -> tuple[dict[str, str], str]:
    """Layers to convert, with reasons; and what chose them."""
    if spec.repair.layers:
        return wanted_by_globs(model, spec.repair.layers), "--layers " + " ".join(spec.repair.layers)
    if spec.repair.report:
        return wanted_from_report(_read_report(Path(spec.repair.report)), model), spec.repair.report
    assert before is not None  # the caller scans where nothing else chooses
    return wanted_from_report(before, model), f"a scan at batch size {before.scan.batch_size}"


def _read_report(path: Path) -> Report:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"The report {path} could not be read: {error}.") from None
    return load_report(text)


def _folder(
    spec: Spec, wish: Wish, workload: Workload, plans: Sequence[Plan], subject: Subject, world: World
) -> StateFolder | None:
    """Where finished runs and the one in progress are kept; process 0 makes it, before the others look."""
    if wish.state is None or not wish.finetune:
        return None
    marks = _marks(spec, workload, plans, subject, world)
    folder = StateFolder.open(wish.state, marks, wish.resume, wish.force) if world.is_main else None
    world.wait()
    return folder or StateFolder.open(wish.state, marks, resume=True)


def _marks(spec: Spec, workload: Workload, plans: Sequence[Plan], subject: Subject, world: World) -> dict[str, Any]:
    """What must be the same for a state to be gone on from."""
    settings = spec.recorded()
    settings["train"].pop("save_every")
    settings["repair"].pop("require")
    return {
        "bnprobe": bnprobe.__version__,
        "torch": torch.__version__,
        "model": type(subject.model).__name__,
        "weights": _digest(subject.model),
        "code": workload.module.digest if workload.module else None,
        "layers": [change.name for change in plans[0].changes],
        "processes": world.size,
        **settings,
    }


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        if isinstance(tensor, Tensor):
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _weights(repaired: nn.Module, original: nn.Module, made: Plan) -> dict[str, Tensor]:
    """Those that load into the original model where that can be, on the host."""
    state = deployable_state(repaired, original) if made.deploys else repaired.state_dict()
    return on_host(state)


def _second_scan(
    spec: Spec, workload: Workload, model: nn.Module, made: Plan, progress: Progress, world: World
) -> tuple[Report | None, int | None]:
    """The repaired model, as it trains, and its flagged layers; None: not measured.

    A converted layer that a scan skips counts as fine only if its training and inference agree by construction.
    """
    agrees = TARGETS[made.to].agrees
    free = spec.scan.model_copy(update={"what_if": False, "train_steps": None, "gradients": False})
    settings = spec.model_copy(update={"scan": free}).settings()
    seed_everything(spec.data.seed)
    try:
        report = scan_workload(
            replace(read_anew(spec, workload), model=model, checkpoint=None), settings, progress, world
        )
    except NothingToProbeError:
        return None, 0 if agrees else None
    report = whole(report)
    measured = {layer.name for layer in report.layers}
    known = agrees or all(change.name in measured for change in made.changes)
    return report, report.summary.flagged if known else None


def _record(
    spec: Spec,
    wish: Wish,
    workload: Workload,
    subject: Subject,
    made: Plan,
    proof: Proof,
    flagged: tuple[int, int | None],
    notes: Sequence[str],
) -> RepairRecord:
    return RepairRecord(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", bnprobe.__version__),
        environment=environment(subject.device),
        action="convert",
        command=wish.command,
        model=workload.model_name,
        checkpoint=workload.checkpoint,
        weights=None,
        weights_sha256=None,
        settings=spec.recorded(),
        seeds=tuple(subject.seeds) if wish.finetune else (subject.seed,),
        plan=made,
        recalibrated=subject.recalibrated,
        proof=proof if subject.proving.batches else None,
        flagged_before=flagged[0],
        flagged_after=flagged[1],
        requirements=_requirements(spec, proof, flagged[1]),
        notes=(*workload.notes, *notes),
    )


def _requirements(spec: Spec, proof: Proof, flagged: int | None) -> tuple[RequirementResult, ...]:
    written = next(arm for arm in proof.arms if arm.name == proof.repaired).runs[0].score
    gain = None
    if proof.gain is not None:  # what is sure of it, where several runs say so
        gain = proof.gain.mean if proof.gain.interval is None else proof.gain.interval[0]
    values = {"metric": written.metric, "loss": written.loss, "gain": gain, "flagged": flagged}
    results = check(spec.repair.require, values)
    return tuple(RequirementResult(requirement.text, value, held) for requirement, value, held in results)
