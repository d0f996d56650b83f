"""A table of measurements from a file, a data frame or an AnnData object, and the same table with other values.

The columns that no option names are features if they hold numbers; all others are kept as they are.
"""

from __future__ import annotations

import codecs
import csv
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from io import BytesIO
from itertools import islice
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TextIO

import numpy as np
from jaxtyping import Bool, Float

from bnprobe.config.spec import why_missing
from bnprobe.errors import DataError, UsageError, first_line_of, reason_of
from bnprobe.numbers import count, joined, listed
from bnprobe.registry import require
from bnprobe.stats.batch_effects import Covariate, Design
from bnprobe.wording import nearest, option

Array = np.ndarray

SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".tab": "\t"}
"""What separates the fields of text, by the ending of the file's name, if its header has it."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

_MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""With which bytes text begins that is not UTF-8."""

_WITH_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_IN_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")

_LARGEST = 1e100
"""Of larger numbers there are no squares."""

_MOSTLY = 0.5
"""A column of which more of the values are numbers was meant to hold numbers."""

_PADDED = r"0\d+"
"""Of such values one in a column says that it holds codes, not numbers."""

_LOOKED_AT = 100
"""Rows of a file in which such values, and decimal commas, are looked for."""

_NAMES = re.compile(
    r"(^|[\W_])(id|ids|index|barcode|sample|subject|patient|well|row|number|nr|no)([\W_]|$)", re.IGNORECASE
)
"""Columns of such names that hold other whole numbers in each row name the rows."""


@dataclass(frozen=True)
class Choice:
    """Which columns of a table are what.

    Attributes:
        batch: The column that says the batch of a row.
        covariates: Columns whose effects are kept apart from those of batches.
        categorical: Covariates that are categories, though they are numbers.
        features: Patterns of the columns that are measurements; none: all that hold numbers and are nothing else.
        ignore: Patterns of columns that are none.
    """

    batch: str
    covariates: Sequence[str] = ()
    categorical: Sequence[str] = ()
    features: Sequence[str] = ()
    ignore: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    """A table of measurements.

    Attributes:
        name: What it is called.
        features: Names of the columns of ``values``.
        values: A row for each sample; missing values are NaN.
        design: Batches and covariates.
        notes: What was taken for what, where nobody said so; a sentence each.
    """

    name: str
    features: tuple[str, ...]
    values: Float[Array, "rows features"]
    design: Design
    notes: tuple[str, ...]
    _sheet: Sheet

    def replaced(self, values: Float[Array, "rows features"], kept: Bool[Array, " features"]) -> Any:
        """A copy of the table as it was given, a data frame or an AnnData object, with other values.

        Args:
            values: Of all features.
            kept: Features that stay as they are.
        """
        return self._sheet.replaced(self.features, values, kept)

    def written(self, values: Float[Array, "rows features"], kept: Bool[Array, " features"], suffix: str) -> bytes:
        """The same as the content of a file with this ending."""
        return self._sheet.written(self.features, values, kept, suffix)


def read_table(data: Any, choice: Choice) -> Table:
    """Read a table.

    Args:
        data: The path of a file (.csv, .tsv, .parquet, .h5ad), a ``pandas.DataFrame``, or an ``anndata.AnnData``.
        choice: Which columns are what.

    Raises:
        UsageError: A column does not exist, or is named for two things; or a package is not installed.
        DataError: The file cannot be read, a value is missing or is no number, or there is nothing to compare. The
            message says where: file, line and column.
    """
    sheet = _sheet_of(data)
    covariates = list(dict.fromkeys([*choice.covariates, *choice.categorical]))
    for name in (choice.batch, *covariates):
        sheet.require(name)
    if choice.batch in covariates:
        raise UsageError(
            f"{choice.batch} is the batch and a covariate: its effect cannot be taken out and kept. Leave it out of"
            f" {option('--covariates')}."
        )
    batch, batches = _categories(sheet, choice.batch)
    if len(batches) < 2:
        raise DataError(f"{sheet.name}: {choice.batch} is {batches[0]} in all rows: there is nothing to compare.")
    if len(batches) == len(batch):
        raise DataError(
            f"{sheet.name}: {choice.batch} is another one in each row: a batch has no row to compare with. Is it the"
            " column of the batch?"
        )
    made = tuple(_covariate(sheet, name, name in choice.categorical) for name in covariates)
    features, values, notes = sheet.measured({choice.batch, *covariates}, choice)
    return Table(sheet.name, features, values, Design(choice.batch, batches, batch, made), notes, sheet)


