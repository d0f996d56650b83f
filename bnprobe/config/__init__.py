"""What the user asked for: the spec, and where its values come from."""

from __future__ import annotations

from typing import Literal

# Here and not in the spec, which takes longer to import than `bnprobe --help` has to spare.
StatisticsPath = Literal["train", "eval"]
"""What earlier layers normalize with while a layer is recalibrated: batch statistics, or new running statistics."""

PathChoice = Literal["auto", "train", "eval"]
"""``auto``: train; where samples cannot be mixed, the path whose statistics score better."""
