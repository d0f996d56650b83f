"""How often the diagnosis was right, and how well intervals and p-values are calibrated: outcomes in, rows out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks.faults.calibration import Check, PValue
from benchmarks.faults.controls import CONTROLS
from benchmarks.faults.faults import FAULTS, IN_TRAINING, STRENGTHS
from benchmarks.faults.trials import Outcome
from benchmarks.tables import Row

FIRST_GOAL, SILENT_GOAL, FALSE_GOAL, PAIR_GOAL, BACK_GOAL = 0.95, 0.02, 0.01, 0.90, 0.95
COVERAGE_GOAL = (0.93, 0.97)
NOTHING = "(nothing)"

BACK = 0.95
"""Of the metric that was lost: when so much returned, it came back."""

KEPT = 0.02
"""What was promised was kept where the metric is no more than this and two standard errors below."""

BLAMES = {"propagation", *(cause for fault in FAULTS.values() for cause in fault.causes)} - {"random_at_inference"}
"""Causes of batch normalization, and of data that reaches it."""

Table = list[list[str]]
"""Rows of cells; the first row is the header."""


def goals(outcomes: Sequence[Outcome], checks: Sequence[Check]) -> list[Row]:
    """Every goal, on the cases that are scored; beside it the figure on those that thresholds may have been set on."""
    faults = [one for one in outcomes if len(one.trial.planted) == 1]
    pairs = [one for one in outcomes if len(one.trial.planted) == 2]
    controls = [one for one in outcomes if not one.trial.planted]
    structural = [one for one in faults if FAULTS[one.trial.planted[0]].structural]
    damaged = [one for one in faults if one.is_damaged and one not in structural]
    harmless = [one for one in (*faults, *controls) if is_harmless(one)]
    healthy = [one for one in harmless if one.trial.control]
    at_inference = [one for one in harmless if not set(one.trial.planted) & set(IN_TRAINING)]
    troubled = [one for one in controls if not CONTROLS[one.trial.control].healthy]
    rows = [
        _goal("faults that a direct measure without bnprobe shows", _measured(faults), is_proven),
        _goal("pairs of which direct measures show both", _measured(pairs), is_proven),
        _goal("the metric fell: planted cause named first", damaged, named_first, FIRST_GOAL),
        _goal("the metric fell: planted cause named at all", damaged, all_named),
        _goal("the metric fell: no error (silent)", damaged, is_silent, SILENT_GOAL, at_most=True),
        _goal("the metric fell: it comes back, or the report said how much", damaged, is_back_or_told, BACK_GOAL),
        _goal("the metric fell: it comes back", damaged, is_back),
        _goal("the fault is in the structure: named first", structural, named_first, FIRST_GOAL),
        _goal("no damage: false error", harmless, is_false_error, FALSE_GOAL, at_most=True),
        _goal("the same, without faults of the batches", at_inference, is_false_error),
        _goal("the same, in healthy controls alone", healthy, is_false_error),
        _goal("worse for another reason: no batch normalization blamed", troubled, blames_nothing, FIRST_GOAL),
        _goal("both causes of a pair named", pairs, all_named, PAIR_GOAL),
        _goal("the same, or named as a consequence of the other", pairs, all_mentioned),
    ]
    return [*rows, *_coverage_goal(checks)]


def right_answers(outcome: Outcome) -> list[set[str]]:
    """For each planted fault the causes one of which is to be named."""
    return [set(FAULTS[name].causes) for name in outcome.trial.planted]


def named_first(outcome: Outcome) -> bool:
    """The diagnosis that is ranked first is the planted fault."""
    return any(set(outcome.named[:1]) & causes for causes in right_answers(outcome))


def all_named(outcome: Outcome) -> bool:
    """Every planted fault is among the diagnoses."""
    return all(causes & set(outcome.named) for causes in right_answers(outcome))


def all_mentioned(outcome: Outcome) -> bool:
    """Every planted fault is named, as a diagnosis or as a consequence of one."""
    return all(causes & {*outcome.named, *outcome.folded} for causes in right_answers(outcome))


def is_proven(outcome: Outcome) -> bool:
    """Measures of the benchmark's own show every planted fault."""
    return outcome.proven is True


