"""Read the spec from its sources. The later one wins: ``[tool.bnprobe]`` of the nearest pyproject.toml, the spec file
(YAML), the options of the command line. Errors name the file and line, or the option, that is wrong.
"""

from __future__ import annotations

import os
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bnprobe.config.nodes import SUFFIXES, Configuration, configuration_of
from bnprobe.config.spec import (
    TENSOR_FILES,
    ScanSettings,
    Spec,
    as_thresholds,
    is_file_target,
    split_target,
    why_missing,
    with_location,
)
from bnprobe.errors import BnprobeError, SpecError, UsageError, reason_of
from bnprobe.paths import is_file, placed, read_bounded, real
from bnprobe.wording import argument_of, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]

MOST_BYTES = 1_000_000
"""A spec file or pyproject.toml of more bytes is taken for something else."""

MOST_VALUES = 100_000
"""Values that a YAML document may hold, those that aliases repeat included."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MOST_DIGITS = 400

_LONGEST = 60
"""Characters of a value in a message."""


def shown(value: object) -> str:
    """A value in words that fit YAML."""
    if isinstance(value, str):
        return f"the text {value if len(value) <= 2 * _LONGEST else value[: 2 * _LONGEST] + '...'!r}"
    if isinstance(value, Mapping):
        return "a mapping (key: value)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"the list {_SHORT.repr(list(value))}"[:_LONGEST]
    return _SHORT.repr(value)[:_LONGEST]


class _Short(reprlib.Repr):
    """Shows the beginning of a value, however large it is."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**_LONGEST else "a number with too many digits"


_SHORT = _Short()
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, _LONGEST, _LONGEST, _LONGEST

_TARGETS = ("model", "data", "eval_data")
_ALIASES = {"class_path": "target", "init_args": "args"}
_SHORT_FORMS = {**dict.fromkeys(_TARGETS, "target"), "checkpoint": "path"}
_OPTION_NAMES = {
    "checkpoint.path": "--checkpoint",
    "thresholds": "--threshold",
    "model.target": "TARGET",
    "model.args": "--model-arg",
    **dict.fromkeys(("data.target", "data.tensors"), "--data"),
    **dict.fromkeys(("eval_data.target", "eval_data.tensors"), "--eval-data"),
    "scan.emulate": "--no-emulate",
}
"""Options that are not called as the keys are."""


@dataclass(frozen=True)
class Source:
    """Values from one source, with its name.

    Attributes:
        values: By key.
        name: Of the file; empty: options, or arguments of a function.
        lines: Line numbers of a file's keys, from 1.
        arguments: They are arguments of a function.
        further: Its further arguments, which are no keys.
    """

    values: dict[str, Any]
    name: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    arguments: bool = False
    further: tuple[str, ...] = ()

    def key(self, path: KeyPath) -> str:
        """The key as the user wrote it."""
        if self.arguments:
            path = (argument_of(f"--{path[0]}"), *path[1:])
        if self.name or self.arguments:
            return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, path)))
        named = [name for name in (path[0], ".".join(map(str, path[:2]))) if name in _OPTION_NAMES]
        return _OPTION_NAMES[named[0]] if named else "--" + str(path[:2][-1]).replace("_", "-")

    def place(self, path: KeyPath) -> str:
        """File and line of the key in parentheses; empty for options."""
        if not self.name:
            return ""
        line = self.line(path)
        return f" ({self.name}, line {line})" if line else f" ({self.name})"

    def origin(self, path: KeyPath) -> str:
        """The source of a value in words, e.g. "spec.yaml, line 4" or "option --batch-size"."""
        if self.name:
            return self.place(path).strip(" ()")
        key = self.key(path)
        return f"option {key}" if key.startswith("--") else key

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
    path = next((candidate for candidate in found if is_file(candidate)), None)
    if path is None:
        return Source({})
    try:
        table: Any = tomllib.loads(_read_text(path))
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise SpecError(f"{path} is not valid TOML: {said}.") from None
    for part in ("tool", "bnprobe"):
        table = table.get(part, {})
        if not isinstance(table, dict):
            name = "tool" if part == "tool" else "tool.bnprobe"
            raise SpecError(f"{name} of {path} must be a table, but is {shown(table)}.")
    return _normalised(Source(table, f"[tool.bnprobe] of {path}"), path.parent)


def read_yaml(path: Path) -> Source:
    text = _read_text(path)
    keys = _KeyLines(path)
    try:
        values = load_yaml(text, keys.walk)
    except yaml.MarkedYAMLError as error:
        raise SpecError(_yaml_message(error, text, path)) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:  # of values with a tag, too
        raise SpecError(f"{path} is not valid YAML: {error}.") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise SpecError(f"{path}, line 1: a spec file must be a mapping (key: value), but is {shown(values)}.")
    return _normalised(Source(values, str(path), keys.lines), path.parent)


