"""The optimizer and the learning-rate schedule that the spec names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from bnprobe.config.spec import OptimizerSpec, ScheduleSpec
from bnprobe.errors import UsageError
from bnprobe.loading.model import UserModule, kind_of, locate, signature_of, user_code
from bnprobe.wording import nearest


@dataclass(frozen=True)
class Catalogue:
    """The classes of one of torch's modules that a key of the spec may name.

    Attributes:
        key: Key of the spec, e.g. "train.optimizer".
        noun: What the classes make, e.g. "optimizer".
        module: Module of torch, e.g. ``torch.optim``.
        base: Base class of them all.
        given: Their first argument in words, e.g. "parameters".
    """

    key: str
    noun: str
    module: ModuleType
    base: type
    given: str

    @property
    def place(self) -> str:
        """The module's name."""
        return self.module.__name__

    @property
    def example(self) -> str:
        """Example name for a function of the user's own."""
        return f"make_{self.noun}"

    def classes(self) -> dict[str, Callable[..., Any]]:
        """The public classes of the module that derive from ``base``, by name."""
        found = {name: value for name, value in vars(self.module).items() if isinstance(value, type)}
        return {
            name: value
            for name, value in found.items()
            if issubclass(value, self.base) and value is not self.base and not name.startswith("_")
        }


@dataclass(frozen=True)
class Maker:
    """The class or function that a target names.

    Attributes:
        name: E.g. "torch.optim.SGD" or "model.py:make_optimizer".
        make: Called with the first argument and ``args``.
        of_torch: Whether it is one of the catalogue's classes.
    """

    catalogue: Catalogue
    name: str
    make: Callable[..., Any]
    args: Mapping[str, Any]
    of_torch: bool

    def __call__(self, given: Any) -> Any:
        """Call it with its first argument and ``args``.

        Raises:
            UsageError: The class of torch rejects the arguments.
            UserCodeError: The user's own function raised.
        """
        with self.refusing():
            return self.make(given, **self.args)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn rejected arguments into a UsageError while the block runs, as ``__call__`` does."""
        call = f"calling {self.name}({', '.join([self.catalogue.given, *self.args])})"
        try:
            with user_code(call, self._refuses):
                yield
        except _BAD_ARGUMENTS as error:
            raise UsageError(
                f"{self.catalogue.key}.args: {self.name} rejects these arguments: {error}{_hint(self.args)}"
            ) from None

    def require_args(self) -> bool:
        """Check the arguments against the signature, without calling it.

        Returns:
            False if Python cannot read the signature.

        Raises:
            UsageError: The signature does not accept them; the message names the key of the spec.
        """
        try:
            inspect.signature(self.make).bind(None, **self.args)
        except TypeError as error:
            shown = "(" + ", ".join(name for name in signature_of(self.make) if name != "self") + ")"
            message = f"{self.catalogue.key}.args: {self.name}{shown} cannot be called with these arguments: {error}."
            raise UsageError(message) from None
        except ValueError:
            return False  # a built-in
        return True

    def _refuses(self, error: BaseException) -> bool:
        """Whether an error is about the arguments; torch's own classes raise no other kind."""
        return self.of_torch and isinstance(error, _BAD_ARGUMENTS)


_BAD_ARGUMENTS = (TypeError, ValueError)


def find_maker(catalogue: Catalogue, target: str, args: Mapping[str, Any], near: UserModule | None) -> Maker:
    """Find the class or function that a target names.

    Args:
        catalogue: Where a plain name is looked up first.
        target: ``SGD``, ``torch.optim.SGD``, ``model.py:make_optimizer`` or ``package.module:Class``.
        args: Its keyword arguments.
        near: The model's module, where a plain name that torch does not have is looked up.

    Raises:
        UsageError: No such class or function exists; the message suggests the nearest class of torch.
        ModelError: The user's file, module or symbol does not exist.
        UserCodeError: The user's module raised while it was loaded.
    """
    known = catalogue.classes()
    name = target.removeprefix(f"{catalogue.place}.")
    if name in known:
        return Maker(catalogue, f"{catalogue.place}.{name}", known[name], args, of_torch=True)
    is_users = near is not None and name == target and near.find(name) is not None
    if name.isidentifier() and not is_users:
        raise UsageError(_unknown(catalogue, target, list(known), near))
    module, symbol = locate(target, near)
    key = f"{catalogue.key}.target"
    if symbol is None:
        raise UsageError(f"{key}: name a class or function of {module.name}, e.g. {module.name}:{catalogue.example}.")
    make = module.get(symbol)
    if not callable(make):
        raise UsageError(f"{key}: {symbol} of {module.name} is {kind_of(make)}, not a class or function.")
    return Maker(catalogue, f"{module.name}:{symbol}", make, args, of_torch=False)


def _unknown(catalogue: Catalogue, target: str, known: list[str], near: UserModule | None) -> str:
    lower = {each.lower(): each for each in known}
    name = target.removeprefix(f"{catalogue.place}.").lower()
    close = nearest(name, lower, cutoff=0.0)
    where = catalogue.place if near is None else f"{catalogue.place} or {near.name}"
    return (
        f'{catalogue.key}.target: there is no {catalogue.noun} "{target}" in {where}. The nearest name in'
        f" {catalogue.place} is {lower[close]}. To use your own, write model.py:{catalogue.example} or"
        " package.module:Class."
    )


