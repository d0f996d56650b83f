"""How often the diagnosis was right, and how well intervals and p-values are calibrated: outcomes in, rows out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from benchmarks.faults.calibration import Check, PValue
from benchmarks.faults.trials import Outcome
from benchmarks.tables import Row

FIRST_GOAL, PAIR_GOAL, HEALTHY_GOAL = 0.95, 0.90, 0.02
COVERAGE_GOAL = (0.93, 0.97)
NOTHING = "(nothing)"

Table = list[list[str]]
"""Rows of cells; the first row is the header."""


def goals(outcomes: Sequence[Outcome], checks: Sequence[Check]) -> list[Row]:
    """Every goal, on the cases that are scored; beside it the figure on those that thresholds may have been set on."""
    faults = [one for one in outcomes if len(one.trial.planted) == 1]
    pairs = [one for one in outcomes if len(one.trial.planted) == 2]
    controls = [one for one in outcomes if not one.trial.planted]
    rows = [
        _goal("faults that a direct measure without bnprobe shows", faults, is_proven),
        _goal("pairs of which direct measures show both", pairs, is_proven),
        _goal("planted cause named first", faults, named_first, FIRST_GOAL),
        _goal("planted cause named at all", faults, all_named),
        _goal("both causes of a pair named", pairs, all_named, PAIR_GOAL),
        _goal("the same, or named as a consequence of the other", pairs, all_mentioned),
        _goal("healthy models with an error-level finding", controls, has_error, HEALTHY_GOAL, at_most=True),
        _goal("healthy models with any diagnosis", controls, lambda outcome: bool(outcome.named)),
        _goal("healthy models with a layer flagged", controls, lambda outcome: outcome.flagged > 0),
    ]
    return [*rows, *_coverage_goal(checks)]


def named_first(outcome: Outcome) -> bool:
    """The diagnosis that is ranked first is the planted fault."""
    return outcome.named[:1] == outcome.trial.planted


def all_named(outcome: Outcome) -> bool:
    """Every planted fault is among the diagnoses."""
    return set(outcome.trial.planted) <= set(outcome.named)


def all_mentioned(outcome: Outcome) -> bool:
    """Every planted fault is named, as a diagnosis or as a consequence of one."""
    return set(outcome.trial.planted) <= {*outcome.named, *outcome.folded}


def is_proven(outcome: Outcome) -> bool:
    """Measures of the benchmark's own show every planted fault."""
    return outcome.proven is True


def has_error(outcome: Outcome) -> bool:
    """Some finding is of level error, or the scan failed."""
    return bool(outcome.errors) or outcome.problem is not None


def by_fault(outcomes: Iterable[Outcome]) -> Table:
    """For every fault: in how many scored cases it was named first, and at all."""
    table = [["planted", "cases", "named first", "named at all", "not applicable"]]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if len(outcome.trial.planted) == 1:
            groups.setdefault(outcome.trial.planted[0], []).append(outcome)
    for name, found in groups.items():
        scored = _scored(found)
        counts = [len(scored), sum(map(named_first, scored)), sum(map(all_named, scored))]
        missing = sum(one.not_applicable is not None for one in found)
        table.append([name, *map(str, counts), str(missing or "")])
    return table


