"""Convert BN layers to a repair target: planning, surgery, and weights for the original model."""

from __future__ import annotations

from bnprobe.repairs.deploy import deployable_state, left_out, on_host
from bnprobe.repairs.plan import apply, convert, plan, refusals, wanted_by_globs, wanted_from_report

__all__ = [
    "apply",
    "convert",
    "deployable_state",
    "left_out",
    "on_host",
    "plan",
    "refusals",
    "wanted_by_globs",
    "wanted_from_report",
]
