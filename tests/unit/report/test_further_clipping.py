"""What Batch Renorm would clip: which layers are listed, and how."""

from __future__ import annotations

from dataclasses import replace

import fabricated_parts
import fabricated_reports
import pytest
from rendered import said, section
from rich.cells import cell_len

from bnprobe.records import Layer

TITLE = "Values that Batch Renorm (r_max 3, d_max 5) would clip in training"
MOST_LAYERS = 5


def clipped(name: str, r: float = 0.0, r_iid: float = 0.0, d: float = 0.0, d_iid: float = 0.0) -> Layer:
    """A flagged layer with these fractions."""
    path = fabricated_parts.path(4, 1)
    path = replace(
        path, r=replace(path.r, clipped=r, clipped_iid=r_iid), d=replace(path.d, clipped=d, clipped_iid=d_iid)
    )
    return fabricated_parts.layer(name, path, path, flagged=True)


def listed(layers: list[Layer], show_all: bool = False) -> list[list[str]]:
    """The rows of the table, headings and legend left out."""
    rows = [line.split() for line in section(fabricated_reports.report(layers), TITLE, show_all=show_all)[2:]]
    return [row for row in rows if row[0].startswith("bn")]


def test_both_factors_stand_beside_what_chance_explains() -> None:
    assert listed([clipped("bn", 0.25, 0.21, 0.034, 0.0004)]) == [["bn", "25%", "21%", "3.4%", "<0.1%"]]


@pytest.mark.parametrize(
    ("layer", "worth_a_line"),
    [
        (clipped("bn"), False),
        (clipped("bn", r=0.011, r_iid=0.011), True),
        (clipped("bn", d=0.011, d_iid=0.011), True),
        (clipped("bn", r=0.009, r_iid=0.008), False),
        (clipped("bn", r=0.009, r_iid=0.001), True),
        (clipped("bn", d=0.0005), False),
        (replace(clipped("bn", r=0.5), flagged=False), False),
        (replace(clipped("bn", r=0.5), train=None), False),
    ],
)
def test_only_flagged_layers_that_would_be_clipped_noticeably(layer: Layer, worth_a_line: bool) -> None:
    assert bool(section(fabricated_reports.report([layer]), TITLE)) is worth_a_line


def test_the_worst_come_first_and_the_others_with_all() -> None:
    layers = [clipped(f"bn{index}", **{"rd"[index % 2]: 0.02 * (index + 1)}) for index in range(MOST_LAYERS + 2)]
    worst = [row[0] for row in listed(layers)]
    assert worst == [f"bn{index}" for index in range(MOST_LAYERS + 1, 1, -1)]
    assert len(listed(layers, show_all=True)) == MOST_LAYERS + 2
    assert "--all shows 2 more layers" in said(fabricated_reports.report(layers))


def test_long_names_fit() -> None:
    lines = section(fabricated_reports.report([clipped("very.long.name." * 9 + "bn", r=1.0)]), TITLE)
    assert 60 < max(map(cell_len, lines)) <= 80


def test_a_healthy_network_has_no_such_part() -> None:
    assert "would clip" not in said(fabricated_reports.healthy())


def test_nothing_is_expected_by_chance_where_no_size_of_batch_explains_the_mismatch() -> None:
    layer = clipped("bn", 0.06, 1.0)
    beyond = replace(layer, train=replace(layer.train, mismatch=3.4, equivalent_batch_size=1.0))
    assert listed([beyond]) == [["bn", "6.0%", "–", "0%", "–"]]
    assert "(–: no size of batch explains the mismatch)" in said(fabricated_reports.report([beyond]))
    assert "no size of batch" not in said(fabricated_reports.report([layer]))
