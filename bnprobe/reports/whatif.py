"""What each free remedy would give, measured on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Remedy, Score
from bnprobe.reports import figures
from bnprobe.reports.glyphs import ARROW, UNMEASURED
from bnprobe.reports.layout import Page, pad

_DOING = {
    "recalibrated": "Recalibrating",
    "evaluation statistics": "Taking the statistics of the evaluation data",
    "batch statistics": "Normalizing at inference with batch statistics",
}

_MEASURES = ("loss", "metric")


def whatif(remedies: Sequence[Remedy], page: Page) -> list[Text]:
    """The remedies, best first, and the best in words."""
    if not remedies:
        return []
    ordered = best_first(remedies)
    numbers = [f"{number:,}" for number in sorted({remedy.images for remedy in remedies})]
    images = " or ".join(", ".join(numbers).rsplit(", ", 1))
    heading = page.heading(f"What free remedies would give, on {images} held-out images")
    return [*heading, *page.paragraph(best_in_words(ordered), first="  "), *_table(ordered, page)]


def best_first(remedies: Sequence[Remedy]) -> list[Remedy]:
    """By the loss; without one by the metric, of which more is taken to be better; those without either last."""
    return sorted(remedies, key=_rank)


def _rank(remedy: Remedy) -> tuple[float, float]:
    loss, metric = remedy.after.loss, remedy.after.metric
    return math.inf if loss is None else loss, math.inf if metric is None else -metric


def best_in_words(ordered: Sequence[Remedy]) -> str:
    """What the best remedy does, e.g. "Recalibrating takes the loss from 1.92 to 0.08."."""
    best = ordered[0]
    measure = "loss" if best.after.loss is not None else "metric"
    start, end = _value(best.before, measure), _value(best.after, measure)
    if start is None or end is None:
        return "None of them could be scored."
    if (end - start) * (1 if measure == "loss" else -1) >= 0:
        what = "lowers the loss" if measure == "loss" else "raises the metric"
        return f"None of them {what}, which is {figures.score(start)} as it is."
    return f"{doing(best.name)} takes the {measure} from {figures.score(start)} to {figures.score(end)}."


def doing(name: str) -> str:
    """A remedy as the subject of a sentence."""
    for known, words in _DOING.items():
        if name.startswith(known):
            return words + name.removeprefix(known).replace(", batches", " of batches")
    return name[:1].upper() + name[1:]


def _value(score: Score | None, measure: str) -> float | None:
    return None if score is None else score.loss if measure == "loss" else score.metric


def _how(remedy: Remedy) -> str:
    """How it was done, in how many layers, and its control."""
    control = ""
    if remedy.control is not None:
        values = [("loss", remedy.control.loss), ("metric", remedy.control.metric)]
        given = [f"{measure} {figures.score(value)}" for measure, value in values if value is not None]
        control = f"to be held against {', '.join(given)}" if given else ""
    return "; ".join(filter(None, (remedy.detail, control)))


def _table(ordered: Sequence[Remedy], page: Page) -> list[Text]:
    """The scores; how it was done stands beside them where there is room, else below."""
    scores = [*_layers(ordered), *(column for measure in _MEASURES for column in _scores(ordered, measure, page))]
    blocks = [_block(column, right=True) for column in scores]
    room = page.width - 2 - sum(2 + cell_len(block[0]) for block in blocks)
    names = ["remedy", *page.shorten([remedy.name for remedy in ordered], max(room, 6))]
    blocks.insert(0, _block(names, right=False))
    lines = [Text("  " + "  ".join(cells)) for cells in zip(*blocks, strict=True)]
    lines[0].stylize("dim")
    how = [page.clean(_how(remedy)) for remedy in ordered]
    if max(map(cell_len, how)) + 2 <= page.width - cell_len(lines[0].plain):
        beside = [line + Text(f"  {text}", "dim") for line, text in zip(lines[1:], how, strict=True)]
        return [lines[0], *beside]
    told = [(remedy.name, text) for remedy, text in zip(ordered, how, strict=True) if text]
    below = (page.paragraph(f"{name}: {text}", "dim", first="  ", rest="    ") for name, text in told)
    return [*lines, *(line for block in below for line in block)]


def _block(column: Sequence[str], right: bool) -> list[str]:
    width = max(map(cell_len, column))
    return [pad(cell, width, right) for cell in column]


def _layers(ordered: Sequence[Remedy]) -> list[list[str]]:
    """How many layers are changed, where that is not the same for all."""
    numbers = [str(len(remedy.layers)) for remedy in ordered]
    return [["layers", *numbers]] if len(set(numbers)) > 1 else []


def _scores(ordered: Sequence[Remedy], measure: str, page: Page) -> list[list[str]]:
    """A column of before and after; none where there is nothing to show."""
    before = [_value(remedy.before, measure) for remedy in ordered]
    after = [_value(remedy.after, measure) for remedy in ordered]
    if all(value is None for value in [*before, *after]):
        return []
    ends = zip(_aligned(before, page), _aligned(after, page), strict=True)
    return [[measure, *(f"{start} {page.clean(ARROW)} {end}" for start, end in ends)]]


def _aligned(values: Sequence[float | None], page: Page) -> list[str]:
    texts = [page.clean(UNMEASURED) if value is None else figures.score(value) for value in values]
    return _block(figures.points_in_line(texts), right=True)
