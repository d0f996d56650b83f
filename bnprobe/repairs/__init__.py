"""What a layer can be converted to, and the surgery that does it."""

from __future__ import annotations

from bnprobe.repairs.catalogue import REPAIRS, repair_named
from bnprobe.repairs.conversion import convert
from bnprobe.repairs.deployment import deployable_state, left_out, on_host
from bnprobe.repairs.interface import Repair
from bnprobe.repairs.planning import apply, plan
from bnprobe.repairs.wanted import wanted_by_globs, wanted_from_report

__all__ = [
    "REPAIRS",
    "Repair",
    "apply",
    "convert",
    "deployable_state",
    "left_out",
    "on_host",
    "plan",
    "repair_named",
    "wanted_by_globs",
    "wanted_from_report",
]
