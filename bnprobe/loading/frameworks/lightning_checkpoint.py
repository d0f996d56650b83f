"""What a checkpoint of Lightning says beside the weights: arguments of its classes, what it watched, how far it was.

Nothing in the file is run: objects of other classes than plain containers are stubs (``bnprobe.loading.weights``).
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from bnprobe.config.nodes import MARKS, is_node
from bnprobe.config.spec import CheckpointSpec
from bnprobe.errors import CheckpointError, ModelError
from bnprobe.loading.model import required_of
from bnprobe.loading.weights import Stub, read_arguments, read_weights, weights_file
from bnprobe.numbers import count, joined, listed
from bnprobe.paths import placed
from bnprobe.records import Goal

GOALS: tuple[Goal, ...] = ("max", "min")


@dataclass(frozen=True)
class Saved:
    """What the file says.

    Attributes:
        file: Its name; "" without a checkpoint.
        model: Arguments of the LightningModule.
        model_argument: The one argument that takes all of them as a whole, e.g. "hparams"; None: each is an argument.
        data: Arguments of the LightningDataModule.
        data_argument: As ``model_argument``.
        monitored: Name of what a callback watched, and whether a larger or a smaller one is better, the first that is
            no loss; else None.
        epoch, step: How far the training was.
    """

    file: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    model_argument: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    data_argument: str | None = None
    monitored: tuple[str, Goal] | None = None
    epoch: int = 0
    step: int = 0


def read_saved(spec: CheckpointSpec) -> Saved:
    """Read what a checkpoint says beside the weights; empty for a file of weights alone, and without a checkpoint.

    Raises:
        CheckpointError: The file does not exist, or is damaged.
    """
    if spec.path is None:
        return Saved()
    path = weights_file(placed(Path(spec.path)))
    held, _ = read_weights(path, spec.unsafe_load)
    try:
        return _said_in(held, path)
    except RecursionError:
        raise CheckpointError(f"The hyper-parameters in {path} are nested too deeply to be read.") from None


def _said_in(held: Any, path: Path) -> Saved:
    if not isinstance(held, Mapping) or "state_dict" not in held:
        return Saved(path.name, read_arguments(path))
    model, data = (_arguments(held.get(key)) for key in ("hyper_parameters", "datamodule_hyper_parameters"))
    return Saved(
        path.name,
        model,
        _whole(held.get("hparams_name")),
        data,
        _whole(held.get("datamodule_hparams_name")),
        _monitored(held.get("callbacks")),
        _count(held.get("epoch")),
        _count(held.get("global_step")),
    )


def _arguments(held: Any) -> dict[str, Any]:
    found = plain(held)
    return {str(name): value for name, value in found.items()} if isinstance(found, Mapping) else {}


def _whole(name: Any) -> str | None:
    return name if isinstance(name, str) and name != "kwargs" else None


def _count(value: Any) -> int:
    return value if type(value) is int else 0


_STATE = re.compile(r"(?:ModelCheckpoint|EarlyStopping)(\{.*\})")
"""Under such keys the states of callbacks are saved, with their settings as Python writes them."""


def _monitored(callbacks: Any) -> tuple[str, Goal] | None:
    for key in callbacks if isinstance(callbacks, Mapping) else ():
        match = _STATE.fullmatch(key) if isinstance(key, str) else None
        try:
            settings = ast.literal_eval(match[1]) if match else {}
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        name = settings.get("monitor")
        goal = next((goal for goal in GOALS if settings.get("mode") == goal), None)
        if isinstance(name, str) and goal is not None and "loss" not in name.lower():
            return name, goal
    return None


def plain(value: Any) -> Any:
    """A value of a checkpoint with the stubs of namespaces and of OmegaConf's nodes as plain containers."""
    if isinstance(value, Stub):
        kind, inside = value.class_name, vars(value)
        if kind.startswith("omegaconf."):
            return plain(inside["_content"] if "_content" in inside else inside.get("_val"))
        if kind == "argparse.Namespace":
            return plain(inside)
        return plain(dict(value)) if kind.endswith(".AttributeDict") else value
    if type(value) is dict:
        return {name: plain(item) for name, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def _as_settings(saved: Mapping[str, Any]) -> Any:
    """All that was saved as one object, whose entries are attributes too, also those of mappings in it.

    It is that of OmegaConf where the user's code uses that, else that of Lightning.
    """
    if "omegaconf" in sys.modules and _stub_in(saved) is None:
        with suppress(Exception):  # of a value that it does not take
            return sys.modules["omegaconf"].OmegaConf.create(dict(saved))
    homes = (sys.modules.get(f"{package}.utilities.data") for package in ("lightning.fabric", "lightning_fabric"))
    kind = next((home.AttributeDict for home in homes if home is not None), dict)
    return kind({key: _as_settings(value) if type(value) is dict else value for key, value in saved.items()})


def _stub_in(value: Any) -> Stub | None:
    """An object in a value that was not read."""
    if isinstance(value, Stub):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for part in parts if (found := _stub_in(part)) is not None), None)


