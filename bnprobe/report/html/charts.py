"""Charts of D against batch size, of scores and of rates.

A chart is Vega-Lite, made with Altair by a function from plain figures, in colours that the page's style sheet names.
Names are values in the data, never a part of a specification. A chart has the width of its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bnprobe.records import Estimate, Interval
from bnprobe.report import figures
from bnprobe.report.html.vega import (
    LINES,
    SMALLEST,
    altair,
    colour,
    drawing,
    drawn_from,
    finished,
    floored,
    hue,
    log_scale,
    rounded,
    told,
)
from bnprobe.report.page import UNMEASURED

# --- D against batch size ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizePoint:
    """D at one batch size, with its interval, what i.i.d. samples would give, and how it stands."""

    size: int
    mismatch: float
    interval: Interval
    theory: float | None
    limit: float


@dataclass(frozen=True)
class SizeCurve:
    """A layer at several batch sizes; of a role ("worst", "median"), it stands out."""

    name: str
    points: tuple[SizePoint, ...]
    role: str = ""


@drawing
def batch_sizes(curves: Sequence[SizeCurve]) -> dict[str, Any]:
    """D of every layer against batch size, both logarithmic; with intervals and theory for those that stand out.

    The limit is that of the first.
    """
    alt = altair()
    sizes = sorted({point.size for curve in curves for point in curve.points})
    measured = [max(point.mismatch, SMALLEST) for curve in curves for point in curve.points]
    expected = [point.theory for curve in curves if curve.role for point in curve.points if point.theory]
    x = alt.X(
        "size:Q",
        scale=alt.Scale(type="log", base=2, domain=[sizes[0] / 1.15, sizes[-1] * 1.15], nice=False),
        axis=alt.Axis(title="samples in a batch", values=sizes, format="d", grid=False),
    )
    limits = [point.limit for curve in curves[:1] for point in curve.points]
    scale, axis = log_scale([*measured, *limits, *(max(value, min(measured)) for value in expected)], "D at inference")
    rows = [_size_row(curve, point) for curve in curves for point in curve.points]
    marked = [row for row in rows if row["role"]]
    by_role = hue("role", dict(zip(roles(curves), LINES, strict=False)))
    y = alt.Y("D:Q", scale=scale, axis=axis)
    every, some = drawn_from("rows"), drawn_from("told")
    tooltip = told(("name", ""), ("at", "samples in a batch"), ("text", "D (95%)"), ("theory_text", "i.i.d. samples"))
    faint = every.mark_line(color=colour("soft"), opacity=0.35, strokeWidth=1).encode(x=x, y=y, detail="name:N")
    theory = some.mark_line(strokeDash=[4, 4], strokeWidth=1.5, opacity=0.9)
    return finished(
        alt.layer(
            faint,
            theory.encode(x=x, y=alt.Y("theory:Q", scale=scale, axis=axis), color=by_role),
            drawn_from("limit")
            .mark_line(color=colour("ink"), strokeDash=[1, 4], strokeWidth=1.6, strokeCap="round")
            .encode(x=x, y=alt.Y("limit:Q", scale=scale, axis=axis)),
            some.mark_line(strokeWidth=2.4).encode(x=x, y=y, color=by_role),
            some.mark_rule(strokeWidth=1.6).encode(
                x=x, y=alt.Y("low:Q", scale=scale, axis=axis), y2="high", color=by_role
            ),
            every.mark_point(filled=True, size=30, opacity=0.45, color=colour("soft")).encode(
                x=x, y=y, tooltip=tooltip
            ),
            some.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=by_role, tooltip=tooltip),
        ),
        height=280,
        rows=rows,
        told=marked,
        limit=[{"size": point.size, "limit": rounded(point.limit)} for curve in curves[:1] for point in curve.points],
    )


def roles(curves: Sequence[SizeCurve]) -> list[str]:
    """The roles that there are, in the order of their colours."""
    return list(dict.fromkeys(curve.role for curve in curves if curve.role))


def _size_row(curve: SizeCurve, point: SizePoint) -> dict[str, Any]:
    low, high = point.interval
    return {
        "name": curve.name,
        "role": curve.role,
        "size": point.size,
        "at": str(point.size),
        "D": floored(point.mismatch),
        "low": floored(low),
        "high": floored(point.mismatch if high is None else high),
        "theory": floored(point.theory),
        "text": f"{figures.mismatch(point.mismatch)} ({figures.span(point.interval)})",
        "theory_text": None if point.theory is None else figures.mismatch(point.theory),
    }


# --- Scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A line of a chart of scores.

    Attributes:
        label: What it is of.
        text: Its figure, as printed.
        start, end: What is drawn: a value with a start, or from one value to another.
        interval: Around the end.
        look: The colour.
        seeds: Single runs.
    """

    label: str
    text: str
    start: float | None
    end: float | None
    look: str
    interval: Interval | None = None
    seeds: tuple[float, ...] = ()


