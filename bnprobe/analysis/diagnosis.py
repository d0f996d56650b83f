"""Select and run the rules, join their verdicts into diagnoses, and rank these.

A cause that follows from another one, on the same layer, in an earlier layer or of the whole model, is not a diagnosis
of its own. Which causes follow from which is declared by the rules. Mismatch from earlier layers of which none has a
cause of its own is what their stale statistics, or dropout, add up to, and is called so. A remedy that was tried
without a gain is not printed.

Ranking: errors before warnings before information; within these, first what stops training; then what a remedy without
training is known to mend for the most part; then by the effect on the output, not by the number of layers. Where a
layer has several causes, the effect measured for it belongs to all of
them: a diagnosis gets the fraction that its causes have in the layers' mismatch D, as a square root, since the effect
on the output grows with the root of D. The effects are measured by the caller, for the groups of layers that
``groups_of`` names: nothing here runs the model.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from bnprobe.config.spec import RuleExemption, RulesSpec, matches_any
from bnprobe.numbers import count
from bnprobe.records import EXEMPT, SOURCES, Cause, Diagnosis, Layer, LintReport, Report, Verdict
from bnprobe.rules import RULES, Rule, effect
from bnprobe.rules.facts import Facts
from bnprobe.rules.findings import SEVERITIES, failures
from bnprobe.rules.selection import matches_code, selected
from bnprobe.rules.shares import SHARES, STATISTICS_CAUSES, ShareRule, found_against, share_of

Group = tuple[str, ...]
"""Names of the layers of one diagnosis, in network order."""

_Key = tuple[str, str | None]
"""Rule and layer."""


def judge(facts: Facts, rules: RulesSpec, among: Iterable[Rule] = RULES) -> tuple[Verdict, ...]:
    """Every verdict of the selected rules, in the order of the rules, with the layers' places in the code.

    Raises:
        UsageError: A code or prefix fits no rule.
    """
    places = {anatomy.name: anatomy.location for anatomy in facts.anatomy}
    judged = [_weighed(verdict, rule, facts) for rule in selected(rules, among) for verdict in rule.judge(facts)]
    left = [_exempted(verdict, rules.exempt, facts) for verdict in _rooted(judged, facts)]
    tried = (_not_contradicted(verdict, left, facts) for verdict in left)
    return tuple(replace(verdict, location=places.get(verdict.layer or "")) for verdict in tried)


def groups_of(verdicts: Iterable[Verdict], facts: Facts) -> tuple[Group, ...]:
    """The groups of layers whose joint effect on the output ``diagnose`` ranks by.

    Args:
        verdicts: Of any rules.
        facts: What they were judged on.
    """
    return tuple(dict.fromkeys(finding.layers for finding in _joined(verdicts, facts) if finding.layers))


def diagnose(
    verdicts: Iterable[Verdict], facts: Facts, impacts: Mapping[Group, float | None] | None = None
) -> tuple[Diagnosis, ...]:
    """Join the failed verdicts of each rule, fold what follows from other causes into these, and rank.

    Args:
        verdicts: Of any rules.
        facts: What they were judged on.
        impacts: Relative change of the outputs if the layers of a group use batch statistics, for the groups of
            ``groups_of``; a group that is missing or None was not measured.

    Returns:
        The worst first. A cause that follows from others on every layer is only named among their consequences; where
        it stands on its own on some layers, its diagnosis is about these.
    """
    known = impacts or {}
    made = [finding.ranked(known.get(finding.layers)) for finding in _joined(verdicts, facts)]
    return tuple(diagnosis for _, diagnosis in sorted(made, key=lambda pair: pair[0]))


def _weighed(verdict: Verdict, rule: Rule, facts: Facts) -> Verdict:
    """The verdict; what was measured on synthetic inputs is a remark, since the weights were trained on other data."""
    noise = facts.scan is not None and facts.scan.synthetic and rule.needs != "model"
    return replace(verdict, severity="info") if noise and verdict.outcome == "failed" else verdict


def _exempted(verdict: Verdict, exemptions: Sequence[RuleExemption], facts: Facts) -> Verdict:
    """The verdict, skipped with the user's reason where one is given for its layer."""
    layer = facts.layers.get(verdict.layer or "")
    names = (verdict.layer or "", *(layer.aliases if layer else ()))
    for exemption in exemptions:
        if matches_any(exemption.layers, names) and matches_code(verdict.rule, exemption.rules):
            message = f"{EXEMPT}{exemption.reason.rstrip('.')}."
            return replace(verdict, outcome="skipped", message=message, remedy="", reason=exemption.reason)
    return verdict


