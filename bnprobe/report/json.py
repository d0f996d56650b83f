"""Records as JSON documents and back, and their JSON Schemas, made from the records and their docstrings.

The files ``NAME.schema.json`` beside this one are committed copies, one for each name in ``SCHEMAS``; ``make schema``
rewrites them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from bnprobe._version import __version__
from bnprobe.docstrings import docstring
from bnprobe.errors import UsageError
from bnprobe.paths import read_bounded
from bnprobe.printable import escaped_json
from bnprobe.records import (
    OMITTED_WHEN_EMPTY,
    SCHEMA_VERSION,
    Baseline,
    Comparison,
    Difference,
    DriftReport,
    ExportReport,
    LabReport,
    LayerSample,
    LintReport,
    ModeLoss,
    MonitorLog,
    Plan,
    Profile,
    Record,
    RepairRecord,
    Report,
    SweepReport,
    TableReport,
    Verification,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import ValidationError

    from bnprobe.report.page import RenderOptions

_Document = TypeVar("_Document", bound=Record)


def render(record: DataclassInstance, options: RenderOptions) -> str:
    """The record as JSON."""
    return dump(record, ascii_only=not options.unicode)


def dump(record: DataclassInstance, ascii_only: bool = False) -> str:
    """The record as JSON: the version of the schema first, then the fields in their order; a newline at the end.

    Args:
        record: Any record.
        ascii_only: Escape all that is not ASCII.

    Raises:
        ValueError: A figure is NaN or infinite, which the records do not allow.
    """
    return to_text(asdict(record, dict_factory=_without_empty), ascii_only)


def _without_empty(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value or key not in OMITTED_WHEN_EMPTY}


def to_text(content: dict[str, Any], ascii_only: bool = False) -> str:
    """The content of a record as JSON; see `dump`. What a terminal would obey is written as an escape."""
    document = {"schema_version": SCHEMA_VERSION} | content
    return escaped_json(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), ascii_only) + "\n"


# --- Reading ----------------------------------------------------------------------------------------------------------


_KINDS: dict[type[Record], tuple[str, str]] = {
    Report: ("the report of a scan", "bnprobe scan --format json"),
    LintReport: ("the report of a lint", "bnprobe lint --format json"),
    SweepReport: ("the report of a sweep", "bnprobe sweep --format json"),
    Plan: ("the plan of a repair", "bnprobe convert --dry-run --format json"),
    RepairRecord: ("the record of a repair", "bnprobe convert or recalibrate"),
    Verification: ("the result of a verification", "bnprobe verify --format json"),
    ExportReport: ("the report of an export", "bnprobe export --format json"),
    Comparison: ("a comparison", "bnprobe compare --format json"),
    Profile: ("a profile", "bnprobe profile"),
    DriftReport: ("the report of a check for drift", "bnprobe drift --format json"),
    MonitorLog: ("the log of a monitor", "bnprobe show LOG --format json"),
    TableReport: ("the report of a table", "bnprobe table --format json"),
    LabReport: ("the results of an experiment", "bnprobe lab"),
    Baseline: ("a baseline", "bnprobe scan --write-baseline"),
}
"""Documents: what each is, and what writes it. Which one a document is, its keys say."""


def load_document(text: str) -> Record:
    """Read any document that bnprobe writes, other than a baseline.

    Raises:
        UsageError: As `load_as` raises it; or the keys are those of no document, or of a baseline.
    """
    document = _parse(text)
    _check_version(document)
    record = _kind(document)
    if record is None:
        raise UsageError("This is not a JSON report of bnprobe: its keys are those of no document that bnprobe writes.")
    if record is Baseline:
        raise UsageError("This is a baseline, not a report: --baseline of a scan or lint reads it.")
    return _validated(record, document)


def _kind(document: dict[str, Any]) -> type[Record] | None:
    """What a document is, as far as its keys say."""
    record = max(_KINDS, key=lambda each: _likeness(each, document))
    return None if _likeness(record, document) < _LEAST_LIKENESS else record


_LEAST_LIKENESS = 0.5
"""Share of common keys from which on a document is taken for a record that lacks fields, or has others."""


def _likeness(record: type[Record], document: dict[str, Any]) -> float:
    """The keys that a record and a document have in common, as a share of all."""
    known = {"schema_version", *_fields(record)}
    return len(known & document.keys()) / len(known | document.keys())


def _fields(record: type[Record]) -> set[str]:
    return {field.name for field in fields(record)}  # type: ignore[arg-type]  # every record is a dataclass


def _validated(record: type[_Document], document: dict[str, Any]) -> _Document:
    # Imported here: pydantic takes longer to import than `bnprobe --help` has to spare.
    from pydantic import TypeAdapter, ValidationError

    version = {} if "schema_version" in _fields(record) else {"schema_version"}
    content = {key: value for key, value in document.items() if key not in version}
    try:
        return TypeAdapter(record).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise UsageError(_explain(error) + _writer(document)) from error


def _writer(document: dict[str, Any]) -> str:
    """Which version wrote the document, where that is another one."""
    tool = document.get("tool")
    version = tool.get("version") if isinstance(tool, dict) else None
    if not isinstance(version, str) or version == __version__:
        return ""
    return f" It was written by bnprobe {version}, and this is {__version__}."


MOST_BYTES = 1_000_000_000
"""A file of more bytes is taken for something else: the report of a scan of 10,000 layers has 50 million."""


def read_document(path: Path) -> Record:
    """Read the file of any document that bnprobe writes.

    Raises:
        UsageError: The file cannot be read, or is no such document; the message names it.
    """
    return _read(path, load_document, "report")


def _read(path: Path, load: Callable[[str], _Document], noun: str) -> _Document:
    try:
        content = read_bounded(path, MOST_BYTES, lambda what: UsageError(f"{path} {what}: it is no {noun}."))
        text = content.decode("utf-8-sig")  # editors and shells of Windows put a mark before it
    except FileNotFoundError:
        from bnprobe.config.spec import why_missing  # pydantic again

        raise UsageError(f"The {noun} {path} {why_missing(path)}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a JSON report of bnprobe: it is not text.") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"The {noun} {path} could not be read: {getattr(error, 'strerror', error)}.") from None
    try:
        return load(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def read_as(path: Path, record: type[_Document]) -> _Document:
    """Read the file of a document of one kind.

    Raises:
        UsageError: The file cannot be read, or is no such document; the message names it.
    """
    return _read(path, lambda text: load_as(record, text), "baseline" if record is Baseline else "report")


def load_as(record: type[_Document], text: str) -> _Document:
    """Read a document of one kind.

    A field with a default may be missing: documents written before the field was added can still be read.

    Raises:
        UsageError: The text is no such document of this schema version: a key is unknown, a key without a default is
            missing, or a value is of another type. The message names the key.
    """
    document = _parse(text)
    _check_version(document)
    found = _kind(document)
    wanted, command = _KINDS[record]
    if found is not None and _likeness(found, document) > _likeness(record, document):
        raise UsageError(f"This is {_KINDS[found][0]}, not {wanted}. Leave it out, or give what `{command}` writes.")
    if record is Baseline and "findings" not in document:
        raise UsageError("This is no baseline: --write-baseline writes one.")
    return _validated(record, document)


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_float=_finite, parse_constant=_reject_constant, object_hook=_restored)
    except RecursionError:
        raise UsageError("This is not a JSON report of bnprobe: it is nested too deeply.") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and text.lstrip().startswith("{") and _is_cut_off(error):
            raise UsageError(
                f"The JSON report is incomplete: it ends in line {text.count(chr(10)) + 1}, in the middle. Was the run"
                " that wrote it stopped, or the copy? Write it again."
            ) from None
        raise UsageError(f"This is not a JSON report of bnprobe: {error}.") from error
    if not isinstance(document, dict):
        raise UsageError("This is not a JSON report of bnprobe: the top level is not an object.")
    return document


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    """Whether the text is right as far as it goes."""
    return not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated string")


def _restored(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object; of one with the keys of ``_NOT_FINITE``, what is null was not finite."""
    figures = _NOT_FINITE.get(frozenset(value), {})
    return value | {name: figure for name, figure in figures.items() if value[name] is None}


