"""Charts of a training run: lines over steps, the layers over steps, and what happened at which step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnprobe.report import figures
from bnprobe.report.html.network_charts import axis_labels
from bnprobe.report.html.vega import (
    altair,
    colour,
    drawing,
    drawn_from,
    finished,
    hue,
    log_scale,
    rounded,
    sparse_labels,
    told,
    y_axis,
)

_WIDE = 8.0
"""Values that differ by more than this factor have a logarithmic axis."""

_MOST_DOTS = 25
"""Points of a line that are drawn as dots."""


# --- Lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: What it is of; lines of one name have one colour.
        points: (x, y), or (x, y, half the interval); y None: a gap.
        look: A colour of ``LINES``.
        run: Tells lines of one name apart.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    look: str
    run: str = ""


@dataclass(frozen=True)
class Mark:
    """What happened at a step: a line from top to bottom, with a label above it.

    Attributes:
        step: Where.
        label: What, in a word.
        says: What, where a pointer is.
        where: The layers.
        look: A colour of the style sheet.
    """

    step: int
    label: str
    says: str
    where: str
    look: str


@dataclass(frozen=True)
class Course:
    """What the charts of one run have in common.

    Attributes:
        first, last: Steps at the ends of the axis.
        marks: What happened, the most important first.
    """

    first: int
    last: int
    marks: tuple[Mark, ...] = ()

    @property
    def x(self) -> dict[str, Any]:
        """The axis of steps."""
        scale = altair().Scale(domain=[self.first, max(self.last, self.first + 1)], nice=False)
        return {"scale": scale, "axis": _axis("step")}


def _axis(title: str) -> Any:
    return altair().Axis(title=title, format=",d", grid=False, tickCount=6)


_LANES = 3
"""Labels of marks stand in so many rows."""

_LANE = 13
"""Pixels of a row."""

_NARROWEST = 450.0
"""Pixels of a chart of steps where there is least room."""

_LETTER = 7.0
"""Pixels of a letter of a label."""


def _marks(course: Course, by_look: Any) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
    """The marks of a course, whose labels stand above the chart where they have room: layers, and what they draw."""
    if not course.marks:
        return [], {}
    alt = altair()
    x = alt.X("x:Q", **course.x)
    tooltip = told(("says", ""), ("at", "step"), ("where", "layers"))
    lanes = {name: labels for name, labels in _lanes(course).items() if labels}
    labels = [
        drawn_from(name)
        .mark_text(baseline="bottom", fontSize=11, fontWeight=600)
        .encode(x=x, y=alt.value(-2 - _LANE * number), text="label:N", color=by_look)
        for number, name in enumerate(lanes)
    ]
    marks = drawn_from("marks")
    pointed = marks.mark_rule(strokeWidth=9, opacity=0).encode(x=x, tooltip=tooltip)
    layers = [marks.mark_rule(strokeWidth=1.4, opacity=0.9).encode(x=x, color=by_look), *labels, pointed]
    return layers, {"marks": _mark_rows(course), **lanes}


def _with_room(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification with room above the chart for the labels of marks."""
    lanes = sum(f"labels{number}" in spec["datasets"] for number in range(_LANES))
    return {**spec, "padding": {**spec["padding"], "top": spec["padding"]["top"] + _LANE * lanes}}


def _mark_rows(course: Course) -> list[dict[str, Any]]:
    return [
        {"x": mark.step, "at": f"{mark.step:,}", "says": mark.says, "where": mark.where, "look": mark.look}
        for mark in course.marks
    ]


def _lanes(course: Course) -> dict[str, list[dict[str, Any]]]:
    """The labels of the marks in rows in which none covers another; those that have no room are left out."""
    lanes: dict[str, list[dict[str, Any]]] = {f"labels{number}": [] for number in range(_LANES)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes}
    a_pixel = max(course.last - course.first, 1) / _NARROWEST
    for mark in course.marks:
        half = _LETTER * a_pixel * (len(mark.label) + 1) / 2
        centre = max(min(mark.step, course.last - half), course.first + half)
        for name, others in taken.items():
            if 2 * half <= _NARROWEST * a_pixel and all(
                centre + half <= low or high <= centre - half for low, high in others
            ):
                others.append((centre - half, centre + half))
                lanes[name].append({"x": rounded(centre), "label": mark.label, "look": mark.look})
                break
    return lanes