def _rooted(verdicts: Sequence[Verdict], facts: Facts) -> list[Verdict]:
    """The verdicts, with mismatch from earlier layers that has no root given to what adds up to most in these."""
    order = _order(facts)
    failed = _Failed(verdicts, order)
    lost = {
        verdict.layer: verdict
        for verdict in failed.verdicts
        if RULES[verdict.rule].follows_upstream and _reason(verdict, failed, facts) is None
    }
    known = {name for name, layer in facts.layers.items() if layer.eval and not layer.flagged and not layer.undecided}
    first = min((place for name, place in order.items() if name not in known), default=len(order))
    rooted = list(verdicts)
    for name, found in lost.items():
        roots = {verdict.rule: place for place, verdict in enumerate(verdicts) if verdict.layer == name}
        root = max(_passing_on(), key=_passed_on(name, facts, order), default=None)
        if root is not None and root.code in roots:
            place = rooted.index(found)
            rooted[place] = replace(found, outcome="passed", message=_NO_ROOT, remedy="")
            rooted[roots[root.code]] = _passing(root, found, facts, order[name or ""] <= first)
    return rooted


_NO_ROOT = "Its input differs between training and inference, and no rule found the root in an earlier layer."


def _passing_on() -> list[ShareRule]:
    """The rules on what earlier layers pass on; stale statistics first, which it is where no share adds to anything."""
    return [rule for rule in RULES if isinstance(rule, ShareRule) and rule.adds_up]


def _passed_on(name: str | None, facts: Facts, order: Mapping[str, int]) -> Callable[[ShareRule], float]:
    """By rule, the sum of its share over all earlier layers."""
    before = [layer for other, layer in facts.layers.items() if order[other] < order[name or ""]]
    return lambda rule: sum(max(share_of(layer, rule.cause) or 0.0, 0.0) for layer in before)


def _passing(root: ShareRule, found: Verdict, facts: Facts, within: bool) -> Verdict:
    """A finding on mismatch from earlier layers, as one of another cause.

    ``within``: every earlier layer was measured, and is neither flagged nor undecided.
    """
    start = "Earlier layers are each within their limit, but" if within else "Of earlier layers,"
    start = f"{start} {root.adds_up} adds up in its input."
    layer = facts.layers.get(found.layer or "")
    amount = None if layer is None else found_against(layer, found.cause, facts)
    message = start if amount is None else f"{start} {amount[0]}"
    return replace(found, rule=root.code, cause=root.cause, message=message, remedy=root.remedy)


def _not_contradicted(verdict: Verdict, verdicts: Sequence[Verdict], facts: Facts) -> Verdict:
    """The verdict with another remedy, where its own was tried and is no gain.

    A metric of which nobody said whether a larger value is better contradicts nothing.
    """
    rule = RULES[verdict.rule]
    if not rule.other_remedy or verdict.remedy != rule.remedy:
        return verdict
    gain = effect.gain(facts, rule.free_remedy)
    goal_is_known = all(gap.goal_is_known for gap in facts.gaps)
    tells = goal_is_known or any(change.measure == "loss" for change in gain.changes)
    if not tells or not gain.is_no_gain:
        return verdict
    failed = (other for other in verdicts if other.outcome == "failed" and other.severity != "info")
    first = [other for other in failed if other.cause in rule.mended_first]
    gained = "gains too little to count" if gain.gains_little else "is no gain"
    return replace(verdict, remedy=_after(first[0], gained) if first else rule.other_remedy.format(gain=gained))


def _after(first: Verdict, gained: str) -> str:
    """What to do where a remedy was tried without a gain that counts, and another finding is to be mended before."""
    title = RULES[first.rule].title
    return f"Mend the {title} first ({first.rule}): recalibrating alone was tried, and {gained}."


def _order(facts: Facts) -> dict[str, int]:
    """Positions of the layers in the network."""
    order = {anatomy.name: position for position, anatomy in enumerate(facts.anatomy)}
    for name in facts.layers:
        order.setdefault(name, len(order))
    return order


