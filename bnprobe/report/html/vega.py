"""What all charts of a page share: how Altair is called, colours and axes, and how numbers are rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec

LINES = tuple(f"line-{number}" for number in range(1, 7))
"""Colours of lines."""

_AXIS = 46
"""Pixels of a y axis."""

SMALLEST = 1e-4
"""A mismatch below this is drawn here on a logarithmic axis."""

_DIGITS = 5

_MOST_TICKS = 9
"""So many labels have room beside an axis."""

_Given = ParamSpec("_Given")


def colour(name: str) -> str:
    """A colour of the style sheet."""
    return f"var(--{name})"


@cache
def altair() -> Any:
    """Altair, which is imported only where a chart is drawn."""
    import altair

    return altair


def hue(field: str, looks: Mapping[str, str]) -> Any:
    """The colours of marks by the values of a field: for each value a colour of the style sheet."""
    scale = altair().Scale(domain=list(looks), range=[colour(look) for look in looks.values()])
    return altair().Color(f"{field}:N", legend=None, scale=scale)


def drawing(build: Callable[_Given, dict[str, Any]]) -> Callable[_Given, dict[str, Any]]:
    """A function that makes a chart: Altair validates no part of it, which would take longer than all else.

    The tests validate every chart.
    """

    @wraps(build)
    def built(*given: _Given.args, **named: _Given.kwargs) -> dict[str, Any]:
        from altair.utils.schemapi import debug_mode

        with debug_mode(False):
            return build(*given, **named)

    return built


def finished(chart: Any, height: int, **data: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The specification: as wide as its place, without a frame, with the colours and the type of the page.

    Args:
        chart: Of Altair.
        height: Pixels, without the axis.
        data: What it draws, by name.
    """
    spec: dict[str, Any] = chart.properties(width="container", height=height).to_dict(validate=False)
    spec.pop("$schema", None)
    spec["datasets"] = data
    text = {"labelColor": colour("soft"), "titleColor": colour("soft"), "labelFontSize": 11, "titleFontSize": 11}
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["padding"] = {"left": 2, "right": 8, "top": 6, "bottom": 4}
    spec["background"] = "transparent"
    spec["config"] = {
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "gridColor": colour("grid"),
            "domainColor": colour("line"),
            "tickColor": colour("line"),
        },
        "legend": text,
        "text": {"color": colour("ink"), "fontSize": 12},
        "view": {"stroke": None},
        "aria": False,
    }
    return spec


def rounded(value: float | None) -> float | None:
    """With as many digits as a picture shows."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


def y_axis(title: str | None, **axis: Any) -> Any:
    return altair().Axis(title=title, minExtent=_AXIS, maxExtent=_AXIS, titlePadding=6, **{"tickCount": 5, **axis})


def drawn_from(name: str) -> Any:
    """A chart of data of this name, which `finished` is given or the page has."""
    return altair().Chart(altair().NamedData(name=name))


def told(*fields: tuple[str, str]) -> list[Any]:
    return [altair().Tooltip(f"{name}:N", title=title) for name, title in fields]


def log_scale(values: Sequence[float], title: str, form: str = "~g") -> tuple[Any, Any]:
    """A logarithmic axis with a little room around the values, and labels at 1, 2 and 5, or at powers of ten."""
    low, high = min(values) / 1.4, max(values) * 1.4
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > _MOST_TICKS:
        ticks = [float(f"1e{decade}") for decade in decades if low <= float(f"1e{decade}") <= high]
    scale = altair().Scale(type="log", domain=[rounded(low), rounded(high)], nice=False, clamp=True)
    return scale, y_axis(title, values=ticks, format=form, tickCount=len(ticks))


def sparse_labels() -> dict[str, Any]:
    """What an axis of names is given so that of the labels of ``axis_labels`` those that are numbers are not shown."""
    shown = {"condition": {"test": {"field": "value", "lt": "!"}, "value": 0}, "value": 1}
    return {"labelLimit": 0, "labelOverlap": False, "labelOpacity": shown, "ticks": False, "domain": True}


def floored(mismatch: float | None) -> float | None:
    return None if mismatch is None else rounded(max(mismatch, SMALLEST))
