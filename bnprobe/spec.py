"""The spec: every option of a scan, spelled and validated in one place.

Three sources, the later one wins: ``[tool.bnprobe]`` of the nearest pyproject.toml, the spec file (YAML),
the options of the command line. Each key remembers its source, so that an error names the line or the option.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bnprobe.errors import BnprobeError, SpecError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_THRESHOLD = 32.0
"""Equivalent batch size under which a layer is flagged (DESIGN section 1)."""

MODEL_LIBRARIES = ("timm:", "torchvision:")
"""How targets begin that name a model of a library."""

KeyPath = tuple[str | int, ...]


def _numbers(value: object) -> object:
    """``"1,2,4"`` as (1, 2, 4); anything else is left to validation."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*,?\s*", value):
        return tuple(int(part) for part in value.split(",") if part.strip())
    return value


def _shapes(value: object) -> object:
    """One shape or several: ``"3,224,224"``, ``[3, 224, 224]`` and ``[[3, 224, 224], [10]]`` will do."""
    value = _numbers(value)
    if isinstance(value, list | tuple) and value and all(isinstance(part, int) for part in value):
        return (tuple(value),)
    return value


def _thresholds(value: object) -> object:
    return value if isinstance(value, Mapping) else {"*": value}


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes
Globs = Annotated[tuple[str, ...], Field(strict=False)]
Shape = Annotated[tuple[Count, ...], Field(strict=False, min_length=1), BeforeValidator(_numbers)]
Shapes = Annotated[tuple[Shape, ...], Field(strict=False), BeforeValidator(_shapes)]
BatchSizes = Annotated[
    tuple[Count, ...],
    Field(strict=False),
    AfterValidator(lambda sizes: tuple(sorted(set(sizes)))),
    BeforeValidator(_numbers),
]
Thresholds = Annotated[
    dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
    AfterValidator(lambda given: {"*": DEFAULT_THRESHOLD} | given),  # "*" is weakest wherever it stands
    BeforeValidator(_thresholds),
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ScanSpec(_Section):
    """How a scan runs, whatever the data.

    Attributes:
        max_batches: Most micro-batches that are drawn when their number is not fixed.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        autocast: Run the forward passes under autocast of this dtype.
        physical_batch: Images that run at once; None: chosen from memory.
        batch_sizes: Batch sizes for which the eval path is evaluated as well; sorted, without repeats.
        emulate: Whether micro-batches may run in groups.
    """

    max_batches: Count = 256
    device: str = "auto"
    autocast: Literal["bfloat16", "float16"] | None = None
    physical_batch: Count | None = None
    batch_sizes: BatchSizes = ()
    emulate: bool = True


class ScanSettings(ScanSpec):
    """What the measurement needs to know, data and model apart.

    Attributes:
        batch_size: Images of a micro-batch; None: the loader's own.
        batches: Micro-batches to measure exactly; None: until every layer is decided.
        seed: Seed of torch, numpy and random.
        thresholds: Layer-name glob to the equivalent batch size under which a layer is flagged.
        include, exclude: Layer-name globs; nothing included means all.
    """

    batch_size: Count | None = None
    batches: Count | None = None
    seed: Seed = 0
    thresholds: Thresholds = Field(default_factory=lambda: {"*": DEFAULT_THRESHOLD})
    include: Globs = ()
    exclude: Globs = ()

    def threshold_of(self, layer_name: str) -> float:
        """The threshold of the last glob that matches, in the order given."""
        return [n_eq for glob, n_eq in self.thresholds.items() if fnmatchcase(layer_name, glob)][-1]

    def is_selected(self, layer_name: str) -> bool:
        """Whether a layer is to be measured."""
        included = not self.include or any(fnmatchcase(layer_name, glob) for glob in self.include)
        return included and not any(fnmatchcase(layer_name, glob) for glob in self.exclude)


class ModelSpec(_Section):
    """Where the model comes from."""

    target: str
    args: dict[str, Any] = Field(default_factory=dict)


class CheckpointSpec(_Section):
    """Which weights go into it."""

    path: str | None = None
    key: str | None = None
    strip_prefix: str | None = None
    strict: bool = True
    unsafe_load: bool = False


class EvalDataSpec(_Section):
    """Where evaluation batches come from."""

    target: str | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    batch_size: Count | None = None
    batches: Count | None = None
    seed: Seed = 0


class DataSpec(EvalDataSpec):
    """Where the batches come from; ``input_shape`` are shapes of one image for synthetic ones."""

    input_shape: Shapes = ()


class LayersSpec(_Section):
    """Which layers are measured, by globs of their names."""

    include: Globs = ()
    exclude: Globs = ()


class Spec(_Section):
    """Everything a user can say about a scan (DESIGN section 7)."""

    model: ModelSpec
    checkpoint: CheckpointSpec = CheckpointSpec()
    data: DataSpec = DataSpec()
    eval_data: EvalDataSpec = EvalDataSpec()
    forward: str | None = None
    loss: str | None = None
    metric: str | None = None
    thresholds: Thresholds = Field(default_factory=lambda: {"*": DEFAULT_THRESHOLD})
    layers: LayersSpec = LayersSpec()
    scan: ScanSpec = ScanSpec()

    def settings(self) -> ScanSettings:
        """The part of the spec that the measurement needs."""
        return ScanSettings(
            batch_size=self.data.batch_size,
            batches=self.data.batches,
            seed=self.data.seed,
            thresholds=self.thresholds,
            include=self.layers.include,
            exclude=self.layers.exclude,
            **self.scan.model_dump(),
        )


def load_spec(path: Path) -> Spec:
    """Reads a spec file.

    Raises:
        SpecError: It is not there, not YAML, or says something that bnprobe does not understand.
    """
    return _validated([_read_yaml(path)])


def build_spec(target: str, overrides: Mapping[str, Any]) -> Spec:
    """The spec of one command: target, spec file, pyproject.toml and options together.

    Args:
        target: A model target (``model.py:Net``, ``package.module``, ``timm:NAME``) or a spec file
            (.yaml, .yml).
        overrides: Dotted keys to values, e.g. ``{"data.batch_size": 2}``; None means not given.

    Raises:
        SpecError: A file says something that bnprobe does not understand.
        UsageError: An option does.
    """
    options = _option_source(overrides)
    if target.lower().endswith((".yaml", ".yml")):
        path = Path(target)
        return _validated([_read_pyproject(path.parent), _read_yaml(path), options])
    options.values["model"] = {**options.values.get("model", {}), "target": target}
    location, _ = split_target(target)
    folder = Path(location).parent if is_file_target(target) else Path()
    return _validated([_read_pyproject(folder), options])


def settings_from(options: Mapping[str, Any]) -> ScanSettings:
    """Scan settings from keyword arguments of the Python API; None means not given.

    Raises:
        UsageError: An option is unknown or has a wrong value.
    """
    source = _Source({key: value for key, value in options.items() if value is not None}, arguments=True)
    try:
        return ScanSettings.model_validate(source.values)
    except ValidationError as error:
        sentences = [_sentence(item, source, ScanSettings) for item in error.errors()]
        raise UsageError("\n".join(sentences)) from None


def split_target(target: str) -> tuple[str, str | None]:
    """``"dir/model.py:Net"`` as ("dir/model.py", "Net"); the colon of a Windows drive does not count."""
    location, colon, symbol = target.rpartition(":")
    if not colon or not location or re.search(r"[/\\]", symbol):
        return target, None
    return location, symbol or None


def is_file_target(target: str) -> bool:
    """Whether a target names a file rather than a module or a model library."""
    if target.startswith(MODEL_LIBRARIES):
        return False
    location, _ = split_target(target)
    return location.endswith(".py") or bool(re.search(r"[/\\]", location))


def nearest_file(path: Path) -> str:
    """A sentence on what to do about a missing file: the file of its folder whose name is nearest."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent}."
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, 1)
    return f"Did you mean {path.with_name(close[0])}?" if close else "Check the path."


# ---- sources

_TARGETS = ("model", "data", "eval_data")
_ALIASES = {"class_path": "target", "init_args": "args"}
_SHORT_FORMS = {**dict.fromkeys(_TARGETS, "target"), "checkpoint": "path"}
_OPTION_NAMES = {"path": "--checkpoint", "thresholds": "--threshold", "target": "TARGET"}


@dataclass(frozen=True)
class _Source:
    """Values of one origin, and how to name it; a file's ``lines`` are those of its keys, from 1."""

    values: dict[str, Any]
    name: str = ""
    lines: dict[KeyPath, int] = field(default_factory=dict)
    arguments: bool = False

    def key(self, path: KeyPath) -> str:
        """How the user spelt the key."""
        if self.name or self.arguments:
            return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(map(str, path)))
        last = path[0] if path[0] == "thresholds" else path[min(1, len(path) - 1)]
        return _OPTION_NAMES.get(str(last), "--" + str(last).replace("_", "-"))

    def place(self, path: KeyPath) -> str:
        """Where the key stands, as a parenthesis; empty for options."""
        if not self.name:
            return ""
        line = self.line(path)
        return f" ({self.name}, line {line})" if line else f" ({self.name})"

    def line(self, path: KeyPath) -> int | None:
        """Line of the key, or of the nearest key above it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def _option_source(overrides: Mapping[str, Any]) -> _Source:
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
    return _Source(values)


def _read_pyproject(folder: Path) -> _Source:
    folder = folder.absolute()
    found = (parent / "pyproject.toml" for parent in (folder, *folder.parents))
    path = next((candidate for candidate in found if candidate.is_file()), None)
    if path is None:
        return _Source({})
    try:
        table = tomllib.loads(_read_text(path)).get("tool", {}).get("bnprobe", {})
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from None
    if not isinstance(table, dict):
        raise SpecError(f"tool.bnprobe of {path} must be a table, but is {_shown(table)}.")
    return _normalised(_Source(table, f"[tool.bnprobe] of {path}"), path.parent)


def _read_yaml(path: Path) -> _Source:
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
        raise SpecError(f"{path}, line 1: a spec file is a mapping (key: value), but got {_shown(values)}.")
    return _normalised(_Source(values, str(path), keys.lines), path.parent)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"There is no file {path}. {nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} could not be read as UTF-8 text: {error}.") from None


class _KeyLines:
    """The line of every key of a YAML document, from 1; a key given twice is an error.

    Each node is walked once: an alias shares its anchor's node, which may even hold itself.
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