def endings(data: Any) -> tuple[str, ...]:
    """How files may end that take the table."""
    annotated = Path(data).suffix.lower() == ".h5ad" if isinstance(data, str | PathLike) else _is_annotated(data)
    return (".h5ad",) if annotated else (*SEPARATORS, ".parquet")


# --- Columns ----------------------------------------------------------------------------------------------------------


def _categories(sheet: Sheet, name: str) -> tuple[Any, tuple[str, ...]]:
    labels = sheet.labels(name)
    names = sorted(set(labels), key=lambda label: (_natural(label), label))
    places = {label: place for place, label in enumerate(names)}
    return np.array([places[label] for label in labels]), tuple(names)


def _natural(text: str) -> list[tuple[int, float, str]]:
    """So that P2 comes before P10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in parts]


def _covariate(sheet: Sheet, name: str, categorical: bool) -> Covariate:
    sheet.require_all(name)
    numbers = None if categorical else sheet.numbers(name, f"{option('--categorical', name)} takes it as categories.")
    if numbers is not None:
        return Covariate(name, numbers)
    places, levels = _categories(sheet, name)
    return Covariate(name, places, levels)


def _to_ignore(name: str) -> str:
    return f"{option('--ignore', name)} leaves the column as it is."


def _matching(patterns: Sequence[str], names: Sequence[str], flag: str, sheet: Sheet) -> list[str]:
    """The names that patterns match."""
    matched = {
        pattern: {name for name in names if name == pattern or fnmatchcase(name, pattern)} for pattern in patterns
    }
    for pattern, found in matched.items():
        if not found:
            raise UsageError(f"{option(flag)} {pattern}: {sheet.no_column(pattern, names)}")
    return [name for name in names if any(name in found for found in matched.values())]


class Sheet:
    """A data frame, and where its cells are for the user."""

    row: ClassVar[str] = "row"

    def __init__(self, name: str, frame: Any) -> None:
        self.name = name
        self.frame = frame
        self.names = [str(column) for column in frame.columns]
        self._places = {column: place for place, column in enumerate(self.names)}
        if (double := _double(self.names)) is not None:
            raise DataError(f"{name} has two columns that are called {_quoted(double)}.")
        if not len(frame):
            raise DataError(f"{name} has no rows.")

    def column(self, name: str) -> Any:
        """A column by its name."""
        return self.frame.iloc[:, self._places[name]]

    def require(self, name: str) -> None:
        """Refuse a name that no column has.

        Raises:
            UsageError: Says the nearest.
        """
        if name not in self.names:
            raise UsageError(self.no_column(name))

    def no_column(self, name: str, among: Sequence[str] | None = None) -> str:
        """That there is no such column among those that may be named, and what there is."""
        names = self.names if among is None else among
        if name in self.names and name not in names:
            return f"the column is the batch or a covariate, or {self.name} has no such feature."
        near = nearest(name, names)
        there = f"did you mean {_quoted(near)}?" if near else f"it has {listed([_quoted(each) for each in names], 8)}."
        return f"{self.name} has no column {_quoted(name)}; {there}"

    def place(self, row: int, name: str) -> str:
        """Where a cell is, e.g. 'data.csv, line 17, column "IL6"'."""
        return f"{self.name}, {self.row} {self.line(row)}, column {_quoted(name)}"

    def line(self, row: int) -> int:
        """The number of a row for the user."""
        return row + 1

    def require_all(self, name: str) -> None:
        """Refuse missing values.

        Raises:
            DataError: Says where the first is.
        """
        gaps = np.flatnonzero(self.column(name).isna().to_numpy())
        if len(gaps):
            more = f" ({count(len(gaps) - 1, 'more row')} like it)" if len(gaps) > 1 else ""
            written = self._written(int(gaps[0]), name)
            what = f"{_quoted(written)}, which is a missing value" if written else "empty"
            raise DataError(f"{self.place(int(gaps[0]), name)} is {what}{more}: every row needs a value. Fill it in.")

    def _written(self, row: int, name: str) -> str:
        """What stands in a cell that has no value; empty: nothing, or it is not known."""
        return ""

    def labels(self, name: str) -> list[str]:
        """The values of a column as text.

        Raises:
            DataError: One is missing.
        """
        self.require_all(name)
        return [_label(value) for value in self.column(name).tolist()]

    def numbers(self, name: str, way_out: str) -> Float[Array, " rows"] | None:
        """The values of a column of numbers; None: it is none.

        Args:
            name: The column.
            way_out: What to do where a value is wrong, a sentence.

        Raises:
            DataError: Most of its values are numbers, and one is not, or is infinite; says where.
        """
        import pandas as pd
        from pandas.api.types import infer_dtype, is_string_dtype

        column = self.column(name)
        if name in self._numeric:
            values: Float[Array, " rows"] = column.to_numpy(dtype=np.float64, na_value=np.nan)
        elif not is_string_dtype(column.dtype) or infer_dtype(column) == "boolean":
            return None  # neither text nor any objects: times, categories, truth values
        else:
            there = ~np.asarray(column.isna())
            text = column.astype(object).map(self._number, na_action="ignore")  # so that no whole number is too large
            converted = pd.to_numeric(text, errors="coerce")
            values = np.asarray(converted, dtype=np.float64)
            numeric = ~np.isnan(values)
            if not there.any() or (numeric & there).sum() <= _MOSTLY * there.sum() or _is_padded(column[there]):
                return None
            wrong = np.flatnonzero(there & ~numeric)
            if len(wrong):
                value = _quoted(str(column.iloc[int(wrong[0])]))
                raise DataError(
                    f"{self.place(int(wrong[0]), name)}: {value} is no number, and most values of this column are."
                    f" Empty cells and NA are missing values. {way_out}"
                )
        self._require_finite(values[:, None], [name], way_out)
        return values

    def _number(self, value: Any) -> str:
        """A number as Python writes it."""
        return str(value)

    @cached_property
    def _numeric(self) -> frozenset[str]:
        """Columns of numbers; neither of truth values nor of text."""
        from pandas.api.types import is_bool_dtype, is_complex_dtype, is_numeric_dtype

        return frozenset(
            name
            for name, dtype in zip(self.names, self.frame.dtypes, strict=True)
            if is_numeric_dtype(dtype) and not is_bool_dtype(dtype) and not is_complex_dtype(dtype)
        )

    def _require_finite(self, values: Float[Array, "rows columns"], names: Sequence[str], way_out: str = "") -> None:
        large = np.argwhere(np.abs(values) > _LARGEST)
        if len(large):
            row, place = map(int, large[0])
            what = "infinite" if np.isinf(values[row, place]) else f"beyond {_LARGEST:g}"
            more = len(np.unique(large[:, 1])) - 1
            beside = f", and such are in {count(more, 'more column')}" if more else ""
            raise DataError(
                f"{self.place(row, names[place])}: the value is {what}{beside}. {way_out or _to_ignore(names[place])}"
            )

    def measured(
        self, taken: set[str], choice: Choice
    ) -> tuple[tuple[str, ...], Float[Array, "rows features"], tuple[str, ...]]:
        """The features, their values, and what is to be said of the choice."""
        free = [name for name in self.names if name not in taken]
        asked = _matching(choice.features, free, "--features", self) if choice.features else free
        ignored = set(_matching(choice.ignore, self.names, "--ignore", self))
        asked = [name for name in asked if name not in ignored]
        numeric = [name for name in asked if name in self._numeric]
        block = self.frame.iloc[:, [self._places[name] for name in numeric]].to_numpy(np.float64, na_value=np.nan)
        self._require_finite(block, numeric)
        whole = dict(zip(numeric, block.T, strict=True))
        columns: dict[str, Float[Array, " rows"]] = {}
        notes, others = [], []
        for name in asked:
            found = whole[name] if name in whole else self.numbers(name, _to_ignore(name))
            if found is None:
                others.append(_quoted(name))
                if name in choice.features:
                    raise DataError(f"{self.name}: column {_quoted(name)} of {option('--features')} holds no numbers.")
            elif not choice.features and (_names_rows(name, found) or self._is_long(name, found)):
                notes.append(
                    f"{_quoted(name)} names the rows by numbers: it is kept as it is. {option('--features')} takes it"
                    " as a measurement."
                )
            else:
                columns[name] = found
        if not columns:
            raise DataError(
                f"{self.name} has no column of numbers besides {listed([_quoted(each) for each in sorted(taken)])}"
                + (f" and those of {option('--ignore')}" if ignored else "")
                + ": there is nothing to measure."
            )
        if others:
            holds, are = ("holds", "it is") if len(others) == 1 else ("hold", "they are")
            notes.append(f"{listed(others, 6)} {holds} text, dates, truth values or codes: {are} kept as {are}.")
        return tuple(columns), np.column_stack(list(columns.values())), tuple(notes)

    def _is_long(self, name: str, values: Float[Array, " rows"]) -> bool:
        """Whether it holds whole numbers of so many digits that floats do not tell them apart."""
        from pandas.api.types import is_integer_dtype

        return is_integer_dtype(self.column(name).dtype) and bool((np.abs(values) > 2**53).any())

    def replaced(self, features: Sequence[str], values: Any, kept: Any) -> Any:
        """A copy with other values."""
        return self._replaced(self.frame, features, values, kept)

    def _replaced(self, frame: Any, features: Sequence[str], values: Any, kept: Any) -> Any:
        """A frame of all columns, those of the features with new values, in the same order."""
        import pandas as pd

        changed = {name: values[:, place] for place, name in enumerate(features) if not kept[place]}
        given = dict(zip(self.names, self.frame.columns, strict=True))
        new = pd.DataFrame({given[name]: column for name, column in changed.items()}, index=frame.index)
        others = frame.drop(columns=[given[name] for name in changed if given[name] in frame.columns])
        return pd.concat([others, new], axis=1)[list(self.frame.columns)]

    def written(self, features: Sequence[str], values: Any, kept: Any, suffix: str) -> bytes:
        """The content of a file."""
        frame = self.replaced(features, values, kept)
        if suffix == ".parquet":
            out = BytesIO()
            frame.to_parquet(out)
            return out.getvalue()
        return _as_text(frame, SEPARATORS[suffix])


def _as_text(frame: Any, separator: str, decimal: str = ".") -> bytes:
    from pandas.api.types import is_integer_dtype

    names_rows = frame.index.names != [None] or not is_integer_dtype(frame.index.dtype)
    text: str = frame.to_csv(sep=separator, decimal=decimal, index=names_rows, lineterminator="\n")
    if "\r" in text:  # which Python puts in quotes only where lines end so
        text = frame.to_csv(sep=separator, decimal=decimal, index=names_rows, lineterminator="\r\n")
    return text.encode(errors="backslashreplace")


def _names_rows(name: str, values: Float[Array, " rows"]) -> bool:
    """Whether it is 0, 1, 2, ... or 1, 2, 3, ..., as an index of the rows is, or another whole number in each row.

    The latter where its name is one of names.
    """
    if len(values) < 3 or np.isnan(values).any():
        return False
    if values[0] in (0, 1) and (np.diff(values) == 1).all():
        return True
    whole = bool((values == np.round(values)).all())
    return whole and bool(_NAMES.search(name)) and len(np.unique(values)) == len(values)


def _is_padded(column: Any) -> bool:
    """Whether a value of a column of text begins with a needless 0, as codes do."""
    return bool(column.astype(str).str.fullmatch(_PADDED).any())


def _double(names: Sequence[str]) -> str | None:
    """The first name that comes twice."""
    times = Counter(names)
    return next((name for name in names if times[name] > 1), None)


def _label(value: Any) -> str:
    """A value as a person would write it: 1, not 1.0."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quoted(name: str) -> str:
    return f'"{name}"' if name else "without a name"


