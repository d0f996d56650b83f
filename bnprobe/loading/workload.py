"""Load everything a scan needs from the user's files: model, weights, data and functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bnprobe.config.load import settings_from
from bnprobe.config.nodes import is_node_target
from bnprobe.config.spec import NormClass, ScanSettings, Spec, split_target
from bnprobe.errors import DataError, ModelError, UsageError
from bnprobe.loading import preflight
from bnprobe.loading.checkpoint import load_checkpoint
from bnprobe.loading.data import BatchSource, few_samples
from bnprobe.loading.model import BatchFunction, LoadedModel, UserModule, kind_of, load_model, locate, require_values
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.loading.source import load_held_out, load_source
from bnprobe.paths import placed
from bnprobe.records import Goal


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
        taken: What was taken from where, by role; empty for a model file that says all by the documented names.
        missing: Why there is no loss or no metric, clauses by role; empty where nothing was taken.
        model_args: The arguments that a framework's project made its model of.
        data_args: Arguments for a class of data of the framework, where the spec does not give them.
        goal: Whether a larger or a smaller metric is better, where the framework's project says so.
        offered: Which of forward, loss and metric the framework's project gave, not the user.
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
    taken: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data_args: Mapping[str, Any] = field(default_factory=dict)
    goal: Goal | None = None
    offered: frozenset[str] = frozenset()

    def settings(self, given: ScanSettings) -> ScanSettings:
        """Settings with the norms that the model file names, and the goal that the project has, where they say none."""
        norms = {} if given.norms else {"norms": dict(self.norms)}
        goal = {"goal": self.goal} if self.goal and not given.goal_is_known else {}
        return given.model_copy(update={**norms, **goal})

    def scored_by(self, loss: BatchFunction | None, metric: BatchFunction | None) -> Workload:
        """The same with this loss and metric, or without."""
        without = {role for role, function in (("loss", loss), ("metric", metric)) if function is None}
        taken = {role: words for role, words in self.taken.items() if role not in without}
        lost = dict.fromkeys(without & self.taken.keys(), "it cannot be computed on the training data")
        return replace(self, loss=loss, metric=metric, taken=taken, missing={**self.missing, **lost})

    def completed(self, spec: Spec) -> Spec:
        """The spec with what the project says and it does not: the goal, and plain arguments of the model."""
        args = {name: value for name, value in self.model_args.items() if _is_plain(value)}
        model = spec.model.model_copy(update={"args": {**args, **spec.model.args}})
        repair = spec.repair
        if self.goal is not None and repair.assumes_goal:
            repair = repair.model_copy(update={"goal": self.goal})
        return spec.model_copy(update={"model": model, "repair": repair})


def _is_plain(value: Any) -> bool:
    """Whether a value is the same after it was written as JSON."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


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
    data_args = loaded.project.data_args if loaded.project else {}
    source = load_source(spec.data, loaded.module, data_args)
    few = None if loaded.project is None or loaded.project.observe is None else few_samples(source)
    if few is not None:
        loaded = loaded.observing(few)
    notes = list(loaded.notes)
    held_out, not_held_out = _held_out(spec, loaded.module, source, data_args)
    notes += [] if not_held_out is None else [not_held_out]
    functions = {
        role: _function(role, target, loaded.module, notes)
        for role, target in (("forward", spec.forward), ("loss", spec.loss), ("metric", spec.metric))
    }
    if source.synthetic and not (spec.scan.train_steps or spec.scan.gradients):
        functions |= {"loss": None, "metric": None}  # there are no labels, and the inputs are nothing to be right about
    taken = _taken(loaded, spec, source, functions)
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
        taken=taken,
        missing=_missing(loaded, source, functions) if taken else {},
        model_args=loaded.project.model_args if loaded.project else {},
        data_args=data_args,
        goal=loaded.project.goal if loaded.project else None,
        offered=_offered(functions, loaded),
        **functions,
    )


