"""How often Batch Renorm clipped r and d at the end of a run."""

from __future__ import annotations

from collections import deque
from typing import Any

Fractions = tuple[float, float]
"""Fractions of r and of d that were clipped in a step."""

_PART = 10


class ClippedAtEnd:
    """Means over the last tenth of the steps taken.

    Args:
        steps: Upper limit on the number of steps.
    """

    def __init__(self, steps: int) -> None:
        self._last: deque[Fractions] = deque(maxlen=_tenth(steps))

    def add(self, fractions: Fractions | None) -> None:
        """Add the fractions of one step; None if there is nothing to clip."""
        if fractions is not None:
            self._last.append(fractions)

    def mean(self, steps: int) -> Fractions | None:
        """Mean over the last tenth of ``steps`` steps; None if nothing was added."""
        last = list(self._last)[-_tenth(steps) :]
        if not last:
            return None
        r, d = zip(*last, strict=True)
        return sum(r) / len(r), sum(d) / len(d)

    def state_dict(self) -> dict[str, Any]:
        """The state, as plain types."""
        return {"last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._last.clear()
        self._last.extend((r, d) for r, d in state["last"])


def _tenth(steps: int) -> int:
    return max(1, steps // _PART)