# --- Where tables come from -------------------------------------------------------------------------------------------


def _sheet_of(data: Any) -> Sheet:
    if isinstance(data, str | PathLike):
        path = Path(data)
        if (missing := why_missing(path)) is not None:
            raise DataError(f"The table {path} {missing}")
        readers: dict[str, Callable[[Path], Sheet]] = {
            **dict.fromkeys(SEPARATORS, _Text.read),
            ".parquet": _parquet,
            ".h5ad": _Annotated.read,
        }
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise UsageError(f"{path}: a table is a file that ends in {listed(list(readers))}.")
        if not path.is_file():
            raise DataError(f"The table {path} is no file.")
        return reader(path)
    kind = f"{type(data).__module__}.{type(data).__qualname__}"
    if re.fullmatch(r"pandas\..*DataFrame", kind):
        return Sheet("The data frame", data)
    if _is_annotated(data):
        return _Annotated("The AnnData object", data)
    raise UsageError(f"A table is a path, a pandas.DataFrame or an anndata.AnnData, and not {kind}.")


def _is_annotated(data: Any) -> bool:
    return hasattr(data, "obs") and hasattr(data, "var_names")


class _Text(Sheet):
    """A file of separated values. What is no feature stays text, so that "007" and "1.50" are written as they were."""

    row = "line"

    def __init__(self, path: Path, dialect: _Dialect) -> None:
        super().__init__(str(path), _parsed(path, dialect, {"decimal": dialect.decimal}))
        self._path = path
        self._dialect = dialect

    @classmethod
    def read(cls, path: Path) -> _Text:
        """Read the file.

        Raises:
            DataError: It cannot be read as a table.
        """
        require("pandas", "pandas", f"Reading {path}")
        return cls(path, _Dialect.of(path))

    def line(self, row: int) -> int:
        with self._dialect.opened(self._path) as file:
            reader = csv.reader(file, delimiter=self._dialect.separator)
            filled = -1
            for fields in reader:
                filled += bool(fields)
                if filled == row + 1:
                    break
            return reader.line_num

    def measured(
        self, taken: set[str], choice: Choice
    ) -> tuple[tuple[str, ...], Float[Array, "rows features"], tuple[str, ...]]:
        names, values, notes = super().measured(taken, choice)
        return names, values, (*self._dialect.notes(self._path), *notes)

    def _number(self, value: Any) -> str:
        return str(value).replace(self._dialect.decimal, ".")

    @cached_property
    def _codes(self) -> frozenset[str]:
        """Columns of whole numbers that are written as codes, e.g. 007."""
        from pandas.api.types import is_integer_dtype

        whole = [name for name, dtype in zip(self.names, self.frame.dtypes, strict=True) if is_integer_dtype(dtype)]
        raw = self._raw(whole, nrows=_LOOKED_AT)
        text = raw.to_numpy().astype(str)
        padded = np.any((np.char.str_len(text) > 1) & np.char.startswith(text, "0"), axis=0).tolist()
        return frozenset(name for name, code in zip(raw.columns, padded, strict=True) if code)

    @cached_property
    def _numeric(self) -> frozenset[str]:
        return super()._numeric - self._codes

    def numbers(self, name: str, way_out: str) -> Float[Array, " rows"] | None:
        return None if name in self._codes else super().numbers(name, way_out)

    def labels(self, name: str) -> list[str]:
        self.require_all(name)
        raw: list[str] = self._raw([name]).iloc[:, 0].tolist()
        return raw

    def _written(self, row: int, name: str) -> str:
        return str(self._raw([name]).iloc[row, 0])

    def written(self, features: Sequence[str], values: Any, kept: Any, suffix: str) -> bytes:
        if suffix == ".parquet":
            return super().written(features, values, kept, suffix)
        changed = {name for place, name in enumerate(features) if not kept[place]}
        raw = self._raw([name for name in self.names if name not in changed])
        separator = SEPARATORS[suffix]
        if suffix == self._path.suffix.lower():
            separator = self._dialect.separator
        elif separator == self._dialect.decimal:
            separator = ";"
        return _as_text(self._replaced(raw, features, values, kept), separator, self._dialect.decimal)

    def _raw(self, names: Iterable[str], **also: Any) -> Any:
        """Columns as they are written in the file."""
        options = {"dtype": str, "keep_default_na": False, "na_filter": False, "usecols": list(names), **also}
        return _parsed(self._path, self._dialect, options)