def read_configuration(path: Path) -> Configuration | None:
    """A configuration of Hydra or LightningCLI; None if a YAML file is a spec, or is wrong as ``read_yaml`` says.

    Raises:
        SpecError: It cannot be read, or not composed.
    """
    try:
        values = load_yaml(_read_text(path))
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError):
        return None
    return configuration_of(path, values, frozenset(Spec.model_fields))


def load_yaml(text: str, look: Callable[[yaml.Node | None], None] = lambda node: None) -> Any:
    """The value of a YAML document, of bounded size: aliases can make a short text hold billions of values.

    Args:
        text: One document.
        look: Called with the document as nodes, before it becomes a value.

    Raises:
        yaml.YAMLError: The text is not YAML.
        ValueError: It holds too many values, is nested too deeply or within itself, or holds a number or a date that
            cannot be.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _require_bounded(node)
        look(node)
        return None if node is None else loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    finally:
        loader.dispose()


def _require_bounded(top: yaml.Node | None) -> None:
    """Refuse a document with too many values, counted as if every alias were written out."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None) -> int:
        if node is None:
            return 0
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise ValueError(f"line {node.start_mark.line + 1} has a value that an alias repeats within itself")
            return sizes[id(node)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
            raise ValueError(f"line {node.start_mark.line + 1} has a number of more than {_MOST_DIGITS} characters")
        sizes[id(node)] = 0  # until it is known
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in pairs for part in pair]
        sizes[id(node)] = total = 1 + sum(map(size, parts))
        if total > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values, those that aliases repeat included")
        return total

    size(top)


def _read_text(path: Path) -> str:
    if (missing := why_missing(path)) is not None:
        raise SpecError(f"The file {path} {missing}")
    try:
        return read_bounded(path, MOST_BYTES, lambda what: SpecError(f"{path} {what}: it is no spec.")).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} could not be read as UTF-8 text: {reason_of(error)}.") from None


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
    with_paths(values, lambda path: _anchored_path(path, folder))
    return Source(values, source.name, source.lines)


def _normal_section(section: str, value: Any) -> Any:
    if isinstance(value, str) and section in _SHORT_FORMS:
        return {_SHORT_FORMS[section]: value}
    if section == "thresholds" and value is not None:
        return as_thresholds(value)
    if section in _TARGETS and isinstance(value, dict):
        return {_ALIASES.get(key, key): item for key, item in value.items()}
    return value


_PATHS = ("checkpoint.path", "repair.report", "data.tensors", "eval_data.tensors")
_CODE = (
    *(f"{section}.target" for section in (*_TARGETS, "train.optimizer", "train.schedule")),
    *("data.batch_size_of", "eval_data.batch_size_of", "forward", "loss", "metric"),
)
"""Keys of a spec that name a file, and those of targets, which may."""


def with_paths(values: dict[str, Any], moved: Callable[[str], str]) -> None:
    """Replace every path in the values of a spec by what a function gives for it."""
    for dotted in (*_PATHS, *_CODE):
        *sections, key = dotted.split(".")
        part: Any = values
        for section in sections:
            part = part.get(section) if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(part.get(key), str):
            part[key] = moved(part[key]) if dotted in _PATHS else with_location(part[key], moved)


def _anchored_path(path: str, folder: Path) -> str:
    """The path as seen from ``folder``; ``~user`` stays as it is where there is no such user.

    It is as short as the user would write it: "probe/../lit.py" is "lit.py", but where a link makes that another file.
    """
    given = Path(os.path.expanduser(path))  # noqa: PTH111, pathlib raises
    anchored, here = folder / given, placed(Path()).absolute()
    if not given.is_absolute() and anchored.is_relative_to(here):
        anchored = anchored.relative_to(here)
    plain = Path(os.path.normpath(anchored))
    with suppress(OSError, ValueError):  # no path can be so: loading it says what is wrong
        if real(plain) == real(anchored):
            return str(plain)
    return str(anchored)


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "option_list": "whole numbers and commas (as in 1,2,4)",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "too_short": "at least one size",
    "greater_than_equal": "a whole number of at least {ge}",
    "at_least": "a number of at least {ge}",
    "greater_than": "a number above {gt}",
    "less_than_equal": "a number of at most {le}",
    "less_than": "a number below {lt}",
    "literal_error": "{expected}",
    "invalid_key": "text as key",
}


_PLACES = ("target", "tensors")
"""Keys that say where a model or data comes from: one of them alone does."""


