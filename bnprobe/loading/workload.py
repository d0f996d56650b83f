"""Load everything a scan needs from the user's files: model, weights, data and functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bnprobe.config.load import settings_from
from bnprobe.config.spec import NormClass, ScanSettings, Spec
from bnprobe.errors import DataError, ModelError, UsageError
from bnprobe.loading import preflight
from bnprobe.loading.checkpoint import load_checkpoint
from bnprobe.loading.data import BatchSource
from bnprobe.loading.model import BatchFunction, LoadedModel, UserModule, kind_of, load_model, locate, require_values
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.loading.source import load_held_out, load_source
from bnprobe.paths import placed


@dataclass(frozen=True)
class Workload:
    """A model and the batches to measure it with.

    Attributes:
        model: The user's model with its checkpoint loaded, without wrappers.
        model_name: Name of the model, e.g. "model.py:load_model".
        checkpoint: The weights file, if one was given.
        source: Micro-batches of the training data.
        held_out: Micro-batches of the held-out data, if there are any.
        forward, loss, metric: The user's functions of (model, batch), if given.
        notes: What the reader should know, one sentence each; ``source`` has its own.
        make_optimizer: Makes an optimizer for given parameters, if training steps are requested.
        module: Module where the user's functions were looked up, if there is one.
        wrapped, parameters_alone: As in ``LoadedModel``.
        not_held_out: Why held-out data that is there was not used, a sentence; None: all that there is was used.
        norms: Norms of the user's own by the name of their class, as the spec or the model file says.
        averaged, undone: As in ``LoadedModel``.
    """

    model: nn.Module
    model_name: str
    checkpoint: str | None
    source: BatchSource
    held_out: BatchSource | None
    forward: BatchFunction | None
    loss: BatchFunction | None
    metric: BatchFunction | None
    notes: tuple[str, ...]
    make_optimizer: Callable[[list[nn.Parameter]], Any] | None = None
    module: UserModule | None = None
    norms: Mapping[str, NormClass] = field(default_factory=dict)
    wrapped: bool = False
    parameters_alone: bool = False
    not_held_out: str | None = None
    averaged: tuple[str | None, str | None] = (None, None)
    undone: Mapping[str, str] = field(default_factory=dict)

    def settings(self, given: ScanSettings) -> ScanSettings:
        """Settings with the norms that the model file names, where they name none."""
        return given if given.norms else given.model_copy(update={"norms": dict(self.norms)})


def load_workload(spec: Spec, need_statistics: bool = True) -> Workload:
    """Load model, checkpoint, data and functions, in this order.

    The user's code may draw random weights. Seed first to make them reproducible.

    Args:
        spec: What the user asked for.
        need_statistics: Whether the checkpoint must hold the running statistics; False where they are about to be made.

    Raises:
        BnprobeError: Something is wrong with the user's files; see ``bnprobe.errors``.
    """
    preflight.check(spec)
    loaded = load_model_only(spec, need_statistics)
    source = load_source(spec.data, loaded.module)
    notes = list(loaded.notes)
    held_out, not_held_out = _held_out(spec, loaded.module, source)
    notes += [] if not_held_out is None else [not_held_out]
    functions = {
        role: _function(role, target, loaded.module, notes)
        for role, target in (("forward", spec.forward), ("loss", spec.loss), ("metric", spec.metric))
    }
    if source.synthetic and not (spec.scan.train_steps or spec.scan.gradients):
        functions |= {"loss": None, "metric": None}  # there are no labels, and the inputs are nothing to be right about
    return Workload(
        loaded.model,
        loaded.name,
        spec.checkpoint.path,
        source,
        held_out,
        notes=tuple(notes),
        make_optimizer=load_optimizer(spec.train.optimizer, loaded.module) if spec.scan.train_steps else None,
        module=loaded.module,
        norms=spec.layers.norms or _norm_classes(loaded.module),
        wrapped=loaded.wrapped,
        parameters_alone=loaded.parameters_alone,
        not_held_out=not_held_out,
        averaged=loaded.averaged,
        undone=loaded.undone,
        **functions,
    )


def _norm_classes(module: UserModule | None) -> Mapping[str, NormClass]:
    """What ``norm_classes`` of the model's module says.

    Raises:
        UsageError: It is no dictionary of classes with their buffers.
    """
    given = None if module is None else module.find("norm_classes")
    if given is None or module is None:
        return {}
    try:
        return settings_from({"norms": given}).norms
    except UsageError as error:
        raise UsageError(f"norm_classes of {module.name}: {error}") from None


def read_again(spec: Spec, workload: Workload) -> Workload:
    """The same model with its data loaded again, because a generator can be read only once.

    The user's code may draw random numbers. Seed first to make them reproducible.
    """
    source, held_out = load_source(spec.data, workload.module), workload.held_out
    if held_out is not None:
        held_out = load_held_out(spec.eval_data, workload.module, source.batch_size) or source.beside
    return replace(workload, source=source, held_out=held_out)


def _held_out(spec: Spec, module: UserModule | None, source: BatchSource) -> tuple[BatchSource | None, str | None]:
    """The held-out data, or a sentence that says why it was not used.

    What the spec names must load; a load_eval_data that is only in the model file may fail.
    """
    if source.synthetic and spec.eval_data.target is None:
        return None, None  # there is nothing to compare it with
    try:
        return load_held_out(spec.eval_data, module, source.batch_size) or source.beside, None
    except (DataError, UsageError) as error:
        if spec.eval_data.target is not None:
            raise
        return None, f"The held-out data was not used. {error}"


def load_model_only(spec: Spec, need_statistics: bool = True) -> LoadedModel:
    """Load the model with its checkpoint, without data; ``need_statistics`` as for ``load_workload``."""
    checkpoint = spec.checkpoint
    loaded = load_model(spec.model)
    if checkpoint.path is not None:
        checkpoint = checkpoint.model_copy(update={"path": str(placed(Path(checkpoint.path)))})
    require_values(loaded.model)
    weights = load_checkpoint(loaded.model, checkpoint, need_statistics)
    return replace(
        loaded,
        notes=(*loaded.notes, *weights.notes),
        parameters_alone=weights.parameters_alone,
        averaged=(weights.averaged, weights.beside),
        undone=weights.undone,
    )


def _function(role: str, target: str | None, module: UserModule | None, notes: list[str]) -> BatchFunction | None:
    """The function that the spec names, or else the one with the name of its role in the model's module."""
    if target is not None:
        home, symbol = locate(target, module)
        value: BatchFunction = home.get(symbol or role)
        problem = _problem(value)
        if problem:
            raise ModelError(f"{symbol or role} of {home.name} cannot be used as {role}: {problem}.")
        return value
    found: BatchFunction | None = module.find(role) if module is not None else None
    if module is None or found is None:
        return None
    problem = _problem(found)
    if problem:
        notes.append(f"{role} of {module.name} was not used: {problem}.")
        return None
    return found


def _problem(value: Any) -> str | None:
    """Why a value is not a function of (model, batch), as a clause; None if it is one."""
    if isinstance(value, nn.Module | type) or not callable(value):
        return f"it is {kind_of(value)}, not a function of (model, batch)"
    try:
        inspect.signature(value).bind(None, None)
    except TypeError:
        return f"it takes {inspect.signature(value)}, not (model, batch)"
    except ValueError:
        return None  # a built-in whose signature Python cannot read
    return None
