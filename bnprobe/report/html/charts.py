"""Charts as Vega-Lite, made with Altair: functions from plain figures, in colours that the page's style sheet names.

Names are values in the data, never a part of a specification. A chart has the width of its place; y axes are equally
wide, so that charts below each other have the same x axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec

from bnprobe.records import SOURCES, Distribution, Estimate, Interval, Layer
from bnprobe.report import charts as terminal
from bnprobe.report import figures
from bnprobe.report.layers import sign_of, worse_path
from bnprobe.report.page import FINE, FLAGGED, UNDECIDED, UNMEASURED, Page
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.theory import D_MAX, R_MAX

LAYERS = "layers"
"""The data that charts of the network share."""

COLOURS = {FLAGGED: "flagged", UNDECIDED: "undecided", FINE: "fine", UNMEASURED: "unmeasured"}
SOURCE_COLOURS = {source.field: source.field.replace("_", "-") for source in SOURCES}
LINES = tuple(f"line-{number}" for number in range(1, 7))

_QUANTILES = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")
_AXIS = 46
"""Pixels of a y axis."""

_LABEL = 26
"""Characters of a name below an axis."""

_HEADROOM = 1.08
"""The axis of stacked bars is so many times as long as the longest bar."""

_SMALLEST = 1e-4
"""A mismatch below this is drawn here on a logarithmic axis."""

_DIGITS = 5

_WIDE = 8.0
"""Values that differ by more than this factor have a logarithmic axis."""

_MOST_DOTS = 25
"""Points of a line that are drawn as dots."""

_Given = ParamSpec("_Given")


def colour(name: str) -> str:
    """A colour of the style sheet."""
    return f"var(--{name})"


@cache
def altair() -> Any:
    """Altair, which is imported only where a chart is drawn."""
    import altair

    return altair


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


def _number(value: float | None) -> float | None:
    """With as many digits as a picture shows."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


# --- The network in depth order ---------------------------------------------------------------------------------------


def network_data(layers: Sequence[Layer]) -> tuple[list[str], list[list[Any]]]:
    """The layers in depth order, as rows of the shared data: what is drawn of each, and what a pointer shows."""
    labels = axis_labels([layer.name for layer in layers], [sign_of(layer) for layer in layers])
    full = full_mismatch(layers)
    rows = [
        [number, label, layer.name, COLOURS[sign_of(layer)], *_path_texts(layer), *_stack(layer, full), *_both(layer)]
        for number, (label, layer) in enumerate(zip(labels, layers, strict=True), start=1)
    ]
    stack = [f"{letter}{index}" for index in range(len(SOURCES)) for letter in "ab"]
    spread = [f"{name}{place}" for name in "rd" for place in range(len(_QUANTILES))]
    texts = [f"{name}{text}" for name in "rd" for text in ("middle", "half", "wide", "all")]
    paths = ["D", "train", "eval", "most"]
    return ["i", "label", "name", "standing", *paths, *stack, "limit", "cut", *spread, *texts], rows


def axis_labels(names: Sequence[str], signs: Sequence[str]) -> list[str]:
    """Names short enough to stand below an axis, all different; with the sign of those that are not fine."""
    short = Page(80, unicode=True).shorten(names, _LABEL)
    return [name if sign == FINE else f"{sign} {name}" for sign, name in zip(signs, short, strict=True)]


def full_mismatch(layers: Sequence[Layer]) -> float:
    """D of the longest bar that is not cut."""
    shares = [layer.shares for layer in layers if layer.shares is not None and layer.only_in != "train"]
    limits = [flagging_limit(layer) for layer in layers if layer.shares is not None]
    return terminal.full_length([terminal.length(one) for one in shares], limits)


def _path_texts(layer: Layer) -> list[str | None]:
    path = worse_path(layer.train, layer.eval)
    if path is None:
        return [None, None, None, None]
    around = figures.span(path.interval)
    most = ""
    if layer.shares is not None:
        source, share = max(terminal.drawn(layer.shares), key=lambda pair: pair[1])
        most = f"{source.words}, D {figures.mismatch(share)}"
    return [
        f"{figures.mismatch(path.mismatch)} ({around})",
        figures.path_equivalent(layer.train),
        figures.path_equivalent(layer.eval),
        most,
    ]


