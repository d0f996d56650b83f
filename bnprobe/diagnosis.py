"""Select and run the rules, and join their verdicts into diagnoses.

No rule knows another. What they have to do with each other stands here, in two tables: which cause explains which on
the same layer (`EXPLAINS`), and which causes are handed down to later layers (`ROOTS`).

Ranking: errors before warnings before information; what stops training before all else (`BLOCKING`); then by effect on
the output, not by number of layers. Where a layer has several causes, the effect that was measured for it belongs to
all of them: a diagnosis gets the part that its causes have in the layers' mismatch D, as a square root, since the
effect on the output grows with the root of D.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bnprobe.facts import Facts
from bnprobe.records import EXEMPT, Cause, Diagnosis, Layer, Severity, Verdict
from bnprobe.rules import RULES, Rule
from bnprobe.rules.selection import fits, selected
from bnprobe.rules.shares import SHARES, share_limit
from bnprobe.spec import RuleExemption, RulesSpec, matches_any

ImpactOf = Callable[[tuple[str, ...]], float | None]
"""Effect on the output if these layers normalize with their batch's statistics; None if it was not measured."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Explanation:
    """One cause that brings another about on the same layer.

    Attributes:
        by: The cause that explains.
        holds: Whether it does so on this layer; not asked where the layer was not measured.
    """

    by: Cause
    holds: Callable[[Layer], bool] = lambda layer: True


def _no_more_than_composition(layer: Layer) -> bool:
    """A running average of uneven batches is off by no more than these are."""
    shares = layer.shares
    return shares is not None and shares.composition is not None and shares.lag <= shares.composition


def _is_mostly_composition(layer: Layer) -> bool:
    """Batches of one domain each are uneven; within a domain they may well pass for drawn at random."""
    shares = layer.shares
    return shares is not None and shares.composition is not None and shares.small_batch <= shares.composition


def _is_of_domains(layer: Layer) -> bool:
    """What batches of one domain each add to the mismatch is what these are apart; more has a cause of its own."""
    shares, domains = layer.shares, layer.domains
    return shares is None or domains is None or _is_small(layer, (shares.composition or 0.0) - domains.mismatch)


def _is_no_more_than_domains(layer: Layer) -> bool:
    """A running average of two domains by turns is off by no more than these are apart."""
    shares, domains = layer.shares, layer.domains
    return shares is None or domains is None or _is_small(layer, shares.lag - domains.mismatch)


def _is_small(layer: Layer, rest: float) -> bool:
    """Whether what domains leave of a share is too little to be blamed."""
    return rest <= share_limit(layer)


USUAL_RATE = 0.1
"""The default momentum: a running average that is noisier than this one has a cause of its own."""

NOISE_FACTOR = 3.0
"""One average is one draw: three times its expected noise is still noise."""


def _is_noise_of_batches(layer: Layer) -> bool:
    """A running average of noisy batches is noisy itself, by a / (2 - a) of their noise at the rate a."""
    shares, rate = layer.shares, min(layer.momentum or 0.0, USUAL_RATE)
    if shares is None:
        return False
    noise = (shares.small_batch + (shares.composition or 0.0)) * rate / (2 - rate)
    return shares.lag <= NOISE_FACTOR * noise


EXPLAINS: Mapping[Cause, tuple[Explanation, ...]] = {
    "lag": (
        Explanation("non_finite"),
        Explanation("never_trained"),
        Explanation("momentum_convention"),
        Explanation("double_update"),
        Explanation("frozen_mismatch"),
        Explanation("shared_domains", _is_no_more_than_domains),
        Explanation("composition", _no_more_than_composition),
        Explanation("small_batch", _is_noise_of_batches),
    ),
    "dropout_before_norm": (Explanation("dropout"),),
    "small_batch": (
        Explanation("single_value"),
        Explanation("single_image"),
        Explanation("shared_domains", _is_mostly_composition),
    ),
    "composition": (Explanation("shared_domains", _is_of_domains),),
    "dead_channels": (Explanation("lag"), Explanation("never_trained")),
}
"""What follows from what on the same layer; of several explanations the first that is there counts."""

ROOTS: tuple[Cause, ...] = (
    "non_finite",
    "never_trained",
    "momentum_convention",
    "double_update",
    "frozen_mismatch",
    "shared_domains",
    "composition",
    "lag",
    "dropout",
    "single_value",
    "single_image",
    "small_batch",
)
"""Causes that make a layer's own output differ, and so explain propagation in later layers; of equal ones the first."""

