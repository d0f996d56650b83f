"""How layers stand, and the table of layers: signs, figures on both paths, and histograms of r and d on one axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

from bnprobe.numbers import count, percent
from bnprobe.records import DEFAULT_THRESHOLD, FROZEN, CallMeasurement, Distribution, Layer, PathMeasurement, Report
from bnprobe.report import charts, figures
from bnprobe.report.page import CENTRE, FINE, FLAGGED, UNDECIDED, UNMEASURED, Page
from bnprobe.report.table import Column, Mark, TableLayout, layer_names, table
from bnprobe.rules.shares import NOISE_THRESHOLD

OUTPUT_CHANGE = "relative L2 change of the outputs if"
"""What is measured as the effect of layers on the output, before what is done to them."""

MEANINGS = {FLAGGED: "flagged", UNDECIDED: "undecided", FINE: "fine"}
"""What the signs of layers say that were measured on every path on which they run."""


def sign_of(layer: Layer) -> str:
    """The sign of a layer; one that was not measured on every path on which it runs is not called fine."""
    if layer.flagged:
        return FLAGGED
    if layer.undecided:
        return UNDECIDED
    one = worse_path(layer.train, layer.eval)
    measured = one is not None and (layer.only_in is not None or None not in (layer.train, layer.eval))
    return FINE if measured else UNMEASURED


def unmeasured(layers: Iterable[Layer]) -> tuple[int, int]:
    """How many layers were not measured in both modes: those that training leaves in eval mode, and the others."""
    found = with_sign(layers, UNMEASURED)
    frozen = sum(layer.note is not None and layer.note.startswith(FROZEN) for layer in found)
    return frozen, len(found) - frozen


def on_samples(report: Report) -> str:
    """The samples that effects on the output were measured on, e.g. ", on 16 samples"."""
    found = next((extra.images for extra in report.scan.passes if extra.name == "impact"), None)
    return "" if found is None else f", on {count(found, report.scan.sample)}"


def with_sign(layers: Iterable[Layer], wanted: str) -> list[Layer]:
    """The layers that carry a sign."""
    return [layer for layer in layers if sign_of(layer) == wanted]


def worse_path(train: PathMeasurement | None, eval: PathMeasurement | None) -> PathMeasurement | None:
    """The path with the larger mismatch, of those that could be measured."""
    measured = [path for path in (train, eval) if path is not None]
    return max(measured, key=lambda path: path.mismatch, default=None)


def worst_first(layers: Iterable[Layer]) -> list[Layer]:
    """Flagged layers, then undecided, then the others; within each the largest mismatch first."""
    return sorted(layers, key=_badness, reverse=True)


def select(layers: Sequence[Layer], limit: int) -> list[Layer]:
    """The worst ``limit`` layers, in network order."""
    kept = {layer.name for layer in worst_first(layers)[:limit]}
    return [layer for layer in layers if layer.name in kept]


def _badness(layer: Layer) -> tuple[bool, bool, float]:
    path = worse_path(layer.train, layer.eval)
    mismatch = -math.inf if path is None else path.mismatch
    return layer.flagged, layer.undecided, math.inf if has_overflowed(layer) else mismatch


def has_overflowed(layer: Layer) -> bool:
    """Whether a layer is flagged since a figure is not finite: no figure of another layer is worse."""
    return layer.flagged and layer.running_statistics and None in (layer.train, layer.eval) and not layer.only_in


# --- The table --------------------------------------------------------------------------------------------------------

MOST_CALLS = 3
"""Of a layer that is called more often, the worst call is shown, unless all are asked for."""

MARKED_WORST = 3
"""So many of the worst flagged layers carry their rank beside the sign."""


@dataclass(frozen=True)
class LayerRow:
    """A line of the table: a layer, or one call of it."""

    mark: Mark
    name: str
    kind: str
    channels: str
    values: str
    limit: str
    train: PathMeasurement | None
    eval: PathMeasurement | None


@dataclass(frozen=True)
class _Richness:
    """What is shown where there is room.

    Attributes:
        half: Cells in half a histogram; 0 for none.
        extras: Columns beyond those that are always there.
        least: Taken if this much room is left for names; None: if the longest fits.
    """

    half: int
    extras: frozenset[str]
    least: int | None = None


_RICH_TO_POOR = (
    _Richness(8, frozenset({"kind", "channels", "values", "interval", "clipped"})),
    _Richness(8, frozenset({"kind", "channels", "interval", "clipped"})),
    _Richness(6, frozenset({"kind", "channels", "interval", "clipped"})),
    _Richness(6, frozenset({"kind", "channels", "clipped"})),
    _Richness(6, frozenset({"kind", "channels"})),
    _Richness(5, frozenset({"kind", "channels"})),
    _Richness(5, frozenset({"channels"})),
    _Richness(5, frozenset()),
    _Richness(4, frozenset()),
    _Richness(0, frozenset(), least=0),
)


def layer_table(layers: Sequence[Layer], network: Sequence[Layer], page: Page, all_calls: bool = False) -> list[Text]:
    """The lines of the table: headings, layers, and the axes of the histograms.

    Args:
        layers: The layers to show.
        network: All layers; a shortened name tells a layer from all of them, not only from those shown.
        page: What the table is written on.
        all_calls: Show every call of a layer, however many there are; otherwise the worst of many.
    """
    ranks = _ranks(layers)
    rows = [row for layer in layers for row in _rows(layer, ranks, all_calls)]
    names = layer_names([row.name for row in rows], [layer.name for layer in network], page, [row.mark for row in rows])
    layouts = (TableLayout(_columns(rows, richness, layers), richness.least) for richness in _RICH_TO_POOR)
    return table(names, layouts, page)


def legend(layers: Sequence[Layer], page: Page) -> list[Text]:
    """How to read the table."""
    return page.labelled(terms(layers), "dim")


def terms(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """The figures of a layer, and what they are."""
    limits = {layer.threshold for layer in layers}
    noise = f", by noise alone below {figures.plain(NOISE_THRESHOLD)}" if DEFAULT_THRESHOLD in limits else ""
    limit = figures.plain(limits.pop()) if len(limits) == 1 else "its limit"
    return [
        ("n_eq", f"behaves as if the batch were n_eq values; flagged when below {limit}{noise} (95%)"),
        (
            "D",
            "mean squared difference between activations normalized by batch and by running statistics; the larger of"
            " training and inference",
        ),
        ("r, d", "batch std / running std, and (batch mean - running mean) / running std"),
        ("train", "in training, on batch statistics; eval: at inference, on running statistics"),
    ]


def _columns(rows: Sequence[LayerRow], richness: _Richness, layers: Sequence[Layer]) -> list[Column]:
    several_kinds = len({layer.kind for layer in layers}) > 1
    several_limits = len({layer.threshold for layer in layers}) > 1
    half, extras = richness.half, richness.extras

    def column(
        heading: str, cell: Callable[[LayerRow], str], align: Literal["left", "right", "point"] = "right"
    ) -> Column:
        return Column(heading, [cell(row) for row in rows], align)

    def columns() -> Iterator[Column]:
        if "kind" in extras and several_kinds:
            yield column("kind", lambda row: row.kind, "left")
        if "channels" in extras:
            yield column("chan", lambda row: row.channels)
        if "values" in extras:
            yield column("values in\na batch", lambda row: row.values)
        if several_limits:
            yield column("limit", lambda row: row.limit)
        yield column("n_eq\ntrain", lambda row: figures.path_equivalent(row.train), "point")
        yield column("n_eq\neval", lambda row: figures.path_equivalent(row.eval), "point")
        if "interval" in extras:
            yield column("n_eq 95%\nworse", _interval)
        yield column("D\nworse", _mismatch, "point")
        if half:
            yield _histograms(rows, "r", charts.R_CHART, half)
            yield _histograms(rows, "d", charts.D_CHART, half)
        if "clipped" in extras:
            yield column("r out of\n1/3..3", lambda row: _clipped(row, "r"))
            yield column("d out of\n-5..5", lambda row: _clipped(row, "d"))

    return list(columns())


def _histograms(rows: Sequence[LayerRow], name: Literal["r", "d"], axis: charts.ChartAxis, half: int) -> Column:
    found = [_distribution(row, name) for row in rows]
    cells = [
        " " * half + CENTRE if values is None else charts.histogram(values.histogram, axis, half) for values in found
    ]
    heading = f"{' ' * half}{name}\n{' ' * (half - 2)}train"
    return Column(heading, cells, "left", charts.ruler(axis, half))


def _distribution(row: LayerRow, name: Literal["r", "d"]) -> Distribution | None:
    return None if row.train is None else row.train.r if name == "r" else row.train.d


def _clipped(row: LayerRow, name: Literal["r", "d"]) -> str:
    values = _distribution(row, name)
    return UNMEASURED if values is None else percent(values.clipped)


def _interval(row: LayerRow) -> str:
    path = worse_path(row.train, row.eval)
    return UNMEASURED if path is None else figures.equivalent_interval(path.equivalent_batch_size_interval)


def _mismatch(row: LayerRow) -> str:
    return figures.path_mismatch(worse_path(row.train, row.eval))


def _ranks(layers: Sequence[Layer]) -> dict[str, str]:
    """Rank of the worst layers; a lone flagged layer needs none."""
    flagged = worst_first(with_sign(layers, FLAGGED))
    if len(flagged) < 2:
        return {}
    return {layer.name: str(rank) for rank, layer in enumerate(flagged[:MARKED_WORST], start=1)}


def _rows(layer: Layer, ranks: dict[str, str], all_calls: bool) -> list[LayerRow]:
    sign = sign_of(layer)
    row = LayerRow(
        mark=Mark.of(sign, ranks.get(layer.name, "")),
        name=layer.name,
        kind=layer.kind.replace("BatchNorm", "BN"),
        channels=str(layer.channels),
        values=str(layer.values_per_channel),
        limit=figures.plain(layer.threshold),
        train=layer.train,
        eval=layer.eval,
    )
    shown, worst_of = layer.calls, ""
    if len(layer.calls) > MOST_CALLS and not all_calls:
        shown, worst_of = (max(layer.calls, key=_mismatch_of),), "worst: "
    calls = [
        LayerRow(
            mark=Mark(),
            name=f"  {worst_of}call {call.index + 1} of {layer.calls_per_forward}",
            kind="",
            channels="",
            values=str(call.values_per_channel),
            limit="",
            train=call.train,
            eval=call.eval,
        )
        for call in shown
    ]
    return [row, *calls]


def _mismatch_of(call: CallMeasurement) -> float:
    """In the worse mode; infinite where it could not be measured."""
    path = worse_path(call.train, call.eval)
    return math.inf if path is None else path.mismatch
