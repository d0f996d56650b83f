"""The steps of a LightningModule, called without a Trainer: what they return, what they log, how they call the model.

While a step runs, ``LightningModule`` itself answers what a Trainer would: logging is noted, optimizers do not step,
and of ``self.trainer`` is there what is known without a run. A model's own attributes are not touched.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.loading.frameworks import imported, is_a

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""Lightning is published under two names, with classes of their own."""


BATCH_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
"""What may change a batch before a step gets it."""


def classes(name: str) -> tuple[type, ...]:
    """A class of Lightning by its name, once for each of the packages that have been imported."""
    found = (imported(package, name) for package in PACKAGES)
    return tuple(each for each in found if isinstance(each, type))


def overrides(value: Any, name: str) -> bool:
    """Whether a module or data module has a hook of its own, rather than that of Lightning."""
    if value is None:
        return False
    bases = [*classes("LightningModule"), *classes("LightningDataModule")]
    mine = getattr(type(value), name, None)
    return name in vars(value) or (mine is not None and all(mine is not getattr(base, name, None) for base in bases))


@dataclass(frozen=True)
class Run:
    """What is known of the training without a Trainer.

    Attributes:
        epoch, step: How far it was when the checkpoint was saved.
        datamodule: The data module, if there is one.
    """

    epoch: int = 0
    step: int = 0
    datamodule: Any = None


@dataclass
class Said:
    """What a step said while it ran.

    Attributes:
        logged: Values by name, as they were given to ``log``.
        backward: Losses that were given to ``manual_backward``.
    """

    logged: dict[str, Any] = field(default_factory=dict)
    backward: list[Any] = field(default_factory=list)

    def log(self, name: Any, value: Any) -> None:
        """Note a value; a metric of torchmetrics may be updated until the step ends."""
        self.logged[str(name)] = value

    def log_all(self, values: Any) -> None:
        """Note the values of a dictionary, or of a MetricCollection."""
        for name, value in values.items():
            self.log(name, value)


class _NoTrainer:
    """Stands for the Trainer: has what is known without a run, and says of all else that it is not there."""

    def __init__(self, model: Any, run: Run, logger: Any, resting: Callable[[], _Resting]) -> None:
        training = model is None or model.training
        vars(self).update(
            current_epoch=run.epoch,
            global_step=run.step,
            training=training,
            validating=not training,
            logger=logger,
            loggers=[logger],
            lightning_module=model,
            model=model,
            **dict.fromkeys(
                ("testing", "predicting", "sanity_checking", "fast_dev_run", "should_stop", "is_last_batch"), False
            ),
            **dict.fromkeys(("global_rank", "local_rank", "node_rank"), 0),
            **dict.fromkeys(("world_size", "num_devices", "num_nodes", "accumulate_grad_batches"), 1),
            **{name: {} for name in ("callback_metrics", "logged_metrics", "progress_bar_metrics")},
            is_global_zero=True,
            callbacks=[],
            precision="32-true",
        )
        if run.datamodule is not None:
            self.datamodule = run.datamodule
        self._resting = resting

    def __getattr__(self, name: str) -> Any:
        if name == "optimizers":
            return self._resting().optimizers
        if name == "lr_scheduler_configs":
            return [types.SimpleNamespace(scheduler=each) for each in self._resting().schedulers]
        raise AttributeError(f"self.trainer.{name} is there only while a Trainer runs")

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Answer how long training will be, while what never steps is made for it."""
        vars(self).update(_LENGTHS)
        try:
            yield
        finally:
            for name in _LENGTHS:
                delattr(self, name)


_LENGTHS = {
    **dict.fromkeys(("estimated_stepping_batches", "max_steps"), 1_000_000),
    **dict.fromkeys(("max_epochs", "num_training_batches"), 1000),
}
"""Of a training that has room for the phases of any schedule."""


class _Still:
    """An optimizer or scheduler that stays where it is."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing was computed."""

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, where a closure does, and leave the weights."""
        return closure() if callable(closure) else None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        """No gradient is kept from anything."""
        return nullcontext()


class _Resting:
    """The optimizers and schedulers that the module configures, none of which steps."""

    def __init__(self, model: Any, trainer: _NoTrainer) -> None:
        with trainer.planning():
            found = list(_objects_in(model.configure_optimizers()))
        self.optimizers = [_Still(each) for each in found if isinstance(each, torch.optim.Optimizer)]
        self.schedulers = [_Still(each) for each in found if not isinstance(each, torch.optim.Optimizer)]


def _objects_in(configured: Any) -> Iterator[Any]:
    """Optimizers and schedulers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(configured, Mapping):
        yield from _objects_in(
            [configured.get("optimizer"), configured.get("lr_scheduler", configured.get("scheduler"))]
        )
    elif isinstance(configured, list | tuple):
        for each in configured:
            yield from _objects_in(each)
    elif hasattr(configured, "step"):
        yield configured