BLOCKING: tuple[Cause, ...] = ("non_finite", "single_value")
"""Causes that stop training, or leave nothing to compare: whatever the output does, these come first."""

OFF_THE_PATH: tuple[Cause, ...] = ("backward_noise", "data_shift")
"""Causes whose effect is no matter of batch against running statistics: the impact ranks them, but is not theirs."""

_Key = tuple[str, str | None]
"""Rule and layer."""


def judge(facts: Facts, rules: RulesSpec, among: Sequence[Rule] = RULES) -> tuple[Verdict, ...]:
    """Every verdict of the rules that are selected, in the order of the rules, with the layers' places in the code.

    Raises:
        UsageError: A code or prefix fits no rule.
    """
    places = {anatomy.name: anatomy.location for anatomy in facts.anatomy}
    verdicts = (verdict for rule in selected(rules, among) for verdict in rule.judge(facts))
    placed = (replace(verdict, location=places.get(verdict.layer or "")) for verdict in verdicts)
    return tuple(_exempted(verdict, rules.exempt, facts) for verdict in placed)


def diagnose(verdicts: Iterable[Verdict], facts: Facts, impact_of: ImpactOf) -> tuple[Diagnosis, ...]:
    """Join the failed verdicts of each rule, fold what follows from another cause, and rank.

    Args:
        verdicts: Of any rules.
        facts: What they were judged on.
        impact_of: Called with the layers of a diagnosis.

    Returns:
        The worst first. A cause that follows from others on every layer is only named among their consequences; where
        it stands on its own on some layers, its diagnosis is about these.
    """
    order = {anatomy.name: position for position, anatomy in enumerate(facts.anatomy)}
    for name in facts.layers:
        order.setdefault(name, len(order))
    failed = [verdict for verdict in verdicts if verdict.outcome == "failed"]
    groups = _folded(failed, facts, order)
    made = [_Group(own, folded, facts, order).ranked(impact_of) for own, folded in groups]
    return tuple(diagnosis for _, diagnosis in sorted(made, key=lambda pair: pair[0]))


def _exempted(verdict: Verdict, exemptions: Sequence[RuleExemption], facts: Facts) -> Verdict:
    """The verdict, skipped with the user's reason where one is given for its layer."""
    layer = facts.layers.get(verdict.layer or "")
    names = (verdict.layer or "", *(layer.aliases if layer else ()))
    for exemption in exemptions:
        if matches_any(exemption.layers, names) and fits(verdict.rule, exemption.rules):
            message = f"{EXEMPT}{exemption.reason.rstrip('.')}."
            return replace(verdict, outcome="skipped", message=message, remedy="", reason=exemption.reason)
    return verdict


def _folded(
    failed: Sequence[Verdict], facts: Facts, order: Mapping[str, int]
) -> list[tuple[list[Verdict], list[Verdict]]]:
    """For each rule its own failed verdicts that nothing explains, and those that follow from them."""
    reasons = {_key(verdict): _reason(verdict, failed, facts, order) for verdict in failed}
    by_key = {_key(verdict): verdict for verdict in failed}
    own: dict[str, list[Verdict]] = defaultdict(list)
    folded: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in failed:
        key = _key(verdict)
        while (reason := reasons[key]) is not None:  # ends: the tables have no circle, and propagation goes upstream
            key = _key(reason)
        (own if key == _key(verdict) else folded)[by_key[key].rule].append(verdict)
    return [(own[rule], folded[rule]) for rule in own]


def _reason(verdict: Verdict, failed: Sequence[Verdict], facts: Facts, order: Mapping[str, int]) -> Verdict | None:
    """The failed verdict that explains another; None if it stands on its own."""
    if verdict.layer is None:
        return None
    if verdict.cause == "propagation":
        return _upstream(verdict, failed, order)
    layer = facts.layers.get(verdict.layer)
    causes = [entry.by for entry in EXPLAINS.get(verdict.cause, ()) if layer is None or entry.holds(layer)]
    here = [other for other in failed if other.layer == verdict.layer and other.cause in causes]
    return min(here, key=lambda other: causes.index(other.cause), default=None)


