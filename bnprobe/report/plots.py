"""Charts of documents in Python, made with Altair: ``report.plot.shares()``, ``.depth()`` and ``.batch_sizes()``.

A notebook shows what they return; ``chart.save("shares.html")`` writes it, and every method of Altair changes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnprobe.errors import UsageError
from bnprobe.records import SOURCES, Report, SweepReport
from bnprobe.registry import require
from bnprobe.report.rows import Row
from bnprobe.rules.shares import flagging_limit

_STEP = 16
"""Pixels of a layer."""

_QUANTILES = {"0.05": "low", "0.25": "first", "0.5": "median", "0.75": "third", "0.95": "high"}


class Plots:
    """The charts of a report; each needs the extra ``plot``."""

    def __init__(self, document: Report | SweepReport) -> None:
        require("altair", "plot", "report.plot")
        self._document = document

    def __repr__(self) -> str:
        return f"<plots of {self._document!r}: {', '.join(name for name in dir(self) if not name.startswith('_'))}>"

    def shares(self) -> Any:
        """Where D of each layer comes from at inference, stacked in network order, and the limit that flags a layer.

        Returns:
            An ``altair.LayerChart``.

        Raises:
            UsageError: No mismatch was decomposed.
        """
        import altair as alt

        layers = self._layers(lambda layer: layer.shares is not None and layer.only_in != "train", "decomposed")
        rows: list[Row] = [
            {"layer": layer.name, "source": source.words, "order": place, "D": max(source.of(layer.shares) or 0.0, 0.0)}
            for layer in layers
            for place, source in enumerate(SOURCES)
        ]
        limits: list[Row] = [{"layer": layer.name, "limit": flagging_limit(layer)} for layer in layers]
        y = alt.Y("layer:N", sort=None, title=None)
        bars = alt.Chart(_data(rows), height=alt.Step(_STEP)).mark_bar()
        words = [source.words for source in SOURCES]
        return alt.layer(
            bars.encode(
                x=alt.X("D:Q", title="D at inference"),
                y=y,
                color=alt.Color("source:N", scale=alt.Scale(domain=words), title=None),
                order="order:Q",
                tooltip=["layer:N", "source:N", alt.Tooltip("D:Q", format=".3g")],
            ),
            alt.Chart(_data(limits)).mark_tick(color="black", thickness=2).encode(x="limit:Q", y=y),
        )

    def depth(self) -> Any:
        """r and d of each layer in training, in network order: the median, half and 90% of the values.

        Returns:
            An ``altair.HConcatChart``.

        Raises:
            UsageError: No layer was measured in training.
        """
        import altair as alt

        layers = self._layers(lambda layer: layer.train is not None, "measured in training")
        return alt.hconcat(
            *(
                _spread(
                    [
                        {"layer": layer.name} | {_QUANTILES[key]: values.quantiles[key] for key in _QUANTILES}
                        for layer in layers
                        for values in [getattr(layer.train, name)]
                    ],
                    name,
                    labelled=name == "r",
                )
                for name in ("r", "d")
            )
        )

    def batch_sizes(self) -> Any:
        """D of each layer at inference against the batch size, both logarithmic; dashed: D of i.i.d. samples.

        Returns:
            An ``altair.LayerChart``.

        Raises:
            UsageError: Only one batch size was measured.
        """
        import altair as alt

        rows = [row for row in self._sizes() if row["D"]]
        if len({row["size"] for row in rows}) < 2:
            raise UsageError(
                "Only one batch size was measured: scan(..., batch_sizes=[1, 2, 4, 8]) and sweep(...) measure more."
            )
        x = alt.X("size:Q", scale=alt.Scale(type="log", base=2), title="samples in a batch")
        log = alt.Scale(type="log")
        chart = alt.Chart(_data(rows))
        tooltip = ["layer:N", "size:Q", alt.Tooltip("D:Q", format=".3g")]
        return alt.layer(
            chart.mark_line(point=True).encode(
                x=x,
                y=alt.Y("D:Q", scale=log, title="D at inference"),
                color=alt.Color("layer:N", sort=None),
                tooltip=tooltip,
            ),
            chart.mark_line(strokeDash=[4, 4], opacity=0.6).encode(
                x=x, y=alt.Y("theory:Q", scale=log), color=alt.Color("layer:N", sort=None)
            ),
        )

    def _layers(self, wanted: Any, what: str) -> list[Any]:
        if not isinstance(self._document, Report):
            raise UsageError("A sweep has no such chart: it has plot.batch_sizes().")
        layers = [layer for layer in self._document.layers if wanted(layer)]
        if not layers:
            raise UsageError(f"No layer of this report was {what}.")
        return layers

    def _sizes(self) -> Iterator[Row]:
        for layer in self._document.layers:
            points: Any = getattr(layer, "batch_sizes", ()) if isinstance(self._document, Report) else layer.eval
            for point in points:
                theory = getattr(point, "theory", None)
                yield {"layer": layer.name, "size": point.batch_size, "D": point.mismatch, "theory": theory}


def _spread(rows: list[Row], name: str, labelled: bool) -> Any:
    import altair as alt

    scale = alt.Scale(type="log", nice=False) if name == "r" else alt.Scale(type="symlog", constant=0.5)
    y = alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(labels=labelled, ticks=labelled))
    chart = alt.Chart(_data(rows), height=alt.Step(_STEP), width=240)
    tooltip = ["layer:N", *(alt.Tooltip(f"{field}:Q", format=".3g") for field in _QUANTILES.values())]
    return alt.layer(
        chart.mark_rule().encode(x=alt.X("low:Q", scale=scale, title=f"{name} in training"), x2="high", y=y),
        chart.mark_bar(size=_STEP / 2).encode(x="first:Q", x2="third", y=y, tooltip=tooltip),
        chart.mark_tick(color="black", thickness=2).encode(x="median:Q", y=y),
        alt.Chart(_data([{}])).mark_rule(strokeDash=[3, 3]).encode(x=alt.XDatum(1 if name == "r" else 0)),
    )


def _data(rows: list[Row]) -> Any:
    import altair as alt

    return alt.InlineData(values=rows)  # which has no limit of rows
