"""The spec's ``train.optimizer`` -> what makes an optimizer of some parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnprobe.errors import UsageError
from bnprobe.loading.inspection import kind_of, signature_of
from bnprobe.loading.modules import UserModule, locate
from bnprobe.spec import OptimizerSpec
from bnprobe.usercode import user_code

_KEY = "train.optimizer"


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes optimizers.

    Attributes:
        name: What makes them, e.g. "torch.optim.SGD" or "model.py:make_optimizer".
        make: Called with the parameters and ``args``.
    """

    name: str
    make: Callable[..., Any]
    args: Mapping[str, Any]
    of_torch: bool

    def __call__(self, parameters: list[nn.Parameter]) -> Any:
        """The optimizer of these parameters.

        Raises:
            UsageError: The optimizer refuses its arguments, or cannot be driven by zero_grad, backward and step.
            UserCodeError: The user's own function raised.
        """
        call = f"calling {self.name}({', '.join(['parameters', *self.args])})"
        try:
            with user_code(call, self._refuses):
                optimizer = self.make(parameters, **self.args)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{_KEY}.args: {self.name} refuses them: {error}{_hint(self.args)}") from None
        self._check(optimizer)
        return optimizer

    def _refuses(self, error: BaseException) -> bool:
        """Whether an error is about the arguments: torch's own classes raise no other."""
        return self.of_torch and isinstance(error, TypeError | ValueError)

    def _check(self, optimizer: object) -> None:
        step = getattr(optimizer, "step", None)
        if not callable(step):
            raise UsageError(f"{_KEY}.target: {self.name} returned {kind_of(optimizer)}, not an optimizer with step().")
        closure = signature_of(step).get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{_KEY}.target: {self.name} needs a closure that computes the loss anew, which is no plain training"
                " step. Choose another optimizer, e.g. SGD."
            )


def load_optimizer(spec: OptimizerSpec, near: UserModule | None = None) -> OptimizerFactory:
    """Find what a spec names, and see that it takes the arguments, before anything is measured.

    Args:
        spec: ``SGD``, ``torch.optim.SGD``, or a class or function of the user's: ``callable(parameters, **args)``.
        near: The model's module, where a plain name that is not of torch.optim is looked up.

    Raises:
        UsageError: No such optimizer, or arguments that it refuses; names the key of the spec.
        ModelError: The user's file, module or symbol is not there.
        UserCodeError: The user's module raised while it was loaded.
    """
    factory = _find(spec, near)
    try:
        inspect.signature(factory.make).bind([], **spec.args)
    except TypeError as error:
        message = f"{_KEY}.args: {factory.name}{_shown(factory.make)} cannot be called with them: {error}."
        raise UsageError(message) from None
    except ValueError:
        return factory  # a built-in whose signature Python cannot tell
    if factory.of_torch:
        factory([nn.Parameter(torch.zeros(1, 1))])
    return factory


def _find(spec: OptimizerSpec, near: UserModule | None) -> OptimizerFactory:
    known = _optimizers_of_torch()
    name = spec.target.removeprefix("torch.optim.")
    if name in known:
        return OptimizerFactory(f"torch.optim.{name}", known[name], spec.args, of_torch=True)
    is_users = near is not None and name == spec.target and near.find(name) is not None
    if name.isidentifier() and not is_users:
        raise UsageError(_unknown(spec.target, name, list(known), near))
    module, symbol = locate(spec.target, near)
    if symbol is None:
        raise UsageError(f"{_KEY}.target: name a class or function of {module.name}, as {module.name}:make_optimizer.")
    make = module.get(symbol)
    if not callable(make):
        raise UsageError(f"{_KEY}.target: {symbol} of {module.name} is {kind_of(make)}, not a class or function.")
    return OptimizerFactory(f"{module.name}:{symbol}", make, spec.args, of_torch=False)


def _optimizers_of_torch() -> dict[str, Callable[..., Any]]:
    base = torch.optim.Optimizer
    classes = {name: value for name, value in vars(torch.optim).items() if isinstance(value, type)}
    return {name: value for name, value in classes.items() if issubclass(value, base) and value is not base}


def _unknown(target: str, name: str, known: list[str], near: UserModule | None) -> str:
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, 1, cutoff=0.0)
    place = "torch.optim" if near is None else f"torch.optim or {near.name}"
    return (
        f'{_KEY}.target: there is no optimizer "{target}" in {place}. The nearest of torch.optim is {lower[close[0]]};'
        " one of your own is named as model.py:make_optimizer or package.module:Class."
    )


def _shown(make: Callable[..., Any]) -> str:
    """The signature, for messages."""
    return "(" + ", ".join(name for name in signature_of(make) if name != "self") + ")"


def _hint(args: Mapping[str, Any]) -> str:
    """YAML reads 1e-3 as text: it wants a dot in the number."""
    for key, value in args.items():
        if isinstance(value, str) and _is_number(value):
            number = repr(float(value))
            written = number if "." in number else number.replace("e", ".0e")
            return f". {key} is the text {value!r}, which YAML takes for no number: write {written}."
    return "."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
