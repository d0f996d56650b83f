"""What all records have in common: constants and words."""

from __future__ import annotations

from typing import Literal

SCHEMA_VERSION = 1

Interval = tuple[float, float | None]
"""Lower and upper end of a 95% interval; None: no upper end can be given."""

StopReason = Literal["requested", "decided", "max_batches", "data_exhausted", "interrupted", "failed"]

Cause = Literal[
    "small_batch",
    "composition",
    "lag",
    "dropout",
    "propagation",
    "data_shift",
    "shared_domains",
    "double_update",
    "rank_divergence",
    "backward_noise",
    "momentum_convention",
    "never_trained",
    "non_finite",
    "no_running_stats",
    "frozen_mismatch",
    "single_value",
    "single_image",
    "last_batch",
    "dead_channels",
    "dropout_before_norm",
]
"""Why a layer is off, or may become so (DESIGN section 4)."""

Severity = Literal["error", "warning", "info"]
"""error: training and inference differ, or will; warning: likely a mistake, or harmless so far; info: good to know."""

Outcome = Literal["passed", "failed", "skipped"]

EXEMPT = "Exempt: "
"""How the message of a verdict begins that was skipped because the user exempts the layer, and of no other."""
