"""Projects of Lightning as they stand: a LightningModule, its checkpoint, its data, and its steps."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bnprobe.config.spec import Spec
from bnprobe.errors import (
    BnprobeError,
    DataError,
    ModelError,
    UserCodeError,
    message_of,
    place_in_user_code,
)
from bnprobe.loading.frameworks import Data, Project, Reader, is_a
from bnprobe.loading.frameworks.lightning_checkpoint import Saved, arguments_for, read_saved
from bnprobe.loading.frameworks.lightning_steps import (
    BATCH_HOOKS,
    Call,
    Run,
    Said,
    attached,
    classes,
    loss_in,
    noting_calls,
    outputs_of,
    overrides,
    step,
    validate,
)
from bnprobe.loading.frameworks.metric_names import chosen_metric
from bnprobe.loading.model import eagerly, user_code
from bnprobe.loading.returned import described
from bnprobe.loading.scripts import classes_near
from bnprobe.numbers import listed
from bnprobe.paths import short_path


class Lightning(Reader):
    """LightningModules and LightningDataModules, of ``lightning`` and of ``pytorch_lightning``."""

    def claims(self, value: Any) -> bool:
        """See the base class."""
        return is_a(value, *classes("LightningModule"))

    def project(self, value: Any, name: str, spec: Spec) -> Project:
        """See the base class."""
        saved = read_saved(spec.checkpoint)
        model: Any
        model, arguments = (value, {}) if isinstance(value, nn.Module) else _built(value, name, spec, saved)
        if overrides(model, "configure_model"):
            with user_code(f"calling configure_model() of {name}"):
                model.configure_model()
        (source_name, source), failed = (name, None), None
        try:
            source_name, source = _data_of(model, name, spec, saved)
        except BnprobeError as error:  # said where data is asked for: some commands need none
            failed = error
        run = Run(saved.epoch, saved.step, source if self.claims_data(source) else None)
        owners = [(source_name, source), (name, model)] if run.datamodule is not None else [(name, model)]
        data = _Loaders(source_name, source, _SettingUp(owners, run))
        if overrides(model, "setup"):  # before the weights are loaded, since it may make layers
            with suppress(UserCodeError):  # said where the data is loaded, or the weights do not fit
                data.setting_up.once()
        kind = "" if name.endswith(f":{type(model).__name__}") else f" ({type(model).__name__})"
        from_file = f" with arguments saved in {saved.file}" if arguments.keys() - spec.model.args.keys() else ""
        return Project(
            model,
            data.functions if failed is None else {"load_data": lambda: _fail(failed)},
            {"model": f"{name}{kind}{from_file}"},
            model_args=arguments,
            data_args=saved.data if saved.data_argument is None else {saved.data_argument: saved.data},
            observe=functools.partial(_observed, name=name, run=run, saved=saved),
            no_data=functools.partial(_without_data, type(model), name),
        )

    def claims_data(self, value: Any) -> bool:
        """See the base class."""
        return is_a(value, *classes("LightningDataModule"))

    def data(self, value: Any, name: str, args: Mapping[str, Any]) -> Data:
        """See the base class."""
        source = _datamodule(value, name, args, Saved())
        return _Loaders(name, source, _SettingUp([(name, source)], Run(datamodule=source))).both()


def _fail(error: BnprobeError) -> NoReturn:
    raise error


def _built(kind: type, name: str, spec: Spec, saved: Saved) -> tuple[Any, dict[str, Any]]:
    """Make the LightningModule of what the user gives and what the checkpoint has saved; also its arguments."""
    arguments = arguments_for(
        kind, name, spec.model.args, saved.model, saved.model_argument, saved.file, "--model-arg NAME=VALUE"
    )
    with user_code(f"calling {name}({', '.join(arguments)})"):
        return kind(**arguments), arguments


def _datamodule(value: Any, name: str, args: Mapping[str, Any], saved: Saved) -> Any:
    """The data module itself, made of its arguments where a class is given."""
    if not isinstance(value, type):
        return value
    option = "data: {args: {NAME: VALUE}} in a spec"
    arguments = arguments_for(value, name, args, saved.data, saved.data_argument, saved.file, option)
    with user_code(f"calling {name}({', '.join(arguments)})"):
        return value(**arguments)


# ---- data


@dataclass
class _SettingUp:
    """Modules and data modules that are set up once, as a Trainer does it before it asks for loaders.

    Attributes:
        owners: The user's names for them, and they themselves, in the order of a Trainer.
        run: What is known of the training.
    """

    owners: list[tuple[str, Any]]
    run: Run
    _done: bool = False

    def once(self) -> None:
        """Call ``prepare_data`` and ``setup("fit")`` where they have their own.

        Raises:
            UserCodeError: The user's code raised.
        """
        if self._done:
            return
        for hook in ("prepare_data", "setup"):
            for name, owner in self.owners:
                if overrides(owner, hook):
                    arguments = ("fit",) if hook == "setup" else ()
                    with user_code(f"calling {hook}({', '.join(arguments)}) of {name}"), attached(owner, self.run):
                        getattr(owner, hook)(*arguments)
        self._done = True


@dataclass(frozen=True)
class _Loaders:
    """The loaders of a module or data module, as a Trainer asks for them.

    Attributes:
        name: The user's name for it.
        source: The module or data module; None where there are none.
        setting_up: What must be set up before.
    """

    name: str
    source: Any
    setting_up: _SettingUp

    @property
    def functions(self) -> dict[str, Any]:
        """By the names of a model file."""
        hooks = {"load_data": ("train_dataloader", self.training), "load_eval_data": ("val_dataloader", self.held_out)}
        return {name: load for name, (hook, load) in hooks.items() if overrides(self.source, hook)}

    def both(self) -> Data:
        """The training data, and the validation data if there is any."""
        training = self.training()
        if not overrides(self.source, "val_dataloader"):
            return training
        held_out = self.held_out()
        notes = (*training.notes, *held_out.notes)
        return replace(training, held_out=held_out.training, held_out_origin=held_out.origin, notes=notes)

    def training(self) -> Data:
        """The first loader of ``train_dataloader``."""
        return self._first("train_dataloader")

    def held_out(self) -> Data:
        """The first loader of ``val_dataloader``."""
        return self._first("val_dataloader")

    def _first(self, hook: str) -> Data:
        self.setting_up.once()
        origin = f"{hook}() of {self.name}"
        with user_code(f"calling {origin}"), attached(self.source, self.setting_up.run):
            loaders = list(_loaders(getattr(self.source, hook)()))
        if not loaders:
            raise DataError(f"{origin} gives no loader.")
        of_module = isinstance(self.source, nn.Module)  # whose steps call the hooks
        hooks = BATCH_HOOKS if hook == "train_dataloader" and not of_module else ()
        skipped = [each for each in hooks if overrides(self.source, each)]
        notes = [f"{each}() of {self.name} is not called: the batches are those of its loaders." for each in skipped]
        label, first = loaders[0]
        if len(loaders) == 1:
            return Data(first, origin=origin, notes=tuple(notes))
        names = listed([str(each) for each, _ in loaders])
        note = f"{origin} gives {len(loaders)} loaders ({names}): the first, {label}, was used."
        return Data(first, origin=origin, notes=(*notes, note))


def _loaders(given: Any, label: str = "loader") -> Iterator[tuple[str, Any]]:
    """The loaders in what a hook returned, each with a name: one, a list or dictionary of them, or a CombinedLoader."""
    if type(given).__name__ == "CombinedLoader" and hasattr(given, "iterables"):
        yield from _loaders(given.iterables, label)
    elif isinstance(given, Mapping):
        for key, each in given.items():
            yield from _loaders(each, str(key))
    elif isinstance(given, list | tuple):
        for number, each in enumerate(given):
            yield from _loaders(each, f"number {number}")
    elif given is not None:
        yield label, given


def _data_of(model: Any, name: str, spec: Spec, saved: Saved) -> tuple[str, Any]:
    """Who gives the data, with the user's name for it: the module itself, else the only data module of its file.

    None where the user names other data, and where nobody does.
    """
    if spec.data.is_named:
        return name, None
    if overrides(model, "train_dataloader"):
        return name, model
    home = sys.modules.get(type(model).__module__)
    found = [
        (symbol, each)
        for symbol, each in vars(home).items()
        if isinstance(each, type)
        and is_a(each, *classes("LightningDataModule"))
        and each.__module__ == type(model).__module__
    ] if home is not None and not spec.data.input_shape else []  # fmt: skip
    if len(found) != 1:
        return name, None
    symbol, kind = found[0]
    file, named = Path(getattr(home, "__file__", None) or ""), name.rpartition(":")[0]
    where = f"{named if Path(named).name == file.name else short_path(file)}:{symbol}"
    return where, _datamodule(kind, where, spec.data.args, saved)


def _without_data(kind: type, name: str) -> tuple[str, str]:
    """What to say of a module without data, with a data module that is there."""
    home = Path(getattr(sys.modules.get(kind.__module__), "__file__", None) or "")
    found = list(classes_near(home, r"\w*DataModule"))
    named = f"{found[0]} ({listed(found)} are there)" if len(found) > 1 else (*found, "FILE.py:CLASS")[0]
    return f"{name} has no train_dataloader", f"Name a data module with --data {named}"


# ---- what a trial of the steps shows


def _observed(model: Any, batch: Any, *, name: str, run: Run, saved: Saved) -> Project:
    """The project with what trials of its steps on a few samples show: how they call the model, loss and metric."""
    project = Project(model)
    try:
        trial = copy.deepcopy(model)
    except Exception as error:  # whatever the user's classes raise
        why = f"{name} cannot be copied ({_said(error)}), so its steps were not tried"
        return replace(project, missing=dict.fromkeys(("loss", "metric"), why))
    device = next((each.device for each in trial.parameters()), torch.device("cpu"))
    if device.type != "cpu":  # a constructor put it there
        batch = trial.transfer_batch_to_device(batch, device, 0)
    with torch.no_grad(), eagerly():
        return _with_metric(_with_loss(project, trial, batch, name, run), trial, batch, name, run, saved)


def _with_loss(project: Project, trial: nn.Module, batch: Any, name: str, run: Run) -> Project:
    """Call ``training_step`` in both modes; add forward and loss as it shows them to be."""
    if not overrides(trial, "training_step"):
        return replace(project, missing={"loss": f"{name} has no training_step"})
    calls: list[Call] = []
    problem = None
    for training in (True, False):
        trial.train(training)
        with noting_calls(trial) as noted:
            try:
                problem = problem or _why_no_loss(*step(trial, batch, run))
            except Exception as error:  # whatever the user's code raises
                problem = problem or f"{'in train mode' if training else 'in eval mode'} it raises {_said(error)}"
        calls = calls or noted
    functions: dict[str, Any] = {}
    if calls and not _is_usual(calls, batch):
        module, times = _which(calls)
        functions["forward"] = _as_written(
            lambda model, batch: outputs_of(model, batch, run, module, times), trial, "training_step"
        )
    if problem is not None and not calls and not overrides(trial, "forward"):
        why = (
            f"{name} has no forward, and its training_step did not call the network: {problem}. Give it a forward, or"
            " name a function forward(model, batch) in a spec."
        )
        functions["forward"] = lambda model, batch: _fail(ModelError(why))
    if problem is None:
        functions["loss"] = _as_written(lambda model, batch: loss_in(*step(model, batch, run)), trial, "training_step")
    taken = dict.fromkeys(functions, "training_step")
    missing = {} if problem is None else {"loss": f"training_step gives none to compare: {problem}"}
    return replace(project, functions=functions, taken=taken, missing=missing)


def _why_no_loss(returned: Any, said: Said) -> str | None:
    """Why a step gave no loss, a clause; None if it gave one."""
    loss = loss_in(returned, said)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return None
    if len(said.backward) > 1:
        return f"it calls manual_backward {len(said.backward)} times, and none of these losses is that of the network"
    return f"it returned {described(returned)}"


def _with_metric(project: Project, trial: nn.Module, batch: Any, name: str, run: Run, saved: Saved) -> Project:
    """Call ``validation_step`` in both modes; add the metric that it logs."""
    if not overrides(trial, "validation_step"):
        return _without_metric(project, f"{name} has no validation_step")
    names: list[str] = []
    for to_end in (False, True):
        try:
            found = [set(validate(trial.train(training), batch, run, to_end)) for training in (True, False)]
        except Exception as error:  # whatever the user's code raises
            return _without_metric(project, f"validation_step gives none: on training data it raises {_said(error)}")
        names = sorted(found[0] & found[1])
        chosen = chosen_metric(names, saved.monitored)
        if chosen is not None:
            break
    else:
        logged = (
            f"of what validation_step logs ({listed(names)}) none is known" if names else "validation_step logs none"
        )
        return _without_metric(project, logged)
    metric, goal = chosen
    function = _as_written(
        lambda model, batch: validate(model, batch, run, to_end).get(metric), trial, "validation_step"
    )
    which = f"{metric} of validation_step" + (f" (goal: {goal})" if goal else "")
    return replace(
        project,
        functions={**project.functions, "metric": function},
        taken={**project.taken, "metric": which},
        goal=goal,
    )


def _without_metric(project: Project, why: str) -> Project:
    return replace(project, missing={**project.missing, "metric": why})


def _is_usual(calls: list[Call], batch: Any) -> bool:
    """Whether a step calls the model as is usual: once, on the batch or its first item as it is."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    only = calls[0]
    return len(calls) == 1 and not only.name and not only.kwargs and len(only.args) == 1 and only.args[0] is first


def _which(calls: list[Call]) -> tuple[str, int]:
    """Of which module the output is that of the network, by its name, and how often a step calls it."""
    names = [call.name for call in calls]
    name = "" if "" in names else names[-1]
    return name, names.count(name)


def _as_written(function: Callable[..., Any], model: nn.Module, name: str) -> Callable[..., Any]:
    """A function of (model, batch) that messages place where the user wrote the step."""

    def call(model: nn.Module, batch: Any) -> Any:
        return function(model, batch)

    signature = inspect.signature(call)
    functools.update_wrapper(call, getattr(type(model), name), assigned=(), updated=())
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _said(error: Exception) -> str:
    """An exception of the user's code in words, with its line."""
    line, said = place_in_user_code(error), message_of(error).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}{f' in {line}' if line else ''}{f': {said}' if said else ''}"
