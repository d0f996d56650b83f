"""Watch the norm layers of a model while it trains: `bnprobe.Monitor`, and what starts it in frameworks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnprobe.monitor.huggingface import HuggingFaceMonitor
    from bnprobe.monitor.ignite import IgniteMonitor
    from bnprobe.monitor.lightning import LightningMonitor

__all__ = ["HuggingFaceMonitor", "IgniteMonitor", "LightningMonitor"]

_HOMES = {
    "HuggingFaceMonitor": "bnprobe.monitor.huggingface",
    "IgniteMonitor": "bnprobe.monitor.ignite",
    "LightningMonitor": "bnprobe.monitor.lightning",
}


def __getattr__(name: str) -> object:
    """Import a framework when its monitor is asked for, and not before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
