"""Findings that are known: the file that holds them, and how those of a later run compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bnprobe.records.base import SCHEMA_VERSION, Interval, Record, Tool
from bnprobe.records.findings import Severity

BaselineState = Literal["new", "worse", "known", "fixed", "stale"]
"""new: not in the baseline; worse: more severe, or surely farther beyond the limit; known: equal or better; fixed: no
finding any more; stale: the layer or its rule was not judged again."""

BASELINE_STATES: tuple[BaselineState, ...] = ("new", "worse", "known", "fixed", "stale")


@dataclass(frozen=True)
class KnownFinding(Record):
    """A finding of a baseline.

    Attributes:
        rule: Code, e.g. "BN201"; "flagged" for a flagged layer that no rule explains.
        layer: Name of the layer; None: the model as a whole.
        value, limit, unit: As in the verdict.
        interval: 95% interval of ``value``; None where there is none.
    """

    layer: str | None
    rule: str
    severity: Severity
    value: float | None
    interval: Interval | None
    limit: float | None
    unit: str


@dataclass(frozen=True)
class Baseline(Record):
    """The findings that are known, of one model on one kind of data.

    Attributes:
        command: What found them, "scan" or "lint".
        model: As in the report.
        data: Where the micro-batches came from, in words; None for a lint.
        batch_size: Samples in a micro-batch; None for a lint.
        findings: Errors and warnings, sorted by layer and rule.
    """

    tool: Tool
    command: Literal["scan", "lint"]
    model: str
    data: str | None
    batch_size: int | None
    findings: tuple[KnownFinding, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class BaselineChange(Record):
    """One finding now and in the baseline.

    Attributes:
        rule, layer: Of the finding.
        state: What has become of it.
        before, after: Its value in the baseline and now; None where there is none.
    """

    rule: str
    layer: str | None
    state: BaselineState
    before: float | None
    after: float | None


@dataclass(frozen=True)
class BaselineComparison(Record):
    """The findings of a report against a baseline.

    Attributes:
        file: Name of the baseline.
        changes: By state, then by layer and rule.
    """

    file: str
    changes: tuple[BaselineChange, ...]

    def of(self, state: BaselineState) -> tuple[BaselineChange, ...]:
        """The findings of one state."""
        return tuple(change for change in self.changes if change.state == state)
