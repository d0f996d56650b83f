"""What every result of a command can do in Python: be printed, shown in a notebook, saved, loaded and asked.

Records are plain data, below the code that presents and judges them, which these methods import by its name when they
are called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from bnprobe.records.base import Record

if TYPE_CHECKING:
    from typing_extensions import Self


class Document(Record):
    """Base of the records that commands return; ``print`` shows what the command line prints."""

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        line: str = _of("bnprobe.report.notebook").one_line(self)
        return f"<{type(self).__name__}: {line}>"

    def _repr_html_(self) -> str:
        fragment: str = _of("bnprobe.report.notebook").fragment(self)
        return fragment

    def text(self, *, verbose: bool = False, width: int | None = None) -> str:
        """What the command line prints, without colours.

        Args:
            verbose: The whole of it, not what fits a screen.
            width: Columns; None: those of the terminal.
        """
        text: str = _of("bnprobe.report.notebook").text(self, verbose, width)
        return text

    @property
    def ok(self) -> bool:
        """Whether the command would exit with 0."""
        found: bool = _of("bnprobe.analysis.standing").is_ok(self)
        return found

    def save(self, path: str | PathLike[str], format: str | None = None) -> None:
        """Write it to a file, which is replaced.

        Args:
            path: The file.
            format: As in ``--format``; None: by the ending of the file, e.g. ".json" or ".md". `load` reads JSON.

        Raises:
            UsageError: There is no such format or ending, or it does not support this document.
            OutputError: The file could not be written.
        """
        _of("bnprobe.report.notebook").save(self, path, format)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` or ``--format json`` wrote.

        Raises:
            UsageError: The file cannot be read, or is no such document.
        """
        read: Self = _of("bnprobe.report.notebook").load(path, cls)
        return read


class Tabular(Document):
    """A document with a row for each layer and path; layers are found by their name."""

    layers: tuple[Any, ...]

    def __getitem__(self, name: str) -> Any:
        """The layer of this name.

        Raises:
            KeyError: There is none; names the nearest.
        """
        return _of("bnprobe.report.rows").layer_named(self, name)

    def __contains__(self, name: str) -> bool:
        with suppress(KeyError):
            self[name]
            return True
        return False

    def __iter__(self) -> Iterator[str]:
        """The names of the layers, as of a mapping."""
        return (layer.name for layer in self.layers)

    def _ipython_key_completions_(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each layer and path; needs the extra ``pandas``.

        Raises:
            UsageError: pandas is not installed.
        """
        return _of("bnprobe.report.rows").frame(self)


class Plotted(Tabular):
    """A document of which charts can be drawn."""

    @property
    def plot(self) -> Any:
        """Charts, made with Altair: ``shares()``, ``depth()`` and ``batch_sizes()``; needs the extra ``plot``.

        Raises:
            UsageError: Altair is not installed.
        """
        return _of("bnprobe.report.plots").Plots(self)


def _of(module: str) -> Any:
    """The code above the records; see the module's docstring."""
    return import_module(module)
