"""The rules on a page: the outcome of each, what failed, and its manual."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bnprobe.numbers import count, grouped
from bnprobe.records import Verdict
from bnprobe.report import diagnoses
from bnprobe.report.findings import MODEL
from bnprobe.report.html.page import Block, Facts, Fold, Text
from bnprobe.report.html.parts import points
from bnprobe.report.page import FINE, SEVERITY_SIGNS, UNMEASURED, worst_sign
from bnprobe.rules import rule_of, title_of
from bnprobe.rules.docs import manual


def rule_folds(verdicts: Sequence[Verdict]) -> Iterator[Block]:
    """Each rule with its outcome, what failed, and its manual; those that failed first."""
    by_rule = grouped((verdict.rule, verdict) for verdict in sorted(verdicts, key=lambda verdict: verdict.rule))
    folds: dict[str, list[Fold]] = {}
    for code, found in by_rule.items():
        title = f"{code}: {title_of(code, found[0].cause)}"
        blocks = (*_failures(found), *_manual(code))
        fold = Fold(title, blocks, _rule_sign(found), f"rule-{code}", _outcome_in_words(found))
        folds.setdefault(_outcome(found), []).append(fold)
    yield from folds.get("failed", ())
    for outcome, sign in (("passed", FINE), ("skipped", UNMEASURED)):
        if outcome in folds:
            yield Fold(f"{count(len(folds[outcome]), 'rule')} {outcome}", tuple(folds[outcome]), sign)


def _outcome(found: Sequence[Verdict]) -> str:
    outcomes = {verdict.outcome for verdict in found}
    return next(outcome for outcome in ("failed", "passed", "skipped") if outcome in outcomes)


def _rule_sign(found: Sequence[Verdict]) -> str:
    if _outcome(found) == "skipped":
        return UNMEASURED
    return worst_sign(verdict.severity for verdict in found if verdict.outcome == "failed")


def _outcome_in_words(found: Sequence[Verdict]) -> str:
    failed = [verdict for verdict in found if verdict.outcome == "failed"]
    if failed:
        layers = sum(verdict.layer is not None for verdict in failed)
        return f"failed in {count(layers, 'layer')}" if layers else "failed for the model"
    if _outcome(found) == "passed":
        return "passed"
    reasons = dict.fromkeys(verdict.reason or "" for verdict in found)
    return f"skipped: {'; '.join(filter(None, reasons))}"


def _failures(found: Sequence[Verdict]) -> tuple[Block, ...]:
    return points(
        (
            SEVERITY_SIGNS[verdict.severity],
            f"{verdict.layer or MODEL}: {verdict.message}{diagnoses.value_in_words(verdict)}",
        )
        for verdict in found
        if verdict.outcome == "failed"
    )


def manual_folds(found: Iterable[tuple[str, str]]) -> Iterator[Block]:
    """The manuals of some rules, each with its sign; of a rule that is not installed here there is none."""
    for code, sign in found:
        if (rule := rule_of(code)) is not None:
            yield Fold(f"{code}: {rule.title}", tuple(_manual(code)), sign, f"rule-{code}")


def _manual(code: str) -> Iterator[Block]:
    rule = rule_of(code)
    if rule is None:
        return
    text = manual(rule)
    yield Text((text.summary,))
    yield Facts(text.sections)
