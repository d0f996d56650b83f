"""Outcomes in, rows of tables out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from scipy.stats import binomtest

from benchmarks.monitor.runs import EVERY, NETS, Outcome
from bnprobe.monitor.inputs import INPUTS
from bnprobe.monitor.screening import LOSS, UPDATES

RATE = 0.05
"""Of false alarms in a run, as the monitor states it."""

_OTHERS = (LOSS, UPDATES, INPUTS)
"""What raises alarms beside layers."""

Table = list[list[str]]
"""Rows of cells; the first row is the header."""


def false_alarms(outcomes: Sequence[Outcome]) -> Table:
    """By condition, by network, and all."""
    head = ["runs", "number", "with an alarm", "raised by", "with a finding", "rules", "accuracy"]
    parts = [(what, [one for one in outcomes if one.what == what]) for what in dict.fromkeys(o.what for o in outcomes)]
    parts += [(f"all of {net}", [one for one in outcomes if one.network == net]) for net in NETS]
    parts.append(("all", list(outcomes)))
    return [head, *(_healthy_row(name, part) for name, part in parts if part)]


def _healthy_row(name: str, part: list[Outcome]) -> list[str]:
    first = [one.alarms[0][1] for one in part if one.alarms]
    named = [sorted({rule for _, rule in one.findings}) for one in part if one.findings]
    return [
        name,
        str(len(part)),
        share(len(first), len(part)),
        _raised_by(first),
        share(len(named), len(part)),
        _counted(rule for rules in named for rule in rules),
        f"{statistics.mean(one.accuracy for one in part):.3f}",
    ]


def alarmed(outcomes: Sequence[Outcome]) -> Table:
    """The runs without a fault that had an alarm."""
    head = [
        "network",
        "seed",
        "run",
        "steps before alarms",
        "raised by",
        "named",
        "accuracy",
        "lost to running statistics",
    ]
    return [
        head,
        *(
            [
                *(one.network, str(one.seed), one.what),
                ", ".join(str(step) for step, _ in one.alarms),
                ", ".join(dict.fromkeys(name for _, series in one.alarms for name in series)),
                ", ".join(dict.fromkeys(rule for _, rule in one.findings)),
                f"{one.accuracy:.3f}",
                f"{one.gap:+.3f}",
            ]
            for one in outcomes
            if one.alarms
        ),
    ]


def share(count: int, of: int) -> str:
    """E.g. "3: 6.0% [1.3%, 16.5%]", by Clopper and Pearson."""
    low, high = binomtest(count, of).proportion_ci()
    return f"{count}: {count / of:.1%} [{low:.1%}, {high:.1%}]"


def detections(outcomes: Sequence[Outcome], healthy: Sequence[Outcome]) -> Table:
    """A row for each fault and strength."""
    twins = {(one.network, one.seed): one.accuracy for one in healthy}
    head = ["fault", "detected", "by network", "steps", "samples", "raised by", "named", "accuracy lost"]
    parts = [[one for one in outcomes if one.what == what] for what in dict.fromkeys(one.what for one in outcomes)]
    return [head, *(_fault_row(part, twins) for part in parts)]


def delay(outcome: Outcome) -> int | None:
    """Steps from the beginning of the fault to the first alarm since."""
    begin = outcome.begin or 0
    return next((step - begin for step, _ in outcome.alarms if step >= begin), None)


def _fault_row(part: list[Outcome], twins: dict[tuple[str, int], float]) -> list[str]:
    delays = [found for one in part if (found := delay(one)) is not None]
    first = [series for one in part for step, series in one.alarms if step - (one.begin or 0) == delay(one)]
    nets = [[one for one in part if one.network == net] for net in NETS]
    counts = [f"{net[0].network} {sum(delay(one) is not None for one in net)}/{len(net)}" for net in nets if net]
    lost = [twins[one.network, one.seed] - one.accuracy for one in part]
    return [
        part[0].what,
        f"{len(delays)} of {len(part)}",
        ", ".join(counts),
        _range(delays),
        f"{statistics.median(delays) / EVERY:.0f}" if delays else "",
        _raised_by(first),
        _counted(rule for one in part for rule in {r for step, r in one.findings if step >= (one.begin or 0)}),
        f"{statistics.mean(lost):.3f} ({min(lost):.3f} to {max(lost):.3f})",
    ]


def _raised_by(alarms: Iterable[Sequence[str]]) -> str:
    """In how many alarms what took part: layers, the loss, updates or inputs."""
    kinds = [{name if name in _OTHERS else "layers" for name in series} for series in alarms]
    return _counted(kind for alarm in kinds for kind in sorted(alarm))


def _range(values: list[int]) -> str:
    return f"{statistics.median(values):.0f} ({min(values)} to {max(values)})" if values else ""


def _counted(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def missed(outcomes: Sequence[Outcome], healthy: Sequence[Outcome], costly: float = 0.02) -> list[str]:
    """Faults that cost accuracy and went unnoticed in half of the runs or more, a line each."""
    twins = {(one.network, one.seed): one.accuracy for one in healthy}
    found = []
    for what in dict.fromkeys(one.what for one in outcomes):
        part = [one for one in outcomes if one.what == what]
        hurt = [one for one in part if twins[one.network, one.seed] - one.accuracy > costly]
        quiet = [one for one in hurt if delay(one) is None]
        if quiet:
            found.append(f"* {what}: {len(quiet)} of {len(hurt)} runs that lost over {costly:g}, without an alarm.")
    return found
