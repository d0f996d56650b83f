"""What a scan or a lint found, layer by layer: what decides the exit code, and what the formats for programs list."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.numbers import IN_MODE, mismatch
from bnprobe.records import EXEMPT, Layer, LintReport, Report, Severity, Verdict
from bnprobe.rules import RULES, effect
from bnprobe.rules.shares import flagging_limit

UNEXPLAINED = "flagged"
"""Stands for the code of a rule where a layer is flagged and no rule says why."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""


def findings(report: Report | LintReport, narrowed: bool | None = None) -> tuple[Verdict, ...]:
    """The failed verdicts, worst first; and for flagged layers that none of them explains, verdicts of their own.

    Within a severity root causes come in the order of the diagnoses, then what follows from them.

    Args:
        report: Of a scan or a lint.
        narrowed: Whether the user has selected among the rules; None: as far as the verdicts show it.
    """
    found = [verdict for verdict in report.verdicts if verdict.outcome == "failed"]
    if isinstance(report, Report):
        found += _unexplained(report, _is_narrowed(report) if narrowed is None else narrowed)
    places = {
        (diagnosis.rule, layer): place
        for place, diagnosis in enumerate(report.diagnoses)
        for layer in (diagnosis.layers or (None,))
    }
    last = len(places)
    return tuple(
        sorted(
            found,
            key=lambda verdict: (
                SEVERITIES.index(verdict.severity),
                places.get((verdict.rule, verdict.layer), last),
            ),
        )
    )


def failures(report: Report | LintReport, narrowed: bool | None = None) -> tuple[Verdict, ...]:
    """The findings that make a command exit with 1.

    Warnings of a scan do not: what only looks like a mistake was measured to be harmless. In a lint nothing was
    measured, and they do. Nothing counts on synthetic inputs, and nothing that a baseline knows, if it is no worse now.
    """
    if isinstance(report, Report) and report.scan.synthetic:
        return ()
    counted = ("error", "warning") if isinstance(report, LintReport) else ("error",)
    known = set() if report.baseline is None else {(each.rule, each.layer) for each in report.baseline.of("known")}
    return tuple(
        finding
        for finding in findings(report, narrowed)
        if finding.severity in counted and (finding.rule, finding.layer) not in known
    )


def _is_narrowed(report: Report) -> bool:
    judged = {verdict.rule for verdict in report.verdicts}
    return bool(judged) and not judged >= set(RULES.names())


def _unexplained(report: Report, narrowed: bool) -> Iterator[Verdict]:
    """Flagged layers without an explanation by any rule; remarks explain nothing.

    A flagged layer whose rules the user ignores or exempts is accepted, and so is one where loss and metric are known
    to be no worse at inference.
    """
    if effect.inconsistency(report.summary.gaps, report.summary.chance).is_no_worse:
        return
    failed = [verdict for verdict in report.verdicts if verdict.outcome == "failed"]
    accepted = {verdict.layer for verdict in report.verdicts if verdict.message.startswith(EXEMPT)}
    explained = {verdict.layer for verdict in failed if verdict.severity != "info"} | accepted
    for layer in report.layers:
        is_left = layer.flagged and layer.name not in explained
        if is_left and (not narrowed or layer.name in {verdict.layer for verdict in failed}):
            yield _flagged(layer)


def _flagged(layer: Layer) -> Verdict:
    paths = {mode: path for mode, path in (("train", layer.train), ("eval", layer.eval)) if path is not None}
    worse = max(paths, key=lambda mode: paths[mode].mismatch, default=None)
    value, limit = None if worse is None else paths[worse].mismatch, flagging_limit(layer)
    measured = "" if value is None else f": D is {mismatch(value)} {IN_MODE[worse or 'eval']}"
    return Verdict(
        rule=UNEXPLAINED,
        cause=UNEXPLAINED,
        layer=layer.name,
        outcome="failed",
        severity="error",
        message=f"Training and inference normalize differently{measured}, and the layer's limit is {mismatch(limit)}.",
        value=value,
        limit=limit,
        unit="D",
        remedy="",
        location=layer.location,
    )