@dataclass(frozen=True)
class _Dialect:
    """How a table is written as text.

    Attributes:
        encoding: UTF-8, or UTF-16 where a mark says so, as in text of Excel.
        separator: Between fields.
        decimal: A comma, as spreadsheets write it in much of Europe, or a point.
        names: The fields of the header.
    """

    encoding: str
    separator: str
    decimal: str
    names: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> _Dialect:
        """That of a file.

        Raises:
            DataError: It has no header of several columns of different names.
        """
        own = SEPARATORS[path.suffix.lower()]
        try:
            with path.open("rb") as raw:
                encoding = _MARKS.get(raw.read(2), "utf-8-sig")
            with path.open(encoding=encoding, newline="") as file:
                lines = list(islice((line for line in file if line.strip()), 1 + _LOOKED_AT))
            headers = {each: _first(lines, each) for each in (own, *_SEPARATORS)}
        except OSError as error:
            raise DataError(f"The table {path} could not be read: {reason_of(error)}.") from None
        except UnicodeError as error:
            raise _no_text(path, error) from None
        separator = own if len(headers[own]) > 1 else max(headers, key=lambda each: len(headers[each]))
        fields = headers[separator]
        if not fields:
            raise DataError(f"{path} is empty.")
        if len(fields) == 1:
            raise DataError(
                f"{path} has one column, {_quoted(fields[0])}: neither {' nor '.join(_SEPARATORS.values())} separate"
                " others."
            )
        if (double := _double(fields)) is not None:
            raise DataError(f"{path}, line 1: two columns are called {_quoted(double)}.")
        cells = [cell for row in csv.reader(lines[1:], delimiter=separator) for cell in row]
        commas = separator != "," and any(map(_WITH_COMMA.fullmatch, cells))
        commas = commas and not all(map(_IN_THOUSANDS.fullmatch, filter(_WITH_COMMA.fullmatch, cells)))
        return cls(encoding, separator, "," if commas else ".", tuple(fields))

    def opened(self, path: Path) -> TextIO:
        """A file of it, to be closed."""
        return path.open(encoding=self.encoding, newline="")

    def notes(self, path: Path) -> Iterator[str]:
        """What is not as the ending of the file's name says."""
        other = self.separator != SEPARATORS[path.suffix.lower()]
        found = [f"fields are separated by {_SEPARATORS[self.separator]}"] * other
        found += ["numbers have decimal commas"] * (self.decimal == ",")
        if found:
            yield f"{joined(found).capitalize()}."


