"""Reports: pure functions from a `Report` to text.

A new format is one file with ``render(report, options) -> str`` and one line in `FORMATS`.
"""

from __future__ import annotations

from bnprobe.reports import json, terminal
from bnprobe.reports.interface import Format, RenderOptions

FORMATS: dict[str, Format] = {
    "terminal": terminal.render,
    "json": json.render,
}

__all__ = ["FORMATS", "Format", "RenderOptions"]