def _one_or_all(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else found


@contextmanager
def answering(model: nn.Module, run: Run) -> Iterator[Said]:
    """Have Lightning's base class answer as with a Trainer while the block runs; yields what is said meanwhile."""
    base = next(each for each in classes("LightningModule") if isinstance(model, each))
    said = Said()
    answers = _answers(model, run, said, base)
    before = {name: vars(base).get(name) for name in answers}
    for name, answer in answers.items():
        setattr(base, name, answer)
    try:
        yield said
    finally:
        for name, value in before.items():
            if value is None:
                delattr(base, name)
            else:
                setattr(base, name, value)


@contextmanager
def attached(owner: Any, run: Run) -> Iterator[None]:
    """Answer a module or data module as if a Trainer were attached to it, while the block runs."""
    if isinstance(owner, nn.Module):
        with answering(owner, run):
            yield
        return
    before = owner.trainer
    owner.trainer = _NoTrainer(None, replace(run, datamodule=owner), None, _nothing_to_rest)
    try:
        yield
    finally:
        owner.trainer = before


def _nothing_to_rest() -> _Resting:
    raise AttributeError("a data module has no optimizers")


def _answers(model: nn.Module, run: Run, said: Said, base: type) -> dict[str, Any]:
    """What stands in for attributes of ``LightningModule``."""
    logger = _silent_logger(base)
    resting = functools.cache(lambda: _Resting(model, trainer))
    trainer = _NoTrainer(model, run, logger, resting)

    def ignore(self: Any, *args: Any, **kwargs: Any) -> None:
        """What has no effect on the outputs."""

    return {
        "log": lambda self, name, value, *args, **kwargs: said.log(name, value),
        "log_dict": lambda self, dictionary, *args, **kwargs: said.log_all(dictionary),
        "manual_backward": lambda self, loss, *args, **kwargs: said.backward.append(loss),
        "all_gather": lambda self, data, *args, **kwargs: data,
        "optimizers": lambda self, *args, **kwargs: _one_or_all(resting().optimizers),
        "lr_schedulers": lambda self: _one_or_all(resting().schedulers) or None,
        "toggled_optimizer": lambda self, *args, **kwargs: nullcontext(),
        **dict.fromkeys(("print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients"), ignore),
        "trainer": _always(trainer),
        "logger": _always(logger),
        "loggers": _always([logger]),
        "current_epoch": _always(run.epoch),
        "global_step": _always(run.step),
        **dict.fromkeys(("global_rank", "local_rank"), _always(0)),
    }


def _always(value: Any) -> property:
    return property(lambda self: value)


def _silent_logger(base: type) -> Any:
    """Lightning's own logger that drops all it is given."""
    package = next(each for each in PACKAGES if base.__module__.startswith(f"{each}."))
    module = sys.modules[f"{package}.loggers.logger"]
    return module.DummyLogger()


def step(model: Any, batch: Any, run: Run) -> tuple[Any, Said]:
    """Call ``training_step`` on a batch.

    Returns:
        What it returned, and what it said.
    """
    with answering(model, run) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metrics on a few samples
        return call_step(model, "training_step", batch), said


def call_step(model: Any, name: str, batch: Any) -> Any:
    """Call ``training_step`` or ``validation_step`` on a batch, where ``answering`` is in force already."""
    for hook in BATCH_HOOKS:
        if overrides(model, hook):
            batch = getattr(model, hook)(batch, 0)
    function = getattr(model, name)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    takes_any = any(each.kind is each.VAR_POSITIONAL for each in parameters)
    # batch, batch_idx, and an index of an optimizer or a loader where it has no default
    needed = sum(each.kind in positional and (each.default is each.empty or n < 2) for n, each in enumerate(parameters))
    return function(*(batch, 0, 0)[: 2 if takes_any else needed])


def loss_in(returned: Any, said: Said) -> Any:
    """The loss that a step returned, or gave to ``manual_backward``; None without one, or of several."""
    if isinstance(returned, Mapping):
        returned = returned.get("loss")
    if returned is None and len(said.backward) == 1:
        return said.backward[0]
    return returned


# ---- metrics


def _metrics(model: nn.Module) -> list[Any]:
    """The metrics of torchmetrics that hang on a model."""
    return [each for each in model.modules() if is_a(each, imported("torchmetrics", "Metric"))]


@contextmanager
def _starting_anew(metrics: list[Any]) -> Iterator[None]:
    """Forget what metrics were given before; and ask no other process, which has samples of its own."""
    for each in metrics:
        each.reset()
        each.sync_on_compute = each._to_sync = False
    try:
        yield
    finally:
        for each in metrics:
            each.sync_on_compute = each._to_sync = True


def validate(model: Any, batch: Any, run: Run, to_end: bool) -> dict[str, float | Tensor]:
    """Call ``validation_step`` on a batch as if it were all of the validation data.

    Args:
        model: The LightningModule.
        batch: A batch.
        run: What is known of the training.
        to_end: Also what is done when an epoch of validation ends.

    Returns:
        The numbers that were logged, by name.
    """
    with _starting_anew(_metrics(model)), answering(model, run) as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _call_if_overridden(model, "on_validation_epoch_start")
        call_step(model, "validation_step", batch)
        if to_end:
            _call_if_overridden(model, "on_validation_epoch_end")
        found = {name: _number(value) for name, value in said.logged.items()}
        return {name: value for name, value in found.items() if value is not None}


def _call_if_overridden(model: Any, hook: str) -> None:
    if overrides(model, hook):
        getattr(model, hook)()


def _number(value: Any) -> float | Tensor | None:
    """One number, also of a metric of torchmetrics; None where it is none."""
    if hasattr(value, "compute") and hasattr(value, "update"):
        value = value.compute()
    if isinstance(value, Tensor):
        return value if value.numel() == 1 else None
    return value if isinstance(value, int | float) else None


# ---- how a step calls the model


class _Enough(BaseException):
    """Ends a step once the model has been called. It is not an Exception, so that the step does not catch it."""


@dataclass(frozen=True)
class Call:
    """A call of the model, or of a module in it, from a step itself rather than from another module.

    Attributes:
        name: The name of the module; "" for the model.
        args, kwargs: What it was called with.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@contextmanager
def noting_calls(model: nn.Module) -> Iterator[list[Call]]:
    """Note the outermost calls of modules while the block runs. Metrics, and modules without parameters, are none."""
    found: list[Call] = []
    metrics = set(map(id, _metrics(model)))
    depth = 0

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if not depth:
                found.append(Call(name, args, kwargs))
            depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1

        return forward

    modules = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and (not name or (id(module) not in metrics and next(module.parameters(), None) is not None))
    }
    with _forwards({name: (module, functools.partial(noting, name)) for name, module in modules.items()}):
        yield found


@contextmanager
def _forwards(wrappers: Mapping[str, tuple[nn.Module, Callable[[Any], Any]]]) -> Iterator[None]:
    """Wrap the forward of modules while the block runs."""
    before = []
    for module, wrap in wrappers.values():
        attributes = vars(module)
        before.append((attributes, attributes.get("forward")))
        attributes["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        for attributes, original in reversed(before):
            if original is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = original


def outputs_of(model: Any, batch: Any, run: Run, name: str, calls: int) -> Any:
    """What a module returns while ``training_step`` runs on a batch; the step ends with the last call.

    Args:
        model: The LightningModule.
        batch: A batch.
        run: What is known of the training.
        name: The name of the module; "" for the model.
        calls: How often the step calls it.

    Returns:
        What it returned; of several calls a tuple.
    """
    outputs: list[Any] = []
    inside = False

    def collecting(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                outputs.append(original(*args, **kwargs))
            finally:
                inside = False
            if len(outputs) == calls:
                raise _Enough
            return outputs[-1]

        return forward

    with _forwards({name: (model.get_submodule(name), collecting)}), suppress(_Enough):
        step(model, batch, run)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
