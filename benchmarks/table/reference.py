"""``python -m benchmarks.table.reference``: values adjusted by other packages, for tests where none is installed."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from benchmarks.table.libraries import LIBRARIES, drawn

FILE = Path(__file__).parents[2] / "tests" / "unit" / "stats" / "combat.json"
SIZE = (14, 4, 3)
SETTINGS = ((None, False), (None, True), (1, False))
"""Reference batch, and whether the mean alone is adjusted."""


def main() -> None:
    """Write the file."""
    table = drawn(*SIZE)
    cases = [
        {
            "library": name,
            "version": version(name),
            "reference": reference,
            "mean_only": mean_only,
            "adjusted": library(table, reference, mean_only).round(9).tolist(),
        }
        for name, (library, _, _) in LIBRARIES.items()
        for reference, mean_only in SETTINGS
    ]
    given = {name: getattr(table, name).tolist() for name in ("values", "batch", "sex", "age")}
    FILE.write_text(json.dumps({**given, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
