"""What an experiment of ``bnprobe lab`` found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bnprobe.records.base import SCHEMA_VERSION, Environment, Record, Tool
from bnprobe.records.document import Document

ClaimVerdict = Literal["shown", "refuted", "open"]
"""What the figures say of a claim; open: they do not decide it."""

Setting = str | int | float | bool

Scale = Literal["linear", "log"]


FEWEST_SEEDS = 3
"""Of fewer figures no interval is given: two that happen to be alike would give one of no width, and decide claims."""


@dataclass(frozen=True)
class Claim(Record):
    """A claim about what was measured, and what the figures say of it.

    Attributes:
        text: The claim, a sentence.
        verdict: Decided by an interval or a tolerance, never by a single run.
        evidence: The figures that decide it, a sentence.
        trained: Whether it is about what networks learn, so that less than budget 1 does not decide it; otherwise it is
            exact, or of a formula, a simulation or times.
    """

    text: str
    verdict: ClaimVerdict
    evidence: str
    trained: bool = False


@dataclass(frozen=True)
class LabSeries(Record):
    """Values against x, one for each.

    Attributes:
        name: What it is of.
        x: Numbers, or names of what is compared.
        y: None: there is no value, e.g. of a run that diverged.
        low, high: Ends of 95% intervals; None: there is none.
        theory: Whether a formula gave it.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...]
    high: tuple[float | None, ...]
    theory: bool = False


@dataclass(frozen=True)
class LabChart(Record):
    """A chart.

    Attributes:
        name: Unique in the experiment, a word.
        title: What it shows.
        x, y: What the axes show, with units.
        x_scale, y_scale: Of the axes.
        bounds: Between which the figures are by what they are, e.g. 0 and 1 of an accuracy; None: there is no bound.
        series: What is drawn.
        legend: How to read it, a sentence each.
    """

    name: str
    title: str
    x: str
    y: str
    x_scale: Scale = field(default="linear", kw_only=True)
    y_scale: Scale = field(default="linear", kw_only=True)
    bounds: tuple[float | None, float | None] = field(default=(None, None), kw_only=True)
    series: tuple[LabSeries, ...]
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabTable(Record):
    """A table of figures as they are shown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    legend: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial(Record):
    """One run of an experiment.

    Attributes:
        condition: What was different from other trials.
        seed: Of everything random in it.
        values: What was measured; None: no number, e.g. because the training diverged.
        seconds: Processor time.
    """

    condition: Mapping[str, Setting]
    seed: int
    values: Mapping[str, float | tuple[float | None, ...] | None]
    seconds: float

    def number(self, name: str) -> float | None:
        """A figure; None: it is not there, or no number."""
        value = self.values.get(name)
        return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, repr=False)
class LabReport(Document):
    """What an experiment found, and the trials that say so.

    Attributes:
        experiment: Its name.
        title: What it is about.
        question: What it asks.
        sources: Papers that it follows.
        data: What the networks were trained and scored on; empty: the experiment needs no data.
        budget: Amount of work, as a multiple of the default.
        seeds: Trials of each condition.
        seconds: Processor time of all trials.
        claims, charts, tables: What was found.
        notes: What the reader should know, a sentence each.
        trials: Every run.
        answer: What the figures answer to the question; empty: nothing.
        folder: What ``--data`` named; None: nothing.
    """

    tool: Tool
    environment: Environment
    experiment: str
    title: str
    question: str
    sources: tuple[str, ...]
    data: str
    budget: float
    seeds: int
    seconds: float
    claims: tuple[Claim, ...]
    charts: tuple[LabChart, ...]
    tables: tuple[LabTable, ...]
    notes: tuple[str, ...]
    trials: tuple[Trial, ...]
    answer: str = ""
    folder: str | None = None
    schema_version: int = SCHEMA_VERSION
