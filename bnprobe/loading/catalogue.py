"""A ``target`` with ``args`` that names a class of torch's or a callable of the user's."""

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
        key: Of the spec, e.g. "train.optimizer".
        noun: What is made, e.g. "optimizer".
        module: Of torch, e.g. ``torch.optim``.
        base: The classes are derived from it.
        given: What they are made of, e.g. "parameters".
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
        """How a function of the user's could be called."""
        return f"make_{self.noun}"

    def classes(self) -> dict[str, Callable[..., Any]]:
        """The classes by name."""
        found = {name: value for name, value in vars(self.module).items() if isinstance(value, type)}
        return {
            name: value
            for name, value in found.items()
            if issubclass(value, self.base) and value is not self.base and not name.startswith("_")
        }


@dataclass(frozen=True)
class Maker:
    """What a target names.

    Attributes:
        name: E.g. "torch.optim.SGD" or "model.py:make_optimizer".
        make: Called with what it is made of, and ``args``.
        of_torch: It is one of the catalogue's classes.
    """

    catalogue: Catalogue
    name: str
    make: Callable[..., Any]
    args: Mapping[str, Any]
    of_torch: bool

    def __call__(self, given: Any) -> Any:
        """Make it.

        Raises:
            UsageError: torch's class refuses the arguments.
            UserCodeError: The user's own function raised.
        """
        with self.refusing():
            return self.make(given, **self.args)

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Around what takes the arguments; raises as a call does."""
        call = f"calling {self.name}({', '.join([self.catalogue.given, *self.args])})"
        try:
            with user_code(call, self._refuses):
                yield
        except _REFUSALS as error:
            raise UsageError(
                f"{self.catalogue.key}.args: {self.name} refuses them: {error}{_hint(self.args)}"
            ) from None

    def require_args(self) -> bool:
        """Refuse arguments that the signature does not take, without calling it.

        Returns:
            Whether Python could tell the signature.

        Raises:
            UsageError: It does not take them; names the key of the spec.
        """
        try:
            inspect.signature(self.make).bind(None, **self.args)
        except TypeError as error:
            shown = "(" + ", ".join(name for name in signature_of(self.make) if name != "self") + ")"
            message = f"{self.catalogue.key}.args: {self.name}{shown} cannot be called with them: {error}."
            raise UsageError(message) from None
        except ValueError:
            return False  # a built-in
        return True

    def _refuses(self, error: BaseException) -> bool:
        """Whether an error is about the arguments: torch's own classes raise no other."""
        return self.of_torch and isinstance(error, _REFUSALS)


_REFUSALS = (TypeError, ValueError)


def find_maker(catalogue: Catalogue, target: str, args: Mapping[str, Any], near: UserModule | None) -> Maker:
    """Find what a target names.

    Args:
        catalogue: Where a plain name is looked up first.
        target: ``SGD``, ``torch.optim.SGD``, ``model.py:make_optimizer`` or ``package.module:Class``.
        args: For it.
        near: The model's module, where a plain name that is not torch's is looked up.

    Raises:
        UsageError: There is no such thing; gives the nearest of torch's.
        ModelError: The user's file, module or symbol is not there.
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
        raise UsageError(f"{key}: name a class or function of {module.name}, as {module.name}:{catalogue.example}.")
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
        f'{catalogue.key}.target: there is no {catalogue.noun} "{target}" in {where}. The nearest of'
        f" {catalogue.place} is {lower[close[0]]}; one of your own is named as model.py:{catalogue.example} or"
        " package.module:Class."
    )


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
