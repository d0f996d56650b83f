"""Requirements on a repair, such as ``"metric>=0.97"``: their syntax, and whether they hold."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bnprobe.errors import UsageError
from bnprobe.wording import nearest

QUANTITIES = {
    "metric": "metric on the held-out data, for the weights that are written (those of the first seed)",
    "loss": "loss on the held-out data, for the same weights",
    "gain": "gain over the baseline in the metric (in the loss without a metric): lower end of the 95% interval",
    "flagged": "number of layers that the scan of the repaired model flags",
}
"""The quantities that a requirement can name, and their meaning."""

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_FORM = re.compile(r"\s*([A-Za-z_]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Requirement:
    """A quantity, a comparison and a number."""

    text: str
    quantity: str
    comparison: str
    limit: float

    def holds(self, value: float | None) -> bool:
        """Whether a value meets the requirement; a value that was not measured never does."""
        return value is not None and _COMPARISONS[self.comparison](value, self.limit)


def parse_requirement(text: str) -> Requirement:
    """Parse one requirement.

    Raises:
        UsageError: The form is wrong or the quantity is unknown; the message says what is accepted.
    """
    match = _FORM.fullmatch(text)
    number = _number(match.group(3)) if match else None
    if match is None or number is None:
        raise UsageError(
            f'--require "{text}" is not a requirement: give a quantity, a comparison and a number, as in'
            ' "metric>=0.97". Keep the quotes, because > has a meaning of its own in the shell.'
        )
    quantity = match.group(1)
    if quantity not in QUANTITIES:
        near = nearest(quantity, QUANTITIES, cutoff=0.0)
        known = ", ".join(QUANTITIES)
        raise UsageError(f'--require "{text}": unknown quantity "{quantity}" (known: {known}); the nearest is {near}.')
    return Requirement(text.strip(), quantity, match.group(2), number)


def check_requirements(
    texts: tuple[str, ...], values: Mapping[str, float | None]
) -> list[tuple[Requirement, float | None, bool]]:
    """Every requirement with the value that was measured, and whether it holds."""
    found = [(requirement, values.get(requirement.quantity)) for requirement in map(parse_requirement, texts)]
    return [(requirement, value, requirement.holds(value)) for requirement, value in found]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
