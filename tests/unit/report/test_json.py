"""The JSON report: against its schema, and back again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import fabricated_reports as fabricated
import jsonschema
import pytest
from fabricated_documents import CASES, document

from bnprobe.analysis.baseline import baseline_of
from bnprobe.errors import UsageError
from bnprobe.records import Baseline, Report
from bnprobe.report import render
from bnprobe.report.json import _KINDS, SCHEMAS, load_as, read_as, read_document, schema, schema_text
from bnprobe.report.json import dump as as_json


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_committed_schemas_are_the_generated_ones(name: str) -> None:
    committed = files("bnprobe.report").joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(name), "write it again: make schema"
    jsonschema.Draft202012Validator.check_schema(schema(name))


def test_every_field_of_every_record_is_described() -> None:
    """Fields of a lone figure whose name and unit say all are left out, as are those explained by their record."""
    documents = [schema(name) for name in SCHEMAS]
    bodies = {body["title"]: body for document in documents for body in document["$defs"].values()}
    assert [title for title, body in bodies.items() if "Attributes" in body["description"]] == []
    text = json.dumps(documents)
    assert "DESIGN" not in text
    explained = re.findall(r"docs/explanation/[a-z-]+\.md", text)
    assert set(explained) >= {"docs/explanation/equations.md", "docs/explanation/ladder.md"}


@pytest.mark.parametrize("name", fabricated.REPORTS)
def test_every_report_fits_the_schema_and_comes_back_equal(name: str) -> None:
    report = fabricated.REPORTS[name]()
    text = render(report, "json")
    jsonschema.Draft202012Validator(schema()).validate(json.loads(text))
    assert load_as(Report, text) == report
    assert as_json(load_as(Report, text)) == text
    assert text.endswith("\n}\n")


def test_the_schema_closes_every_object_and_describes_its_fields() -> None:
    document = schema()
    objects = [document, *document["$defs"].values()]
    assert [body["title"] for body in objects if body["additionalProperties"] is not False] == []
    optional = {body["title"]: set(body["properties"]) - set(body["required"]) for body in objects}
    assert {title: names for title, names in optional.items() if names} == {
        "PathMeasurement": {"statistics"},
        "bnprobe report": {"baseline"},
    }
    path = document["$defs"]["PathMeasurement"]["properties"]
    assert path["interval"]["description"] == (
        "95% interval of ``mismatch``, over micro-batches; the upper end is None where it cannot be told: after one"
        " micro-batch, and where tails are heavy (see ``Layer.note``)."
    )
    assert path["r"]["description"] == path["d"]["description"] == "The Batch Renorm correction factors."
    note = document["$defs"]["Layer"]["properties"]["undecided"]["description"]
    assert note == "Not flagged, but an interval contains the threshold."


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_not_finite_is_refused(value: float) -> None:
    report = fabricated.healthy()
    broken = replace(report, scan=replace(report.scan, seconds=value))
    with pytest.raises(ValueError, match="JSON compliant"):
        as_json(broken)


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
        (
            _set("schema_version", value=2),
            r"has schema_version 2, and this bnprobe reads schema_version 1\. Update",
        ),
        (_set("schema_version", value="1"), "has schema_version '1'"),
        (lambda document: document.pop("schema_version"), "has no schema_version"),
        (_set("scan", "batches", value="12"), r"schema: scan\.batches: Input should be a valid integer"),
        (_set("scan", "stopped", value="bored"), r"schema: scan\.stopped: Input should be 'requested'"),
        (_set("layers", 0, "colour", value="red"), r"schema: layers\.0\.colour is unknown\."),
        (lambda document: document["layers"][1].pop("eps"), r"schema: layers\.1\.eps is missing"),
        (
            _set("layers", 0, "train", "r", "histogram", "counts", value=[1, 2]),
            r"schema: layers\.0\.train\.r\.histogram: 2 counts need one edge more, but there are 33\.",
        ),
        (
            _set("layers", 0, "eval", "d", "histogram", value={"edges": [0.0, 0.0], "counts": [1]}),
            r"layers\.0\.eval\.d\.histogram: the edges do not increase\.",
        ),
        (_set("scan", "seconds", value=float("nan")), "NaN is not a finite number"),
    ],
)
def test_another_document_is_refused_with_the_place(change: Callable[[dict[str, Any]], object], message: str) -> None:
    document = json.loads(as_json(fabricated.healthy()))
    change(document)
    with pytest.raises(UsageError, match=message):
        load_as(Report, json.dumps(document))


def test_a_report_older_than_a_field_with_a_default_is_read() -> None:
    report = fabricated.healthy()
    document = json.loads(as_json(report))
    del document["scan"]["unselected"], document["layers"][1]["calls"]
    assert load_as(Report, json.dumps(document)) == report
    document["layers"][1]["colour"] = "red"
    with pytest.raises(UsageError, match=r"layers\.1\.colour is unknown\."):
        load_as(Report, json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{{", "3", '{"schema_version": 1e999}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a JSON report of bnprobe"):
        load_as(Report, text)


def test_importing_the_formats_loads_neither_torch_nor_pydantic() -> None:
    code = "import sys, bnprobe.report; print([name for name in ('torch', 'pydantic') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_another_kind_of_document_is_named_with_what_to_do(tmp_path: Path) -> None:
    """Whatever is read, whatever is in the file."""
    made = (document(kind, name) for kind, name in CASES)
    records = [getattr(each, "record", each) for each in (*made, baseline_of(fabricated.flagged()))]
    one_of_each = {type(record): record for record in records}
    assert one_of_each.keys() == _KINDS.keys()
    path = tmp_path / "x.json"
    for kind, record in one_of_each.items():
        path.write_text(as_json(record), encoding="utf-8")
        for wanted in _KINDS:
            if wanted is kind:
                assert read_as(path, wanted) == record
                continue
            with pytest.raises(UsageError) as raised:
                read_as(path, wanted)
            said = f"x.json: This is {_KINDS[kind][0]}, not {_KINDS[wanted][0]}. Leave it out, or give what `bnprobe "
            assert str(raised.value).startswith(f"{tmp_path}/{said}")
    path.write_text(as_json(one_of_each[Baseline]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"This is a baseline, not a report: --baseline of a scan or lint reads it"):
        read_document(path)


def test_names_keep_their_characters() -> None:
    report = fabricated.healthy()
    odd = replace(report.layers[0], name='"[red]\n\u7d22')
    changed: Report = replace(report, layers=(odd, *report.layers[1:]))
    assert load_as(Report, as_json(changed)).layers[0].name == '"[red]\n\u7d22'
