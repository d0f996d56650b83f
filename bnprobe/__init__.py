"""bnprobe: find the Batch Normalization layers that behave differently in training and at inference.

``report = bnprobe.scan(model, batches, batch_size=2)`` measures, and ``print(report)`` shows what was found.
Everything that users may rely on is listed in ``__all__``, in ``bnprobe.nn`` and in ``bnprobe.errors``. Other packages
extend bnprobe through the registries of ``docs/extending.md``. All else is internal.

The examples of the functions and results begin with these lines: a network of large batches, and 64 single pixels.

>>> import torch
>>> from torch import nn
>>> from torch.utils.data import DataLoader, TensorDataset
>>> import bnprobe
>>> _ = torch.manual_seed(0)
>>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
>>> pixels = torch.randn(64, 3, 1, 1)
>>> for _ in range(200):
...     _ = model(pixels)
>>> loader = DataLoader(TensorDataset(pixels, torch.arange(64) % 2), batch_size=32, shuffle=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnprobe._version import __version__

if TYPE_CHECKING:
    from bnprobe import errors, nn, report
    from bnprobe.commands.compare import compare
    from bnprobe.commands.export import export
    from bnprobe.commands.lint import lint
    from bnprobe.commands.profile import profile
    from bnprobe.commands.scan import scan
    from bnprobe.commands.sweep import sweep
    from bnprobe.commands.table import adjust_table, table
    from bnprobe.commands.verify import verify
    from bnprobe.monitor.monitor import Monitor
    from bnprobe.monitor.shift import ShiftMonitor
    from bnprobe.records import (
        Comparison,
        DriftReport,
        ExportReport,
        LintReport,
        MonitorLog,
        Profile,
        Report,
        SweepReport,
        TableReport,
        Verification,
    )
    from bnprobe.repairs import convert, deployable_state
    from bnprobe.repairs.recalibration import recalibrate

__all__ = [
    "Comparison",
    "DriftReport",
    "ExportReport",
    "LintReport",
    "Monitor",
    "MonitorLog",
    "Profile",
    "Report",
    "ShiftMonitor",
    "SweepReport",
    "TableReport",
    "Verification",
    "__version__",
    "adjust_table",
    "compare",
    "convert",
    "deployable_state",
    "errors",
    "export",
    "lint",
    "nn",
    "profile",
    "recalibrate",
    "report",
    "scan",
    "sweep",
    "table",
    "verify",
]

_HOMES = {
    "Comparison": "bnprobe.records",
    "DriftReport": "bnprobe.records",
    "ExportReport": "bnprobe.records",
    "LintReport": "bnprobe.records",
    "Monitor": "bnprobe.monitor.monitor",
    "MonitorLog": "bnprobe.records",
    "Profile": "bnprobe.records",
    "Report": "bnprobe.records",
    "ShiftMonitor": "bnprobe.monitor.shift",
    "SweepReport": "bnprobe.records",
    "TableReport": "bnprobe.records",
    "Verification": "bnprobe.records",
    "adjust_table": "bnprobe.commands.table",
    "compare": "bnprobe.commands.compare",
    "convert": "bnprobe.repairs",
    "deployable_state": "bnprobe.repairs",
    "export": "bnprobe.commands.export",
    "lint": "bnprobe.commands.lint",
    "profile": "bnprobe.commands.profile",
    "recalibrate": "bnprobe.repairs.recalibration",
    "scan": "bnprobe.commands.scan",
    "sweep": "bnprobe.commands.sweep",
    "table": "bnprobe.commands.table",
    "verify": "bnprobe.commands.verify",
}
_SUBMODULES = {"errors", "nn", "report"}


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


def __dir__() -> list[str]:
    return sorted(__all__)
