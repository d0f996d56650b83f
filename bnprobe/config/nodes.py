"""Configurations of Hydra and of LightningCLI: which of their nodes describe the model and the data.

A node is a mapping with ``_target_`` (Hydra) or ``class_path`` (LightningCLI), whose other keys are arguments. It is
named as a target by its file and its keys: ``conf/config.yaml:model``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bnprobe.errors import SpecError, message_of
from bnprobe.numbers import listed
from bnprobe.paths import is_file
from bnprobe.wording import command_for

SUFFIXES = (".yaml", ".yml")
MARKS = ("_target_", "class_path")
ARGUMENTS = ("init_args", "dict_kwargs")
"""Beside ``class_path``: the arguments of a class, and those that its signature does not name."""

_MODEL = ("model", "lit_model", "lit_module", "module", "net", "network", "task", "system", "learner")
_DATA = (
    *("data", "datamodule", "data_module", "dm", "train_dataloader", "train_loader", "dataloader", "loader"),
    *("train_dataset", "dataset"),
)
_EVAL_DATA = ("val_dataloader", "val_loader", "eval_dataloader", "test_dataloader", "val_dataset", "eval_dataset")
"""Names of nodes by role, the likeliest first."""

_OF_LIGHTNING = frozenset(("trainer", "seed_everything", "ckpt_path", "fit"))
"""Keys by which a configuration of LightningCLI is known: a spec of bnprobe has none of them."""

_PLACES = ("best", "last", "hpc", "registry")
"""Words in place of a path under ``ckpt_path``."""

_LARGEST_SEED = 2**32


@dataclass(frozen=True)
class Configuration:
    """A configuration, composed.

    Attributes:
        path: Its file.
        flavour: Whose it is.
        values: Plain containers; interpolations of OmegaConf are not resolved.
        resolvable: The same as OmegaConf's container; None for LightningCLI.
    """

    path: Path
    flavour: Literal["Hydra", "LightningCLI"]
    values: Mapping[str, Any]
    resolvable: Any = None

    def node(self, name: str) -> Mapping[str, Any]:
        """A node by its dotted name; its interpolations are resolved.

        Raises:
            SpecError: There is none; names those that there are.
        """
        value: Any = self.values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not is_node(value):
            raise SpecError(f'{self.path} has no node "{name}" that names a class. {self._those_there()}')
        if self.resolvable is None:
            return dict(value)
        from omegaconf import OmegaConf, errors

        try:
            with _project_root(self.path):
                found = OmegaConf.select(self.resolvable, name)
                plain = OmegaConf.to_container(found, resolve=True, throw_on_missing=True)
        except errors.OmegaConfBaseException as error:
            said = message_of(error).partition("\n")[0]
            raise SpecError(f'The node "{name}" of {self.path} cannot be resolved: {said}.') from None
        assert isinstance(plain, dict)  # select() gave a node
        return {str(key): item for key, item in plain.items()}

    def as_spec(self, model: str | None) -> dict[str, dict[str, Any]]:
        """The sections of a spec that the configuration says.

        Args:
            model: The node of the model; None: found by its name.

        Raises:
            SpecError: No node is the model.
        """
        names = list(_nodes(self.values))
        model = model or _of_role(names, _MODEL) or self._no_model()
        sections: dict[str, dict[str, Any]] = {"model": {"target": f"{self.path}:{model}"}}
        rest = [name for name in names if name != model and not name.startswith(f"{model}.")]
        for section, role in (("data", _DATA), ("eval_data", _EVAL_DATA)):
            if (name := _of_role(rest, role)) is not None:
                sections[section] = {"target": f"{self.path}:{name}"}
        settings = {**self.values, **_mapping(self.values.get("fit"))}
        path = settings.get("ckpt_path")
        if isinstance(path, str) and path not in _PLACES and "${" not in path and path != "???":
            sections["checkpoint"] = {"path": path}
        seed = settings.get("seed_everything", settings.get("seed"))
        if type(seed) is int and 0 <= seed < _LARGEST_SEED:
            sections.setdefault("data", {})["seed"] = seed
        return sections

    def _no_model(self) -> str:
        given = self.values.get("model")
        if self.flavour == "LightningCLI" and isinstance(given, Mapping):
            arguments = "".join(f" --model-arg {key}={value}" for key, value in given.items() if _is_short(value))
            raise SpecError(
                f"{self.path} does not name the class of the model (model: class_path): LightningCLI is given it in"
                f" code. Name it yourself: {command_for(f'FILE.py:CLASS{arguments}')}"
            )
        raise SpecError(f"{self.path} has no node for the model ({listed(list(_MODEL))}). {self._those_there()}")

    def _those_there(self) -> str:
        names = list(_nodes(self.values))
        if not names:
            return "It has no node that names a class (_target_ or class_path)."
        return f"Its nodes are {listed(names)}: name one, as in {self.path}:{_of_role(names, _MODEL) or names[0]}."


def is_node(value: Any) -> bool:
    """Whether a value describes an object."""
    return isinstance(value, Mapping) and any(isinstance(value.get(mark), str) for mark in MARKS)


def is_node_target(target: str) -> bool:
    """Whether a target names a node of a configuration."""
    return target.rpartition(":")[0].lower().endswith(SUFFIXES)


def configuration_of(path: Path, values: Any, known: frozenset[str]) -> Configuration | None:
    """What a YAML file holds, if it is a configuration of Hydra or LightningCLI; None if it is a spec.

    Args:
        path: The file.
        values: Its content.
        known: The keys of a spec.

    Raises:
        SpecError: It cannot be composed, or what composes it is not installed.
    """
    if not isinstance(values, Mapping):
        return None
    if isinstance(values.get("defaults"), list) or _has_target(values):
        return _of_hydra(path, values)
    if not _OF_LIGHTNING.isdisjoint(values.keys() - known) or _is_beyond_a_spec(values):
        return Configuration(path, "LightningCLI", values)
    return None


def _of_hydra(path: Path, values: Mapping[str, Any]) -> Configuration:
    try:
        from hydra import compose, initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf, open_dict
    except ImportError:
        raise SpecError(
            f'{path} is a configuration of Hydra, which is not installed. Run: pip install "bnprobe[hydra]"'
        ) from None
    of_run = path.with_name("hydra.yaml")  # which Hydra leaves beside the composed configuration of a run
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(path.parent.absolute()), version_base=None):
            whole = compose(path.stem if path.suffix == ".yaml" else None, return_hydra_config=True)
        with open_dict(whole):
            if is_file(of_run):
                whole.hydra.merge_with(OmegaConf.load(of_run).hydra)
            HydraConfig.instance().set_config(whole)  # ${hydra:runtime.cwd} and the like
            del whole["hydra"]
            if path.suffix != ".yaml":  # Hydra reads no other files
                whole.merge_with(OmegaConf.create(dict(values)))
    except Exception as error:  # of a group that is missing, or of one of the files
        said = " ".join(message_of(error).split())
        raise SpecError(f"Hydra cannot compose {path} ({type(error).__name__}): {said}") from None
    plain = OmegaConf.to_container(whole, resolve=False)
    assert isinstance(plain, dict)  # as the file is
    return Configuration(path, "Hydra", {str(key): value for key, value in plain.items()}, whole)


@contextmanager
def _project_root(path: Path) -> Iterator[None]:
    """Say in PROJECT_ROOT where the project is, as the setup of many projects does: the folder with .project-root."""
    found = next((each for each in path.absolute().parents if (each / ".project-root").exists()), None)
    if found is None or "PROJECT_ROOT" in os.environ:
        yield
        return
    os.environ["PROJECT_ROOT"] = str(found)
    try:
        yield
    finally:
        del os.environ["PROJECT_ROOT"]


def _has_target(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _nodes(values: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Dotted names of the outermost nodes."""
    for key, value in values.items():
        name = f"{inside}{key}"
        if is_node(value):
            yield name
        elif isinstance(value, Mapping):
            yield from _nodes(value, f"{name}.")


def _of_role(names: list[str], roles: tuple[str, ...]) -> str | None:
    """The node of a role: the one of that name, else the only one below that name."""
    for role in roles:
        for name in names:
            if name.rpartition(".")[2] == role:
                return name
        below = [name for name in names if role in name.split(".")[:-1]]
        if len(below) == 1:
            return below[0]
    return None


def _is_beyond_a_spec(values: Mapping[str, Any]) -> bool:
    """Whether this is nothing but nodes of LightningCLI, and says what a spec's aliases for them cannot say."""
    nodes = list(values.values())
    if not all(is_node(node) and node.keys() <= {"class_path", *ARGUMENTS} for node in nodes):
        return False
    return any("dict_kwargs" in node or _has_node(node.get("init_args")) for node in nodes)


def _has_node(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return is_node(value) or any(map(_has_node, parts))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_short(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
