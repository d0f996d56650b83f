"""The JSON report: the records as they are, and back.

``render`` and ``load`` are inverses; the format is described by ``report.schema.json``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from bnprobe.errors import UsageError
from bnprobe.records import SCHEMA_VERSION, Report
from bnprobe.reports.interface import RenderOptions

if TYPE_CHECKING:
    from pydantic import ValidationError


def render(report: Report, options: RenderOptions | None = None) -> str:
    """The report as JSON: two spaces of indent, keys in the order of the records, a newline at the end.

    Raises:
        ValueError: If a figure is NaN or infinite, which the records do not allow.
    """
    return json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load(text: str) -> Report:
    """Read a JSON report back.

    Raises:
        UsageError: If the text is not a JSON report of this schema version, down to every key and type.
    """
    document = _parse(text)
    _check_version(document)
    report = _validate(text)
    _check_keys(document, json.loads(render(report)))
    return report


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, parse_float=_finite, parse_constant=_reject_constant)
    except ValueError as error:
        raise UsageError(f"This is not a JSON report of bnprobe: {error}.") from error
    if not isinstance(document, dict):
        raise UsageError("This is not a JSON report of bnprobe: the top level is not an object.")
    return document


def _finite(number: str) -> float:
    value = float(number)
    return _reject_constant(number) if abs(value) == float("inf") else value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


def _check_version(document: dict[str, Any]) -> None:
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        found = "no schema_version" if version is None else f"schema_version {version!r}"
        raise UsageError(
            f"The JSON report has {found}, and this bnprobe reads schema_version {SCHEMA_VERSION}. "
            "Scan again with this version, or use the version that wrote the report."
        )


def _validate(text: str) -> Report:
    # Imported here: pydantic takes longer to import than `bnprobe --help` has to spare.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Report).validate_json(text, strict=True)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the top level"
    more = error.error_count() - 1
    others = f" ({more} more of this kind)" if more else ""
    return f"The JSON report does not fit its schema at {place}: {first['msg']}{others}."


def _check_keys(found: Any, expected: Any, place: str = "") -> None:
    """Compare the keys of two documents of the same types: the records would drop an unknown key silently."""
    if isinstance(expected, dict):
        for key in sorted(found.keys() ^ expected.keys()):
            problem = "unknown" if key in found else "missing"
            raise UsageError(f"The JSON report does not fit its schema: {place}{key} is {problem}.")
        for key, value in expected.items():
            _check_keys(found[key], value, f"{place}{key}.")
    elif isinstance(expected, list):
        for index, value in enumerate(expected):
            _check_keys(found[index], value, f"{place}{index}.")