def confusion(outcomes: Iterable[Outcome]) -> Table:
    """Planted cause against the cause named first, in scored cases; healthy controls are planted with nothing."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in _scored(outcomes):
        if len(outcome.trial.planted) < 2:
            planted = "".join(outcome.trial.planted) or NOTHING
            counts[planted, _first(outcome)] += 1
    rows = list(dict.fromkeys(planted for planted, _ in counts))
    columns = list(dict.fromkeys([*rows, *(named for _, named in counts)]))
    columns = [name for name in columns if any(counts[row, name] for row in rows)]
    body = [[row, *(str(counts[row, column] or "") for column in columns)] for row in rows]
    return [["planted \\ named first", *columns], *body]


def misses(outcomes: Iterable[Outcome]) -> Table:
    """Every scored case that missed its goal, with what was said instead."""
    table = [["planted", "network", "seed", "named, in order", "as consequences", "error level"]]
    for outcome in _scored(outcomes):
        trial = outcome.trial
        right = (not has_error(outcome), named_first(outcome), all_named(outcome))[len(trial.planted)]
        if not right:
            planted = " + ".join(trial.planted) or f"{NOTHING}, {trial.variant}"
            said = outcome.problem or ", ".join(outcome.named) or NOTHING
            table.append(
                [planted, trial.network, str(trial.seed), said, ", ".join(outcome.folded), ", ".join(outcome.errors)]
            )
    return table


def coverage(checks: Iterable[Check]) -> Table:
    """For every figure: how often the stated 95% interval held the truth."""
    table = [["figure", "intervals", "covered", "truth below", "truth above", "covered, by network"]]
    groups: dict[str, list[Check]] = {}
    for check in checks:
        groups.setdefault(check.what, []).append(check)
    for what, found in groups.items():
        networks = dict.fromkeys(check.network for check in found)
        shares = [f"{name} {_percent(_covered([one for one in found if one.network == name]))}" for name in networks]
        below, above = (sum(getattr(check, side) for check in found) / len(found) for side in ("below", "above"))
        cells = [str(len(found)), _percent(_covered(found)), _percent(below), _percent(above), ", ".join(shares)]
        table.append([what, *cells])
    return table


def p_values(found: Sequence[PValue]) -> Table:
    """How often chance alone looks like composition in healthy models; as reported, so corrected for all channels."""
    table = [["p-value of composition", "below 0.05", "below 0.01", "median"]]
    scans: dict[tuple[str, int, int], float] = {}
    for one in found:
        key = (one.network, one.seed, one.scan)
        scans[key] = min(one.p_value, scans.get(key, 1.0))
    kinds = {"of each layer": [one.p_value for one in found], "smallest of a scan": list(scans.values())}
    for kind, values in kinds.items():
        if values:
            fractions = [_percent(sum(value < limit for value in values) / len(values)) for limit in (0.05, 0.01)]
            table.append([f"{kind} ({len(values)})", *fractions, f"{statistics.median(values):.2f}"])
    return table


def markdown(table: Table) -> str:
    """The table as Markdown, with columns of even width."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _goal(
    what: str,
    outcomes: Iterable[Outcome],
    right: Callable[[Outcome], bool],
    limit: float | None = None,
    *,
    at_most: bool = False,
) -> Row:
    planted = [one for one in outcomes if one.not_applicable is None]
    scored, tuned = (_fraction([one for one in planted if one.tuned is side], right) for side in (False, True))
    if scored is None:
        return Row(what, "not run")
    figure = f"{_counted(scored)}; where thresholds may be set: {_counted(tuned)}"
    if limit is None:
        return Row(what, figure)
    share = scored[0] / scored[1]
    sign = "at most" if at_most else "at least"
    return Row(what, figure, f"{sign} {limit:.0%}", share <= limit if at_most else share >= limit)


def _coverage_goal(checks: Sequence[Check]) -> list[Row]:
    low, high = COVERAGE_GOAL
    rows = []
    for what in dict.fromkeys(check.what for check in checks):
        share = _covered([check for check in checks if check.what == what])
        goal = f"{low:.0%} to {high:.0%}"
        rows.append(Row(f"95% intervals that hold the truth: {what}", _percent(share), goal, low <= share <= high))
    return rows


def _fraction(outcomes: Sequence[Outcome], right: Callable[[Outcome], bool]) -> tuple[int, int] | None:
    return (sum(map(right, outcomes)), len(outcomes)) if outcomes else None


def _counted(fraction: tuple[int, int] | None) -> str:
    return "none" if fraction is None else f"{_percent(fraction[0] / fraction[1])} ({fraction[0]} of {fraction[1]})"


def _scored(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if not one.tuned and one.not_applicable is None]


def _first(outcome: Outcome) -> str:
    return "(failed)" if outcome.problem else next(iter(outcome.named), NOTHING)


def _covered(checks: Sequence[Check]) -> float:
    return sum(not check.below and not check.above for check in checks) / len(checks)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