def _stack(layer: Layer, full: float) -> list[float | None]:
    """Where each share begins and ends, the limit, and where a bar is cut that does not fit."""
    shares = layer.shares
    if shares is None or layer.only_in == "train":
        return [None] * (2 * len(SOURCES) + 2)
    length = terminal.length(shares)
    cut = length > full * (1 + 1e-9)
    scale = full / length if cut else 1.0
    ends: list[float | None] = []
    place = 0.0
    for _, share in terminal.drawn(shares):
        ends += [_number(place), _number(place + share * scale)] if share else [None, None]
        place += share * scale
    return [*ends, None if cut else _number(flagging_limit(layer)), full if cut else None]


def _both(layer: Layer) -> list[Any]:
    """Quantiles of r and d in training, and what a pointer shows of them."""
    path = layer.train
    if path is None:
        return [None] * (2 * len(_QUANTILES) + 8)
    places = [_number(each.quantiles[key]) for each in (path.r, path.d) for key in _QUANTILES]
    return [*places, *_spread(path.r), *_spread(path.d)]


def _spread(values: Distribution) -> list[str]:
    return [figures.score(values.quantiles["0.5"]), *quantile_spans(values)]


def quantile_spans(values: Distribution) -> list[str]:
    """The middle half of the values, 90% and 98% of them, as text."""
    found = [figures.score(values.quantiles[key]) for key in _QUANTILES]
    return [f"{found[2]} to {found[4]}", f"{found[1]} to {found[5]}", f"{found[0]} to {found[6]}"]


def _depth_axis(labelled: bool) -> Any:
    alt = altair()
    axis = alt.Axis(
        title=None,
        labels=labelled,
        ticks=False,
        labelAngle=-55,
        labelLimit=0,
        labelOverlap="greedy",
        labelPadding=4,
        domain=True,
        labelSeparation=2,
    )
    return alt.X("label:N", sort=None, axis=axis, scale=alt.Scale(paddingInner=0.18, paddingOuter=0.3))


def _mismatch_axis(title: str | None, **axis: Any) -> Any:
    return altair().Axis(title=title, minExtent=_AXIS, maxExtent=_AXIS, tickCount=5, titlePadding=6, **axis)


def _pointed(tooltip: Sequence[Any], labelled: bool) -> Any:
    """What a pointer meets: the whole column of a layer, however small what is drawn there."""
    return (
        _network()
        .mark_rect(fill=colour("ink"), fillOpacity=0, cursor="pointer")
        .encode(x=_depth_axis(labelled), tooltip=list(tooltip))
    )


def _network() -> Any:
    return _drawn_from(LAYERS)


def _drawn_from(name: str) -> Any:
    """A chart of data of this name, which `finished` is given or the page has."""
    return altair().Chart(altair().NamedData(name=name))


def _told(*fields: tuple[str, str]) -> list[Any]:
    return [altair().Tooltip(f"{name}:N", title=title) for name, title in fields]


@drawing
def shares(layers: Sequence[Layer], labelled: bool = False) -> dict[str, Any]:
    """Shares of D at inference, stacked, for each layer, with its limit; what comes on top of D is narrower."""
    alt = altair()
    scale = alt.Scale(domain=[0, _number(_HEADROOM * full_mismatch(layers))], nice=False)
    axis = _mismatch_axis("D at inference", format="~g")
    x = _depth_axis(labelled)
    parts = []
    for index, source in enumerate(SOURCES):
        y = alt.Y(f"a{index}:Q", scale=scale, axis=axis)
        size = {} if source.adds_up else {"width": alt.RelativeBandSize(0.45)}
        bar = _network().mark_bar(color=colour(SOURCE_COLOURS[source.field]), **size)
        parts.append(bar.encode(x=x, y=y, y2=f"b{index}"))
    limit = _network().mark_tick(color=colour("ink"), thickness=1.5, opacity=1)
    cut = _network().mark_point(shape="triangle-up", size=45, filled=True, color=colour("ink"), opacity=1, yOffset=-6)
    tooltip = _told(("name", ""), ("D", "D, worse mode"), ("train", "n_eq in training"), ("eval", "n_eq at inference"))
    return finished(
        alt.layer(
            *parts,
            limit.encode(x=x, y=alt.Y("limit:Q", scale=scale, axis=axis)),
            cut.encode(x=x, y=alt.Y("cut:Q", scale=scale, axis=axis)),
            _pointed([*tooltip, *_told(("most", "most of it"))], labelled),
        ),
        height=220,
    )


