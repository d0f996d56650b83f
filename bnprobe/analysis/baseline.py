"""Known findings: which findings of a report a baseline holds, and which are new, worse, fixed or stale."""

from __future__ import annotations

from bnprobe.errors import UsageError
from bnprobe.records import (
    BASELINE_STATES,
    SOURCES,
    Baseline,
    BaselineChange,
    BaselineComparison,
    BaselineState,
    Interval,
    KnownFinding,
    Layer,
    LintReport,
    Report,
    Verdict,
)
from bnprobe.rules.findings import SEVERITIES, UNEXPLAINED, findings

ROUNDING = 0.001
"""A value without an interval may be farther from its limit by so much of itself: other machines round otherwise."""


def baseline_of(report: Report | LintReport, narrowed: bool | None = None) -> Baseline:
    """The errors and warnings of a report as a baseline.

    Args:
        report: Of a scan or a lint.
        narrowed: Whether the user has selected among the rules; None: as far as the verdicts show it.
    """
    intervals = _intervals(report) if isinstance(report, Report) else {}
    known = [
        KnownFinding(
            layer=finding.layer,
            rule=finding.rule,
            severity=finding.severity,
            value=finding.value,
            interval=intervals.get((finding.rule, finding.layer)),
            limit=finding.limit,
            unit=finding.unit,
        )
        for finding in findings(report, narrowed)
        if finding.severity != "info"
    ]
    scan = report.scan if isinstance(report, Report) else None
    return Baseline(
        tool=report.tool,
        command="lint" if scan is None else "scan",
        model=report.model if isinstance(report, LintReport) else report.scan.model,
        data=None if scan is None else scan.data,
        batch_size=None if scan is None else scan.batch_size,
        findings=tuple(sorted(known, key=lambda each: (each.layer or "", each.rule))),
    )


def compare(
    baseline: Baseline, report: Report | LintReport, file: str, narrowed: bool | None = None
) -> BaselineComparison:
    """The findings of a report against those that are known.

    Args:
        baseline: The known findings.
        report: Of a scan or a lint of the same model, on the same data at the same batch size.
        file: Name of the baseline.
        narrowed: As for `baseline_of`.

    Raises:
        UsageError: The baseline is of another command, model, data or batch size, or the scan ended early.
    """
    now = baseline_of(report, narrowed)
    _require_alike(baseline, now, report, file)
    before = {(known.rule, known.layer): known for known in baseline.findings}
    after = {(known.rule, known.layer): known for known in now.findings}
    judged = {(verdict.rule, verdict.layer) for verdict in report.verdicts if verdict.outcome != "skipped"}
    if isinstance(report, Report):
        judged |= {(UNEXPLAINED, layer.name) for layer in report.layers}
    changes = [
        BaselineChange(
            rule=rule,
            layer=layer,
            state=_state(before.get((rule, layer)), after.get((rule, layer)), (rule, layer) in judged),
            before=_value(before.get((rule, layer))),
            after=_value(after.get((rule, layer))),
        )
        for rule, layer in {**before, **after}
    ]
    changes.sort(key=lambda each: (BASELINE_STATES.index(each.state), each.layer or "", each.rule))
    return BaselineComparison(file, tuple(changes))


def _require_alike(baseline: Baseline, now: Baseline, report: Report | LintReport, file: str) -> None:
    again = f"Write a new one: --write-baseline {file} --force."
    if isinstance(report, Report) and report.scan.partial:
        raise UsageError(f"The scan ended early ({report.scan.stopped}), and is not compared with the baseline {file}.")
    for what in ("command", "model", "batch_size", "data"):
        was, is_now = getattr(baseline, what), getattr(now, what)
        if was != is_now:
            words = what.replace("_", " ")
            raise UsageError(
                f"The baseline {file} is of another {words}: {was}, and this is {is_now}. What is known of one says"
                f" nothing of the other. {again}"
            )


def _state(before: KnownFinding | None, after: KnownFinding | None, is_judged: bool) -> BaselineState:
    if after is None:
        return "fixed" if is_judged else "stale"
    if before is None:
        return "new"
    return "worse" if _is_worse(before, after) else "known"


def _is_worse(before: KnownFinding, after: KnownFinding) -> bool:
    """Whether a finding is more severe, or farther beyond its limit than its intervals, or rounding, explain."""
    if SEVERITIES.index(after.severity) < SEVERITIES.index(before.severity):
        return True
    if before.value is None or after.value is None:
        return False
    sign = 1.0 if before.limit is None or before.value >= before.limit else -1.0
    if before.interval is None or after.interval is None:
        return sign * (after.value - before.value) > ROUNDING * abs(before.value)
    highest, lowest = before.interval[1], after.interval[0]
    return highest is not None and lowest > highest


def _intervals(report: Report) -> dict[tuple[str, str | None], Interval | None]:
    """The intervals of the values of verdicts, by rule and layer, where the report holds them."""
    layers = {layer.name: layer for layer in report.layers}
    found: dict[tuple[str, str | None], Interval | None] = {}
    for verdict in findings(report, narrowed=False):
        layer = layers.get(verdict.layer or "")
        found[verdict.rule, verdict.layer] = _of_layer(verdict, layer) if layer else _of_model(verdict, report)
    return found


def _of_layer(verdict: Verdict, layer: Layer) -> Interval | None:
    """Of a share of D, or of the larger D of both modes."""
    for source in SOURCES:
        if source.field == verdict.cause:
            return source.interval(layer.share_intervals)
    paths = [path for path in (layer.train, layer.eval) if path is not None and path.mismatch == verdict.value]
    return paths[0].interval if paths and verdict.unit == "D" else None


def _of_model(verdict: Verdict, report: Report) -> Interval | None:
    """Of the change of loss or metric from training to inference, which is given without its sign."""
    for gap in report.summary.gaps:
        low, high = gap.inconsistency_interval or (None, None)
        if low is not None and high is not None and abs(gap.inconsistency) == verdict.value:
            return (low, high) if gap.inconsistency > 0 else (-high, -low)
    return None


def _value(known: KnownFinding | None) -> float | None:
    return None if known is None else known.value
