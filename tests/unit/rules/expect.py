"""Verdicts as the tests of rules expect them: what is not spelt out is the rule's own."""

from __future__ import annotations

from bnprobe.records import Severity, Verdict
from bnprobe.rules import RULES, Rule
from bnprobe.stats.theory import mismatch_iid

LIMIT = mismatch_iid(32.0)
"""The mismatch D above which a layer is flagged."""

HALF = LIMIT / 2
"""The share of D above which its cause is named."""


def passed(
    code: str, layer: str | None, message: str, value: float | None = None, limit: float | None = None
) -> Verdict:
    rule = _rule(code)
    return Verdict(code, rule.cause, layer, "passed", rule.severity, message, value, limit, rule.unit, "")


def failed(
    code: str,
    layer: str | None,
    message: str,
    value: float | None = None,
    limit: float | None = None,
    severity: Severity | None = None,
) -> Verdict:
    rule = _rule(code)
    severity = severity or rule.severity
    return Verdict(code, rule.cause, layer, "failed", severity, message, value, limit, rule.unit, rule.remedy)


def skipped(code: str, layer: str | None, reason: str) -> Verdict:
    rule = _rule(code)
    message = f"Not judged: {reason}."
    return Verdict(code, rule.cause, layer, "skipped", rule.severity, message, None, None, rule.unit, "", reason)


def _rule(code: str) -> Rule:
    return RULES[code]