def _hint(args: Mapping[str, Any]) -> str:
    """Point out a number that YAML read as text: 1e-3 needs a dot, as in 1.0e-3."""
    for key, value in args.items():
        if isinstance(value, str) and _is_number(value):
            number = repr(float(value))
            written = number if "." in number else number.replace("e", ".0e")
            return f". YAML reads {key}: {value} as text, not as a number; write {written}."
    return "."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_OPTIMIZERS = Catalogue("train.optimizer", "optimizer", torch.optim, torch.optim.Optimizer, "parameters")


@dataclass(frozen=True)
class _Factory:
    """Makes what a spec names.

    Attributes:
        maker: The class or function that is called.
    """

    maker: Maker

    @property
    def name(self) -> str:
        """Full name, e.g. "torch.optim.SGD" or "model.py:make_schedule"."""
        return self.maker.name


class OptimizerFactory(_Factory):
    """Makes optimizers for given parameters."""

    def __call__(self, parameters: list[nn.Parameter]) -> Any:
        """Make an optimizer for these parameters.

        Raises:
            UsageError: The optimizer rejects its arguments, or does not work with zero_grad(), backward() and step().
            UserCodeError: The user's own function raised.
        """
        optimizer = self.maker(parameters)
        self._check(optimizer)
        return optimizer

    def _check(self, optimizer: object) -> None:
        key, step = "train.optimizer.target", getattr(optimizer, "step", None)
        if not callable(step):
            raise UsageError(f"{key}: {self.name} returned {kind_of(optimizer)}, not an optimizer with step().")
        closure = signature_of(step).get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{key}: step() of {self.name} needs a closure that recomputes the loss, which bnprobe does not"
                " support. Choose another optimizer, e.g. SGD."
            )


def load_optimizer(spec: OptimizerSpec, near: UserModule | None = None) -> OptimizerFactory:
    """Find the optimizer that a spec names, and check that it accepts the arguments, before anything is measured.

    Args:
        spec: ``SGD``, ``torch.optim.SGD``, or a class or function of the user: ``callable(parameters, **args)``.
        near: The model's module, where a plain name that torch.optim does not have is looked up.

    Raises:
        UsageError: No such optimizer, or it rejects the arguments; the message names the key of the spec.
        ModelError: The user's file, module or symbol does not exist.
        UserCodeError: The user's module raised while it was loaded.
    """
    factory = OptimizerFactory(find_maker(_OPTIMIZERS, spec.target, spec.args, near))
    if factory.maker.require_args() and factory.maker.of_torch:
        factory([nn.Parameter(torch.zeros(1, 1))])
    return factory


_SCHEDULERS = Catalogue("train.schedule", "schedule", lr_scheduler, lr_scheduler.LRScheduler, "optimizer")

MakeOptimizer = Callable[[list[nn.Parameter]], Any]


class ScheduleFactory(_Factory):
    """Makes learning rate schedules for given optimizers."""

    def __call__(self, optimizer: Any) -> Any:
        """Make a schedule for this optimizer; call its ``step()`` after every optimizer step.

        Raises:
            UsageError: The schedule rejects its arguments or the optimizer, or its ``step()`` needs arguments.
            UserCodeError: The user's own function raised.
        """
        schedule = self.maker(optimizer)
        step = getattr(schedule, "step", None)
        if not callable(step):
            raise UsageError(
                f"train.schedule.target: {self.name} returned {kind_of(schedule)}, not a schedule with step()."
            )
        self._refuse_metric(step)
        return schedule

    def _refuse_metric(self, step: Callable[..., Any]) -> None:
        needed = [name for name, each in signature_of(step).items() if _is_needed(each)]
        if needed:
            raise UsageError(
                f"train.schedule.target: step() of {self.name} needs {', '.join(needed)}, but bnprobe calls step()"
                " without arguments after every optimizer step. Use CosineAnnealingLR with T_max = the steps of the"
                " run, or a constant learning rate with early stopping by --patience (train.patience)."
            )


def load_schedule(
    spec: ScheduleSpec, near: UserModule | None = None, make_optimizer: MakeOptimizer | None = None
) -> ScheduleFactory:
    """Find the schedule that a spec names, and check that it accepts the arguments, before anything is trained.

    Args:
        spec: ``CosineAnnealingLR``, ``torch.optim.lr_scheduler.CosineAnnealingLR``, or a class or function of the
            user: ``callable(optimizer, **args)``.
        near: The model's module, where a plain name that torch does not have is looked up.
        make_optimizer: Makes the optimizer, for schedules of torch that depend on its kind; None: SGD with momentum.

    Raises:
        UsageError: No such schedule, or it rejects the arguments; the message names the key of the spec.
        ModelError: The user's file, module or symbol does not exist.
        UserCodeError: The user's module raised while it was loaded.
    """
    target = spec.target.removeprefix("torch.optim.lr_scheduler.").removeprefix("lr_scheduler.")
    factory = ScheduleFactory(find_maker(_SCHEDULERS, target, spec.args, near))
    if factory.maker.require_args() and factory.maker.of_torch:
        # Take one step: some classes check their arguments only then.
        optimizer = (make_optimizer or _throw_away)([nn.Parameter(torch.zeros(1, 1))])
        schedule = factory(optimizer)
        optimizer.step()
        with factory.maker.refusing():
            schedule.step()
    return factory


def _throw_away(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _is_needed(parameter: inspect.Parameter) -> bool:
    named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return named and parameter.default is parameter.empty
