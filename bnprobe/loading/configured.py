"""Objects that a configuration of Hydra or of LightningCLI describes: the class or function, and its arguments."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnprobe.config.load import read_configuration
from bnprobe.config.nodes import ARGUMENTS, MARKS, is_node
from bnprobe.errors import ModelError, SpecError
from bnprobe.loading.model import Described, UserModule, import_from_here, resolve, user_code
from bnprobe.paths import placed


def described_by(location: str, name: str) -> Described:
    """What a node of a configuration describes; arguments that are nodes themselves are made.

    Args:
        location: The file, as the user names it.
        name: The node's dotted name.

    Raises:
        SpecError: There is no such node, or the file is no configuration.
        ModelError: What it names does not exist.
        UserCodeError: The user's code raised.
    """
    path = placed(Path(location))
    configuration = read_configuration(path)
    if configuration is None:
        raise SpecError(f"{location} is a spec of bnprobe, not a configuration with nodes: name it without :{name}.")
    node = configuration.node(name)
    target = next(node[mark] for mark in MARKS if mark in node)
    _make_importable(target, path)
    module, symbol = resolve(target)
    if symbol is None:
        raise ModelError(f'"{target}" (node {name} of {location}) names a module, not a class or function in it.')
    function = module.get(symbol)
    with user_code(f"making {name} of {location}"):
        args = _hydra_arguments(node) if configuration.flavour == "Hydra" else _arguments(node, path)
        positional = args.pop("_args_", ())
    return Described(functools.partial(function, *positional) if positional else function, args)


def _make_importable(target: str, path: Path) -> None:
    """Let imports find the project that a configuration belongs to, where they do not find it from here."""
    top = target.split(".")[0]
    import_from_here()
    if not top.isidentifier() or importlib.util.find_spec(top) is not None:
        return
    for parent in path.absolute().parents:
        if (parent / top).is_dir() or (parent / f"{top}.py").is_file():
            sys.path.insert(0, str(parent))
            return


def _hydra_arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as Hydra makes them: nodes become objects, other mappings OmegaConf's containers."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    instantiate({"_target_": node["_target_"], "_partial_": True})  # which Hydra refuses of what runs programs
    own = ("_target_", "_partial_", "_recursive_", "_convert_")
    given = {key: value for key, value in node.items() if key not in own}
    if node.get("_recursive_") is False:
        make = OmegaConf.create
    else:
        make = functools.partial(instantiate, _convert_=node.get("_convert_", "none"))
    return {key: make(value) if isinstance(value, dict | list) else value for key, value in given.items()}


def _arguments(node: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of a node of LightningCLI, with the nodes in them made."""
    found: dict[str, Any] = {}
    for key in ARGUMENTS:
        given = _made(node.get(key) or {}, path)
        if not isinstance(given, dict):
            raise SpecError(f"{key} of {node['class_path']} in {path} must be a mapping (key: value).")
        found |= given
    return found


def _made(value: Any, path: Path) -> Any:
    """A value of LightningCLI's configuration with the nodes in it made."""
    if is_node(value) and "class_path" in value:
        _make_importable(value["class_path"], path)
        module, symbol = resolve(value["class_path"])
        return module.get(symbol or "")(**_arguments(value, path))
    if isinstance(value, Mapping):
        return {str(key): _made(item, path) for key, item in value.items()}
    return [_made(item, path) for item in value] if isinstance(value, list) else value


class ConfiguredModule(UserModule):
    """A configuration in the place of a user's module: its symbols are nodes."""

    def get(self, symbol: str) -> Any:
        """What a node describes."""
        return described_by(self.name, symbol)


def module_of(location: str) -> ConfiguredModule:
    """A configuration as a module that has nothing but its nodes."""
    return ConfiguredModule(types.ModuleType(location), location)
