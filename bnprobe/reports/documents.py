"""Records as JSON documents, and back, strictly: known keys of the right type, finite figures only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from bnprobe.errors import UsageError
from bnprobe.records import SCHEMA_VERSION
from bnprobe.records.measurements import OMITTED_WHEN_EMPTY

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import ValidationError

T = TypeVar("T", bound="DataclassInstance")


def dump(record: DataclassInstance) -> str:
    """The record as JSON: two spaces of indent, keys in the order of the record, a newline at the end.

    Raises:
        ValueError: If a figure is NaN or infinite, which the records do not allow.
    """
    return to_text(asdict(record, dict_factory=_without_empty))


def _without_empty(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value or key not in OMITTED_WHEN_EMPTY}


def to_text(document: dict[str, Any]) -> str:
    """A document as bnprobe writes it.

    Raises:
        ValueError: If a figure is NaN or infinite.
    """
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class DocumentKind(Generic[T]):
    """A kind of document that bnprobe reads.

    Attributes:
        record: The record that it holds.
        noun: What it is called, e.g. "JSON report".
        again: What to do about one of another version, e.g. "Scan again".
    """

    record: type[T]
    noun: str
    again: str

    def load(self, text: str) -> T:
        """Read a document.

        A field with a default may be missing: documents written before the field was added go on being read.

        Raises:
            UsageError: If the text is no such document of this schema version: a key is unknown, a key without a
                default is missing, or a value is of another type.
        """
        document = self._parse(text)
        self._check_version(document)
        record = self._validate(text)
        self._check_keys(document, json.loads(dump(record)))
        return record

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            document = json.loads(text, parse_float=_finite, parse_constant=_reject_constant)
        except ValueError as error:
            raise UsageError(f"This is not a {self.noun} of bnprobe: {error}.") from error
        if not isinstance(document, dict):
            raise UsageError(f"This is not a {self.noun} of bnprobe: the top level is not an object.")
        return document

    def _check_version(self, document: dict[str, Any]) -> None:
        version = document.get("schema_version")
        if version != SCHEMA_VERSION:
            found = "no schema_version" if version is None else f"schema_version {version!r}"
            raise UsageError(
                f"The {self.noun} has {found}, and this bnprobe reads schema_version {SCHEMA_VERSION}. "
                f"{self.again} with this version, or use the version that wrote it."
            )

    def _validate(self, text: str) -> T:
        # Imported here: pydantic takes longer to import than `bnprobe --help` has to spare.
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(self.record).validate_json(text, strict=True)
        except ValidationError as error:
            raise UsageError(self._explain(error)) from error

    def _explain(self, error: ValidationError) -> str:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top level"
        more = error.error_count() - 1
        others = f" ({more} more of this kind)" if more else ""
        return f"The {self.noun} does not fit its schema at {place}: {first['msg']}{others}."

    def _check_keys(self, found: Any, expected: Any, place: str = "") -> None:
        """Refuse a key that the records do not have: they would drop it silently."""
        if isinstance(expected, dict):
            for key in sorted(found.keys() - expected.keys()):
                raise UsageError(f"The {self.noun} does not fit its schema: {place}{key} is unknown.")
            for key, value in found.items():
                self._check_keys(value, expected[key], f"{place}{key}.")
        elif isinstance(expected, list):
            for index, value in enumerate(expected):
                self._check_keys(found[index], value, f"{place}{index}.")


def _finite(number: str) -> float:
    value = float(number)
    return _reject_constant(number) if abs(value) == float("inf") else value


def _reject_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")
