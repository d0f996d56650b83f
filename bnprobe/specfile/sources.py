"""Sources of values: the command line, a spec file, pyproject.toml. Each knows how to name its keys in messages."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bnprobe.errors import SpecError
from bnprobe.spec import as_thresholds
from bnprobe.specfile.wording import shown
from bnprobe.targets import is_file_target, nearest_file, split_target

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
_TARGETS = ("model", "data", "eval_data")
_ALIASES = {"class_path": "target", "init_args": "args"}
_SHORT_FORMS = {**dict.fromkeys(_TARGETS, "target"), "checkpoint": "path"}
_OPTION_NAMES = {"path": "--checkpoint", "thresholds": "--threshold", "target": "TARGET"}


@dataclass(frozen=True)
class Source:
    """Values from one source, with its name; ``lines`` are the line numbers of a file's keys, from 1."""

    values: dict[str, Any]
    name: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    arguments: bool = False

    def key(self, path: KeyPath) -> str:
        """The key as the user wrote it."""
        if self.name or self.arguments:
            return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, path)))
        last = path[0] if path[0] == "thresholds" else path[min(1, len(path) - 1)]
        return _OPTION_NAMES.get(str(last), "--" + str(last).replace("_", "-"))

    def place(self, path: KeyPath) -> str:
        """File and line of the key in parentheses; empty for options."""
        if not self.name:
            return ""
        line = self.line(path)
        return f" ({self.name}, line {line})" if line else f" ({self.name})"

    def line(self, path: KeyPath) -> int | None:
        """Line of the key, or of its nearest parent key."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def option_source(overrides: Mapping[str, Any]) -> Source:
    values: dict[str, Any] = {}
    for dotted, value in overrides.items():
        section, _, key = dotted.partition(".")
        if value is None:
            continue
        value = str(value) if isinstance(value, Path) else value
        if key:
            values.setdefault(section, {})[key] = value
        else:
            values[section] = value
    return Source(values)


def read_pyproject(folder: Path) -> Source:
    folder = folder.absolute()
    found = (parent / "pyproject.toml" for parent in (folder, *folder.parents))
    path = next((candidate for candidate in found if candidate.is_file()), None)
    if path is None:
        return Source({})
    try:
        table = tomllib.loads(_read_text(path)).get("tool", {}).get("bnprobe", {})
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from None
    if not isinstance(table, dict):
        raise SpecError(f"tool.bnprobe of {path} must be a table, but is {shown(table)}.")
    return _normalised(Source(table, f"[tool.bnprobe] of {path}"), path.parent)


def read_yaml(path: Path) -> Source:
    text = _read_text(path)
    keys = _KeyLines(path)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        keys.walk(node)
        values = {} if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise SpecError(_yaml_message(error, text, path)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}, line 1: a spec file must be a mapping (key: value), but is {shown(values)}.")
    return _normalised(Source(values, str(path), keys.lines), path.parent)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"The file {path} does not exist. {nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} could not be read as UTF-8 text: {error}.") from None


class _KeyLines:
    """The line of every key in a YAML document, from 1. A duplicate key is an error.

    Each node is visited once: an alias shares the node of its anchor, which may even contain itself.
    """

    def __init__(self, file: Path) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._file = file
        self._seen: set[int] = set()

    def walk(self, node: yaml.Node | None, path: KeyPath = ()) -> None:
        if node is None or id(node) in self._seen:
            return
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._note(key, path)
                self.walk(value, (*path, _key_name(key, path)))

    def _note(self, key: yaml.Node, path: KeyPath) -> None:
        full, line = (*path, _key_name(key, path)), key.start_mark.line + 1
        if key.value != "<<" and full in self.lines:
            lines = f"lines {self.lines[full]} and {line}"
            raise SpecError(f'The key "{full[-1]}" is given twice in {self._file}, {lines}.')
        self.lines[full] = line


def _key_name(key: yaml.Node, path: KeyPath) -> str:
    name = str(key.value)
    return _ALIASES.get(name, name) if len(path) == 1 and path[0] in _TARGETS else name


def _yaml_message(error: yaml.MarkedYAMLError, text: str, path: Path) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{path} is not valid YAML: {error}."
    lines = text.splitlines()
    quoted = f": {lines[mark.line].strip()!r}" if mark.line < len(lines) else ", the end of the file"
    hint = " Put names that start with * in quotes." if "alias" in (error.context or "") else ""
    return f"{path}, line {mark.line + 1} is not valid YAML ({error.problem}){quoted}.{hint}"


def _normalised(source: Source, folder: Path) -> Source:
    """The same values with aliases and short forms expanded, and paths resolved against ``folder``."""
    values = {key: _normal_section(key, value) for key, value in source.values.items()}
    _anchor(values, folder)
    return Source(values, source.name, source.lines)


def _normal_section(section: str, value: Any) -> Any:
    if isinstance(value, str) and section in _SHORT_FORMS:
        return {_SHORT_FORMS[section]: value}
    if section == "thresholds" and value is not None:
        return as_thresholds(value)
    if section in _TARGETS and isinstance(value, dict):
        return {_ALIASES.get(key, key): item for key, item in value.items()}
    return value


def _anchor(values: dict[str, Any], folder: Path) -> None:
    for section in _TARGETS:
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get("target"), str):
            part["target"] = _anchored_target(part["target"], folder)
    for key in ("forward", "loss", "metric"):
        if isinstance(values.get(key), str):
            values[key] = _anchored_target(values[key], folder)
    training = values.get("train")
    for key in ("optimizer", "schedule"):
        part = training.get(key) if isinstance(training, dict) else None
        if isinstance(part, dict) and isinstance(part.get("target"), str):
            part["target"] = _anchored_target(part["target"], folder)
    for section, key in (("checkpoint", "path"), ("repair", "report")):
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = str(folder / Path(part[key]).expanduser())


def _anchored_target(target: str, folder: Path) -> str:
    if not is_file_target(target):
        return target
    location, symbol = split_target(target)
    return str(folder / Path(location).expanduser()) + (f":{symbol}" if symbol else "")
