"""What a scan and a sweep return: frozen records, no logic.

The field names are those of the JSON report (``schema_version`` 1). A figure that does not exist (an
unbounded interval end, an eval path that overflowed) is None, never NaN.
"""

from __future__ import annotations

from bnprobe.records.basics import (
    EXEMPT,
    SCHEMA_VERSION,
    Cause,
    Interval,
    Outcome,
    Severity,
    StopReason,
)
from bnprobe.records.findings import (
    Diagnosis,
    Remedy,
    Score,
    Verdict,
)
from bnprobe.records.layers import (
    Backward,
    Composition,
    Domains,
    Impact,
    Layer,
    ShareIntervals,
    Shares,
    SkippedLayer,
    Updates,
)
from bnprobe.records.measurements import (
    BatchSizePoint,
    CallMeasurement,
    Distribution,
    Histogram,
    PathMeasurement,
)
from bnprobe.records.report import (
    Report,
)
from bnprobe.records.scans import (
    Environment,
    ExtraPass,
    Gap,
    GradientAngle,
    Output,
    PathValues,
    Pool,
    Scan,
    SelfCheck,
    Summary,
    Tool,
)
from bnprobe.records.sweeps import (
    BestRates,
    MomentumCurve,
    MomentumPoint,
    MomentumSweep,
    Smallest,
    SweepLayer,
    SweepPoint,
    SweepReport,
    Tracking,
)

__all__ = [
    "EXEMPT",
    "SCHEMA_VERSION",
    "Backward",
    "BatchSizePoint",
    "BestRates",
    "CallMeasurement",
    "Cause",
    "Composition",
    "Diagnosis",
    "Distribution",
    "Domains",
    "Environment",
    "ExtraPass",
    "Gap",
    "GradientAngle",
    "Histogram",
    "Impact",
    "Interval",
    "Layer",
    "MomentumCurve",
    "MomentumPoint",
    "MomentumSweep",
    "Outcome",
    "Output",
    "PathMeasurement",
    "PathValues",
    "Pool",
    "Remedy",
    "Report",
    "Scan",
    "Score",
    "SelfCheck",
    "Severity",
    "ShareIntervals",
    "Shares",
    "SkippedLayer",
    "Smallest",
    "StopReason",
    "Summary",
    "SweepLayer",
    "SweepPoint",
    "SweepReport",
    "Tool",
    "Tracking",
    "Updates",
    "Verdict",
]
