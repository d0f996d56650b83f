"""``bnprobe convert``: scan, plan, convert, fine-tune, compare with the baseline, scan again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnprobe._version import __version__
from bnprobe.analysis.comparison import remarks
from bnprobe.analysis.description import environment
from bnprobe.commands.experiment import (
    OnStep,
    Subject,
    best_candidate,
    make_subject,
    prove,
    require_measurable,
    require_trainable,
    require_unwrapped,
)
from bnprobe.commands.recalibrate import Repaired
from bnprobe.commands.scan import scan_workload, whole
from bnprobe.config.requirements import check_requirements, parse_requirement
from bnprobe.config.spec import PLAIN, RepairSpec, Spec
from bnprobe.config.targets import AUTO, TARGETS, Target
from bnprobe.distributed import ALONE, World, launched
from bnprobe.errors import NothingToProbeError, RepairError, UsageError
from bnprobe.loading.arguments import device_named
from bnprobe.loading.model import require_state
from bnprobe.loading.workload import Workload, load_model_only, load_workload, read_again
from bnprobe.measure.batch import to_device
from bnprobe.measure.rank_agreement import digest_of
from bnprobe.measure.restore import preserved_random_state, seed_everything
from bnprobe.measure.session import Progress, default_forward, no_progress
from bnprobe.nn.per_domain import current_domain
from bnprobe.paths import placed
from bnprobe.records import SCHEMA_VERSION, Plan, Proof, RepairRecord, Report, RequirementResult, Tool, TrainingStep
from bnprobe.repairs import (
    apply,
    deployable_state,
    left_out,
    on_host,
    plan,
    refusals,
    wanted_by_globs,
    wanted_from_report,
)
from bnprobe.repairs.plan import batch_norms
from bnprobe.report.json import read_as
from bnprobe.rules import effect, title_of
from bnprobe.training import StateFolder, StepLog


@dataclass(frozen=True)
class ConvertOptions:
    """Options of a repair that are not part of the spec.

    Attributes:
        finetune: Whether to train and to measure the gain.
        state: Folder of the state to resume from; None: nothing is saved.
        resume: Whether to continue from it.
        force: Whether to discard an existing state.
        tensorboard: Whether to write the steps for TensorBoard too, in the state's folder.
        command: The command line as typed.
    """

    finetune: bool = False
    state: Path | None = None
    resume: bool = False
    force: bool = False
    tensorboard: bool = False
    command: str | None = None


def plan_spec(spec: Spec, progress: Progress = no_progress) -> Plan:
    """Plan what ``repair_spec`` would change, without changing anything.

    Data is needed only if a scan must find the flagged layers.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        if spec.repair.layers or spec.repair.report:
            loaded = load_model_only(spec)
            require_unwrapped(loaded)
            plans = _plans(spec, loaded.model, None)
        else:
            workload = load_workload(spec)
            spec = workload.completed(spec)
            require_unwrapped(workload)
            _require_runnable(spec, workload)
            plans = _plans(spec, workload.model, whole(scan_workload(workload, spec.settings(), progress)))
    return plans[0] if spec.repair.to != AUTO else replace(plans[0], to=AUTO)


def repair_spec(
    spec: Spec,
    options: ConvertOptions,
    progress: Progress = no_progress,
    on_step: OnStep = lambda step: None,
    world: World = ALONE,
) -> Repaired | None:
    """Load what a spec names, convert its layers, fine-tune on request, and scan again.

    Returns:
        None if no layer needs repair.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree; among others where no layer needs a conversion, but
            something else is wrong.
    """
    for text in spec.repair.require:
        parse_requirement(text)
    if spec.repair.to == AUTO and not options.finetune:
        raise UsageError("--to auto chooses by training every target for a while: add --finetune, or name a target.")
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        spec = workload.completed(spec)
        require_state(workload.model)
        if options.finetune:
            require_trainable(workload)
        require_unwrapped(workload)
        require_measurable(spec, workload, options.finetune)
        _require_runnable(spec, workload)
        before = whole(scan_workload(workload, spec.settings(), progress, world))
        plans = _plans(spec, workload.model, before)
        if not plans[0].changes:
            _require_nothing_refused(plans[0])
            _require_no_error(before)
            return None
        seed_everything(spec.data.seed)
        workload = read_again(spec, workload)
        summary = before.summary
        by_loss = effect.doubt_of_goal(summary.gaps, before.remedies, summary.chance) == "contradicted"
        subject, notes = make_subject(spec, workload, options.finetune, by_loss)
        plans = _knowing_domains(plans, subject, workload, spec.repair)
        folder = _folder(spec, options, workload, plans, subject, world)
        with _logged(folder, options.tensorboard, on_step, world) as log:
            made = plans[0]
            if len(plans) > 1:
                made, sentence = best_candidate(subject, plans, on_step=log, world=world)
                notes.append(sentence)
            proven = prove(subject, [made], folder=folder, on_step=log, world=world)
        # in the form that loads into the original model if possible
        state = deployable_state(proven.model, subject.model) if made.deploys else proven.model.state_dict()
        weights = on_host(state)
        after, flagged = _second_scan(spec, workload, proven.model, made, progress, world)
        notes += [*left_out(proven.model), *remarks(made.to, flagged, proven.proof)]
        if after is None:
            notes.append("The repaired model was not scanned, because it has no layer left that a scan could measure.")
    record = _record(spec, options, workload, subject, made, proven.proof, (before.summary.flagged, flagged), notes)
    return Repaired(record, weights, before, after)


