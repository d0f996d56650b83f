"""The JSON Schema of the JSON report, made from the records and their docstrings.

``python -m bnprobe.reports.schema`` prints it; ``report.schema.json`` beside this file is the committed copy.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from bnprobe import records

_ATTRIBUTE = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.+)$")


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a report, as a plain dictionary."""
    from pydantic import TypeAdapter

    generated = TypeAdapter(records.Report).json_schema(mode="serialization")
    definitions = {name: _closed(name, body) for name, body in sorted(generated.pop("$defs").items())}
    report = _closed("Report", generated)
    report["properties"]["schema_version"]["const"] = records.SCHEMA_VERSION
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **report,
        "title": "bnprobe report",
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as it is committed."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _closed(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """One object of the schema: every key required, no other allowed, described by the record's docstring."""
    record = getattr(records, name)
    summary, attributes = _docstring(record)
    properties = {field.name: body["properties"][field.name] for field in dataclasses.fields(record)}
    for key, text in attributes.items():
        properties[key]["description"] = text
    return {
        "title": name,
        "description": summary,
        "type": "object",
        "properties": {key: _without_default(value) for key, value in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def _without_default(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key != "default"}


def _docstring(record: type) -> tuple[str, dict[str, str]]:
    """The summary of a record's docstring, and the text of each of its attributes."""
    summary, _, listed = (inspect.getdoc(record) or "").partition("\n\nAttributes:\n")
    attributes: dict[str, str] = {}
    names: list[str] = []
    for line in listed.splitlines():
        match = _ATTRIBUTE.match(line)
        if match:
            names = match["names"].split(", ")
            attributes |= dict.fromkeys(names, match["text"])
        else:
            attributes |= {name: f"{attributes[name]} {line.strip()}" for name in names}
    return " ".join(summary.split()), attributes


if __name__ == "__main__":
    print(schema_text(), end="")