def _joined(verdicts: Iterable[Verdict], facts: Facts) -> list[_Finding]:
    """For each rule its failed verdicts that nothing explains, and those that follow from them."""
    order = _order(facts)
    failed = _Failed(verdicts, order)
    reasons = {_key(verdict): _reason(verdict, failed, facts) for verdict in failed.verdicts}
    own: dict[str, list[Verdict]] = defaultdict(list)
    folded: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in failed.verdicts:
        key = _key(verdict)
        root = _root(key, reasons)
        (own if root == key else folded)[root[0]].append(verdict)
    return [_Finding(own[rule], folded[rule], facts, order) for rule in own]


def _root(key: _Key, reasons: Mapping[_Key, Verdict | None]) -> _Key:
    """The verdict at the end of the chain of reasons; where rules explain each other in a circle, each stands alone."""
    current, seen = key, {key}
    while (reason := reasons[current]) is not None:
        current = _key(reason)
        if current in seen:
            return key
        seen.add(current)
    return current


class _Failed:
    """The verdicts that failed, as reasons are looked for among them.

    Attributes:
        verdicts: All, in order.
        of_layer: By layer; under None those on the whole model.
    """

    def __init__(self, verdicts: Iterable[Verdict], order: Mapping[str, int]) -> None:
        self.verdicts = [verdict for verdict in verdicts if verdict.outcome == "failed"]
        self.of_layer: dict[str | None, list[Verdict]] = defaultdict(list)
        roots = []
        for number, verdict in enumerate(self.verdicts):
            self.of_layer[verdict.layer].append(verdict)
            upstream = RULES[verdict.rule].upstream_order
            place = order.get(verdict.layer or "")
            if upstream is not None and place is not None:
                roots.append((place, (-_share(verdict), upstream, number)))
        roots.sort()
        self._order, self._places = order, [place for place, _ in roots]
        self._best = list(accumulate((root for _, root in roots), min))

    def upstream(self, verdict: Verdict) -> Verdict | None:
        """The root cause in an earlier layer with the largest share of that layer's mismatch; else the first one."""
        before = bisect_left(self._places, self._order.get(verdict.layer or "", 0))
        return self.verdicts[self._best[before - 1][2]] if before else None


def _reason(verdict: Verdict, failed: _Failed, facts: Facts) -> Verdict | None:
    """The failed verdict that explains another; None if it stands on its own."""
    rule = RULES[verdict.rule]
    if verdict.layer is None:
        return _largest_error(failed.verdicts) if rule.follows_from_any else None
    for other in failed.of_layer[None]:
        if rule.cause in RULES[other.rule].explains_layers:
            return other
    here = failed.of_layer[verdict.layer]
    if rule.follows_upstream:
        return failed.upstream(verdict) or _root_here(verdict, here)
    # What may explain a finding of this rule on the same layer, the first to count first.
    others = [
        replace(link, cause=other.cause) for other in RULES for link in other.explains if link.cause == rule.cause
    ]
    causes = [link.cause for link in (*rule.follows_from, *others) if link.exists(verdict.layer, facts)]
    explaining = [other for other in here if other.cause in causes]
    return min(explaining, key=lambda other: causes.index(other.cause), default=None)


def _largest_error(failed: Sequence[Verdict]) -> Verdict | None:
    """The error with the largest share, of causes that change what a layer gives out; else the first such error."""
    errors = [
        other
        for other in failed
        if other.severity == "error" and other.layer is not None and RULES[other.rule].upstream_order is not None
    ]
    return max(errors, key=_share, default=None)


def _root_here(verdict: Verdict, here: Sequence[Verdict]) -> Verdict | None:
    """What else is wrong with the statistics of the layer itself."""
    others = [other for other in here if other.cause in STATISTICS_CAUSES and other.rule != verdict.rule]
    return max(others, key=_share, default=None)


def _share(verdict: Verdict) -> float:
    """The share that a verdict is about; 0 for those that are about something else."""
    return verdict.value or 0.0 if verdict.cause in SHARES else 0.0


def _key(verdict: Verdict) -> _Key:
    return verdict.rule, verdict.layer