@contextmanager
def _logged(folder: StateFolder | None, tensorboard: bool, on_step: OnStep, world: World) -> Iterator[OnStep]:
    """Extend ``on_step`` by a row in the log."""
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
        raise RepairError(f"No layer can be converted to {made.to}: {'; '.join(refusals(made))}.")


def _require_no_error(before: Report) -> None:
    """Refuse to call a model sound that the scan finds an error in, where a conversion is not what mends it."""
    error = next((found for found in before.diagnoses if found.severity == "error"), None)
    if error is not None:
        raise RepairError(
            f"No layer is flagged, and converting layers is not what mends the error that the scan found:"
            f" {title_of(error.rule, error.cause)} ({error.rule}). {error.remedy} To convert layers all the same, name"
            " them with --layers."
        )


def _plans(spec: Spec, model: nn.Module, before: Report | None) -> list[Plan]:
    """What would be changed; for "auto" a plan for each target that changes something.

    Raises:
        RepairError: The target that was named would be plain BN at the batch size of training.
    """
    wanted, source = _wanted(spec, model, before)
    size = spec.train.batch_size or (before.scan.batch_size if before else spec.data.batch_size)
    if spec.repair.to != AUTO:
        _require_effect(TARGETS[spec.repair.to], spec, size)
        return [plan(model, wanted, spec.repair.to, source)]
    several = launched().size > 1
    targets = [each for each in TARGETS if (several or not each.needs_processes) and not _is_plain(each, spec, size)]
    plans = [plan(model, wanted, target.name, source) for target in targets]
    return [each for each in plans if each.changes] or plans[:1]


def _is_plain(target: Target, spec: Spec, size: int | None) -> bool:
    """Whether the layers of a target would be plain BN in batches of so many samples; None: not known."""
    limit: int | None = getattr(spec.repair, target.plain_up_to) if target.plain_up_to else None
    return size is not None and limit is not None and size <= limit


def _require_effect(target: Target, spec: Spec, size: int | None) -> None:
    if _is_plain(target, spec, size):
        limit = getattr(spec.repair, target.plain_up_to)
        raise RepairError(
            f"{target.name} with {target.plain_up_to} {limit} is plain BN in batches of {size}: give less than {size}"
            f" with --{target.plain_up_to.replace('_', '-')} (repair.{target.plain_up_to}), or choose another target."
        )


def _require_runnable(spec: Spec, workload: Workload) -> None:
    """Refuse a named target that the batches or the user's functions do not go with, before anything is measured.

    Raises:
        RepairError: It would be plain BN at the batch size of training.
        UsageError: Its layers must be told the domain of their data, and are not; says which function does not tell it.
    """
    if spec.repair.to == AUTO:
        return
    target = TARGETS[spec.repair.to]
    _require_effect(target, spec, spec.train.batch_size or workload.source.batch_size)
    if not target.needs_domains or workload.source.synthetic:
        return
    model, selected = workload.model, bool(spec.repair.layers or spec.repair.report)
    with preserved_random_state():
        seed_everything(spec.data.seed)
        batches = list(islice(read_again(spec, workload).source.batches, 1))
        run = partial(_unknown_domain, workload=workload, batches=batches, device=device_named(spec.scan.device, model))
        every = {layer.name: "" for layer in batch_norms(model)}
        made = _plans(spec, model, None)[0] if selected else plan(model, every, target.name, "")
        if not selected and _any_told(apply(model, replace(made, changes=()), spec.repair), run):
            return  # which layers are flagged is not known yet: they may be those that are told
        problem = run(apply(model, made, spec.repair))
    if problem:
        raise UsageError(f"{target.name}: {problem}")


def _any_told(model: nn.Module, run: Callable[[nn.Module], object]) -> bool:
    """Whether any BN layer of a model runs on data whose domain is said."""
    told: list[bool] = []
    for layer in batch_norms(model):
        layer.module.register_forward_pre_hook(lambda *_: told.append(current_domain() is not None))
    run(model)
    return any(told) or not told


