"""From the training loss to the held-out one in steps (Wu & Johnson 2021, arXiv 2105.07576)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Gap
from bnprobe.reports import figures
from bnprobe.reports.layout import Page, pad

_LEVELS_AND_STEPS = (
    ("training", "training batches, as in training", "training"),
    ("training_noise", "training noise: dropout and the like", "noise"),
    ("without_noise", "training batches, dropout and the like off", "noise off"),
    ("inconsistency", "train/test inconsistency: running statistics", "inconsistency"),
    ("inference", "training batches, as at inference", "inference"),
    ("generalization", "generalization gap: images not trained on", "generalization"),
    ("held_out", "held-out batches, as at inference", "held out"),
)
"""From training down to held-out data, each level followed by the step to the next; labels for wide and narrow."""

_STEPS = {
    "training_noise": "training noise, which is there in training only",
    "inconsistency": "the train/test inconsistency: what running instead of batch statistics change",
    "generalization": "the generalization gap, between training and held-out images on the same running statistics",
}

_MOSTLY = 0.5

_NOTABLE = 0.05
"""A step smaller than this part of the values themselves is not worth a sentence."""


def gaps(found: Sequence[Gap], page: Page) -> list[Text]:
    """The levels and steps, a column for each measure, and which step is the largest."""
    if not found:
        return []
    held_out = any(gap.held_out is not None for gap in found)
    rows = [row for row in _LEVELS_AND_STEPS if held_out or row[0] not in ("generalization", "held_out")]
    columns = [_column(gap, [field for field, *_ in rows]) for gap in found]
    labels = ["", *_labels(rows, page.width - sum(2 + cell_len(column[0]) for column in columns), page)]
    width = max(map(cell_len, labels))
    styles = ["dim", *("dim" if field in _STEPS else "" for field, *_ in rows)]
    lines = [
        Text("  ".join([pad(label, width), *cells]), style)
        for label, style, *cells in zip(labels, styles, *columns, strict=True)
    ]
    heading = f"From training to {'held-out data' if held_out else 'inference'}, step by step"
    return [
        *page.heading(heading),
        *lines,
        *(line for text in _words(found) for line in page.paragraph(text, first="  ")),
    ]


def _labels(rows: Sequence[tuple[str, str, str]], room: int, page: Page) -> list[str]:
    """The longest labels that fit."""
    for length in (1, 2):
        labels = [f"{'    ' if row[0] in _STEPS else '  '}{row[length]}" for row in rows]
        if max(map(cell_len, labels)) <= room:
            break
    return page.shorten(labels, max(room, 5))


def _column(gap: Gap, fields: Sequence[str]) -> list[str]:
    cells = [gap.measure, *figures.points_in_line([_cell(gap, field) for field in fields])]
    width = max(map(cell_len, cells))
    return [pad(cell, width, right=True) for cell in cells]


def _cell(gap: Gap, field: str) -> str:
    value: float | None = getattr(gap, field)
    if value is None:
        return ""
    return figures.signed(value) if field in _STEPS else figures.score(value)


def _words(found: Sequence[Gap]) -> list[str]:
    """Which step is the largest, where one makes up more than half of all, the measures that agree together."""
    measures: dict[str, list[str]] = {}
    for gap in found:
        step = _largest_step(gap)
        if step is not None:
            measures.setdefault(step, []).append(f"the {gap.measure}")
    return [f"The largest step in {' and '.join(names)} is {_STEPS[step]}." for step, names in measures.items()]


def _largest_step(gap: Gap) -> str | None:
    sizes = {field: abs(getattr(gap, field) or 0.0) for field in _STEPS}
    largest = max(sizes, key=lambda field: sizes[field])
    level = max(abs(value) for value in (gap.training, gap.inference, gap.held_out or 0.0))
    notable = sizes[largest] > _NOTABLE * level
    return largest if notable and sizes[largest] > _MOSTLY * sum(sizes.values()) else None
