"""Resolve a ``target`` with ``args`` to a class of torch or to a callable of the user."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.loading.inspection import kind_of, signature_of
from bnprobe.loading.modules import UserModule, locate
from bnprobe.usercode import user_code


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
        except _REFUSALS as error:
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
        return self.of_torch and isinstance(error, _REFUSALS)


_REFUSALS = (TypeError, ValueError)


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
    close = difflib.get_close_matches(name, lower, 1, cutoff=0.0)
    where = catalogue.place if near is None else f"{catalogue.place} or {near.name}"
    return (
        f'{catalogue.key}.target: there is no {catalogue.noun} "{target}" in {where}. The nearest name in'
        f" {catalogue.place} is {lower[close[0]]}. To use your own, write model.py:{catalogue.example} or"
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
