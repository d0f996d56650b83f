"""bnprobe: find the Batch Normalization layers that behave differently in training and at inference.

``bnprobe.scan(model, batches, batch_size=2)`` measures; ``bnprobe.errors`` and ``bnprobe.records`` hold what it raises
and returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnprobe._version import __version__

if TYPE_CHECKING:
    from bnprobe import nn
    from bnprobe.commands.recalibrate import recalibrate
    from bnprobe.commands.scan import scan
    from bnprobe.records import Report
    from bnprobe.repairs import convert

__all__ = ["Report", "__version__", "convert", "nn", "recalibrate", "scan"]

_HOMES = {
    "scan": "bnprobe.commands.scan",
    "convert": "bnprobe.repairs",
    "recalibrate": "bnprobe.commands.recalibrate",
    "Report": "bnprobe.records",
}
_SUBMODULES = {"nn"}


def __getattr__(name: str) -> object:
    """Import the public names on first use: ``bnprobe --help`` must not wait for torch."""
    if name not in _HOMES and name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import random

    state = random.getstate()  # a library that bnprobe imports draws from it
    try:
        if name in _SUBMODULES:
            return importlib.import_module(f"{__name__}.{name}")
        return getattr(importlib.import_module(_HOMES[name]), name)
    finally:
        random.setstate(state)