@drawing
def spread(name: str, layers: Sequence[Layer], labelled: bool = False) -> dict[str, Any]:
    """Quantiles of r or d in training for each layer: 98% of the values, the middle half, and the median."""
    alt = altair()
    paths = [layer.train for layer in layers if layer.train is not None]
    found = [(path.r if name == "r" else path.d).quantiles for path in paths]
    y = {place: f"{name}{index}" for index, place in enumerate(_QUANTILES)}
    scale, axis = (_r_scale if name == "r" else _d_scale)(found)
    x = _depth_axis(labelled)
    hue = alt.Color("standing:N", legend=None, scale=_standing_scale())
    low = alt.Y(f"{y['0.01']}:Q", scale=scale, axis=axis)
    half = alt.Y(f"{y['0.25']}:Q", scale=scale, axis=axis)
    middle = alt.Y(f"{y['0.5']}:Q", scale=scale, axis=axis)
    whiskers = _network().mark_rule(opacity=0.75).encode(x=x, y=low, y2=y["0.99"], color=hue)
    box = _network().mark_bar(opacity=0.8, minBandSize=1, width=alt.RelativeBandSize(0.8))
    median = _network().mark_tick(color=colour("ink"), thickness=1.2, opacity=1)
    words = (("name", ""), (f"{name}middle", "median"), (f"{name}half", "half of the values"))
    tooltip = _told(*words, (f"{name}wide", "90% of them"), (f"{name}all", "98% of them"))
    marks = _marks((1 / R_MAX, 1, R_MAX) if name == "r" else (-D_MAX, 0, D_MAX), scale, axis)
    return finished(
        alt.layer(
            *marks,
            whiskers,
            box.encode(x=x, y=half, y2=y["0.75"], color=hue),
            median.encode(x=x, y=middle),
            _pointed(tooltip, labelled),
        ),
        height=150,
        one=[{}],
    )


def _standing_scale() -> Any:
    names = list(COLOURS.values())
    return altair().Scale(domain=names, range=[colour(name) for name in names])


def _marks(values: Sequence[float], scale: Any, axis: Any) -> list[Any]:
    """The value without mismatch, and the limits of Batch Renorm on both sides of it."""
    alt = altair()
    low, centre, high = values

    def line(at: float, **look: Any) -> Any:
        return (
            _drawn_from("one").mark_rule(color=colour("soft"), **look).encode(y=alt.YDatum(at, scale=scale, axis=axis))
        )

    dashed = {"strokeDash": [3, 4], "opacity": 0.7}
    return [line(centre, opacity=0.9), line(low, **dashed), line(high, **dashed)]


def _r_scale(found: Sequence[Mapping[str, float]]) -> tuple[Any, Any]:
    """Logarithmic; r = 1/2 and r = 2 are equally far from 1."""
    low = max(min([0.25, *(each["0.01"] for each in found)]), 1e-4)
    high = min(max([4.0, *(each["0.99"] for each in found)]), 1e4)
    ticks = [tick for tick in (0.001, 0.01, 0.1, 0.33, 1, 3, 10, 100, 1000) if low <= tick <= high]
    scale = altair().Scale(type="log", domain=[low * 0.95, high * 1.05], clamp=True)
    return scale, _mismatch_axis("r", values=ticks, format="~g")


def _d_scale(found: Sequence[Mapping[str, float]]) -> tuple[Any, Any]:
    """Linear near 0, logarithmic far out."""
    most = max([D_MAX * 1.1, *(abs(each[key]) for each in found for key in ("0.01", "0.99"))])
    most = min(most * 1.05, 1e6)
    ticks = [tick for tick in (0.0, 1, 5, 30, 300, 3000, 30_000, 300_000) if tick <= most]
    scale = altair().Scale(type="symlog", constant=0.5, domain=[-most, most], clamp=True)
    return scale, _mismatch_axis("d", values=[*(-tick for tick in ticks[:0:-1]), *ticks], format="~g")


