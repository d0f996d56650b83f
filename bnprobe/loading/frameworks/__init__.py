"""Projects of other frameworks, read as they stand.

Each framework is one row of ``bnprobe.config.frameworks`` and one module here with its ``Reader``; parts of a reader
stand beside it under its name, what several readers use without one (``libraries``, ``vision``). A reader turns what
a target leads to into a ``Project``: a model, and functions with the names that a model file has. From there on
everything is as with a model file, so that a spec or functions in the user's own file can say otherwise.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from bnprobe.config.frameworks import FRAMEWORKS, Framework
from bnprobe.config.spec import Spec
from bnprobe.errors import ModelError
from bnprobe.records import Goal
from bnprobe.registry import load_code


@dataclass(frozen=True)
class Project:
    """What a framework's project gives, in the terms of a model file.

    Attributes:
        model: The model.
        functions: What a model file would define beside the model, by its names there (docs/model-files.md).
            ``load_data(batch_size)`` may return all that a model file's may: a loader, a data set, or a dictionary of
            "train" and "val".
        taken: What was taken from where, by role, phrases for the report: ``{"model": "LitNet of lit.py"}``. What the
            user gives instead is left out of the report.
        notes: What the reader should know, one sentence each.
        missing: Why there is no loss or no metric, clauses by role.
        goal: Whether a larger or a smaller metric is better, where the project says so.
        model_args: The arguments that the model was made of, where the user did not give all of them.
        data_args: Arguments for the class of a data target that belongs to the framework, where the user gives none.
        observe: Called once with the model, its weights loaded, and a few samples of the training data as a batch:
            gives the project as it is then known, e.g. with the loss that a trial showed it to have. What it changes
            it puts back. None: all is known.
        no_data: Says what of the project has no data and what to name, where nobody gives any: ``("lit.py:LitNet has no
            train_dataloader", "Name a data module with --data data.py:Digits")``. None: as for a model file.
        prepare: Makes of a data set one whose samples the model takes, and notes; None: it is read as it is.
    """

    model: nn.Module
    functions: Mapping[str, Any] = field(default_factory=dict)
    taken: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    goal: Goal | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    data_args: Mapping[str, Any] = field(default_factory=dict)
    observe: Callable[[nn.Module, Any], Project] | None = None
    no_data: Callable[[], tuple[str, str]] | None = None
    prepare: Callable[[Any], tuple[Any, tuple[str, ...]]] | None = None


@dataclass(frozen=True)
class Data:
    """What a data target of a framework gives.

    Attributes:
        training: A loader, a data set or an iterable of batches.
        held_out: The same, where there is some.
        origin: Words for where the training data comes from, e.g. "train_dataloader() of lit.py:Digits".
        held_out_origin: The same of the held-out data.
        notes: What the reader should know, one sentence each.
    """

    training: Any
    held_out: Any = None
    origin: str = ""
    held_out_origin: str = ""
    notes: tuple[str, ...] = ()


class Prepared(Dataset[Any]):
    """A data set that a framework made of the user's, by ``Project.prepare``.

    Attributes:
        collate: Makes a batch of its samples; None: torch does.
    """

    collate: Callable[[list[Any]], Any] | None = None


class Reader:
    """Reads the projects of one framework. A subclass overrides what its framework has."""

    def named(self, name: str, spec: Spec) -> Project:
        """The project of a target ``prefix:name``.

        Raises:
            ModelError: There is none of this name; says which are near.
        """
        raise NotImplementedError

    def claims(self, value: Any) -> bool:
        """Whether a class or object that a model's target leads to is a project of the framework."""
        return False

    def project(self, value: Any, name: str, spec: Spec) -> Project:
        """The project of what was claimed.

        Args:
            value: The class or object.
            name: The user's name for it, e.g. "lit.py:LitNet".
            spec: What the user asked for: arguments of the model, the checkpoint.
        """
        raise NotImplementedError

    def claims_data(self, value: Any) -> bool:
        """Whether a class or object that a data target leads to belongs to the framework."""
        return False

    def data(self, value: Any, name: str, args: Mapping[str, Any]) -> Any:
        """What was claimed as data that is known: ``Data``, or a loader, a data set, an iterable, or a dictionary of
        "train" and "val".
        """
        raise NotImplementedError

    def collate(self, sample: Any) -> Callable[[list[Any]], Any] | None:
        """What makes a batch of such samples of a data set, for data sets that come without a loader; None: torch's."""
        return None


def reader_of(framework: Framework) -> Reader:
    """The reader of a row.

    Raises:
        ModelError: Its code cannot be loaded.
    """
    reader: Reader = load_code(framework.reader, f'The reader of the framework "{framework.name}"', ModelError)
    return reader


def imported(module: str, name: str) -> Any:
    """A class of a module that has been imported; None where it has not been: then nothing is of that class."""
    return getattr(sys.modules.get(module), name, None)


def is_a(value: Any, *kinds: Any) -> bool:
    """Whether a value is an object of one of these classes or a class derived from one; None is no class."""
    known = tuple(kind for kind in kinds if kind is not None)
    return isinstance(value, known) or (isinstance(value, type) and issubclass(value, known) and value not in known)


def claiming(value: Any) -> Reader | None:
    """The reader whose framework a class or object of a model target belongs to."""
    return next((reader for reader in _readers() if reader.claims(value)), None)


def claiming_data(value: Any) -> Reader | None:
    """The reader whose framework a class or object of a data target belongs to."""
    return next((reader for reader in _readers() if reader.claims_data(value)), None)


def may_collate() -> bool:
    """Whether a framework has been imported whose samples may need more than torch to make a batch."""
    return any(type(reader).collate is not Reader.collate for reader in _readers())


def collating(sample: Any) -> Callable[[list[Any]], Any] | None:
    """What makes a batch of samples of a framework; None: torch's ``default_collate``."""
    found = (reader.collate(sample) for reader in _readers())
    return next((collate for collate in found if collate is not None), None)


def _readers() -> Iterator[Reader]:
    """Of frameworks that have been imported: no value belongs to another."""
    return (reader_of(row) for row in FRAMEWORKS if any(package in sys.modules for package in row.packages))


def beside(functions: Mapping[str, Any], module: types.ModuleType | None, name: str) -> types.ModuleType:
    """A module with the functions of a project, and behind them all that the user's module has.

    What the user's module itself says by the documented names comes first.
    """
    found = types.ModuleType(name)
    found.__file__ = None
    if module is not None:
        vars(found).update(vars(module))
    own = {} if module is None else vars(module)
    says_data = any(each in own for each in ("load_data", "loader", "dataset"))
    for role, function in functions.items():
        if role not in own and not (role == "load_data" and says_data):
            setattr(found, role, function)
    return found
