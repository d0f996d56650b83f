"""The record of a repair as JSON: against its schema, and back again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from typing import Any

import fabricated_reports as fabricated
import jsonschema
import pytest

from bnprobe.errors import UsageError
from bnprobe.records import RepairRecord
from bnprobe.report import render
from bnprobe.report.json import load_record, schema, schema_text
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
def test_every_record_fits_the_schema_and_comes_back_equal(name: str) -> None:
    record = repairs.RECORDS[name]()
    text = as_json(record)
    jsonschema.Draft202012Validator(schema("record")).validate(json.loads(text))
    assert load_record(text) == record
    assert as_json(load_record(text)) == text
    assert text.endswith("\n}\n")


def test_a_figure_that_is_not_finite_is_refused() -> None:
    record = replace(repairs.better(), settings={"train": {"steps": float("inf")}})
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json(record)


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema_version", value=2), r"^The repair record has schema_version 2, .* Repair again with"),
        (lambda document: document.pop("schema_version"), "^The repair record has no schema_version"),
        (_set("action", value="mend"), r"schema: action: Input should be 'convert' or 'recalibrate'"),
        (_set("plan", "changes", 0, "to", value=3), r"schema: plan\.changes\.0\.to: Input should be a valid string"),
        (_set("proof", "arms", 3, "runs", 0, "colour", value=1), r"proof\.arms\.3\.runs\.0\.colour is unknown\."),
        (lambda document: document["proof"]["arms"][0].pop("loss"), r"schema: proof\.arms\.0\.loss is missing"),
        (_set("settings", "x", value=float("nan")), "not a repair record of bnprobe: NaN is not a finite number"),
    ],
)
def test_another_document_is_refused_with_the_place(change: Callable[[dict[str, Any]], object], message: str) -> None:
    document = json.loads(as_json(repairs.better()))
    change(document)
    with pytest.raises(UsageError, match=message):
        load_record(json.dumps(document))


def test_a_record_older_than_a_field_with_a_default_is_read() -> None:
    document = json.loads(as_json(repairs.better()))
    assert document["plan"]["changes"][0].pop("note") == ""
    assert load_record(json.dumps(document)) == repairs.better()


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a repair record of bnprobe"):
        load_record(text)


def test_the_report_of_a_scan_is_no_record() -> None:
    with pytest.raises(UsageError, match="The repair record does not fit its schema: action is missing"):
        load_record(render(fabricated.healthy(), "json"))