_NOT_FINITE = {
    frozenset(_fields(record)): dict.fromkeys(names, figure)
    for record, names, figure in (
        (Difference, ("absolute", "relative"), math.inf),
        (LayerSample, ("mismatch", "r", "d"), math.nan),
        (ModeLoss, ("train", "eval"), math.nan),
    )
}
"""By the keys of a record: figures that may be infinite, or NaN, and are null in JSON, and what null is read as."""


def _finite(number: str) -> float:
    value = float(number)
    return _reject_constant(number) if abs(value) == float("inf") else value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


def _check_version(document: dict[str, Any]) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        found = "no schema_version" if version is None else f"schema_version {version!r}"
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "Update bnprobe" if newer else "Scan again with this version"
        raise UsageError(
            f"The JSON report has {found}, and this bnprobe reads schema_version {SCHEMA_VERSION}. {advice}, or use the"
            " version that wrote it."
        )


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the top level"
    problem = {
        "missing": f"{place} is missing",
        "unexpected_keyword_argument": f"{place} is unknown",
    }.get(first["type"], f"{place}: {first['msg'].removeprefix('Value error, ')}")
    more = error.error_count() - 1
    others = f" ({more} more of this kind)" if more else ""
    return f"The JSON report does not fit its schema: {problem}{others}."