_LINE = 40
"""Pixels of a line with its label above it."""


def _bar_rows(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    return [
        {
            "row": number,
            "label": bar.label,
            "text": bar.text,
            "start": rounded(bar.start),
            "end": rounded(bar.end),
            "low": None if bar.interval is None else rounded(bar.interval[0]),
            "high": None if bar.interval is None else rounded(bar.interval[1]),
            "look": bar.look,
        }
        for number, bar in enumerate(bars)
    ]


def _bar_scale(bars: Sequence[Bar], zero: bool) -> Any:
    values = [value for bar in bars for value in (bar.start, bar.end, *bar.seeds) if value is not None]
    values += [end for bar in bars for end in bar.interval or () if end is not None]
    values = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low - 0.06 * ((high - low) or abs(high) or 1.0)
    high += 0.06 * ((high - low) or abs(high) or 1.0)
    return altair().Scale(domain=[rounded(low), rounded(high)], nice=False, zero=False)


def _bar_parts(bars: Sequence[Bar], zero: bool) -> tuple[Any, Any, Any, Any]:
    """The chart, its axes and its colours."""
    alt = altair()
    y = alt.Y("row:O", axis=None, scale=alt.Scale(paddingInner=0.0, paddingOuter=0.0))
    axis = alt.Axis(title=None, tickCount=5, format="~g")
    x = {name: alt.X(f"{name}:Q", scale=_bar_scale(bars, zero), axis=axis) for name in ("start", "end", "low")}
    return drawn_from("rows"), x, y, hue("look", {bar.look: bar.look for bar in bars})


def _labels(chart: Any, y: Any) -> list[Any]:
    """Words at the left and the figure at the right, above the line."""
    alt = altair()
    left = chart.mark_text(align="left", baseline="middle", dy=-9, fontSize=12, color=colour("ink"), limit=1000)
    right = chart.mark_text(align="right", baseline="middle", dy=-9, fontSize=12, color=colour("soft"))
    return [
        left.encode(x=alt.value(0), y=y, text="label:N"),
        right.encode(x=alt.value("width"), y=y, text="text:N"),
    ]


@drawing
def waterfall(bars: Sequence[Bar]) -> dict[str, Any]:
    """Levels as bars from 0, and between them the steps, where each begins and ends."""
    alt = altair()
    chart, x, y, by_look = _bar_parts(bars, zero=True)
    thick = {"height": 11, "yOffset": 8, "cornerRadius": 1.5}
    body = chart.mark_bar(**thick).encode(x=x["start"], x2="end", y=y, color=by_look)
    around = chart.mark_rule(color=colour("ink"), strokeWidth=1.4, yOffset=8).encode(x=x["low"], x2="high", y=y)
    return finished(alt.layer(body, around, *_labels(chart, y)), height=_LINE * len(bars), rows=_bar_rows(bars))


@drawing
def dumbbells(bars: Sequence[Bar]) -> dict[str, Any]:
    """From one value to another, with the interval of the second."""
    alt = altair()
    chart, x, y, by_look = _bar_parts(bars, zero=False)
    down = {"yOffset": 8}
    return finished(
        alt.layer(
            chart.mark_rule(color=colour("before"), opacity=0.6, strokeWidth=1.6, **down).encode(
                x=x["start"], x2="end", y=y
            ),
            chart.mark_rule(strokeWidth=5, opacity=0.35, **down).encode(x=x["low"], x2="high", y=y, color=by_look),
            chart.mark_point(filled=False, opacity=1, stroke=colour("before"), strokeWidth=1.6, size=60, **down).encode(
                x=x["start"], y=y
            ),
            chart.mark_point(filled=True, opacity=1, size=70, **down).encode(x=x["end"], y=y, color=by_look),
            *_labels(chart, y),
        ),
        height=_LINE * len(bars),
        rows=_bar_rows(bars),
    )


@drawing
def estimates(bars: Sequence[Bar]) -> dict[str, Any]:
    """Means with their intervals, and the runs that they are means over."""
    alt = altair()
    chart, x, y, by_look = _bar_parts(bars, zero=False)
    seeds = [{"row": row, "end": rounded(value)} for row, bar in enumerate(bars) for value in bar.seeds]
    down = {"yOffset": 8}
    runs = drawn_from("seeds").mark_tick(color=colour("soft"), thickness=1.2, size=13, **down)
    return finished(
        alt.layer(
            *([runs.encode(x=x["end"], y=y)] if seeds else []),
            chart.mark_rule(strokeWidth=5, opacity=0.4, **down).encode(x=x["low"], x2="high", y=y, color=by_look),
            chart.mark_point(filled=True, opacity=1, size=70, **down).encode(x=x["end"], y=y, color=by_look),
            *_labels(chart, y),
        ),
        height=_LINE * len(bars),
        rows=_bar_rows(bars),
        seeds=seeds,
    )


# --- Rates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatePoint:
    """D that a running average of one rate gives, from one start; ``error``: its standard error."""

    rate: str
    start: str
    mismatch: float
    error: float | None
    best: bool


@drawing
def rates(points: Sequence[RatePoint]) -> dict[str, Any]:
    """D against the rate of the running average, a line for each start; the best of each is filled."""
    alt = altair()
    by_start = hue("start", dict(zip(dict.fromkeys(point.start for point in points), LINES, strict=False)))
    rows = [
        {
            "rate": point.rate,
            "start": point.start,
            "D": floored(point.mismatch),
            "low": floored(point.mismatch - 2 * (point.error or 0.0)),
            "high": floored(point.mismatch + 2 * (point.error or 0.0)),
            "text": f"{point.mismatch:.4g}",
            "best": "best" if point.best else "",
        }
        for point in points
    ]
    values = [max(point.mismatch, SMALLEST) for point in points]
    scale, axis = log_scale(values, "D in training")
    x = alt.X("rate:N", sort=None, axis=alt.Axis(title="weight of the new batch (momentum)", labelAngle=0, grid=False))
    y = alt.Y("D:Q", scale=scale, axis=axis)
    chart = drawn_from("rows")
    best = drawn_from("best")
    tooltip = told(("rate", ""), ("start", "starting"), ("text", "D"), ("best", "tracks"))
    low = alt.Y("low:Q", scale=scale, axis=axis)
    return finished(
        alt.layer(
            chart.mark_line(strokeWidth=2).encode(x=x, y=y, color=by_start, detail="start:N"),
            chart.mark_rule(strokeWidth=1.4).encode(x=x, y=low, y2="high", color=by_start),
            chart.mark_point(filled=True, size=40, opacity=1).encode(x=x, y=y, color=by_start, tooltip=tooltip),
            best.mark_point(filled=False, size=170, opacity=1, strokeWidth=2).encode(x=x, y=y, color=by_start),
        ),
        height=260,
        rows=rows,
        best=[row for row in rows if row["best"]],
    )


def estimate_bar(label: str, value: Estimate | None, look: str, seeds: Iterable[float] = ()) -> Bar:
    """A line of `estimates`."""
    if value is None:
        return Bar(label, UNMEASURED, None, None, look)
    return Bar(label, figures.estimate(value), None, value.mean, look, value.interval, tuple(seeds))