def _upstream(verdict: Verdict, failed: Sequence[Verdict], order: Mapping[str, int]) -> Verdict | None:
    """The root cause in an earlier layer that adds most to that layer's mismatch; else the first root cause."""
    here = order.get(verdict.layer or "", 0)
    roots = [
        other
        for other in failed
        if other.cause in ROOTS and other.layer is not None and order.get(other.layer, here) < here
    ]
    return min(roots, key=lambda root: (-_share(root), ROOTS.index(root.cause)), default=None)


def _share(verdict: Verdict) -> float:
    """The share that a verdict is about; 0 for those that are about something else."""
    return verdict.value or 0.0 if verdict.cause in SHARES else 0.0


def _key(verdict: Verdict) -> _Key:
    return verdict.rule, verdict.layer


@dataclass(frozen=True)
class _Group:
    """Failed verdicts of one rule, and those of others that follow from them."""

    own: Sequence[Verdict]
    folded: Sequence[Verdict]
    facts: Facts
    order: Mapping[str, int]

    def ranked(self, impact_of: ImpactOf) -> tuple[tuple[float, ...], Diagnosis]:
        """The diagnosis, and what to sort it by."""
        layers = tuple(sorted({verdict.layer for verdict in self.own if verdict.layer}, key=self._position))
        impact = impact_of(layers) if layers else None
        severity = min((verdict.severity for verdict in (*self.own, *self.folded)), key=SEVERITIES.index)
        worst = min(self.own, key=self._mildness)
        part = self._part(layers)
        effect = math.inf if impact is None else -impact * part
        diagnosis = Diagnosis(
            cause=worst.cause,
            rule=worst.rule,
            severity=severity,
            layers=layers,
            impact=None if worst.cause in OFF_THE_PATH else impact,
            message=self._message(worst, layers),
            remedy=worst.remedy,
            consequences=self._consequences(),
        )
        blocking = 0.0 if worst.cause in BLOCKING else 1.0
        return (SEVERITIES.index(severity), blocking, effect, -part, float(worst.rule[2:])), diagnosis

    def _position(self, layer: str) -> int:
        return self.order.get(layer, len(self.order))

    def _mildness(self, verdict: Verdict) -> tuple[int, float, int]:
        """Smallest for the verdict that is furthest beyond its limit, on whichever side that is."""
        beyond = 0.0
        if verdict.value and verdict.limit and verdict.value / verdict.limit > 0:
            beyond = abs(math.log(verdict.value / verdict.limit))
        elif verdict.value is not None and not verdict.limit:
            beyond = verdict.value
        return SEVERITIES.index(verdict.severity), -beyond, self._position(verdict.layer or "")

    def _message(self, worst: Verdict, layers: Sequence[str]) -> str:
        if len(layers) < 2:
            return f"{layers[0]}: {worst.message}" if layers else worst.message
        finding = next((rule.finding for rule in RULES if rule.code == worst.rule), worst.cause)
        every = max(len(self.facts.anatomy), len(self.facts.layers), len(layers))
        return f"{len(layers)} of {every} layers: {finding}. Worst is {worst.layer}: {worst.message}"

    def _consequences(self) -> tuple[str, ...]:
        counts: dict[Cause, int] = defaultdict(int)
        for verdict in self.folded:
            counts[verdict.cause] += 1
        return tuple(f"{cause} in {number} layer{'' if number == 1 else 's'}" for cause, number in counts.items())

    def _part(self, layers: Sequence[str]) -> float:
        """Root of the part that these causes have in the layers' mismatch, mean over layers; 1 where nobody knows."""
        causes = {verdict.cause for verdict in (*self.own, *self.folded) if verdict.layer in layers}
        known = [self.facts.layers[name] for name in layers if name in self.facts.layers]
        parts = [part for layer in known if (part := _part_of(layer, causes)) is not None]
        return sum(map(math.sqrt, parts)) / len(parts) if parts else 1.0


def _part_of(layer: Layer, causes: set[Cause]) -> float | None:
    """The part of causes in what adds to the mismatch of a layer; None where it has no shares, or they are of none."""
    if layer.shares is None or not causes & {*SHARES, "data_shift"}:
        return None
    held = {cause: max(getattr(layer.shares, cause) or 0.0, 0.0) for cause in (*SHARES, "data_shift")}
    total = sum(held.values())
    return sum(value for cause, value in held.items() if cause in causes) / total if total > 0 else None