@dataclass
class Merged:
    """Values of all sources, later ones overriding earlier ones, and the source of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    owners: dict[KeyPath, Source] = field(default_factory=dict)

    def add(self, source: Source) -> None:
        for section, value in source.values.items():
            if isinstance(value, dict):
                self._add_section(section, value, source)
            elif value is not None or section not in Spec.model_fields:
                self.values[section] = value
                self.owners[(section,)] = source

    def _add_section(self, section: str, given: dict[str, Any], source: Source) -> None:
        held = self.values.setdefault(section, {})
        if not isinstance(held, dict):
            return  # an earlier source is wrong there: validation reports it
        self.owners[(section,)] = source
        if section in ("data", "eval_data") and not given.get("tensors"):
            is_file = str(given.get("target")).lower().endswith(TENSOR_FILES)
            given = {"tensors" if is_file and key == "target" else key: value for key, value in given.items()}
        if any(given.get(key) is not None for key in _PLACES) and any(
            held.get(key, given.get(key)) != given.get(key) for key in _PLACES
        ):
            for key in (*_PLACES, "args"):  # of the other source, and what belongs to it
                held.pop(key, None)
                self.owners.pop((section, key), None)
        for key, value in given.items():
            if value is None and key in known_keys((section,)):
                continue
            held.pop(key, None)  # a glob of thresholds that is given again moves to the end, where it wins
            held[key] = value
            self.owners[(section, key)] = source

    def owner(self, path: KeyPath) -> Source:
        """The source of this key, or of its nearest parent key."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.owners:
                return self.owners[path[:end]]
        return Source({}, arguments=True)


def validated(sources: list[Source]) -> tuple[Spec, Merged]:
    """Merge and validate all sources.

    Raises:
        SpecError: A file contains something that bnprobe does not understand.
        UsageError: An option has a wrong value.
    """
    merged = Merged()
    for source in sources:
        merged.add(source)
    try:
        return Spec.model_validate(merged.values), merged
    except ValidationError as error:
        raise as_error(error, merged) from None


_MISSING = {
    "model": "say where the model comes from",
    "target": "say where the model comes from",
    "schedule": "name a class of torch.optim.lr_scheduler, e.g. StepLR",
    "reason": "say why these rules should not apply to these layers",
    "rules": "give the codes, e.g. [BN107]",
    "layers": 'give a glob of layer names, e.g. "head.*"',
}
"""What to do about a required key that is missing."""


def as_error(error: ValidationError, merged: Merged) -> BnprobeError:
    sentences, from_files = [], False
    for item in error.errors():
        source = merged.owner(item["loc"])
        from_files |= bool(source.name) or item["type"] == "missing"
        sentences.append(sentence(item, source, Spec))
    return (SpecError if from_files else UsageError)("\n".join(sentences))


def sentence(item: Any, source: Source, top: type[BaseModel]) -> str:
    path: KeyPath = tuple(part for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, source, top)
    if item["type"] == "missing":
        advice = _MISSING.get(str(path[-1] if path[0] != "train" else path[-2]), "add it")
        return f"{'.'.join(map(str, path))} is missing{source.place(path)}: {advice}."
    kind = _kind(item, source)
    expected = _EXPECTED.get(kind, item["msg"]).format(**item.get("ctx", {}))
    found = f"Expected {expected} for {source.key(path)}, but got {shown(item['input'])}"
    return f"{found}{source.place(path)}."


def _kind(item: Any, source: Source) -> str:
    """The key of ``_EXPECTED`` that describes best what was expected."""
    if item["type"] == "tuple_type" and not source.name:
        return "option_list"
    if item["type"] == "greater_than_equal" and isinstance(item["ctx"]["ge"], float):
        return "at_least"
    return str(item["type"])


def _unknown_key(path: KeyPath, source: Source, top: type[BaseModel]) -> str:
    key, section = str(path[-1]), ".".join(map(str, path[:-1]))
    if source.arguments and len(path) == 1:
        return _unknown_argument(key, source, top)
    known = known_keys(path[:-1], top)
    close = nearest(key, known)
    elsewhere = [f"{name}.{key}" for name in Spec.model_fields if key in known_keys((name,))]
    if close or (elsewhere and top is Spec):
        hint = f'the nearest known key is "{close or elsewhere[0]}"'
    else:
        hint = f"the known keys are {', '.join(known)}"
    inside = f" in {section}" if section else ""
    return f'Unknown key "{key}"{inside}{source.place(path)}; {hint}.'


def _unknown_argument(name: str, source: Source, top: type[BaseModel]) -> str:
    fields = [argument_of(f"--{field}") for field in top.model_fields]
    known = list(dict.fromkeys(each for each in (*source.further, *fields) if each != "settings"))
    near = nearest(name, known)
    hint = f'the nearest is "{near}"' if near else f"the known ones are {', '.join(known)}"
    return f'Unknown argument "{name}"; {hint}.'