def _first(lines: Sequence[str], separator: str) -> list[str]:
    """The fields of the first line."""
    try:
        return next(csv.reader(lines, delimiter=separator), [])
    except csv.Error:  # too long for one field
        return [lines[0][:80]]


def _no_text(path: Path, error: Exception) -> DataError:
    return DataError(
        f"The table {path} is no text of UTF-8: {first_line_of(error)}. Save it so; spreadsheets call it CSV UTF-8."
    )


def _parsed(path: Path, dialect: _Dialect, options: dict[str, Any]) -> Any:
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                path,
                sep=dialect.separator,
                names=list(dialect.names),
                header=0,
                index_col=False,
                encoding=dialect.encoding,
                low_memory=False,
                **options,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        found = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if found:
            raise DataError(
                f"{path}, line {found[2]}: there are {found[3]} fields, and the header has {found[1]}."
            ) from None
        if isinstance(error, pd.errors.ParserWarning):
            raise DataError(
                f"{path}: the rows have more fields than the header has names ({len(dialect.names)})."
            ) from None
        raise DataError(f"{path} could not be read as a table: {first_line_of(error)}.") from None
    except UnicodeError as error:
        raise _no_text(path, error) from None


def _parquet(path: Path) -> Sheet:
    require("pandas", "table", f"Reading {path}")
    require("pyarrow", "table", f"Reading {path}")
    import pandas as pd

    try:
        return Sheet(str(path), pd.read_parquet(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read as Parquet: {first_line_of(error)}.") from None


class _Annotated(Sheet):
    """An AnnData object: measurements in ``X``, all else in ``obs``."""

    def __init__(self, name: str, data: Any) -> None:
        super().__init__(name, data.obs)
        if (double := _double([str(each) for each in data.var_names])) is not None:
            raise DataError(f"{name} has two features that are called {_quoted(double)}.")
        self._data = data
        self._matrix: Float[Array, "rows features"] = _dense(data.X)

    @classmethod
    def read(cls, path: Path) -> _Annotated:
        """Read the file.

        Raises:
            DataError: It cannot be read.
        """
        require("anndata", "table", f"Reading {path}")
        import anndata

        try:
            return cls(str(path), anndata.read_h5ad(path))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} could not be read as AnnData: {first_line_of(error)}.") from None

    def measured(
        self, taken: set[str], choice: Choice
    ) -> tuple[tuple[str, ...], Float[Array, "rows features"], tuple[str, ...]]:
        every = [str(name) for name in self._data.var_names]
        asked = set(_matching(choice.features, every, "--features", self)) if choice.features else set(every)
        asked -= set(_matching(choice.ignore, every, "--ignore", self))
        places = [place for place, name in enumerate(every) if name in asked]
        if not places:
            raise DataError(f"{self.name} has no features: there is nothing to measure.")
        values = self._matrix[:, places]
        names = [every[place] for place in places]
        self._require_finite(values, names)
        return tuple(names), values, ()

    def replaced(self, features: Sequence[str], values: Any, kept: Any) -> Any:
        places = {str(name): place for place, name in enumerate(self._data.var_names)}
        matrix = self._matrix.copy()
        for place, name in enumerate(features):
            if not kept[place]:
                matrix[:, places[name]] = values[:, place]
        data = self._data.copy()
        data.X = matrix
        return data

    def written(self, features: Sequence[str], values: Any, kept: Any, suffix: str) -> bytes:
        data = self.replaced(features, values, kept)
        data.obs, data.var = _of_objects(data.obs), _of_objects(data.var)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "adjusted.h5ad"
            data.write_h5ad(path)
            return path.read_bytes()


def _of_objects(frame: Any) -> Any:
    """A frame whose text is Python's: text of Arrow, which pandas 3 reads, is nothing that every AnnData writes."""
    from pandas import Categorical, Index
    from pandas.api.types import is_string_dtype

    made = frame.set_axis(frame.index.astype(object))
    for name in made.columns:
        column = made[name]
        if hasattr(column.dtype, "categories"):
            categories = column.cat.categories
            if is_string_dtype(categories.dtype):
                made[name] = column.cat.rename_categories(categories.astype(object))
        elif is_string_dtype(column.dtype):  # which AnnData makes categories of
            text = column.astype(object)
            made[name] = Categorical(text, categories=Index(text.dropna().unique(), dtype=object))
    return made


def _dense(matrix: Any) -> Float[Array, "rows features"]:
    if matrix is None:
        raise DataError("The AnnData object has no X: there is nothing to measure.")
    whole = matrix.toarray() if hasattr(matrix, "toarray") else matrix
    return np.array(whole, dtype=np.float64)
