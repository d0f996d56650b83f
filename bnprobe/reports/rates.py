"""Which rate of the running average tracks best: the table of rates, that of layers, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

from bnprobe.records import MomentumCurve, MomentumPoint, MomentumSweep
from bnprobe.reports import figures, glyphs
from bnprobe.reports.columns import table
from bnprobe.reports.layout import Page

MOST_LAYERS = 25

_BEST, _TIE = "*", "="
_Rates = tuple[float | None, ...]


def rates(sweep: MomentumSweep, page: Page) -> list[Text]:
    """Mean mismatch over the layers at each rate."""
    recorded = (
        f"Running average replayed on {figures.count(sweep.batches, 'micro-batch')} of {sweep.batch_size}, train path"
    )
    header = ("", "rate", "averages", "loaded", "settled", "±", *(("shifted", "back after") if _shifts(sweep) else ()))
    rows = [header, *(_rate_row(point, sweep) for point in sweep.model.points)]
    in_line = ("rate", *figures.points_in_line([row[1] for row in rows[1:]]))
    rows = [(row[0], rate, *row[2:]) for row, rate in zip(rows, in_line, strict=True)]
    return [
        *page.heading(recorded),
        *table(rows, page, False, ("averages", "±", "back after", "", "loaded")),
        *[line for text in _legend(sweep) for line in page.paragraph(text, style="dim", first="  ")],
    ]


def rates_by_layer(sweep: MomentumSweep, page: Page, show_all: bool) -> list[Text]:
    """The best rate of each layer, where layers differ in it."""
    if len(sweep.layers) < 2:
        return []
    worst = sorted(sweep.layers, key=_own_mismatch, reverse=True)
    kept = {curve.layer for curve in (worst if show_all else worst[:MOST_LAYERS])}
    shown = [curve for curve in sweep.layers if curve.layer in kept]
    header = ("own", "D loaded", "best loaded", "best settled", *(("best shifted",) if _shifts(sweep) else ()), "layer")
    rows = [header, *(_layer_row(curve, sweep) for curve in shown)]
    left_out = figures.count(len(sweep.layers) - len(shown), "layer")
    more = page.paragraph(f"{left_out} with less mismatch not shown; --all shows every one.", first="  ")
    return [
        *page.heading("Best rate by layer; (+n): n more rates tie with it"),
        *table(rows, page, True, ("D loaded", "own", "best loaded")),
        *(more if len(shown) < len(sweep.layers) else []),
        *[
            line
            for layer in sweep.omitted
            for line in page.paragraph(f"{layer.name} ({layer.kind}) not replayed: {layer.reason}", first="  ")
        ],
    ]


def tracking(sweep: MomentumSweep) -> tuple[str, ...]:
    """Which rate tracks best, in words."""
    best, rates_ = sweep.model.best, len(sweep.model.points)
    sentences = [
        f"Starting from the loaded statistics, {_verdict(best.loaded, rates_)}.",
        f"Starting from settled ones, {_verdict(best.converged, rates_)}.",
    ]
    if _shifts(sweep):
        verdict = _verdict(best.shifted, rates_)
        sentences.append(f"When the data changes ({_change(sweep)}), {verdict}.{_recovered(sweep)}")
    return tuple(sentences)


def _verdict(best: _Rates, replayed: int) -> str:
    first, *ties = ("the cumulative average" if rate is None else _rate(rate) for rate in best)
    if len(best) == replayed > 1:
        return "no rate tracks surely better than another"
    tied = f", and {_listed(ties)} {'ties' if len(ties) == 1 else 'tie'} with it" if ties else ""
    return f"{first} tracks best{tied}"


def _recovered(sweep: MomentumSweep) -> str:
    own = _own_point(sweep.model)
    if own is None:
        return ""
    name = f" {_rate(own.rate)}, which the layers are set to,"
    if own.recovery is None:
        return f"{name} has not recovered after {sweep.batches - sweep.batches // 2} micro-batches."
    return f"{name} takes {figures.count(own.recovery, 'micro-batch')} to recover."


def _legend(sweep: MomentumSweep) -> Iterable[str]:
    yield (
        "D of each micro-batch against the running statistics before it, mean over layers and the second half; ±:"
        f" standard error; {_BEST} best, {_TIE} not surely worse (95%)"
    )
    yield "own: what layers are set to; averages: (2 - rate) / rate micro-batches"
    yield "loaded: starts from the model's statistics; settled: from the first half's"
    if not _shifts(sweep):
        yield "No weight moves here, so slow rates look good: --shift shows their cost."
        return
    yield f"shifted: from the middle on {_change(sweep)} of each channel"
    yield "back after: micro-batches until D is within twice that without the shift"
    yield "No weight moves here: in training they are one more change to follow."


def _rate_row(point: MomentumPoint, sweep: MomentumSweep) -> tuple[str, ...]:
    best = sweep.model.best
    averages = "" if point.effective_batches is None else f"{point.effective_batches:,.1f}"
    error = point.converged.standard_error
    row = (
        "own" if _is_own(point, sweep) else "",
        _rate(point.rate),
        averages,
        _marked(point.loaded.mismatch, point, best.loaded),
        _marked(point.converged.mismatch, point, best.converged),
        glyphs.UNMEASURED if error is None else _figure(error),
    )
    if point.shifted is None:
        return row
    late = f"> {sweep.batches - sweep.batches // 2}" if point.recovery is None else str(point.recovery)
    return (*row, _marked(point.shifted.mismatch, point, best.shifted), late)


def _layer_row(curve: MomentumCurve, sweep: MomentumSweep) -> tuple[str, ...]:
    bests = [curve.best.loaded, curve.best.converged, *([curve.best.shifted] if _shifts(sweep) else [])]
    return (_rate(curve.momentum), _figure(_own_mismatch(curve)), *map(_with_ties, bests), curve.layer or "")


def _with_ties(best: _Rates) -> str:
    return _rate(best[0]) + (f" (+{len(best) - 1})" if len(best) > 1 else "")


def _own_point(curve: MomentumCurve) -> MomentumPoint | None:
    if not curve.one_momentum:
        return None
    return next((point for point in curve.points if point.rate == curve.momentum), None)


def _own_mismatch(curve: MomentumCurve) -> float:
    point = _own_point(curve)
    return point.loaded.mismatch if point else 0.0


def _is_own(point: MomentumPoint, sweep: MomentumSweep) -> bool:
    return any(curve.momentum == point.rate for curve in sweep.layers)


def _shifts(sweep: MomentumSweep) -> bool:
    return sweep.model.points[0].shifted is not None


def _change(sweep: MomentumSweep) -> str:
    parts = []
    if sweep.shift:
        parts.append(f"means {sweep.shift:+g} std")
    if sweep.scale != 1.0:
        parts.append(f"std {glyphs.TIMES} {sweep.scale:g}")
    return " and ".join(parts) or "no change at all"


def _rate(rate: float | None) -> str:
    return "cumulative" if rate is None else f"{rate:g}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _marked(value: float, point: MomentumPoint, best: _Rates) -> str:
    mark = _BEST if point.rate == best[0] else _TIE if point.rate in best else " "
    return _figure(value) + mark


def _figure(value: float) -> str:
    """Four decimals: rates differ in the third."""
    return f"{value:.4f}" if 0.0001 <= value < 10 else f"{value:.2g}"
