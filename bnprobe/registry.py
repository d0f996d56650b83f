"""Registries: one table each of what can be added: rules, report formats, repair targets, norm families and others.

Whatever needs to know which rows there are (the command line, its help, the schema, reports, the documentation) reads
the registry. Other packages add rows through an entry point, which is read when the registry is first used:

    [project.entry-points."bnprobe.rules"]
    my_rule = "my_package.my_module:MyRule"

Nothing is registered by the mere import of a module.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bnprobe.errors import BnprobeError, UsageError
from bnprobe.wording import nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Row = TypeVar("Row")


@functools.lru_cache(maxsize=1)
def _entry_points(places: tuple[str, ...]) -> Any:
    """Those of all packages in these folders, to select from: reading one group takes as long as reading all.

    ``EntryPoints``; before Python 3.12 another class that has ``select``, too.
    """
    from importlib.metadata import entry_points  # itself some hundredths of a second: only once a registry is used

    return entry_points()


class Registry(Generic[Row]):
    """Rows in order, each with a unique name.

    Args:
        group: The entry-point group from which other packages add rows, e.g. ``"bnprobe.rules"``.
        rows: The rows that bnprobe itself brings.
        name_of: The name of a row.
        noun: What a row is, for messages: ``"rule"``.
        error: What is raised for a name that is not known.
    """

    def __init__(
        self,
        group: str,
        rows: Iterable[Row],
        name_of: Callable[[Row], str],
        noun: str,
        error: type[BnprobeError] = UsageError,
    ) -> None:
        self.group, self.noun = group, noun
        self._name_of, self._error = name_of, error
        self._rows: dict[str, Row] = {}
        self._from_packages: set[str] = set()
        self._read = False
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append a row.

        Raises:
            ValueError: There is a row of that name.
        """
        name = self._name_of(row)
        if name in self._rows:
            raise ValueError(f'There is already a {self.noun} named "{name}".')
        self._rows[name] = row

    @contextmanager
    def including(self, row: Row) -> Iterator[Row]:
        """Have a row while the block runs: for tests of extensions, and for notebooks.

        It stands in for a row of the same name, e.g. one that an installed package brought.
        """
        before = dict(self._all())
        self._rows.pop(self._name_of(row), None)
        try:
            self.add(row)
            yield row
        finally:
            self._rows = before

    def reload(self) -> None:
        """Read the entry points again when the registry is next used: packages were installed or removed meanwhile."""
        for name in self._from_packages:
            del self._rows[name]
        self._from_packages, self._read = set(), False
        _entry_points.cache_clear()

    def names(self) -> tuple[str, ...]:
        """Names of all rows, in order."""
        return tuple(self._all())

    def __iter__(self) -> Iterator[Row]:
        return iter(tuple(self._all().values()))

    def __len__(self) -> int:
        return len(self._all())

    def __contains__(self, name: object) -> bool:
        return name in self._all()

    def __getitem__(self, name: str) -> Row:
        """The row of a name.

        Raises:
            BnprobeError: There is none; the message lists the names and says which one is spelled alike.
        """
        rows = self._all()
        if name in rows:
            return rows[name]
        near = nearest(name, rows)
        hint = f"; did you mean {near}?" if near else ""
        raise self._error(f'There is no {self.noun} named "{name}" (known: {", ".join(rows)}){hint}')

    def _all(self) -> dict[str, Row]:
        if not self._read:
            self._read = True  # first: a module that is loaded may look into the registry
            for entry_point in _entry_points(tuple(sys.path)).select(group=self.group):
                self._load(entry_point)
        return self._rows

    def _load(self, entry_point: EntryPoint) -> None:
        known = set(self._rows)
        try:
            self.add(entry_point.load())
            self._from_packages |= self._rows.keys() - known
        except Exception as error:
            self.reload()  # the next use fails for the same reason
            raise UsageError(
                f'The {self.noun} "{entry_point.name}" of the entry-point group {self.group}'
                f" ({entry_point.value}) cannot be loaded: {type(error).__name__}: {error}"
            ) from error


def load_code(location: str, what: str, error: type[BnprobeError], call: bool = True) -> Any:
    """Make the object that does the work of a row, for rows that are read without importing what it needs.

    Args:
        location: Its class, as ``"package.module:CLASS"``.
        what: What is loaded, for the message: ``'The conversion of the repair target "frozen"'``.
        error: What is raised if it cannot be loaded.
        call: Make an object; else what is named is the object.
    """
    module, _, attribute = location.partition(":")
    try:
        found = getattr(import_module(module), attribute)
        return found() if call else found
    except Exception as cause:  # the code of another package
        raise error(f"{what} ({location}) cannot be loaded: {type(cause).__name__}: {cause}") from cause


def require(package: str, extra: str, what: str) -> None:
    """Refuse what needs a package that is not installed.

    Raises:
        UsageError: Says how to install it.
    """
    if find_spec(package) is None:
        raise UsageError(f'{what} needs {package}: pip install "bnprobe[{extra}]".')
