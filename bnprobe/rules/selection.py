"""Which rules are meant: by code, by prefix of a code, by cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from bnprobe.config.spec import RulesSpec
from bnprobe.errors import UsageError
from bnprobe.rules import RULES, Rule
from bnprobe.wording import nearest


def codes(given: Sequence[str]) -> tuple[str, ...]:
    """Codes that were given to a function: one as text, or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def selected(spec: RulesSpec, among: Iterable[Rule] = RULES) -> tuple[Rule, ...]:
    """The rules that are to judge: the selected ones (all, where none is) without the ignored ones.

    Raises:
        UsageError: A code or prefix fits no rule; names the nearest code.
    """
    for code in (*spec.select, *spec.ignore, *(code for item in spec.exempt for code in item.rules)):
        check_code(code)
    return tuple(
        rule
        for rule in among
        if (not spec.select or matches_code(rule.code, spec.select)) and not matches_code(rule.code, spec.ignore)
    )


def model_rules(spec: RulesSpec) -> tuple[Rule, ...]:
    """The selected rules that need the model alone.

    Raises:
        UsageError: There are none; or a code or prefix fits no rule.
    """
    alone = selected(spec, [rule for rule in RULES if rule.needs == "model"])
    if not alone:
        raise UsageError(
            "None of the rules selected can judge a model without data; run `bnprobe scan`, or select others"
            " (`bnprobe explain` lists what each needs)."
        )
    return alone


def find_rule(name: str) -> Rule:
    """The rule of this code or cause.

    Raises:
        UsageError: There is none; names the nearest.
    """
    wanted = name.strip().lower().replace("-", "_")
    for rule in RULES:
        if wanted in (rule.code.lower(), rule.cause):
            return rule
    if any(character.isdigit() for character in wanted):
        near = _nearest_code(wanted)
    else:
        near = nearest(wanted, [rule.cause for rule in RULES], cutoff=0.0)
    raise UsageError(
        f'There is no rule "{name}"; the nearest is {near}. `bnprobe explain` without a code lists all rules.'
    )


def check_code(code: str) -> None:
    """Refuse a code or prefix that fits no rule.

    Raises:
        UsageError: Names the nearest code.
    """
    if not any(matches_code(rule.code, (code,)) for rule in RULES):
        raise UsageError(
            f'There is no rule "{code}", and no code begins with it; the nearest code is {_nearest_code(code)}.'
            " `bnprobe explain` lists all rules."
        )


def matches_code(code: str, prefixes: Iterable[str]) -> bool:
    """Whether a code begins with one of the prefixes."""
    return any(prefix and code.upper().startswith(prefix.upper()) for prefix in prefixes)


def _nearest_code(given: str) -> str:
    """The code with the longest common beginning; of several the one most alike."""
    return max((rule.code for rule in RULES), key=lambda code: (_common(code, given.upper()), _likeness(code, given)))


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other.upper()).ratio()