def is_silent(outcome: Outcome) -> bool:
    """A scan would exit with 0."""
    return not outcome.failed


def is_harmless(outcome: Outcome) -> bool:
    """At inference it is as good as the healthy network, and no fault is there that a scan should see all the same."""
    healthy = not outcome.trial.control or CONTROLS[outcome.trial.control].healthy
    seen = any(FAULTS[name].structural or FAULTS[name].wrong_anyway for name in outcome.trial.planted)
    as_good = outcome.damage is not None and (bool(outcome.trial.control) or outcome.damage.is_harmless)
    return healthy and not seen and as_good


def is_false_error(outcome: Outcome) -> bool:
    """A scan would exit with 1."""
    return outcome.failed


def blames_nothing(outcome: Outcome) -> bool:
    """The diagnosis that comes first is no error of batch normalization."""
    first = outcome.named[:1]
    return not (set(first) & set(outcome.errors) & BLAMES) and outcome.problem is None


def won_back(outcome: Outcome) -> float | None:
    """The fraction of the lost metric that came back when the advice was followed; 0 if it could not be."""
    damage, advice = outcome.damage, outcome.advice
    if damage is None or advice is None or not outcome.is_damaged:
        return None
    return 0.0 if advice.score is None else (advice.score - damage.faulty) / damage.lost


def is_back(outcome: Outcome) -> bool:
    """What is missing is less than a twentieth of what was lost, or no more than chance."""
    share, advice = won_back(outcome), outcome.advice
    if share is None or advice is None or advice.score is None or outcome.damage is None:
        return False
    return share >= BACK or outcome.damage.healthy - advice.score <= 2 * advice.error


def is_back_or_told(outcome: Outcome) -> bool:
    """It came back, or the report had given the figure, and kept its word."""
    advice = outcome.advice
    if advice is None or advice.score is None or advice.promised is None:
        return is_back(outcome)
    return is_back(outcome) or advice.score >= advice.promised - KEPT - 2 * advice.error


def by_fault(outcomes: Iterable[Outcome]) -> Table:
    """For every fault and strength: what it costs, what was said, and what came back."""
    table = [["planted", "strength", "cases", "lost, median", "metric fell", "named first", "no error", "came back"]]
    table[0] += ["came back, median", "not damaged", "error all the same"]
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        if len(outcome.trial.planted) == 1:
            groups.setdefault((outcome.trial.planted[0], outcome.trial.strength), []).append(outcome)
    for (name, strength), found in groups.items():
        lost = [one.damage.lost for one in found if one.damage is not None]
        damaged = [one for one in found if one.is_damaged and not FAULTS[name].structural]
        judged = found if FAULTS[name].structural else damaged
        returned = [share for one in damaged if (share := won_back(one)) is not None]
        harmless = [one for one in found if is_harmless(one)]
        counts = [len(damaged), sum(map(named_first, judged)), sum(map(is_silent, damaged)), sum(map(is_back, damaged))]
        table.append(
            [
                name,
                "" if len(FAULTS[name].strengths) == 1 else STRENGTHS[strength],
                str(len(found)),
                f"{statistics.median(lost):.3f}" if lost else "",
                *map(str, counts),
                f"{100 * statistics.median(returned):.0f}%" if returned else "",
                str(len(harmless)),
                str(sum(map(is_false_error, harmless))),
            ]
        )
    return table


def by_control(outcomes: Iterable[Outcome]) -> Table:
    """For every control: what it costs, and what was said."""
    table = [["control", "cases", "lost, median", "error", "any diagnosis"]]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.trial.control:
            groups.setdefault(outcome.trial.control, []).append(outcome)
    for name, found in groups.items():
        lost = [one.damage.lost for one in found if one.damage is not None]
        counts = [sum(one.failed for one in found), sum(bool(one.named) for one in found)]
        median = f"{statistics.median(lost):.3f}" if lost else ""
        table.append([name, str(len(found)), median, *map(str, counts)])
    return table


