"""What Batch Renorm's usual limits would clip in the flagged layers, beside what they would clip by chance alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import Distribution, Layer, PathMeasurement
from bnprobe.reports import figures
from bnprobe.reports.layout import Page, pad

MOST_LAYERS = 5
"""So many layers are listed, those of which most would be clipped, unless all are asked for."""

_NOTABLE = 0.01
"""Fraction of values from which clipping is worth a line, however much chance explains."""

_EXCESS, _SLACK = 2.0, 0.005
"""Below that, clipping is worth a line if it is so many times what chance explains, and this fraction more."""


@dataclass(frozen=True)
class _Clipped:
    name: str
    path: PathMeasurement

    @property
    def most(self) -> float:
        return max(self.path.r.clipped, self.path.d.clipped)

    def cells(self) -> tuple[str, ...]:
        r, d = self.path.r, self.path.d
        return tuple(map(figures.percent, (r.clipped, r.clipped_iid, d.clipped, d.clipped_iid)))


def clipping(layers: Iterable[Layer], page: Page, show_all: bool) -> list[Text]:
    """The flagged layers of which Batch Renorm would clip notably much on the train path; nothing if there are none.

    Args:
        layers: All layers.
        page: What the lines are written on.
        show_all: Every such layer, not only the worst.
    """
    flagged = [_Clipped(layer.name, layer.train) for layer in layers if layer.flagged and layer.train is not None]
    found = [layer for layer in flagged if _notable(layer.path.r) or _notable(layer.path.d)]
    if not found:
        return []
    worst = sorted(found, key=lambda layer: layer.most, reverse=True)
    shown = worst if show_all else worst[:MOST_LAYERS]
    return [
        *page.heading("Batch Renorm (r_max 3, d_max 5) would clip, train path"),
        *_table(shown, page),
        *page.paragraph(_legend(len(worst) - len(shown)), style="dim", first="  "),
    ]


def _notable(values: Distribution) -> bool:
    return values.clipped > _NOTABLE or values.clipped > _EXCESS * values.clipped_iid + _SLACK


def _table(shown: Sequence[_Clipped], page: Page) -> list[Text]:
    columns = zip(("r", "iid", "d", "iid"), *(layer.cells() for layer in shown), strict=True)
    blocks = [[pad(cell, max(map(cell_len, column)), right=True) for cell in column] for column in columns]
    room = page.width - 2 - sum(2 + cell_len(block[0]) for block in blocks)
    names = ["layer", *page.shorten([layer.name for layer in shown], room)]
    width = max(map(cell_len, names))
    lines = [Text("  " + "  ".join([pad(name, width), *cells])) for name, *cells in zip(names, *blocks, strict=True)]
    lines[0].stylize("dim")
    return lines


def _legend(left_out: int) -> str:
    text = "iid: the same for i.i.d. data in batches of n_eq values"
    return f"{text}; --all shows {figures.count(left_out, 'more layer')}" if left_out else text