@dataclass(frozen=True)
class _Finding:
    """Failed verdicts of one rule, and those of others that follow from them."""

    own: Sequence[Verdict]
    folded: Sequence[Verdict]
    facts: Facts
    order: Mapping[str, int]

    @property
    def layers(self) -> Group:
        return tuple(sorted({verdict.layer for verdict in self.own if verdict.layer}, key=self._position))

    def ranked(self, impact: float | None) -> tuple[tuple[float, ...], Diagnosis]:
        """The diagnosis, and what to sort it by."""
        severity = min((verdict.severity for verdict in (*self.own, *self.folded)), key=SEVERITIES.index)
        worst = min(self.own, key=self._mildness)
        rule, fraction = RULES[worst.rule], self._fraction()
        moved = math.inf if impact is None else -impact * fraction
        diagnosis = Diagnosis(
            cause=worst.cause,
            rule=worst.rule,
            severity=severity,
            layers=self.layers,
            # A cause that holds none of the mismatch has no part in the effect: what it does was not measured.
            impact=impact * fraction if impact is not None and rule.reports_impact and fraction else None,
            message=self._message(rule, worst),
            remedy=worst.remedy,
            consequences=self._consequences(),
        )
        blocking = 0.0 if rule.stops_training and severity == "error" else 1.0
        place = float(RULES.names().index(rule.code))
        unmended = 0.0 if _is_mended(rule, self.facts) else 1.0
        return (SEVERITIES.index(severity), blocking, unmended, moved, -fraction, place), diagnosis

    def _position(self, layer: str) -> int:
        return self.order.get(layer, len(self.order))

    def _mildness(self, verdict: Verdict) -> tuple[int, float, int]:
        """Smallest for the verdict that is furthest beyond its limit, on whichever side that is.

        Of D more is worse, also where a small one is a finding for what it does.
        """
        beyond = 0.0
        if verdict.value and verdict.limit and verdict.value / verdict.limit > 0:
            beyond = math.log(verdict.value / verdict.limit)
            beyond = beyond if RULES[verdict.rule].unit == "D" else abs(beyond)
        elif verdict.value is not None and not verdict.limit:
            beyond = verdict.value
        return SEVERITIES.index(verdict.severity), -beyond, self._position(verdict.layer or "")

    def _message(self, rule: Rule, worst: Verdict) -> str:
        layers = self.layers
        if len(layers) < 2:
            return f"{layers[0]}: {worst.message}" if layers else worst.message
        every = max(len(self.facts.anatomy), len(self.facts.layers), len(layers))
        alike = len({self._mildness(verdict)[:2] for verdict in self.own}) == 1
        shown = f"For example {worst.layer}" if alike else f"Worst is {worst.layer}"
        return f"{len(layers)} of {every} layers: {rule.finding}. {shown}: {worst.message}"

    def _consequences(self) -> tuple[str, ...]:
        counts: dict[Cause, int] = defaultdict(int)
        for verdict in self.folded:
            counts[verdict.cause] += verdict.layer is not None
        return tuple(
            f"{cause} in {count(number, 'layer') if number else 'the outputs'}" for cause, number in counts.items()
        )

    def _fraction(self) -> float:
        """Root of the fraction of these causes in the layers' mismatch, mean over layers; 1 where it is not known."""
        layers = self.layers
        causes = {verdict.cause for verdict in (*self.own, *self.folded) if verdict.layer in layers}
        causes.update(cause for verdict in self.own for cause in RULES[verdict.rule].accounts_for)
        known = [self.facts.layers[name] for name in layers if name in self.facts.layers]
        fractions = [part for layer in known if (part := _fraction_of(layer, causes)) is not None]
        return sum(map(math.sqrt, fractions)) / len(fractions) if fractions else 1.0


def _is_mended(rule: Rule, facts: Facts) -> bool:
    """Whether the remedy without training was tried, and surely wins back most of what is lost on held-out data."""
    return bool(effect.wins_back_most(facts, rule.free_remedy))


def _fraction_of(layer: Layer, causes: set[Cause]) -> float | None:
    """The fraction of causes in what adds to the mismatch of a layer; None without shares, or for other causes."""
    if layer.shares is None:
        return None
    known = {source.field: share for source in SOURCES if (share := source.of(layer.shares)) is not None}
    if not causes & known.keys():
        return None
    shares = {cause: max(share, 0.0) for cause, share in known.items()}
    total = sum(shares.values())
    return sum(value for cause, value in shares.items() if cause in causes) / total if total > 0 else None


def lint_has_findings(report: LintReport) -> bool:
    """Whether a rule failed with more than a remark. Warnings count, unlike in a scan: nothing was measured."""
    return bool(failures(report))


def has_findings(report: Report, rules: RulesSpec) -> bool:
    """Whether a cause is an error, or a layer is flagged without an explanation by any rule; never on synthetic inputs.

    See ``bnprobe.rules.findings``.
    """
    return bool(failures(report, narrowed=bool(rules.select or rules.ignore)))
