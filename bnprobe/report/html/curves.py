"""Charts of an experiment: values with their intervals against numbers or names, and what formulas give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from bnprobe.records import LabChart, LabSeries
from bnprobe.report.html.vega import (
    LINES,
    altair,
    colour,
    drawing,
    drawn_from,
    finished,
    log_scale,
    rounded,
    told,
    y_axis,
)
from bnprobe.report.lab import value_at

_HEIGHT = 300

_APART = {"tickCount": 8, "labelSeparation": 8}
"""Numbers along x do not run together; of ones that are too near to each other, some are left out."""

_LONG = 8
"""Longer names along x are turned."""


def colours(chart: LabChart) -> Iterator[tuple[str, str, bool]]:
    """Name and colour of each series, and whether it is theory, which has the colour of text."""
    looks = cycle(LINES)
    for series in chart.series:
        yield series.name, "ink" if series.theory else next(looks), series.theory


@drawing
def curves(chart: LabChart, keyed: bool = False) -> dict[str, Any]:
    """The chart; a formula is dashed.

    Args:
        chart: What to draw.
        keyed: Whether the chart itself says which colour means what.
    """
    alt = altair()
    rows = [row for series in chart.series for row in _rows(series, _floor(chart))]
    looks = {name: colour(look) for name, look, _ in colours(chart)}
    legend = (
        alt.Legend(title=None, orient="bottom", columns=2, columnPadding=24, labelLimit=400, symbolType="stroke")
        if keyed
        else None
    )
    by_name = alt.Color("name:N", legend=legend, scale=alt.Scale(domain=list(looks), range=list(looks.values())))
    names = any(isinstance(at, str) for series in chart.series for at in series.x)
    x = _names_axis(chart) if names else _numbers_axis(chart)
    scale, axis = _y_scale(chart, rows)
    y, low = alt.Y("y:Q", scale=scale, axis=axis), alt.Y("low:Q", scale=scale, axis=axis)
    beside = {"xOffset": alt.XOffset("name:N", scale=alt.Scale(domain=list(looks)))} if names else {}
    tooltip = told(("name", ""), ("at", chart.x), ("text", chart.y))
    measured = drawn_from("measured")
    bounds = measured.mark_rule(strokeWidth=1.6).encode(x=x, y=low, y2="high", color=by_name, **beside)
    dots = measured.mark_point(filled=True, size=55, opacity=1).encode(
        x=x, y=y, color=by_name, tooltip=tooltip, **beside
    )
    theory = drawn_from("theory")
    dashed = (
        theory.mark_tick(thickness=2, strokeDash=[3, 3], width=18).encode(
            x=x, y=y, color=by_name, tooltip=tooltip, **beside
        )
        if names
        else theory.mark_line(strokeDash=[5, 4], strokeWidth=1.4).encode(x=x, y=y, color=by_name, tooltip=tooltip)
    )
    lines = [] if names else [measured.mark_line(strokeWidth=2).encode(x=x, y=y, color=by_name)]
    return finished(
        alt.layer(*lines, bounds, dots, dashed),
        height=_HEIGHT,
        measured=[row for row in rows if not row["theory"]],
        theory=[row for row in rows if row["theory"]],
    )


def _floor(chart: LabChart) -> float | None:
    """Where what is 0 ends on a logarithmic axis: at the least value above; None: the axis is linear."""
    if chart.y_scale != "log":
        return None
    ends = (each for series in chart.series for each in (*series.y, *series.low) if each is not None and each > 0)
    return min(ends, default=1.0)


def _rows(series: LabSeries, floor: float | None) -> Iterator[dict[str, Any]]:
    for index, (at, value) in enumerate(zip(series.x, series.y, strict=True)):
        if value is None or (floor is not None and value <= 0):
            continue
        low, high = series.low[index], series.high[index]
        if floor is not None and low is not None:
            low = max(low, floor)
        yield {
            "name": series.name,
            "theory": series.theory,
            "x": at if isinstance(at, str) else rounded(at),
            "at": at if isinstance(at, str) else f"{at:g}",
            "y": rounded(value),
            "low": rounded(value if low is None else low),
            "high": rounded(value if high is None else high),
            "text": value_at(series, index),
        }


def _names_axis(chart: LabChart) -> Any:
    alt = altair()
    names = list(dict.fromkeys(str(at) for series in chart.series for at in series.x))
    turned = -30 if max(map(len, names), default=0) * len(names) > _LONG * 8 else 0
    return alt.X("x:N", sort=names, axis=alt.Axis(title=chart.x, labelAngle=turned, grid=False, labelLimit=200))


def _numbers_axis(chart: LabChart) -> Any:
    alt = altair()
    places = sorted({float(at) for series in chart.series for at in series.x})
    if chart.x_scale == "log" and places and places[0] > 0:
        scale = alt.Scale(type="log", domain=[places[0] / 1.15, places[-1] * 1.15], nice=False)
        values = {"values": places} if len(places) <= 12 else {}
        return alt.X("x:Q", scale=scale, axis=alt.Axis(title=chart.x, format="~g", grid=False, **values))
    scale = alt.Scale(zero=False, nice=False, padding=8)
    # Of "~g", Vega keeps two digits where ticks are ten apart, and writes 1.1e+2.
    return alt.X("x:Q", scale=scale, axis=alt.Axis(title=chart.x, format="~r", grid=False, **_APART))


def _y_scale(chart: LabChart, rows: list[dict[str, Any]]) -> tuple[Any, Any]:
    ends = [value for row in rows for value in (row["low"], row["y"], row["high"]) if math.isfinite(value)]
    if chart.y_scale == "log" and ends:
        return log_scale(ends, chart.y)
    if chart.bounds != (None, None) and ends:
        least, most = chart.bounds
        room = 0.03 * (max(ends) - min(ends)) or 0.03
        low = min(ends) - room if least is None else max(min(ends) - room, least)
        high = max(ends) + room if most is None else min(max(ends) + room, most)
        scale = altair().Scale(domain=[rounded(low), rounded(high)], zero=False, nice=False)
        return scale, y_axis(chart.y, format="~r")
    return altair().Scale(zero=False, nice=True, padding=6), y_axis(chart.y, format="~r")