def arguments_for(
    kind: type, name: str, given: Mapping[str, Any], saved: Mapping[str, Any], whole: str | None, file: str, option: str
) -> dict[str, Any]:
    """The arguments of a class: what the user gives, and of what the checkpoint has saved what the class takes.

    Args:
        kind: The class.
        name: The user's name for it.
        given: What the user gives.
        saved: What the checkpoint has saved.
        whole: The one argument that takes all that was saved.
        file: Name of the checkpoint.
        option: How a user gives an argument, for messages: "--model-arg net=VALUE" with NAME for the name.

    Raises:
        CheckpointError: An argument is an object that was not read.
        ModelError: An argument that the class needs is neither saved nor given.
    """
    parameters = inspect.signature(kind).parameters
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    saved = {key: value for key, value in saved.items() if not key.startswith("_")}  # of LightningCLI: its own names
    if whole is not None and whole in parameters:
        saved = {whole: _as_settings(saved)}
    used = {key: value for key, value in saved.items() if (key in parameters or takes_all) and key not in given}
    _refuse_objects(used, kind, name, file, option)
    missing = [key for key in required_of(kind) if key not in used and key not in given]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        of_file = (
            f"{file} has not saved (save_hyperparameters)" if file else f"{verb} not given: there is no --checkpoint"
        )
        given_by = "" if any(_is_module(parameters[key]) for key in missing) else f"{_given_by(missing, option)}, or "
        way = f"{given_by}write a function that returns {kind.__name__}(...) and name it as {_function_beside(name)}"
        raise ModelError(f"{name} needs {listed(missing)}, which {of_file}. {way[0].upper()}{way[1:]}.")
    return {**used, **given}


def _given_by(keys: Sequence[str], option: str) -> str:
    return f"give {'it' if len(keys) == 1 else 'them'} by {' '.join(option.replace('NAME', key) for key in keys)}"


def _is_module(parameter: inspect.Parameter) -> bool:
    """Whether an argument is declared to be a module, which no option can give."""
    kind = parameter.annotation
    return issubclass(kind, nn.Module) if isinstance(kind, type) else str(kind).rpartition(".")[2] == "Module"


def _refuse_objects(used: Mapping[str, Any], kind: type, name: str, file: str, option: str) -> None:
    """Refuse saved arguments that are objects, or that say how to make one: both would run code from the file.

    Raises:
        CheckpointError: Some are; names all.
    """
    stubs = {key: stub.class_name for key, value in used.items() if (stub := _stub_in(value)) is not None}
    if stubs:
        which = joined([f'"{key}" ({made_of})' for key, made_of in stubs.items()])
        what = "is an object" if len(stubs) == 1 else "are objects"
        raise CheckpointError(
            f"{count(len(stubs), 'argument')} of {name} in {file} {what}, and objects are not read, since that would"
            f" run code from the file: {which}. Write a function that returns {kind.__name__}(...) and name it as"
            f" {_function_beside(name)}; or, if you trust the file, give --unsafe-load."
        )
    described = {
        key: next(value[mark] for mark in MARKS if mark in value) for key, value in used.items() if is_node(value)
    }
    if described:
        which = joined([f'"{key}" ({names})' for key, names in described.items()])
        verb = "is" if len(described) == 1 else "are"
        raise CheckpointError(
            f"{count(len(described), 'argument')} of {name} in {file} {verb} described by class, and what a checkpoint"
            f" names is not imported: {which}. Scan the configuration that the training wrote beside it, or"
            f" {_given_by(list(described), option)}."
        )


def _function_beside(name: str) -> str:
    return f"{name.rpartition(':')[0] or 'FILE.py'}:FUNCTION"
