"""Targets: names that the user gives for models, functions and files."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

MODEL_LIBRARIES = ("timm:", "torchvision:")
"""Prefixes of targets that name a model of a library."""


def split_target(target: str) -> tuple[str, str | None]:
    """Split ``"dir/model.py:Net"`` into ("dir/model.py", "Net"); ignore the colon of a Windows drive."""
    location, colon, symbol = target.rpartition(":")
    if not colon or not location or re.search(r"[/\\]", symbol):
        return target, None
    return location, symbol or None


def is_file_target(target: str) -> bool:
    """Whether a target names a file rather than a module or a model library."""
    if target.startswith(MODEL_LIBRARIES):
        return False
    location, _ = split_target(target)
    return location.endswith(".py") or bool(re.search(r"[/\\]", location))


def nearest_file(path: Path) -> str:
    """What to do about a missing file, as a sentence: suggests the file in its folder with the nearest name."""
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist."
    names = [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")]
    close = difflib.get_close_matches(path.name, names, 1)
    return f"Did you mean {path.with_name(close[0])}?" if close else "Check the path."
