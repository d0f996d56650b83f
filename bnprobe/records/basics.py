"""What all records have in common: constants and words."""

from __future__ import annotations

from typing import Literal

SCHEMA_VERSION = 1

Interval = tuple[float, float | None]
"""Lower and upper end of a 95% interval; None: no upper end can be given."""

StopReason = Literal["requested", "decided", "max_batches", "data_exhausted", "interrupted", "failed"]

Cause = str
"""Why a layer is off, or may become so: the cause of a rule, e.g. "small_batch"; rules of other packages add theirs."""

Severity = Literal["error", "warning", "info"]
"""error: training and inference differ, or will; warning: likely a mistake, or harmless so far; info: good to know."""

Outcome = Literal["passed", "failed", "skipped"]

EXEMPT = "Exempt: "
"""How the message of a verdict begins that was skipped because the user exempts the layer, and of no other."""