def _offered(functions: Mapping[str, BatchFunction | None], loaded: LoadedModel) -> frozenset[str]:
    """Which of the functions are those of the model's framework."""
    given = {} if loaded.project is None else loaded.project.functions
    return frozenset(role for role, each in functions.items() if each is not None and given.get(role) is each)


def _taken(
    loaded: LoadedModel, spec: Spec, source: BatchSource, functions: Mapping[str, BatchFunction | None]
) -> Mapping[str, str]:
    """What was taken where the user did not name it: of what the user says otherwise, nothing."""
    if loaded.project is None:
        if _is_model_file(loaded, source):
            return {}
        given = {role: f"{role} of {loaded.module.name if loaded.module else loaded.name}" for role in functions}
        found = {"model": f"{loaded.name}{_class_of(loaded)}", **given}
    else:
        found = dict(loaded.project.taken)
    said = {role for role in functions if getattr(spec, role) is not None}
    used = {} if loaded.module is None else vars(loaded.module.module)
    theirs = {} if loaded.project is None else loaded.project.functions
    mine = {role for role, each in functions.items() if each is not None and used.get(role) is theirs.get(role, each)}
    taken = {role: words for role, words in found.items() if role in {"model"} | (mine - said)}
    return taken if source.synthetic else {"model": taken.pop("model", loaded.name), "data": source.origin, **taken}


def _is_model_file(loaded: LoadedModel, source: BatchSource) -> bool:
    """Whether model and data come by the documented names, from one Python file or module."""
    home, symbol = split_target(loaded.name)
    documented = {f"{name} of {home}" for name in ("load_data", "loader", "dataset")}
    named = symbol in ("load_model", "model") and not is_node_target(loaded.name)
    return named and (source.synthetic or source.origin in documented)


def _class_of(loaded: LoadedModel) -> str:
    """The class of a model, in parentheses, where its name does not say it."""
    kind = type(loaded.model).__name__
    return "" if loaded.name.endswith(f":{kind}") else f" ({kind})"


def _missing(
    loaded: LoadedModel, source: BatchSource, functions: Mapping[str, BatchFunction | None]
) -> Mapping[str, str]:
    """Why there is no loss or no metric for real data, clauses by role."""
    project, found = loaded.project, {}
    for role in ("loss", "metric"):
        if source.synthetic or functions[role] is not None:
            continue
        if project is None:
            found[role] = (
                f"{loaded.module.name if loaded.module else loaded.name} has no such function of (model, batch)"
            )
        elif project.observe is not None and not project.missing:
            found[role] = f"{loaded.name} was not tried for it, since {source.origin} can be read only once"
        else:
            found[role] = project.missing.get(role, f"{loaded.name} gives none")
    return found


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
    source, held_out = load_source(spec.data, workload.module, workload.data_args), workload.held_out
    if held_out is not None:
        again = load_held_out(spec.eval_data, workload.module, source.batch_size, workload.data_args)
        held_out = again or source.beside
    return replace(workload, source=source, held_out=held_out)


def _held_out(
    spec: Spec, module: UserModule | None, source: BatchSource, data_args: Mapping[str, Any]
) -> tuple[BatchSource | None, str | None]:
    """The held-out data, or a sentence that says why it was not used.

    What the spec names must load; a load_eval_data that is only in the model file may fail.
    """
    if source.synthetic and not spec.eval_data.is_named:
        return None, None  # there is nothing to compare it with
    try:
        return load_held_out(spec.eval_data, module, source.batch_size, data_args) or source.beside, None
    except (DataError, UsageError) as error:
        if spec.eval_data.is_named:
            raise
        return None, f"The held-out data was not used. {error}"


def load_model_only(spec: Spec, need_statistics: bool = True) -> LoadedModel:
    """Load the model with its checkpoint, without data; ``need_statistics`` as for ``load_workload``."""
    checkpoint = spec.checkpoint
    loaded = load_model(spec)
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
