"""The table that every report uses: it fits the page, drops columns in order and shortens names last."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from bnprobe.report.page import Page
from bnprobe.report.table import Column, Mark, Names, TableLayout, arrows, dropping, table

CELLS = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=6)


def lines(names: Names, columns: list[Column], width: int = 80, expendable: tuple[str, ...] = ()) -> list[str]:
    """The table as plain text."""
    return [line.plain for line in table(names, dropping(columns, expendable), Page(width, unicode=True))]


def test_numbers_have_their_points_in_line_and_headings_may_take_two_lines() -> None:
    columns = [Column("D\nworse", ["0.5", "12", "–"], "point"), Column("kind", ["BN1d", "BN2d", ""], "left", "foot")]
    assert lines(Names(["a", "b", "c"], marks=[Mark("✗"), Mark(), Mark()]), columns) == [
        "              D      ",
        "   layer  worse  kind",
        "✗  a        0.5  BN1d",
        "   b       12    BN2d",
        "   c          –      ",
        "                 foot",
    ]


def test_names_may_stand_last_or_be_missing() -> None:
    columns = [Column("size", ["1", "16"])]
    assert lines(Names(["bn1", "bn2"], last=True), columns) == ["  size  layer", "     1  bn1", "    16  bn2"]
    assert lines(Names([]), columns) == ["  size", "     1", "    16"]


def test_headings_that_are_all_empty_take_no_line() -> None:
    assert lines(Names(["bn1"], heading=""), [Column("", ["x"])]) == ["  bn1  x"]


def test_columns_are_dropped_in_order_until_the_names_have_room() -> None:
    name = "a.rather.long.name.of.a.layer"
    names = Names([name])
    columns = [Column(heading, ["123456"]) for heading in ("one", "two", "three")]

    def headings(width: int) -> list[str]:
        return lines(names, columns, width, expendable=("two", "one"))[0].split()

    room = 2 + len(name)
    assert headings(room + 3 * 8) == ["layer", "one", "two", "three"]
    assert headings(room + 3 * 8 - 1) == ["layer", "one", "three"]
    assert headings(room + 2 * 8 - 1) == ["layer", "three"]
    assert headings(20) == ["layer", "three"]


def test_a_shortened_name_differs_from_all_names_of_the_network() -> None:
    names = Names([f"block.{'x' * 30}.1.bn"], among=[f"block.{'x' * 30}.2.bn"])
    (_, row) = lines(names, [Column("D", ["0.5"])], width=24)
    assert "1" in row
    assert "…" in row


def test_a_bold_mark_makes_its_name_bold_and_a_dim_one_the_line_dim() -> None:
    made = table(
        Names(["bn1", "bn2", "bn3"], marks=[Mark("✗", "bold red"), Mark("✓", "green"), Mark("–", "dim")]),
        [TableLayout([Column("D", ["1", "2", "3"])])],
        Page(80, unicode=True),
    )
    assert [(span.start, span.end) for line in made[1:] for span in line.spans] == [(0, 8), (0, 3), (0, len(made[3]))]


def test_arrows_stand_below_each_other() -> None:
    page = Page(80, unicode=False)
    assert arrows([("1.5", "10"), ("12", "0.25")], page) == [" 1.5 -> 10   ", "12   ->  0.25"]
    assert arrows([], page) == []


@given(
    rows=st.lists(st.tuples(st.text(min_size=1), CELLS, CELLS), min_size=1, max_size=5),
    width=st.integers(40, 100),
    last=st.booleans(),
    unicode=st.booleans(),
)
def test_a_table_of_any_names_fits_any_page(
    rows: list[tuple[str, str, str]], width: int, last: bool, unicode: bool
) -> None:
    names, one, two = zip(*rows, strict=True)
    columns = [Column("one", one), Column("two", two, "left")]
    made = table(Names(names, last=last), dropping(columns, ("one",)), Page(width, unicode))
    assert len(made) == len(rows) + 1
    assert max(cell_len(line.plain.rstrip()) for line in made) <= width