def known_keys(path: KeyPath, top: type[BaseModel] = Spec) -> list[str]:
    """The keys of a section; for an empty path those of the top level; empty for a free mapping."""
    if not path:
        return list(top.model_fields)
    info = top.model_fields.get(str(path[0]))
    sections = [info.annotation, *get_args(info.annotation)] if info else []
    section = next((each for each in sections if isinstance(each, type) and issubclass(each, BaseModel)), None)
    if section is None:
        return []
    if get_origin(info.annotation if info else None) is dict:  # whose keys are names of the user's
        return known_keys(path[2:], section) if len(path) > 1 else []
    return known_keys(path[1:], section)


def build_spec(target: str, overrides: Mapping[str, Any]) -> Spec:
    """Build the spec of one command from target, spec file, pyproject.toml and options.

    Args:
        target: A model target (``model.py:Net``, ``package.module``, ``timm:NAME``), a spec file (.yaml, .yml), or a
            configuration of Hydra or LightningCLI, alone or with the node of the model (``conf/config.yaml:model``).
        overrides: Dotted keys to values, e.g. ``{"data.batch_size": 2}``; None means not given.

    Raises:
        SpecError: A file contains something that bnprobe does not understand.
        UsageError: An option has a wrong value.
    """
    return validated(_sources(target, overrides))[0]


def _sources(target: str | None, overrides: Mapping[str, Any]) -> list[Source]:
    """The sources of a spec, the later ones win; without a target those of the working directory."""
    options = option_source(overrides)
    if target is None:
        return [read_pyproject(Path()), options]
    location, node = split_target(target)
    if location.lower().endswith(SUFFIXES):
        path = Path(location)
        configuration = read_configuration(path)
        if configuration is not None:
            return [read_pyproject(path.parent), Source(configuration.as_spec(node), location), options]
        if node is not None:
            raise SpecError(f"{location} is a spec of bnprobe, which has no nodes: leave out :{node}.")
        return [read_pyproject(path.parent), read_yaml(path), options]
    options.values["model"] = {**options.values.get("model", {}), "target": target}
    folder = Path(location).parent if is_file_target(target) else Path()
    return [read_pyproject(folder), options]


DEFAULT = "default"
"""The origin of a setting that nobody has set."""


@dataclass(frozen=True)
class Setting:
    """A setting that is in force.

    Attributes:
        section, key: Its place in a spec file; of a setting without a section the latter is empty.
        value: As in JSON; None: not set.
        origin: Where it comes from, e.g. "spec.yaml, line 4", "option --batch-size", "default".
    """

    section: str
    key: str
    value: Any
    origin: str


def settings_in_force(target: str | None, overrides: Mapping[str, Any]) -> list[Setting]:
    """Every setting of a spec, and where it comes from.

    Args:
        target: As for `build_spec`; None: what the working directory and the options say.
        overrides: As for `build_spec`.

    Raises:
        SpecError: A file contains something that bnprobe does not understand.
        UsageError: An option has a wrong value.
    """
    assumed = [] if target else [Source({"model": {"target": ""}})]
    spec, merged = validated([*assumed, *_sources(target, overrides)])
    found = []
    for section, value in spec.model_dump(mode="json").items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for key, part in parts:
            path = (section, key) if key else (section,)
            owner = merged.owners.get(path)
            if (section, part) != ("model", ""):
                found.append(Setting(section, key, part, DEFAULT if owner is None else owner.origin(path)))
    return found


def settings_from(options: Mapping[str, Any], called: Callable[..., Any] | None = None) -> ScanSettings:
    """Scan settings from keyword arguments of the Python API; None means not given.

    Args:
        options: By field of ``ScanSettings``.
        called: The function that was called, which has further arguments.

    Raises:
        UsageError: An option is unknown or has a wrong value.
    """
    values = {key: value for key, value in options.items() if value is not None}
    return from_arguments(ScanSettings, values, () if called is None else tuple(signature(called).parameters))


_Section = TypeVar("_Section", bound=BaseModel)


def from_arguments(section: type[_Section], values: Mapping[str, Any], further: tuple[str, ...] = ()) -> _Section:
    """A section from arguments of a function, which has ``further`` ones.

    Raises:
        UsageError: An argument is unknown or has a wrong value.
    """
    source = Source(dict(values), arguments=True, further=further)
    try:
        return section.model_validate(source.values)
    except ValidationError as error:
        raise UsageError("\n".join(sentence(item, source, section) for item in error.errors())) from None
