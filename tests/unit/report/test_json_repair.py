"""The record of a repair as JSON: against its schema."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import jsonschema
import pytest

from bnprobe.records import RepairRecord
from bnprobe.report import render
from bnprobe.report.json import schema, schema_text
from bnprobe.report.repair import RepairReport
from support import repairs


def as_json(record: RepairRecord) -> str:
    """The record as it is written."""
    return render(RepairReport(record), "json")


COMMITTED = files("bnprobe.report").joinpath("record.schema.json")


def test_the_committed_schema_is_the_generated_one() -> None:
    assert COMMITTED.read_text(encoding="utf-8") == schema_text("record"), "write it again: make schema"
    jsonschema.Draft202012Validator.check_schema(schema("record"))


def test_the_schema_closes_every_object_and_describes_its_fields() -> None:
    document = schema("record")
    objects = [document, *document["$defs"].values()]
    assert [body["title"] for body in objects if body["additionalProperties"] is not False] == []
    assert [body["title"] for body in objects if set(body["required"]) != set(body["properties"])] == []
    assert document["title"] == "bnprobe repair record"
    assert document["$defs"]["Run"]["properties"]["ending"]["enum"] == ["finished", "early_stop", "diverged"]
    assert document["$defs"]["Run"]["properties"]["seconds"]["description"] == "Wall time."


@pytest.mark.parametrize("name", repairs.RECORDS)
def test_every_record_fits_the_schema(name: str) -> None:
    text = as_json(repairs.RECORDS[name]())
    jsonschema.Draft202012Validator(schema("record")).validate(json.loads(text))
    assert text.endswith("\n}\n")


def test_a_figure_that_is_not_finite_is_refused() -> None:
    record = replace(repairs.better(), settings={"train": {"steps": float("inf")}})
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json(record)
