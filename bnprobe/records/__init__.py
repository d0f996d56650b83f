"""What the commands return: frozen records without logic, one module for each kind of document.

The field names are those of the JSON documents (``schema_version`` 1). A figure that does not exist (an interval
without an upper end, an eval path that overflowed) is None, never NaN.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from bnprobe.records.base import (
    MEASURES,
    OMITTED_WHEN_EMPTY,
    SCHEMA_VERSION,
    Environment,
    Estimate,
    Goal,
    Interval,
    Measure,
    Record,
    Score,
    Tool,
    leading,
)
from bnprobe.records.baseline import (
    BASELINE_STATES,
    Baseline,
    BaselineChange,
    BaselineComparison,
    BaselineState,
    KnownFinding,
)
from bnprobe.records.document import Document, Plotted, Tabular
from bnprobe.records.findings import (
    EXEMPT,
    FREE_REMEDIES,
    Cause,
    Diagnosis,
    FreeRemedy,
    Outcome,
    Remedy,
    Severity,
    Verdict,
)
from bnprobe.records.layers import (
    DEFAULT_THRESHOLD,
    FROZEN,
    ROOT,
    SOURCES,
    Backward,
    BatchSizePoint,
    CallMeasurement,
    Composition,
    Distribution,
    Domains,
    Histogram,
    Impact,
    Layer,
    PathMeasurement,
    ShareIntervals,
    Shares,
    SkippedLayer,
    Source,
    Updates,
)
from bnprobe.records.outputs import Chance, ChanceValues, Gap, GradientAngle, Output, PathValues
from bnprobe.records.repair import (
    Arm,
    Conclusion,
    Curve,
    Difference,
    Ending,
    ExportReport,
    LayerChange,
    LayerComparison,
    Plan,
    Proof,
    Refusal,
    RepairRecord,
    RequirementResult,
    Run,
    TrainingStep,
    Verification,
)
from bnprobe.records.scan import (
    HELD_OUT,
    REST_IN_EVAL,
    SCORING,
    WITHIN_SCAN,
    WITHOUT_RANDOM,
    ExtraPass,
    LintReport,
    Pool,
    Report,
    Scan,
    SelfCheck,
    StopReason,
    Summary,
)

if TYPE_CHECKING:
    from bnprobe.records.comparison import ComparedScan, Comparison, LayerPoint, LayerTrend, Trend
    from bnprobe.records.drift import ChannelDrift, DriftReport, LayerDrift, Profile, ProfiledLayer
    from bnprobe.records.lab import Claim, ClaimVerdict, LabChart, LabReport, LabSeries, LabTable, Setting, Trial
    from bnprobe.records.monitor import (
        RECALIBRATE,
        UNDO,
        LayerSample,
        ModeLoss,
        MonitorChange,
        MonitorFinding,
        MonitorLog,
        MonitorSample,
    )
    from bnprobe.records.sweep import (
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
    from bnprobe.records.table import (
        SkippedFeature,
        TableAdjustment,
        TableBatch,
        TableFeature,
        TableProjection,
        TableReport,
    )

__all__ = [
    "BASELINE_STATES",
    "DEFAULT_THRESHOLD",
    "EXEMPT",
    "FREE_REMEDIES",
    "FROZEN",
    "HELD_OUT",
    "MEASURES",
    "OMITTED_WHEN_EMPTY",
    "RECALIBRATE",
    "REST_IN_EVAL",
    "ROOT",
    "SCHEMA_VERSION",
    "SCORING",
    "SOURCES",
    "UNDO",
    "WITHIN_SCAN",
    "WITHOUT_RANDOM",
    "Arm",
    "Backward",
    "Baseline",
    "BaselineChange",
    "BaselineComparison",
    "BaselineState",
    "BatchSizePoint",
    "BestRates",
    "CallMeasurement",
    "Cause",
    "Chance",
    "ChanceValues",
    "ChannelDrift",
    "Claim",
    "ClaimVerdict",
    "ComparedScan",
    "Comparison",
    "Composition",
    "Conclusion",
    "Curve",
    "Diagnosis",
    "Difference",
    "Distribution",
    "Document",
    "Domains",
    "DriftReport",
    "Ending",
    "Environment",
    "Estimate",
    "ExportReport",
    "ExtraPass",
    "FreeRemedy",
    "Gap",
    "Goal",
    "GradientAngle",
    "Histogram",
    "Impact",
    "Interval",
    "KnownFinding",
    "LabChart",
    "LabReport",
    "LabSeries",
    "LabTable",
    "Layer",
    "LayerChange",
    "LayerComparison",
    "LayerDrift",
    "LayerPoint",
    "LayerSample",
    "LayerTrend",
    "LintReport",
    "Measure",
    "ModeLoss",
    "MomentumCurve",
    "MomentumPoint",
    "MomentumSweep",
    "MonitorChange",
    "MonitorFinding",
    "MonitorLog",
    "MonitorSample",
    "Outcome",
    "Output",
    "PathMeasurement",
    "PathValues",
    "Plan",
    "Plotted",
    "Pool",
    "Profile",
    "ProfiledLayer",
    "Proof",
    "Record",
    "Refusal",
    "Remedy",
    "RepairRecord",
    "Report",
    "RequirementResult",
    "Run",
    "Scan",
    "Score",
    "SelfCheck",
    "Setting",
    "Severity",
    "ShareIntervals",
    "Shares",
    "SkippedFeature",
    "SkippedLayer",
    "Smallest",
    "Source",
    "StopReason",
    "Summary",
    "SweepLayer",
    "SweepPoint",
    "SweepReport",
    "TableAdjustment",
    "TableBatch",
    "TableFeature",
    "TableProjection",
    "TableReport",
    "Tabular",
    "Tool",
    "Tracking",
    "TrainingStep",
    "Trend",
    "Trial",
    "Updates",
    "Verdict",
    "Verification",
    "leading",
]

_OF_FEW_COMMANDS = ("comparison", "drift", "lab", "monitor", "sweep", "table")
"""Modules whose records are made when one is asked for: to make them takes as long as to make those of a scan."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A record of few commands."""
        for module in _OF_FEW_COMMANDS if name in __all__ else ():
            found = vars(import_module(f"{__name__}.{module}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted(__all__)