# --- Schemas ----------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, tuple[type[Record], str]] = {
    "report": (Report, "bnprobe report"),
    "record": (RepairRecord, "bnprobe repair record"),
    "sweep": (SweepReport, "bnprobe sweep"),
    "comparison": (Comparison, "bnprobe comparison"),
    "baseline": (Baseline, "bnprobe baseline"),
    "profile": (Profile, "bnprobe profile"),
    "drift": (DriftReport, "bnprobe drift"),
    "table": (TableReport, "bnprobe table"),
    "lab": (LabReport, "bnprobe lab"),
}
"""What there is a schema of: the record and the title."""

_ATTRIBUTE = re.compile(r"^    (?P<names>\w+(?:, \w+)*): (?P<text>.+)$")


def schema(document: str = "report") -> dict[str, Any]:
    """The JSON Schema (2020-12) of one of ``SCHEMAS``, as a plain dictionary: what bnprobe writes.

    Every key is required but those that are left out where they are empty; no other key is allowed.
    """
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    class Described(GenerateJsonSchema):
        """Objects with the descriptions of the docstring, without defaults."""

        def dataclass_schema(self, schema: Any) -> dict[str, Any]:
            body = super().dataclass_schema(schema)
            summary, attributes = _docstring(schema["cls"])
            for name, text in attributes.items():
                body["properties"][name]["description"] = text
            for field in body["properties"].values():
                field.pop("default", None)
            required = [name for name in body["properties"] if name not in OMITTED_WHEN_EMPTY]
            return {**body, "description": summary, "required": required}

    record, title = SCHEMAS[document]
    generated = TypeAdapter(record).json_schema(mode="serialization", schema_generator=Described)
    generated["properties"]["schema_version"]["const"] = SCHEMA_VERSION
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **generated, "title": title}


def schema_text(document: str = "report") -> str:
    """The schema as it is committed."""
    return json.dumps(schema(document), indent=2, ensure_ascii=False) + "\n"


def write_schemas() -> None:
    """Rewrite the committed copies."""
    for name in SCHEMAS:
        Path(__file__).with_name(f"{name}.schema.json").write_text(schema_text(name), encoding="utf-8")


def _docstring(record: type) -> tuple[str, dict[str, str]]:
    """The summary of a record's docstring, and the text of each of its attributes."""
    summary, _, listed = docstring(record).partition("\n\nExample:")[0].partition("\n\nAttributes:\n")
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
