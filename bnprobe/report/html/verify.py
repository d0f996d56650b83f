"""The page of a verification: the layers of two scans, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnprobe.numbers import count
from bnprobe.records import Verification
from bnprobe.report import figures
from bnprobe.report import verify as words
from bnprobe.report.html import network_charts
from bnprobe.report.html.page import (
    Block,
    Cell,
    Chart,
    Column,
    Document,
    Figure,
    Row,
    Section,
    Table,
    Text,
    Tiles,
    signs_among,
)
from bnprobe.report.html.parts import points, reproduce
from bnprobe.report.page import ARROW, RenderOptions
from bnprobe.report.verify import ComparedLayer


def verify_page(found: Verification, options: RenderOptions) -> Document:
    """The page of a verification."""
    sign, verdict, sentences = words.closing(found)
    return Document(
        title=words.title(found),
        sign=sign,
        verdict=verdict,
        sentences=sentences,
        top=(Tiles(tuple(_tiles(found))),),
        sections=(
            Section("layers", "Every layer, before and after", tuple(compared_layers(words.compared(found))), "Layers"),
            Section("alone", words.ALONE, points(words.in_one_report(found, show_all=True))),
            Section("output", words.OUTPUT, tuple(Text((text,)) for text in words.output_in_words(found)), "Output"),
            Section("notes", "Notes on the comparison", points(found.notes), "Notes"),
            Section("how", "How this was compared", tuple(reproduce(options.command)), "How compared"),
        ),
    )


def _tiles(found: Verification) -> Iterator[tuple[str, str, str]]:
    before, after = (sum(getattr(layer, f"flagged_{when}") for layer in found.layers) for when in ("before", "after"))
    yield "Layers flagged", f"{before} {ARROW} {after}", f"of {len(found.layers)}"
    if found.output_before is not None and found.output_after is not None:
        values = (figures.relative(value) for value in (found.output_before, found.output_after))
        yield "Outputs apart", f" {ARROW} ".join(values), "training against inference"


def compared_layers(rows: Sequence[ComparedLayer]) -> Iterator[Block]:
    """The chart of layers before and after, and the table that can be sorted."""
    if not rows:
        return
    changes = [
        network_charts.Change(
            row.layer.name, words.sign_after(row.layer), row.layer.before, row.layer.after, words.what_became(row)
        )
        for row in rows
    ]
    yield Figure(
        "before-after",
        words.BEFORE_AND_AFTER,
        (Chart(network_charts.before_and_after(changes), f"D of {count(len(rows), 'layer')} before and after."),),
        None,
        (),
        (("before", "before"), ("after", "after")),
        len(rows),
    )
    yield _table(rows)


def _table(rows: Sequence[ComparedLayer]) -> Table:
    equivalents = any(any(row.equivalent) for row in rows)
    columns = [Column("Layer", number=False), Column("Depth"), Column("D before"), Column("D after")]
    columns += [Column("n_eq before"), Column("n_eq after")] if equivalents else []
    columns += [Column("What became of it", number=False)]
    made = tuple(
        Row(
            (
                Cell(row.layer.name, sign=words.sign_after(row.layer)),
                Cell(str(depth), depth),
                *map(Cell, words.mismatches_of(row.layer), (row.layer.before, row.layer.after)),
                *([Cell(text) for text in row.equivalent] if equivalents else []),
                Cell(words.what_became(row)),
            ),
            f"layer-{depth}",
        )
        for depth, row in enumerate(rows, start=1)
    )
    present = signs_among(words.sign_after(row.layer) for row in rows)
    return Table("D is the larger of training and inference", tuple(columns), made, present)
