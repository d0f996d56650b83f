"""What all arms of a comparison share: the model, the starting point, and the data for training and scoring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from bnprobe.distributed import launched
from bnprobe.errors import NothingToProbeError, RepairError, UsageError
from bnprobe.heldout import HeldOut
from bnprobe.loading.data import BatchSource, load_source
from bnprobe.loading.model import WRAPPED
from bnprobe.loading.optimizer import OptimizerFactory, load_optimizer
from bnprobe.loading.schedule import ScheduleFactory, load_schedule
from bnprobe.loading.workload import Workload, read_anew
from bnprobe.probing.session import device_named
from bnprobe.recalibration import recalibrate_workload
from bnprobe.requirement import parse_requirement
from bnprobe.spec import RepairSpec, Spec, TrainSpec
from bnprobe.training import length_of
from bnprobe.usercode import BatchFunction

FEWEST_IMAGES = 100
"""With fewer held-out samples than this, a note is given."""

RECALIBRATION_IMAGES = 2**14
"""Limit on the samples for recalibration, so that a large data set is not read completely for every arm."""


@dataclass(frozen=True)
class Subject:
    """What all arms of a comparison share.

    Attributes:
        model: The model as loaded, on its device. No arm changes it.
        start: The model that is converted and trained: ``model``, or a copy with recalibrated running statistics.
        recalibrated: Names of the layers that were recalibrated in ``start``.
        renew: Recalibrates a model in place; None: this is not wanted, or not possible.
        training: Micro-batches to train on; None: nothing is trained.
        choosing: Held-out data for model selection; without batches the last weights are kept.
        proving: Held-out data for scoring.
        loss: The user's training loss.
        seed: Seed of the first run.
        make_optimizer, make_schedule: Make the optimizer and schedule that the spec names.
    """

    model: nn.Module
    start: nn.Module
    recalibrated: tuple[str, ...]
    renew: Callable[[nn.Module], Any] | None
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

    @property
    def measure(self) -> Literal["loss", "metric"]:
        """The measure that arms are compared by."""
        return "loss" if self.proving.metric is None else "metric"

    @property
    def goal(self) -> Literal["max", "min"]:
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
    if workload.evaluation is None:
        why = next((note for note in workload.notes if note.startswith("The held-out data was not used")), "")
        raise UsageError(
            "--finetune measures its gain on held-out data, but there is none. Add load_eval_data(batch_size) to the"
            f" model file, or name eval_data in the spec. {why}".rstrip()
        )


def require_unwrapped(notes: Iterable[str]) -> None:
    """Reject a wrapped model, because its repaired weights would not load into it.

    Args:
        notes: Notes of the loaded model.

    Raises:
        RepairError: load_model() returned a wrapped model.
    """
    if any(note.startswith(WRAPPED) for note in notes):
        raise RepairError("load_model() returns a wrapped model, whose keys differ: return the module inside instead.")


def require_measurable(spec: Spec, workload: Workload, finetune: bool) -> None:
    """Reject requirements that cannot be measured, so that they could only fail.

    Raises:
        UsageError: A requirement cannot be measured.
    """
    functions = {"metric": workload.metric, "loss": workload.loss}
    for requirement in map(parse_requirement, spec.repair.require):
        name = requirement.quantity
        if name in functions and (functions[name] is None or workload.evaluation is None):
            raise UsageError(
                f'--require "{requirement.text}" cannot be measured: it needs {name}(model, batch) and held-out data'
                " (load_eval_data) in the model file or the spec."
            )
        if name == "gain" and not finetune:
            raise UsageError(f'--require "{requirement.text}" compares with a fine-tuned baseline: add --finetune.')


def make_subject(spec: Spec, workload: Workload, finetune: bool) -> tuple[Subject, list[str]]:
    """Move the model to its device, recalibrate a copy, and read the held-out data, split in two for model selection.

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
        make_schedule = _schedule(spec, workload, make_optimizer)
    device = device_named(spec.scan.device, workload.model)
    model = workload.model.to(device)
    start, recalibrated, notes = model, tuple[str, ...](), list[str]()
    renew = _renewal(spec, workload) if spec.repair.recalibrate and not workload.source.synthetic else None
    if renew is not None:
        start = copy.deepcopy(model)
        try:
            recalibrated = renew(start)
        except NothingToProbeError as error:
            renew = None
            notes.append(f"No running statistics were recalibrated. {error}")
    held_out = HeldOut.of(spec, workload)
    notes += _few(held_out) if finetune else []
    proving, choosing = held_out.halves() if finetune else (held_out, replace(held_out, batches=()))
    subject = Subject(
        model=model,
        start=start,
        recalibrated=recalibrated,
        renew=renew,
        training=training,
        choosing=choosing,
        proving=proving,
        loss=workload.loss,
        device=device,
        autocast=getattr(torch, spec.scan.autocast) if spec.scan.autocast else None,
        seed=spec.data.seed,
        train=spec.train,
        repair=spec.repair,
        make_optimizer=make_optimizer,
        make_schedule=make_schedule,
    )
    return subject, [*notes, *held_out.notes]


def _few(held_out: HeldOut) -> list[str]:
    """What a small amount of held-out data cannot show, one sentence each."""
    notes = []
    if len(held_out.batches) < 2:
        notes.append("There is only one held-out batch and none for model selection, so the last weights are kept.")
    if held_out.images < FEWEST_IMAGES:
        notes.append(
            f"{held_out.images} held-out samples are too few to tell a gain from chance: give at least a few hundred."
        )
    return notes


def _schedule(spec: Spec, workload: Workload, make_optimizer: OptimizerFactory) -> ScheduleFactory | None:
    if spec.train.schedule is None:
        return None
    return load_schedule(spec.train.schedule, workload.module, make_optimizer)


def _renewal(spec: Spec, workload: Workload) -> Callable[[nn.Module], tuple[str, ...]]:
    """A function that recalibrates a model on all data, or on a large enough part, and returns the layers' names."""
    most = -(-RECALIBRATION_IMAGES // workload.source.batch_size)
    settings = spec.settings().model_copy(update={"batches": most})

    def renew(model: nn.Module) -> tuple[str, ...]:
        return recalibrate_workload(model, read_anew(spec, workload).source, workload.forward, settings=settings)

    return renew


def _training(spec: Spec, workload: Workload) -> BatchSource:
    """The training data at the batch size of training."""
    size = spec.train.batch_size
    if size is None or size == workload.source.batch_size:
        return workload.source
    return load_source(spec.data.model_copy(update={"batch_size": size}), workload.module)
