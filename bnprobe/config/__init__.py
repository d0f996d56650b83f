"""What the user asked for: the spec, and where its values come from."""

from __future__ import annotations

from typing import Literal

# Here and not in the spec, which takes longer to import than `bnprobe --help` has to spare.
StatisticsPath = Literal["train", "eval", "micro-batch-pooled", "micro-batch-averaged"]
"""What earlier layers normalize with while a layer is recalibrated: the statistics of large batches, new running
statistics, or the statistics of the micro-batches of training (of which the variance is pooled, or averaged)."""

PathChoice = Literal["auto", StatisticsPath]
"""``auto``: train; where samples cannot be mixed, the path whose statistics score better."""