def by_remedy(outcomes: Iterable[Outcome]) -> Table:
    """For every action that first diagnoses asked for: how much of the lost metric it gave."""
    table = [["remedy", "cases", "came back", "share, median", "lost, sum", "came back, sum", "carried out"]]
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.is_damaged and len(outcome.trial.planted) == 1 and outcome.advice is not None:
            groups.setdefault(outcome.advice.action, []).append(outcome)
    for action, found in sorted(groups.items()):
        shares = [won_back(one) or 0.0 for one in found]
        lost = [one.damage.lost for one in found if one.damage is not None]
        back = sum(share * part for share, part in zip(shares, lost, strict=True))
        done = sum(one.advice is not None and one.advice.score is not None for one in found)
        cells = [str(len(found)), str(sum(map(is_back, found))), f"{100 * statistics.median(shares):.0f}%"]
        table.append([action, *cells, f"{sum(lost):.2f}", f"{back:.2f}", str(done)])
    return table


def confusion(outcomes: Iterable[Outcome]) -> Table:
    """Planted kind against the cause named first, where the metric fell or the fault is in the structure."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        if len(outcome.trial.planted) == 1 and (outcome.is_damaged or FAULTS[outcome.trial.planted[0]].structural):
            counts[outcome.trial.planted[0], _first(outcome)] += 1
    rows = list(dict.fromkeys(planted for planted, _ in counts))
    table = [["planted", "named first"]]
    for row in rows:
        said = sorted(((number, named) for (planted, named), number in counts.items() if planted == row), reverse=True)
        table.append([row, ", ".join(f"{named} {number}" for number, named in said)])
    return table


def misses(outcomes: Iterable[Outcome]) -> Table:
    """Every case that missed its goal, with what was said instead."""
    table = [["planted", "network", "seed", "lost", "missed", "named, in order", "as consequences", "came back by"]]
    for outcome in outcomes:
        missed = ", ".join(_missed(outcome))
        if missed:
            trial, advice, damage = outcome.trial, outcome.advice, outcome.damage
            strength = STRENGTHS[trial.strength]
            planted = trial.control or f"{' + '.join(trial.planted)}, {strength}"
            lost = "" if damage is None else f"{damage.lost:.3f}"
            share = won_back(outcome)
            followed = "" if advice is None or share is None else f"{advice.action}: {100 * share:.0f}%"
            said = outcome.problem or ", ".join(outcome.named) or NOTHING
            cells = [planted, trial.network, str(trial.seed), lost, missed, said, ", ".join(outcome.folded), followed]
            table.append([cell.replace("\n", " ").replace("|", "/")[:120] for cell in cells])
    return table


def _missed(outcome: Outcome) -> Iterator[str]:
    single = len(outcome.trial.planted) == 1
    structural = single and FAULTS[outcome.trial.planted[0]].structural
    damaged = single and outcome.is_damaged and not structural
    if (damaged or structural) and not named_first(outcome):
        yield "cause"
    if damaged and is_silent(outcome):
        yield "silent"
    if damaged and not is_back_or_told(outcome):
        yield "remedy"
    if len(outcome.trial.planted) == 2 and not all_named(outcome):
        yield "pair"
    if len(outcome.trial.planted) < 2 and is_harmless(outcome) and is_false_error(outcome):
        yield "false error"
    if outcome.trial.control and not CONTROLS[outcome.trial.control].healthy and not blames_nothing(outcome):
        yield "blame"


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
    outcomes: Sequence[Outcome],
    right: Callable[[Outcome], bool],
    limit: float | None = None,
    *,
    at_most: bool = False,
) -> Row:
    sides = ([one for one in outcomes if one.trial.is_scored is side] for side in (True, False))
    scored, tuned = (_fraction(side, right) for side in sides)
    if scored is None:
        return Row(what, "not run" if tuned is None else f"not run; where thresholds may be set: {_counted(tuned)}")
    figure = f"{_counted(scored)}; where thresholds may be set: {_counted(tuned)}"
    if limit is None:
        return Row(what, figure)
    share = scored[0] / scored[1]
    sign = "at most" if at_most else "at least"
    return Row(what, figure, f"{sign} {limit:.0%}", share <= limit if at_most else share >= limit)


def _measured(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return [one for one in outcomes if one.proven is not None]


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


def _first(outcome: Outcome) -> str:
    return "(failed)" if outcome.problem else next(iter(outcome.named), NOTHING)


def _covered(checks: Sequence[Check]) -> float:
    return sum(not check.below and not check.above for check in checks) / len(checks)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
