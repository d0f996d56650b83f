"""The seam of the report formats: what a format is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bnprobe.records import Report


@dataclass(frozen=True)
class RenderOptions:
    """How a report is to be written; a format takes what it needs and ignores the rest.

    Attributes:
        width: Columns of the terminal (a narrower one than 40 is treated as 40).
        color: Whether ANSI colours may be used.
        show_all: Show every layer, however many there are.
        unicode: Whether the output can carry more than ASCII.
        command: The command that the user ran, as typed; suggestions are written as variants of it.
    """

    width: int = 80
    color: bool = False
    show_all: bool = False
    unicode: bool = True
    command: str = "bnprobe scan model.py"


class Format(Protocol):
    """A report format: a pure function from a report to text that ends with a newline."""

    def __call__(self, report: Report, options: RenderOptions) -> str: ...