def _knowing_domains(plans: list[Plan], subject: Subject, workload: Workload, repair: RepairSpec) -> list[Plan]:
    """The plans without those whose layers must be told the domain of their data, and are not.

    Raises:
        UsageError: No other is left; says which function does not tell it.
    """
    found = []
    for each in plans:
        problem = None
        if TARGETS[each.to].needs_domains:
            with preserved_random_state():
                converted = apply(subject.start, each, repair)
                problem = _unknown_domain(converted, workload, subject.proving.batches, subject.device)
        if problem and len(plans) == 1:
            raise UsageError(f"{each.to}: {problem}")
        found += [] if problem else [each]
    return found


def _unknown_domain(model: nn.Module, workload: Workload, batches: Sequence[Any], device: torch.device) -> str | None:
    """Why the user's functions do not run a converted model on the first batch; None if they do."""
    functions = {"forward": workload.forward or default_forward, "loss": workload.loss, "metric": workload.metric}
    model = model.to(device).eval()
    with torch.no_grad():
        for batch in batches[:1]:
            for role, function in functions.items():
                try:
                    if function is not None:
                        function(model, to_device(batch, device))
                except UsageError as error:
                    return f"{role}(model, batch) cannot run the converted model. {error}"
                except Exception:  # what else fails is told where it is run in earnest
                    return None
    return None


def _wanted(spec: Spec, model: nn.Module, before: Report | None) -> tuple[dict[str, str], str]:
    """Layers to convert, with reasons, and what selected them."""
    if spec.repair.layers:
        return wanted_by_globs(model, spec.repair.layers), "--layers " + " ".join(spec.repair.layers)
    if spec.repair.report:
        return wanted_from_report(read_as(placed(Path(spec.repair.report)), Report), model), spec.repair.report
    assert before is not None  # the caller scans if nothing else selects layers
    return wanted_from_report(before, model), f"a scan at batch size {before.scan.batch_size}"


def _folder(
    spec: Spec, options: ConvertOptions, workload: Workload, plans: Sequence[Plan], subject: Subject, world: World
) -> StateFolder | None:
    """The folder for finished runs and the current one; process 0 makes it before the others read it."""
    if options.state is None or not options.finetune:
        return None
    marks = _marks(spec, workload, plans, subject, world)
    folder = StateFolder.open(options.state, marks, options.resume, options.force) if world.is_main else None
    world.wait()
    return folder or StateFolder.open(options.state, marks, resume=True)


def _marks(spec: Spec, workload: Workload, plans: Sequence[Plan], subject: Subject, world: World) -> dict[str, Any]:
    """The fingerprint of a repair: what must be unchanged for its state to be resumed."""
    settings = spec.recorded()
    settings["train"].pop("save_every")
    settings["repair"].pop("require")
    return {
        "bnprobe": __version__,
        "torch": torch.__version__,
        "model": type(subject.model).__name__,
        "weights": digest_of(subject.model.state_dict()),
        "code": workload.module.digest if workload.module else None,
        "layers": [change.name for change in plans[0].changes],
        "processes": world.size,
        **settings,
    }


def _second_scan(
    spec: Spec, workload: Workload, model: nn.Module, made: Plan, progress: Progress, world: World
) -> tuple[Report | None, int | None]:
    """Scan the repaired model in its training configuration, and count its flagged layers; None: not measured.

    A converted layer that a scan skips counts as not flagged only if its training and inference agree by construction.
    """
    agrees = TARGETS[made.to].agrees
    settings = spec.settings().model_copy(update=PLAIN)
    seed_everything(spec.data.seed)
    try:
        report = scan_workload(
            replace(read_again(spec, workload), model=model, checkpoint=None), settings, progress, world
        )
    except NothingToProbeError:
        return None, 0 if agrees else None
    report = whole(report)
    measured = {layer.name for layer in report.layers}
    known = agrees or all(change.name in measured for change in made.changes)
    return report, report.summary.flagged if known else None


def _record(
    spec: Spec,
    options: ConvertOptions,
    workload: Workload,
    subject: Subject,
    made: Plan,
    proof: Proof,
    flagged: tuple[int, int | None],
    notes: Sequence[str],
) -> RepairRecord:
    return RepairRecord(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", __version__),
        environment=environment(subject.device),
        action="convert",
        command=options.command,
        model=workload.model_name,
        checkpoint=workload.checkpoint,
        weights=None,
        weights_sha256=None,
        settings=spec.recorded(),
        seeds=tuple(subject.seeds) if options.finetune else (subject.seed,),
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
    if proof.gain is not None:  # the lower end of its interval, if several runs give one
        gain = proof.gain.mean if proof.gain.interval is None else proof.gain.interval[0]
    values = {"metric": written.metric, "loss": written.loss, "gain": gain, "flagged": flagged}
    results = check_requirements(spec.repair.require, values)
    return tuple(RequirementResult(requirement.text, value, held) for requirement, value, held in results)
