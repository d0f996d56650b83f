"""Outcomes as Markdown tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.peers.checks import CHECKS
from benchmarks.peers.layers import SUBJECTS, control_of
from benchmarks.peers.reasons import REASONS
from benchmarks.peers.registry import FAILED, NOT_APPLICABLE, PASSED, Outcome

_HEADINGS = ("asked", "run", "passed", "failed", "not applicable")


def summary(outcomes: Sequence[Outcome]) -> str:
    """The totals of bnprobe's layers and of BN, in words."""
    lines = []
    for words, controls in (("bnprobe.nn", False), ("BN, the control", True)):
        counts = Counter(each.state for each in outcomes if _is_control(each.layer) == controls)
        run = counts[PASSED] + counts[FAILED]
        lines.append(
            f"* {words}: {run} run, {counts[PASSED]} passed, {counts[FAILED]} failed,"
            f" {counts[NOT_APPLICABLE]} not applicable."
        )
    return "\n".join(lines)


def by_layer(outcomes: Sequence[Outcome]) -> str:
    """Counts for every layer."""
    return _counts("layer", outcomes, lambda outcome: outcome.layer)


def by_source(outcomes: Sequence[Outcome]) -> str:
    """Counts for every suite, without the controls."""
    return _counts("suite", [each for each in outcomes if not _is_control(each.layer)], lambda each: each.source)


def failures(outcomes: Sequence[Outcome]) -> str:
    """Every failure, what BN does there, and why it stands."""
    states = {(each.check, each.layer): each.state for each in outcomes}
    names = {each.name: control_of(each).name for each in SUBJECTS}
    families = {each.name: each.family for each in SUBJECTS}
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for each in outcomes:
        if each.state == FAILED:
            plain = states.get((each.check, names[each.layer]), "not run")
            why = REASONS.get((each.check, families[each.layer]), "")
            groups.setdefault((each.source, each.check, plain, each.reason, why), []).append(each.layer)
    if not groups:
        return "Nothing."
    heading = ["suite", "check", "layers", "BN", "message", "why it stands"]
    rows = [[key[0], key[1], ", ".join(layers), *key[2:]] for key, layers in groups.items()]
    return _table([heading, *rows])


def not_applicable(outcomes: Sequence[Outcome]) -> str:
    """Every check that was not run, by reason."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in outcomes:
        if each.state == NOT_APPLICABLE:
            groups.setdefault((each.source, each.check, each.reason), []).append(each.layer)
    asked = Counter(each.check for each in outcomes)
    rows = [
        [source, check, "all" if len(layers) == asked[check] else ", ".join(layers), reason]
        for (source, check, reason), layers in groups.items()
    ]
    return _table([["suite", "check", "layers", "reason"], *rows]) if rows else "Nothing."


def checks(outcomes: Sequence[Outcome]) -> str:
    """Every check in words, with its counts."""
    run = {each.check for each in outcomes}
    rows = [["suite", "check", "what is asked", *_HEADINGS[2:]]]
    for check in CHECKS:
        if check.name in run:
            counts = Counter(each.state for each in outcomes if each.check == check.name)
            numbers = [str(counts[state]) for state in (PASSED, FAILED, NOT_APPLICABLE)]
            rows.append([check.source, check.name, check.words, *numbers])
    return _table(rows)


def _counts(what: str, outcomes: Iterable[Outcome], key: Callable[[Outcome], str]) -> str:
    counts: dict[str, Counter[str]] = {}
    for each in outcomes:
        counts.setdefault(key(each), Counter())[each.state] += 1
    rows = [[what, *_HEADINGS]]
    for name, found in counts.items():
        numbers = [sum(found.values()), found[PASSED] + found[FAILED], found[PASSED], found[FAILED]]
        rows.append([name, *map(str, [*numbers, found[NOT_APPLICABLE]])])
    return _table(rows)


def _is_control(layer: str) -> bool:
    return layer.startswith("nn.")


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
