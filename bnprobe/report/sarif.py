"""SARIF 2.1.0, which GitHub code scanning, GitLab, Azure DevOps and editors read: one result for each finding.

No library writes it: the object models on PyPI are older than the standard's errata or are converters. The document is
a plain tree, which the tests hold against the official schema.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from bnprobe.printable import escaped_json
from bnprobe.records import BaselineState, LintReport, Report, Severity, Verdict
from bnprobe.report.findings import MODEL, Place, model_of, place_of, text_of, title_of_finding
from bnprobe.report.page import RenderOptions
from bnprobe.rules import rule_of
from bnprobe.rules.docs import manual
from bnprobe.rules.findings import findings

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

LEVELS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "note"}

STATES: dict[BaselineState, str] = {"new": "new", "worse": "updated", "known": "unchanged"}

FINGERPRINT = "bnprobeFinding/v1"
"""Of rule, model and layer, whatever else changes: the same finding of two runs has the same one."""


def render(report: Report | LintReport, options: RenderOptions) -> str:
    """The findings of a scan or a lint as a SARIF log of one run."""
    found = findings(report)
    codes = list(dict.fromkeys(finding.rule for finding in found))
    known = () if report.baseline is None else report.baseline.changes
    states = {(each.rule, each.layer): {"baselineState": STATES[each.state]} for each in known if each.state in STATES}
    first = {finding.rule: finding for finding in reversed(found)}
    results = [
        _result(finding, codes.index(finding.rule), report, options.folder)
        | states.get((finding.rule, finding.layer), {})
        for finding in found
    ]
    run = {
        "tool": {"driver": _driver(report, [_rule(first[code]) for code in codes])},
        # What code scanning keeps apart: the results of a lint do not replace those of a scan.
        "automationDetails": {"id": f"{'lint' if isinstance(report, LintReport) else 'scan'}/{model_of(report)}/"},
        "columnKind": "unicodeCodePoints",
        "invocations": [_invocation(report)],
        "results": results,
        "properties": {"model": model_of(report)},
    }
    text = json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, ensure_ascii=False)
    return escaped_json(text, ascii_only=not options.unicode) + "\n"


def _driver(report: Report | LintReport, rules: list[dict[str, Any]]) -> dict[str, Any]:
    tool = report.tool
    return {"name": tool.name, "version": tool.version, "semanticVersion": tool.version, "rules": rules}


def _invocation(report: Report | LintReport) -> dict[str, Any]:
    """Whether it ran to its end, and how it was called."""
    if isinstance(report, LintReport):
        return {"executionSuccessful": True}
    command = {} if report.scan.command is None else {"commandLine": report.scan.command}
    return {"executionSuccessful": not report.scan.partial, **command}


def _rule(finding: Verdict) -> dict[str, Any]:
    """A rule with its manual; of one that is not installed here, what the finding says of it."""
    rule = rule_of(finding.rule)
    described: dict[str, Any] = {"id": finding.rule, "shortDescription": {"text": title_of_finding(finding)}}
    if rule is None:
        return {**described, "defaultConfiguration": {"level": LEVELS[finding.severity]}}
    text = manual(rule)
    plain = "\n\n".join(f"{heading}: {paragraph}" for heading, paragraph in text.sections)
    marked = "\n\n".join(f"**{heading}.** {paragraph}" for heading, paragraph in text.sections)
    return {
        **described,
        "name": "".join(part.capitalize() for part in rule.cause.split("_")),
        "fullDescription": {"text": text.summary},
        "help": {"text": f"{text.summary}\n\n{plain}", "markdown": f"{text.summary}\n\n{marked}"},
        "defaultConfiguration": {"level": LEVELS[rule.severity]},
        "properties": {"tags": ["batch-normalization", rule.cause]},
    }


def _result(finding: Verdict, index: int, report: Report | LintReport, folder: str) -> dict[str, Any]:
    measured = {"value": finding.value, "limit": finding.limit, "unit": finding.unit or None}
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": LEVELS[finding.severity],
        "message": {"text": text_of(finding)},
        "locations": [_location(finding, place_of(finding, report, folder))],
        "partialFingerprints": {FINGERPRINT: _fingerprint(finding, model_of(report))},
        "properties": {name: value for name, value in measured.items() if value is not None},
    }


def _location(finding: Verdict, place: Place | None) -> dict[str, Any]:
    name = finding.layer or MODEL
    logical = {"name": name.rpartition(".")[2] or name, "fullyQualifiedName": name, "kind": "member"}
    physical = {}
    if place is not None:
        physical["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(place.file)},
            "region": {"startLine": place.line},
        }
    return {**physical, "logicalLocations": [logical]}


def _uri(file: str) -> str:
    """A file as a reference of RFC 3986; relative ones stay relative, as code scanning wants them."""
    path = PurePath(file)
    return path.as_uri() if path.is_absolute() else quote(path.as_posix(), errors="backslashreplace")


def _fingerprint(finding: Verdict, model: str) -> str:
    named = "\0".join((finding.rule, model, finding.layer or ""))
    return hashlib.sha256(named.encode(errors="backslashreplace")).hexdigest()[:32]
