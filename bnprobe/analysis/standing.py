"""Whether a result is good: what the exit codes of the commands say, and ``ok`` of their documents."""

from __future__ import annotations

from bnprobe.analysis.comparison import is_proven
from bnprobe.analysis.diagnosis import has_findings, lint_has_findings
from bnprobe.config.spec import RulesSpec
from bnprobe.records import (
    Comparison,
    Document,
    DriftReport,
    ExportReport,
    LabReport,
    LintReport,
    MonitorLog,
    Plan,
    Profile,
    RepairRecord,
    Report,
    SweepReport,
    TableReport,
    Verification,
)


def is_ok(document: Document) -> bool:
    """Whether the command that returns it exits with 0, with all rules and without ``--check`` and ``--exit-zero``;
    of a log, whether nothing was found.

    Raises:
        TypeError: No command returns such a document.
    """
    record = getattr(document, "record", document)  # of a repair
    match record:
        case Report():
            return not has_findings(record, RulesSpec())
        case LintReport():
            return not lint_has_findings(record)
        case SweepReport():
            return not any(layer.flagged for layer in record.layers)
        case Verification():
            return record.passed
        case ExportReport():
            return record.output is not None
        case RepairRecord():
            return is_proven(record) and record.weights is not None
        case Plan():
            return not record.refused
        case DriftReport():
            return record.alarm is None
        case MonitorLog():
            return not record.findings
        case TableReport():
            return not any(each.off for each in record.batches) and not any(each.differs for each in record.features)
        case Comparison() | Profile() | LabReport():
            return True
    raise TypeError(f"{type(document).__name__} is no document of a command")
