"""What only shows in training: the backward pass's noise, and how steps move the running statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Backward, GradientAngle, Layer, Report, Updates
from bnprobe.reports import figures
from bnprobe.reports.glyphs import DEGREE, UNMEASURED
from bnprobe.reports.layout import Page, pad

MOST_LAYERS = 5
"""So many layers are listed, the worst, unless all are asked for."""

_NAMES_ROOM = 12
"""Columns are left out, the last first, until names have this much."""

_ONCE = 0.01
"""Updates per step, and rates relative to the configured one, within this are as they should be."""

_ALIGNED = 0.99


def backward(report: Report, page: Page, show_all: bool) -> list[Text]:
    """The layers whose backward statistics are noisiest, and what that does to the gradient."""
    found = [(layer, layer.backward) for layer in report.layers if layer.backward is not None]
    angle = report.summary.gradient_angle
    if not found and angle is None:
        return []
    found.sort(key=lambda pair: pair[1].noise, reverse=True)
    shown = found if show_all else found[:MOST_LAYERS]
    lines = page.heading("Backward pass: noise of the batch statistics of the gradient")
    if shown:
        rows = [(layer.name, _noise_cells(noise)) for layer, noise in shown]
        lines += _table(("n_eq backward", "95%"), rows, page)
        lines += _more(len(found) - len(shown), "less noise", page)
    return [*lines, *(page.paragraph(_angle(angle), first="  ") if angle is not None else [])]


def updates(report: Report, page: Page, show_all: bool) -> list[Text]:
    """How real training steps moved the running statistics: the layers where that is not as configured."""
    found = [(layer, layer.updates) for layer in report.layers if layer.updates is not None]
    if not found:
        return []
    odd = [pair for pair in found if not _as_configured(*pair)]
    shown = found if show_all else odd[:MOST_LAYERS]
    lines = page.heading("Running statistics over real training steps")
    if not odd:
        text = f"Updated once per step and call, at the configured rate, in all {figures.count(len(found), 'layer')}."
        lines += page.paragraph(text, first="  ")
    if shown:
        cells = [(layer.name, _update_cells(moved)) for layer, moved in shown]
        lines += _table(("updates per step", "repeated", "rate", "configured", "drift"), cells, page)
        lines += _more(0 if show_all else len(odd) - len(shown), "the same", page)
    worst, moved = max(found, key=lambda pair: pair[1].drift)
    drift = f"{figures.plain(float(f'{moved.drift:.2g}'))} running standard deviations, in {worst.name}"
    said = [f"Largest drift in one step: {drift}."]
    if any(moved.repeated > _ONCE for _, moved in odd):
        said.insert(0, "Repeated: updates with the batch of an earlier one of the same step, as checkpointing makes.")
    return [*lines, *(line for sentence in said for line in page.paragraph(sentence, first="  "))]


def _noise_cells(noise: Backward) -> tuple[str, ...]:
    interval = ""
    if noise.interval is not None:
        low, high = noise.interval
        # Noise and n_eq run in opposite directions: n_eq = 2 / noise.
        ends = (0.0 if high is None else 2 / max(high, 1e-12), 2 / max(low, 1e-12))
        interval = figures.equivalent_interval(ends)
    return figures.equivalent_batch_size(noise.equivalent_batch_size), interval


def _angle(angle: GradientAngle) -> str:
    single, averaged = _degrees(angle.cosine), _degrees(angle.mean_cosine)
    batches = figures.count(angle.batches, "micro-batch")
    meaning = (
        "batch noise, which averages out"
        if angle.mean_cosine >= _ALIGNED
        else "a bias if it stays with more micro-batches; averaging over steps does not remove a bias"
    )
    return (
        f"The gradient with batch statistics is turned by {single} against the one with population statistics"
        f" (cosine {angle.cosine:.3f}, mean over {batches}); averaged over all of them {averaged} are left"
        f" (cosine {angle.mean_cosine:.3f}): {meaning}."
    )


def _degrees(cosine: float) -> str:
    return f"{math.degrees(math.acos(min(max(cosine, -1.0), 1.0))):.0f}{DEGREE}"


def _as_configured(layer: Layer, moved: Updates) -> bool:
    """Once per step and call, at the configured rate; calls on different data add up to a larger one."""
    once = abs(moved.per_step - layer.calls_per_forward) <= _ONCE and moved.repeated <= _ONCE
    if moved.rate is None or moved.configured is None:
        return once
    expected = 1 - (1 - moved.configured) ** layer.calls_per_forward
    return once and abs(moved.rate - expected) <= _ONCE * max(expected, 1e-12)


def _update_cells(moved: Updates) -> tuple[str, ...]:
    rate, configured = (
        UNMEASURED if value is None else figures.plain(value) for value in (moved.rate, moved.configured)
    )
    return figures.plain(moved.per_step), figures.plain(moved.repeated), rate, configured, f"{moved.drift:.2g}"


def _table(heading: tuple[str, ...], rows: Sequence[tuple[str, tuple[str, ...]]], page: Page) -> list[Text]:
    cleaned = [[page.clean(cell) for cell in column] for column in zip(*(cells for _, cells in rows), strict=True)]
    columns = [[title, *figures.points_in_line(column)] for title, column in zip(heading, cleaned, strict=True)]
    blocks = [[pad(cell, max(map(cell_len, column)), right=True) for cell in column] for column in columns]
    room = _room(blocks, page)
    while room < min(_NAMES_ROOM, max(cell_len(page.clean(name)) for name, _ in rows)) and len(blocks) > 1:
        blocks.pop()
        room = _room(blocks, page)
    names = ["layer", *page.shorten([name for name, _ in rows], room)]
    width = max(map(cell_len, names))
    lines = [Text("  " + "  ".join([pad(name, width), *cells])) for name, *cells in zip(names, *blocks, strict=True)]
    lines[0].stylize("dim")
    return lines


def _room(blocks: Sequence[Sequence[str]], page: Page) -> int:
    """What the columns leave for names."""
    return page.width - 2 - sum(2 + cell_len(block[0]) for block in blocks)


def _more(number: int, what: str, page: Page) -> list[Text]:
    text = f"{figures.count(number, 'more layer')} with {what}; --all shows every one."
    return page.paragraph(text, first="  ", style="dim") if number > 0 else []