def _log_scale(values: Sequence[float], title: str) -> tuple[Any, Any]:
    """A logarithmic axis with a little room around the values, and labels at 1, 2 and 5 or at powers of ten."""
    low, high = min(values) / 1.4, max(values) * 1.4
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 4 else (1, 3) if len(decades) <= 6 else (1,)
    ticks = [float(f"{step}e{decade}") for decade in decades for step in steps]
    scale = altair().Scale(type="log", domain=[_number(low), _number(high)], nice=False, clamp=True)
    return scale, _mismatch_axis(title, values=[tick for tick in ticks if low <= tick <= high], format="~g")


# --- D before and after -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A layer before and after.

    Attributes:
        name: The layer.
        sign: How it stands now.
        before, after: D; None: not measured.
        became: What has become of it.
    """

    name: str
    sign: str
    before: float | None
    after: float | None
    became: str = ""


@drawing
def before_and_after(changes: Sequence[Change]) -> dict[str, Any]:
    """D of each layer before and after, with an arrow's path between the two, on a logarithmic axis."""
    alt = altair()
    labels = axis_labels([one.name for one in changes], [one.sign for one in changes])
    rows = [
        {
            "label": label,
            "name": one.name,
            "before": _floored(one.before),
            "after": _floored(one.after),
            "from": UNMEASURED if one.before is None else figures.mismatch(one.before),
            "to": UNMEASURED if one.after is None else figures.mismatch(one.after),
            "became": one.became,
        }
        for label, one in zip(labels, changes, strict=True)
    ]
    drawn = [value for one in changes for value in (_floored(one.before), _floored(one.after)) if value is not None]
    scale, axis = _log_scale([*drawn, 0.01, 0.1], "D, worse mode")
    y = alt.Y("before:Q", scale=scale, axis=axis)
    chart, x = _drawn_from("rows"), _depth_axis(labelled=True)
    point = {"filled": True, "opacity": 1, "size": 55 if len(rows) <= 60 else 16}
    tooltip = _told(("name", ""), ("from", "D before"), ("to", "D after"), ("became", "now"))
    return finished(
        alt.layer(
            chart.mark_rule(color=colour("before"), opacity=0.6).encode(x=x, y=y, y2="after"),
            chart.mark_point(**{**point, "filled": False}, stroke=colour("before"), strokeWidth=1.6).encode(x=x, y=y),
            chart.mark_point(**point, color=colour("after")).encode(x=x, y=alt.Y("after:Q", scale=scale)),
            chart.mark_rect(fill=colour("ink"), fillOpacity=0).encode(x=x, tooltip=tooltip),
        ),
        height=220,
        rows=rows,
    )


def _floored(mismatch: float | None) -> float | None:
    return None if mismatch is None else _number(max(mismatch, _SMALLEST))


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
    """D of every layer against batch size, both logarithmic; with intervals and theory for those that stand out."""
    alt = altair()
    sizes = sorted({point.size for curve in curves for point in curve.points})
    measured = [max(point.mismatch, _SMALLEST) for curve in curves for point in curve.points]
    expected = [point.theory for curve in curves if curve.role for point in curve.points if point.theory]
    x = alt.X(
        "size:Q",
        scale=alt.Scale(type="log", base=2, domain=[sizes[0] / 1.15, sizes[-1] * 1.15], nice=False),
        axis=alt.Axis(title="samples in a batch", values=sizes, format="d", grid=False),
    )
    scale, axis = _log_scale([*measured, *(max(value, min(measured)) for value in expected)], "D at inference")
    rows = [_size_row(curve, point) for curve in curves for point in curve.points]
    told = [row for row in rows if row["role"]]
    hue = alt.Color("role:N", legend=None, scale=_role_scale(curves))
    y = alt.Y("D:Q", scale=scale, axis=axis)
    every, some = _drawn_from("rows"), _drawn_from("told")
    tooltip = _told(("name", ""), ("at", "samples in a batch"), ("text", "D (95%)"), ("theory_text", "i.i.d. samples"))
    faint = every.mark_line(color=colour("soft"), opacity=0.35, strokeWidth=1).encode(x=x, y=y, detail="name:N")
    theory = some.mark_line(strokeDash=[4, 4], strokeWidth=1.5, opacity=0.9)
    return finished(
        alt.layer(
            faint,
            theory.encode(x=x, y=alt.Y("theory:Q", scale=scale, axis=axis), color=hue),
            some.mark_line(strokeWidth=2.4).encode(x=x, y=y, color=hue),
            some.mark_rule(strokeWidth=1.6).encode(x=x, y=alt.Y("low:Q", scale=scale, axis=axis), y2="high", color=hue),
            every.mark_point(filled=True, size=30, opacity=0.45, color=colour("soft")).encode(
                x=x, y=y, tooltip=tooltip
            ),
            some.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=hue, tooltip=tooltip),
        ),
        height=280,
        rows=rows,
        told=told,
    )