# ---- normal form and merge


def _normalised(source: _Source, folder: Path) -> _Source:
    """The same values with aliases and short forms written out, and paths relative to ``folder``."""
    values = {key: _normal_section(key, value) for key, value in source.values.items()}
    _anchor(values, folder)
    return _Source(values, source.name, source.lines)


def _normal_section(section: str, value: Any) -> Any:
    if isinstance(value, str) and section in _SHORT_FORMS:
        return {_SHORT_FORMS[section]: value}
    if section == "thresholds" and value is not None:
        return _thresholds(value)
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
    checkpoint = values.get("checkpoint")
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("path"), str):
        checkpoint["path"] = str(folder / Path(checkpoint["path"]).expanduser())


def _anchored_target(target: str, folder: Path) -> str:
    if not is_file_target(target):
        return target
    location, symbol = split_target(target)
    return str(folder / Path(location).expanduser()) + (f":{symbol}" if symbol else "")


@dataclass
class _Merged:
    """Values of all sources, the later ones winning, and who gave each key."""

    values: dict[str, Any] = field(default_factory=dict)
    owners: dict[KeyPath, _Source] = field(default_factory=dict)

    def add(self, source: _Source) -> None:
        for section, value in source.values.items():
            if isinstance(value, dict):
                self._add_section(section, value, source)
            elif value is not None or section not in Spec.model_fields:
                self.values[section] = value
                self.owners[(section,)] = source

    def _add_section(self, section: str, given: dict[str, Any], source: _Source) -> None:
        held = self.values.setdefault(section, {})
        if not isinstance(held, dict):
            return  # a lower source is broken there: validation will say so
        self.owners[(section,)] = source
        if "target" in given and given["target"] != held.get("target", given["target"]):
            held.pop("args", None)  # they were meant for the other target
        for key, value in given.items():
            if value is None and key in _known_keys((section,)):
                continue
            held.pop(key, None)  # a threshold glob given again moves to the end: the last one wins
            held[key] = value
            self.owners[(section, key)] = source

    def owner(self, path: KeyPath) -> _Source:
        """Who gave this key, or the nearest key above it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.owners:
                return self.owners[path[:end]]
        return _Source({}, arguments=True)


def _validated(sources: list[_Source]) -> Spec:
    merged = _Merged()
    for source in sources:
        merged.add(source)
    try:
        return Spec.model_validate(merged.values)
    except ValidationError as error:
        raise _as_error(error, merged) from None


# ---- errors

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
    "greater_than": "a number above {gt}",
    "less_than": "a number below {lt}",
    "literal_error": "{expected}",
    "invalid_key": "text as key",
}


def _as_error(error: ValidationError, merged: _Merged) -> BnprobeError:
    sentences, from_files = [], False
    for item in error.errors():
        source = merged.owner(item["loc"])
        from_files |= bool(source.name) or item["type"] == "missing"
        sentences.append(_sentence(item, source, Spec))
    return (SpecError if from_files else UsageError)("\n".join(sentences))


def _sentence(item: Any, source: _Source, top: type[BaseModel]) -> str:
    path: KeyPath = tuple(part for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        return _unknown_key(path, source, top)
    if item["type"] == "missing":
        return f"{'.'.join(map(str, path))} is missing{source.place(path)}: say where the model comes from."
    kind = "option_list" if item["type"] == "tuple_type" and not source.name else item["type"]
    expected = _EXPECTED.get(kind, item["msg"]).format(**item.get("ctx", {}))
    found = f"Expected {expected} for {source.key(path)}, but got {_shown(item['input'])}"
    return f"{found}{source.place(path)}."


def _unknown_key(path: KeyPath, source: _Source, top: type[BaseModel]) -> str:
    key, section = str(path[-1]), ".".join(map(str, path[:-1]))
    known = _known_keys(path[:-1], top)
    close = difflib.get_close_matches(key, known, 1)
    elsewhere = [f"{name}.{key}" for name in Spec.model_fields if key in _known_keys((name,))]
    if close or (elsewhere and top is Spec):
        hint = f'the nearest known key is "{[*close, *elsewhere][0]}"'
    else:
        hint = f"the known keys are {', '.join(known)}"
    inside = f" in {section}" if section else ""
    return f'Unknown key "{key}"{inside}{source.place(path)}; {hint}.'


def _known_keys(path: KeyPath, top: type[BaseModel] = Spec) -> list[str]:
    """The keys of a section; of the top level for an empty path; none for a free mapping."""
    if not path:
        return list(top.model_fields)
    info = top.model_fields.get(str(path[0]))
    section = info.annotation if info else None
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, Mapping):
        return "a mapping (key: value)"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)[:60] if not isinstance(value, list | tuple) else f"the list {list(value)!r}"[:60]
