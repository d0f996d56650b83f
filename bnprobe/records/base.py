"""What all documents share: the base of their records, estimates with their intervals, who wrote them and where."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

SCHEMA_VERSION = 1

Interval = tuple[float, float | None]
"""Lower and upper end of a 95% interval; None: no upper end can be given."""

OMITTED_WHEN_EMPTY = frozenset({"baseline", "statistics"})
"""Fields that a document leaves out where they are empty."""


class Record:
    """Base of all records. Where pydantic reads one, a key that is no field is an error.

    As text it is a line: records in it are named, and long collections counted.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # a dataclass writes one only if the class has none

    def __repr__(self) -> str:
        values = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={_short(value)}' for name, value in values.items())})"


_MOST_ITEMS = 8
"""Longer collections are counted."""


def _short(value: object) -> str:
    if isinstance(value, Record):
        return f"{type(value).__name__}(...)"
    if not isinstance(value, tuple | list | dict) or (_is_plain(value) and len(value) <= _MOST_ITEMS):
        return repr(value)
    return f"<{type(value).__name__} of {len(value)}>"


def _is_plain(values: Iterable[object]) -> bool:
    return not any(isinstance(value, Record | tuple | list | dict) for value in values)


@dataclass(frozen=True)
class Estimate(Record):
    """A mean and its 95% interval; None where there is none, e.g. with one value, or where all values are the same."""

    mean: float
    interval: Interval | None


Measure = Literal["loss", "metric"]
Goal = Literal["max", "min"]

MEASURES: tuple[Measure, ...] = ("loss", "metric")


def leading(known: Collection[Measure], goal_is_known: bool = True) -> Measure | None:
    """Which figure comes first, of those that are known: the metric, by which a network is judged, else the loss.

    Args:
        known: The measures to choose from; None is returned if there is none.
        goal_is_known: False: figures are ranked by it, and nobody said whether a larger metric is better. Then the loss
            comes first.
    """
    order: tuple[Measure, ...] = ("metric", "loss") if goal_is_known else ("loss", "metric")
    return next((measure for measure in order if measure in known), None)


@dataclass(frozen=True)
class Score(Record):
    """Loss and metric; None where not given."""

    loss: float | None
    metric: float | None

    def of(self, measure: Measure) -> float | None:
        """One of the two."""
        return self.loss if measure == "loss" else self.metric

    @property
    def known(self) -> tuple[Measure, ...]:
        """Those that are given."""
        return tuple(measure for measure in MEASURES if self.of(measure) is not None)


@dataclass(frozen=True)
class Tool(Record):
    """The program that wrote the document, and its version."""

    name: str
    version: str


@dataclass(frozen=True)
class Environment(Record):
    """The machine and the software it ran on."""

    python: str
    torch: str
    platform: str
    device_name: str
    threads: int