def roles(curves: Sequence[SizeCurve]) -> list[str]:
    """The roles that there are, in the order of their colours."""
    return list(dict.fromkeys(curve.role for curve in curves if curve.role))


def _role_scale(curves: Sequence[SizeCurve]) -> Any:
    names = roles(curves)
    return altair().Scale(domain=names, range=[colour(name) for name in LINES[: len(names)]])


def _size_row(curve: SizeCurve, point: SizePoint) -> dict[str, Any]:
    low, high = point.interval
    return {
        "name": curve.name,
        "role": curve.role,
        "size": point.size,
        "at": str(point.size),
        "D": _floored(point.mismatch),
        "low": _floored(low),
        "high": _floored(point.mismatch if high is None else high),
        "theory": _floored(point.theory),
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
            "start": _number(bar.start),
            "end": _number(bar.end),
            "low": None if bar.interval is None else _number(bar.interval[0]),
            "high": None if bar.interval is None else _number(bar.interval[1]),
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
    return altair().Scale(domain=[_number(low), _number(high)], nice=False, zero=False)


def _bar_parts(bars: Sequence[Bar], zero: bool) -> tuple[Any, Any, Any, Any]:
    """The chart, its axes and its colours."""
    alt = altair()
    looks = list(dict.fromkeys(bar.look for bar in bars))
    hue = alt.Color("look:N", legend=None, scale=alt.Scale(domain=looks, range=[colour(look) for look in looks]))
    y = alt.Y("row:O", axis=None, scale=alt.Scale(paddingInner=0.0, paddingOuter=0.0))
    axis = alt.Axis(title=None, tickCount=5, format="~g")
    x = {name: alt.X(f"{name}:Q", scale=_bar_scale(bars, zero), axis=axis) for name in ("start", "end", "low")}
    return _drawn_from("rows"), x, y, hue


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
    chart, x, y, hue = _bar_parts(bars, zero=True)
    thick = {"height": 11, "yOffset": 8, "cornerRadius": 1.5}
    body = chart.mark_bar(**thick).encode(x=x["start"], x2="end", y=y, color=hue)
    around = chart.mark_rule(color=colour("ink"), strokeWidth=1.4, yOffset=8).encode(x=x["low"], x2="high", y=y)
    return finished(alt.layer(body, around, *_labels(chart, y)), height=_LINE * len(bars), rows=_bar_rows(bars))


@drawing
def dumbbells(bars: Sequence[Bar]) -> dict[str, Any]:
    """From one value to another, with the interval of the second."""
    alt = altair()
    chart, x, y, hue = _bar_parts(bars, zero=False)
    down = {"yOffset": 8}
    return finished(
        alt.layer(
            chart.mark_rule(color=colour("before"), opacity=0.6, strokeWidth=1.6, **down).encode(
                x=x["start"], x2="end", y=y
            ),
            chart.mark_rule(strokeWidth=5, opacity=0.35, **down).encode(x=x["low"], x2="high", y=y, color=hue),
            chart.mark_point(filled=False, opacity=1, stroke=colour("before"), strokeWidth=1.6, size=60, **down).encode(
                x=x["start"], y=y
            ),
            chart.mark_point(filled=True, opacity=1, size=70, **down).encode(x=x["end"], y=y, color=hue),
            *_labels(chart, y),
        ),
        height=_LINE * len(bars),
        rows=_bar_rows(bars),
    )


@drawing
def estimates(bars: Sequence[Bar]) -> dict[str, Any]:
    """Means with their intervals, and the runs that they are means over."""
    alt = altair()
    chart, x, y, hue = _bar_parts(bars, zero=False)
    seeds = [{"row": row, "end": _number(value)} for row, bar in enumerate(bars) for value in bar.seeds]
    down = {"yOffset": 8}
    runs = _drawn_from("seeds").mark_tick(color=colour("soft"), thickness=1.2, size=13, **down)
    return finished(
        alt.layer(
            *([runs.encode(x=x["end"], y=y)] if seeds else []),
            chart.mark_rule(strokeWidth=5, opacity=0.4, **down).encode(x=x["low"], x2="high", y=y, color=hue),
            chart.mark_point(filled=True, opacity=1, size=70, **down).encode(x=x["end"], y=y, color=hue),
            *_labels(chart, y),
        ),
        height=_LINE * len(bars),
        rows=_bar_rows(bars),
        seeds=seeds,
    )


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


@drawing
def lines(found: Iterable[Line], x_title: str, y_title: str, logarithmic: bool = False) -> dict[str, Any]:
    """Lines over steps."""
    alt = altair()
    found = list(found)
    rows: list[dict[str, Any]] = [
        {"name": line.name, "run": line.run, "x": at, "y": _number(y), "text": figures.score(y), "at": f"{at:,.0f}"}
        for line in found
        for at, y in line.points
        if y is not None and math.isfinite(y) and (y > 0 or not logarithmic)
    ]
    looks = {line.name: line.look for line in found}
    hue = alt.Color(
        "name:N", legend=None, scale=alt.Scale(domain=list(looks), range=[colour(look) for look in looks.values()])
    )
    x = alt.X("x:Q", axis=alt.Axis(title=x_title, format=",d", grid=False, tickCount=6))
    scale = alt.Scale(zero=False, nice=False, padding=6)
    axis = _mismatch_axis(y_title, format="~g")
    values = [row["y"] for row in rows]
    if logarithmic and values and max(values) > _WIDE * min(values):
        scale, axis = _log_scale(values, y_title)
    y = alt.Y("y:Q", scale=scale, axis=axis)
    chart = _drawn_from("rows")
    # Many points would hide the lines; a pointer finds them all the same.
    dots = 0.9 if max((len(line.points) for line in found), default=0) <= _MOST_DOTS else 0.0
    tooltip = _told(("name", ""), ("run", "seed"), ("at", x_title), ("text", y_title))
    return finished(
        alt.layer(
            chart.mark_line(strokeWidth=1.5, opacity=0.75).encode(x=x, y=y, color=hue, detail="run:N"),
            chart.mark_point(filled=True, size=45, opacity=dots).encode(x=x, y=y, color=hue, tooltip=tooltip),
        ),
        height=240,
        rows=rows,
    )


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
    starts = list(dict.fromkeys(point.start for point in points))
    hue = alt.Color("start:N", legend=None, scale=alt.Scale(domain=starts, range=[colour(name) for name in LINES[:3]]))
    rows = [
        {
            "rate": point.rate,
            "start": point.start,
            "D": _floored(point.mismatch),
            "low": _floored(point.mismatch - 2 * (point.error or 0.0)),
            "high": _floored(point.mismatch + 2 * (point.error or 0.0)),
            "text": f"{point.mismatch:.4g}",
            "best": "best" if point.best else "",
        }
        for point in points
    ]
    values = [max(point.mismatch, _SMALLEST) for point in points]
    scale, axis = _log_scale(values, "D in training")
    x = alt.X("rate:N", sort=None, axis=alt.Axis(title="weight of the new batch (momentum)", labelAngle=0, grid=False))
    y = alt.Y("D:Q", scale=scale, axis=axis)
    chart = _drawn_from("rows")
    best = _drawn_from("best")
    tooltip = _told(("rate", ""), ("start", "starting"), ("text", "D"), ("best", "tracks"))
    low = alt.Y("low:Q", scale=scale, axis=axis)
    return finished(
        alt.layer(
            chart.mark_line(strokeWidth=2).encode(x=x, y=y, color=hue, detail="start:N"),
            chart.mark_rule(strokeWidth=1.4).encode(x=x, y=low, y2="high", color=hue),
            chart.mark_point(filled=True, size=40, opacity=1).encode(x=x, y=y, color=hue, tooltip=tooltip),
            best.mark_point(filled=False, size=170, opacity=1, strokeWidth=2).encode(x=x, y=y, color=hue),
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
