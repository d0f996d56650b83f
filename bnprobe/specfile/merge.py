"""Merge all sources and validate the result; an error names the line or the option that is wrong."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from bnprobe.errors import BnprobeError, SpecError, UsageError
from bnprobe.spec import Spec
from bnprobe.specfile.sources import KeyPath, Source
from bnprobe.specfile.wording import shown

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
        if "target" in given and given["target"] != held.get("target", given["target"]):
            held.pop("args", None)  # they belong to the other target
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


def validated(sources: list[Source]) -> Spec:
    """Merge and validate all sources.

    Raises:
        SpecError: A file contains something that bnprobe does not understand.
        UsageError: An option has a wrong value.
    """
    merged = Merged()
    for source in sources:
        merged.add(source)
    try:
        return Spec.model_validate(merged.values)
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
    known = known_keys(path[:-1], top)
    close = difflib.get_close_matches(key, known, 1)
    elsewhere = [f"{name}.{key}" for name in Spec.model_fields if key in known_keys((name,))]
    if close or (elsewhere and top is Spec):
        hint = f'the nearest known key is "{[*close, *elsewhere][0]}"'
    else:
        hint = f"the known keys are {', '.join(known)}"
    inside = f" in {section}" if section else ""
    return f'Unknown key "{key}"{inside}{source.place(path)}; {hint}.'


def known_keys(path: KeyPath, top: type[BaseModel] = Spec) -> list[str]:
    """The keys of a section; for an empty path those of the top level; empty for a free mapping."""
    if not path:
        return list(top.model_fields)
    info = top.model_fields.get(str(path[0]))
    sections = [info.annotation, *get_args(info.annotation)] if info else []
    section = next((each for each in sections if isinstance(each, type) and issubclass(each, BaseModel)), None)
    return known_keys(path[1:], section) if section else []
