"""Charts of the network, from input to output: shares of D, distributions of r and d, D before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnprobe.records import SOURCES, Distribution, Layer
from bnprobe.report import charts as terminal
from bnprobe.report import figures
from bnprobe.report.html.vega import (
    altair,
    colour,
    drawing,
    drawn_from,
    finished,
    floored,
    hue,
    log_scale,
    rounded,
    sparse_labels,
    told,
    y_axis,
)
from bnprobe.report.layers import sign_of, worse_path
from bnprobe.report.page import FINE, FLAGGED, INFO, UNDECIDED, UNMEASURED, WARNING, Page
from bnprobe.rules.shares import flagging_limit
from bnprobe.stats.theory import D_MAX, R_MAX

LAYERS = "layers"
"""The data that these charts share."""

COLOURS = {FLAGGED: "flagged", UNDECIDED: "undecided", FINE: "fine", UNMEASURED: "unmeasured"}
_FIRST = (FLAGGED, WARNING, UNDECIDED, INFO, FINE, UNMEASURED)
"""The signs of layers, in the order in which these get a label."""

SOURCE_COLOURS = {source.field: source.field.replace("_", "-") for source in SOURCES}

_QUANTILES = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")

_LABEL = 36
"""Characters of a name below an axis."""

_MOST_LABELS = 60
"""So many names have room below an axis."""

_HEADROOM = 1.08
"""The axis of stacked bars is so many times as long as the longest bar."""


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


def axis_labels(
    names: Sequence[str], signs: Sequence[str], longest: int = _LABEL, most: int = _MOST_LABELS
) -> list[str]:
    """Names short enough to stand beside an axis, all different; with the sign of those that are not fine.

    Where there are more than have room, the layers that are not fine come first, and the others have a number after
    a blank, which the axis does not show.

    Args:
        names, signs: From one end of the axis to the other.
        longest: Characters of a name.
        most: Names that have room.
    """
    short = Page(80, unicode=True).shorten(names, longest)
    apart = math.ceil(len(names) / most)
    shown: list[int] = []
    for place in sorted(range(len(names)), key=lambda place: _FIRST.index(signs[place])):
        if all(abs(place - other) >= apart for other in shown):
            shown.append(place)
    labels = [name if sign == FINE else f"{sign} {name}" for sign, name in zip(signs, short, strict=True)]
    return [label if place in shown else f" {place}" for place, label in enumerate(labels)]


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
        ends += [rounded(place), rounded(place + share * scale)] if share else [None, None]
        place += share * scale
    return [*ends, None if cut else rounded(flagging_limit(layer)), full if cut else None]


def _both(layer: Layer) -> list[Any]:
    """Quantiles of r and d in training, and what a pointer shows of them."""
    path = layer.train
    if path is None:
        return [None] * (2 * len(_QUANTILES) + 8)
    places = [rounded(each.quantiles[key]) for each in (path.r, path.d) for key in _QUANTILES]
    return [*places, *_spread(path.r), *_spread(path.d)]


def _spread(values: Distribution) -> list[str]:
    return [figures.score(values.quantiles["0.5"]), *quantile_spans(values)]


def quantile_spans(values: Distribution) -> list[str]:
    """The middle half of the values, 90% and 98% of them, as text."""
    found = [figures.score(values.quantiles[key]) for key in _QUANTILES]
    return [f"{found[2]} to {found[4]}", f"{found[1]} to {found[5]}", f"{found[0]} to {found[6]}"]


def _depth_axis(labelled: bool) -> Any:
    alt = altair()
    axis = alt.Axis(title=None, labels=labelled, labelAngle=-90, labelPadding=4, **sparse_labels())
    return alt.X("label:N", sort=None, axis=axis, scale=alt.Scale(paddingInner=0.18, paddingOuter=0.3))


def _pointed(tooltip: Sequence[Any], labelled: bool) -> Any:
    """What a pointer meets: the whole column of a layer, however small what is drawn there."""
    return (
        _network()
        .mark_rect(fill=colour("ink"), fillOpacity=0, cursor="pointer")
        .encode(x=_depth_axis(labelled), tooltip=list(tooltip))
    )


def _network() -> Any:
    return drawn_from(LAYERS)


@drawing
def shares(layers: Sequence[Layer], labelled: bool = False) -> dict[str, Any]:
    """Shares of D at inference, stacked, for each layer, with its limit; what comes on top of D is narrower."""
    alt = altair()
    scale = alt.Scale(domain=[0, rounded(_HEADROOM * full_mismatch(layers))], nice=False)
    axis = y_axis("D at inference", format="~g")
    x = _depth_axis(labelled)
    parts = []
    for index, source in enumerate(SOURCES):
        y = alt.Y(f"a{index}:Q", scale=scale, axis=axis)
        size = {} if source.adds_up else {"width": alt.RelativeBandSize(0.45)}
        bar = _network().mark_bar(color=colour(SOURCE_COLOURS[source.field]), **size)
        parts.append(bar.encode(x=x, y=y, y2=f"b{index}"))
    limits = [
        # In the colour of the page around it, to be seen on a bar of any colour.
        _network().mark_tick(color=colour("paper"), thickness=4, opacity=0.9),
        _network().mark_tick(color=colour("ink"), thickness=1.5, opacity=1),
    ]
    cut = _network().mark_point(shape="triangle-up", size=45, filled=True, color=colour("ink"), opacity=1, yOffset=-6)
    tooltip = told(("name", ""), ("D", "D, worse mode"), ("train", "n_eq in training"), ("eval", "n_eq at inference"))
    return finished(
        alt.layer(
            *parts,
            *(limit.encode(x=x, y=alt.Y("limit:Q", scale=scale, axis=axis)) for limit in limits),
            cut.encode(x=x, y=alt.Y("cut:Q", scale=scale, axis=axis)),
            _pointed([*tooltip, *told(("most", "most of it"))], labelled),
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
    by_standing = hue("standing", {name: name for name in COLOURS.values()})
    low = alt.Y(f"{y['0.01']}:Q", scale=scale, axis=axis)
    half = alt.Y(f"{y['0.25']}:Q", scale=scale, axis=axis)
    middle = alt.Y(f"{y['0.5']}:Q", scale=scale, axis=axis)
    whiskers = _network().mark_rule(opacity=0.75).encode(x=x, y=low, y2=y["0.99"], color=by_standing)
    box = _network().mark_bar(opacity=0.8, minBandSize=1, width=alt.RelativeBandSize(0.8))
    median = _network().mark_tick(color=colour("ink"), thickness=1.2, opacity=1)
    words = (("name", ""), (f"{name}middle", "median"), (f"{name}half", "half of the values"))
    tooltip = told(*words, (f"{name}wide", "90% of them"), (f"{name}all", "98% of them"))
    marks = _marks((1 / R_MAX, 1, R_MAX) if name == "r" else (-D_MAX, 0, D_MAX), scale, axis)
    return finished(
        alt.layer(
            *marks,
            whiskers,
            box.encode(x=x, y=half, y2=y["0.75"], color=by_standing),
            median.encode(x=x, y=middle),
            _pointed(tooltip, labelled),
        ),
        height=150,
        one=[{}],
    )


def _marks(values: Sequence[float], scale: Any, axis: Any) -> list[Any]:
    """The value without mismatch, and the limits of Batch Renorm on both sides of it."""
    alt = altair()
    low, centre, high = values

    def line(at: float, **look: Any) -> Any:
        return (
            drawn_from("one").mark_rule(color=colour("soft"), **look).encode(y=alt.YDatum(at, scale=scale, axis=axis))
        )

    dashed = {"strokeDash": [3, 4], "opacity": 0.7}
    return [line(centre, opacity=0.9), line(low, **dashed), line(high, **dashed)]


def _r_scale(found: Sequence[Mapping[str, float]]) -> tuple[Any, Any]:
    """Logarithmic; r = 1/2 and r = 2 are equally far from 1."""
    low = max(min([0.25, *(each["0.01"] for each in found)]), 1e-4)
    high = min(max([4.0, *(each["0.99"] for each in found)]), 1e4)
    ticks = [tick for tick in (0.001, 0.01, 0.1, 0.33, 1, 3, 10, 100, 1000) if low <= tick <= high]
    scale = altair().Scale(type="log", domain=[low * 0.95, high * 1.05], clamp=True)
    return scale, y_axis("r", values=ticks, format="~g")


def _d_scale(found: Sequence[Mapping[str, float]]) -> tuple[Any, Any]:
    """Linear near 0, logarithmic far out."""
    most = max([D_MAX * 1.1, *(abs(each[key]) for each in found for key in ("0.01", "0.99"))])
    most = min(most * 1.05, 1e6)
    ticks = [tick for tick in (0.0, 1, 5, 30, 300, 3000, 30_000, 300_000) if tick <= most]
    scale = altair().Scale(type="symlog", constant=0.5, domain=[-most, most], clamp=True)
    return scale, y_axis("d", values=[*(-tick for tick in ticks[:0:-1]), *ticks], format="~g")


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
            "before": floored(one.before),
            "after": floored(one.after),
            "from": figures.known(one.before, figures.mismatch),
            "to": figures.known(one.after, figures.mismatch),
            "became": one.became,
        }
        for label, one in zip(labels, changes, strict=True)
    ]
    drawn = [value for one in changes for value in (floored(one.before), floored(one.after)) if value is not None]
    scale, axis = log_scale([*drawn, 0.01, 0.1], "D, worse mode")
    y = alt.Y("before:Q", scale=scale, axis=axis)
    chart, x = drawn_from("rows"), _depth_axis(labelled=True)
    point = {"filled": True, "opacity": 1, "size": 55 if len(rows) <= 60 else 16}
    tooltip = told(("name", ""), ("from", "D before"), ("to", "D after"), ("became", "now"))
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
