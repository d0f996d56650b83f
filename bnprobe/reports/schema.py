"""The JSON Schemas of the JSON report and of the record of a repair, made from the records and their docstrings.

``python -m bnprobe.reports.schema`` prints that of the report, with ``record`` after it that of the record;
``report.schema.json`` and ``record.schema.json`` beside this file are the committed copies.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from typing import Any

from bnprobe import records
from bnprobe.records.measurements import OMITTED_WHEN_EMPTY

_ATTRIBUTE = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.+)$")


DOCUMENTS: dict[str, tuple[type, str]] = {
    "report": (records.Report, "bnprobe report"),
    "record": (records.RepairRecord, "bnprobe repair record"),
}
"""What there is a schema of: the record and the title."""


def schema(document: str = "report") -> dict[str, Any]:
    """The JSON Schema (2020-12) of one of ``DOCUMENTS``, as a plain dictionary."""
    from pydantic import TypeAdapter

    record, title = DOCUMENTS[document]
    generated = TypeAdapter(record).json_schema(mode="serialization")
    definitions = {name: _closed(name, body) for name, body in sorted(generated.pop("$defs").items())}
    closed = _closed(record.__name__, generated)
    closed["properties"]["schema_version"]["const"] = records.SCHEMA_VERSION
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **closed,
        "title": title,
        "$defs": definitions,
    }


def schema_text(document: str = "report") -> str:
    """The schema as it is committed."""
    return json.dumps(schema(document), indent=2, ensure_ascii=False) + "\n"


def _closed(name: str, body: dict[str, Any]) -> dict[str, Any]:
    """One object of the schema: no other keys allowed, described by the record's docstring."""
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
        "required": [key for key in properties if key not in OMITTED_WHEN_EMPTY],
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
    print(schema_text(*sys.argv[1:]), end="")