@drawing
def lines(
    found: Iterable[Line],
    x_title: str,
    y_title: str,
    logarithmic: bool = False,
    *,
    course: Course | None = None,
    limits: Mapping[str, float] | None = None,
    text: Callable[[float], str] = figures.score,
    form: str = "~g",
    height: int = 240,
) -> dict[str, Any]:
    """Lines over steps.

    Args:
        found: The lines; a value that is not finite is a cross at the bottom.
        x_title, y_title: Of the axes, and before what a pointer shows.
        logarithmic: Whether the axis of y may be.
        course: The run that they are of.
        limits: Dotted lines, by their labels.
        text: How a pointer shows a value.
        form: How the axis does.
        height: Pixels.
    """
    alt = altair()
    found = list(found)
    points = [(line, at, y) for line in found for at, y in line.points if y is not None]
    rows: list[dict[str, Any]] = [
        {**_line_row(line, at), "y": rounded(y), "text": text(y)}
        for line, at, y in points
        if math.isfinite(y) and (y > 0 or not logarithmic)
    ]
    odd = [{**_line_row(line, at), "text": "not finite"} for line, at, y in points if not math.isfinite(y)]
    marks = course.marks if course else ()
    by_look = hue("look", {look: look for look in [*(line.look for line in found), *(mark.look for mark in marks)]})
    x = alt.X("x:Q", **(course.x if course else {"axis": _axis(x_title)}))
    scale = alt.Scale(zero=False, nice=False, padding=6)
    y_values = y_axis(y_title, format=form)
    values = [row["y"] for row in rows] + list((limits or {}).values())
    if logarithmic and values and max(values) > _WIDE * min(values):
        scale, y_values = log_scale(values, y_title, form)
    y = alt.Y("y:Q", scale=scale, axis=y_values)
    chart = drawn_from("rows")
    # Many points would hide the lines; a pointer finds them all the same.
    dots = 0.9 if max((len(line.points) for line in found), default=0) <= _MOST_DOTS else 0.0
    tooltip = told(("name", ""), ("run", "seed"), ("at", x_title), ("text", y_title))
    layers = [
        chart.mark_line(strokeWidth=1.5, opacity=0.75).encode(x=x, y=y, color=by_look, detail=["name:N", "run:N"]),
        chart.mark_point(filled=True, size=45, opacity=dots).encode(x=x, y=y, color=by_look, tooltip=tooltip),
    ]
    data: dict[str, list[dict[str, Any]]] = {"rows": rows}
    if limits:
        dotted, *named = _limits(y)
        layers, data["limits"] = [dotted, *layers, *named], [{"label": k, "y": rounded(at)} for k, at in limits.items()]
    if odd:
        data["odd"] = odd
        cross = drawn_from("odd").mark_point(shape="cross", angle=45, filled=True, size=70, opacity=1, yOffset=-6)
        layers.append(cross.encode(x=x, y=alt.value("height"), color=by_look, tooltip=tooltip))
    above, marked = _marks(course, by_look) if course else ([], {})
    return _with_room(finished(alt.layer(*layers, *above), height, **data, **marked))


def _limits(y: Any) -> list[Any]:
    """Dotted lines, and their names at the right."""
    drawn = drawn_from("limits")
    dotted = drawn.mark_rule(color=colour("ink"), strokeDash=[1, 4], strokeWidth=1.6, strokeCap="round")
    look = {"align": "right", "baseline": "bottom", "dy": -2}
    named = [  # the first in the colour of the page, so that the second can be read on any line
        drawn.mark_text(**look, color=colour("paper"), stroke=colour("paper"), strokeWidth=4),
        drawn.mark_text(**look, color=colour("soft")),
    ]
    return [dotted.encode(y=y), *(each.encode(x=altair().value("width"), y=y, text="label:N") for each in named)]


def _line_row(line: Line, at: float) -> dict[str, Any]:
    return {"name": line.name, "run": line.run, "look": line.look, "x": at, "at": f"{at:,.0f}"}


# --- The layers over a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """A layer over some steps, in which its n_eq was of one kind.

    Attributes:
        layer: Its place in the network.
        begin, end: Where it is drawn.
        steps: Which steps these are.
        n_eq: From the smallest to the largest.
        look: A colour of the style sheet.
    """

    layer: int
    begin: float
    end: float
    steps: str
    n_eq: str
    look: str


_MOST_HEIGHT, _HIGHEST, _LOWEST = 420, 16, 5
"""Pixels of a heat map where rows are not lower than the lowest, and of a row."""

_NAME_HEIGHT = 12
"""Pixels of a name beside a row."""

_NAME = 32
"""Characters of it."""


@drawing
def heat(names: Sequence[str], signs: Sequence[str], found: Sequence[Stretch], course: Course) -> dict[str, Any]:
    """A row for each layer, from input to output, with the kind of its n_eq over steps."""
    alt = altair()
    high = max(min(_MOST_HEIGHT // len(names), _HIGHEST), _LOWEST)
    labels = axis_labels(names, signs, _NAME, max(high * len(names) // _NAME_HEIGHT, 1))
    rows = [
        {
            "label": labels[each.layer],
            "name": names[each.layer],
            "x": rounded(each.begin),
            "end": rounded(each.end),
            "steps": each.steps,
            "text": each.n_eq,
            "look": each.look,
        }
        for each in sorted(found, key=lambda each: each.layer)
    ]
    looks = dict.fromkeys([*(each.look for each in found), *(mark.look for mark in course.marks)])
    by_look = hue("look", {look: look for look in looks})
    axis = alt.Axis(title=None, labelPadding=4, labelFontSize=min(11, _NAME_HEIGHT - 1), **sparse_labels())
    y = alt.Y("label:N", sort=None, axis=axis, scale=alt.Scale(paddingInner=0.08, paddingOuter=0.0))
    tooltip = told(("name", ""), ("text", "n_eq"), ("steps", "steps"))
    cells = drawn_from("rows").mark_rect(opacity=1).encode(x=alt.X("x:Q", **course.x), x2="end", y=y)
    above, marked = _marks(course, by_look)
    chart = alt.layer(cells.encode(color=by_look, tooltip=tooltip), *above)
    return _with_room(finished(chart, high * len(names), rows=rows, **marked))
