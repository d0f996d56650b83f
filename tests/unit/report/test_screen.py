"""The report of a scan on one screen: how much of it there is, stages of layers alike, and one spelling of a name."""

from __future__ import annotations

import re
from dataclasses import replace

import fabricated_causes as causes
import fabricated_parts as parts
import fabricated_reports as fabricated
import pytest
from fabricated_documents import CASES, document
from rendered import said, section, text_of

from bnprobe.printable import PROSE_WIDTH
from bnprobe.records import Diagnosis, Layer
from bnprobe.report import RenderOptions, render
from bnprobe.report.layers import worst_first
from bnprobe.report.screen import MOST_LINES, stages

SCANS = [name for kind, name in CASES if kind == "scan"]


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("name", SCANS)
def test_it_fits_a_screen_and_prose_is_not_too_wide(name: str, width: int) -> None:
    lines = text_of(document("scan", name), verbose=False, width=width).splitlines()
    assert len(lines) <= MOST_LINES
    assert all(len(line) <= PROSE_WIDTH for line in lines if line.endswith((".", ":")))


def test_the_whole_report_is_a_choice() -> None:
    report = fabricated.flagged()
    whole = render(report, "terminal", RenderOptions(verbose=True))
    assert render(report, "terminal", RenderOptions(show_all=True)).startswith(whole[: whole.index("n_eq")])
    assert "Where the mismatch at inference comes from" in whole
    assert "--verbose" not in whole
    assert "--verbose shows every layer with histograms" in said(report, verbose=False)


def test_findings_that_do_not_fit_are_counted() -> None:
    found = [
        Diagnosis("lag", "BN203", "error", ("a",), None, f"Finding {number}. " + "It is so. " * 30, f"Do {number}.")
        for number in range(9)
    ]
    text = said(replace(fabricated.flagged(), diagnoses=tuple(found)), verbose=False)
    assert "Finding 0." in text
    assert "Remedy: Do 0." in text
    assert "It is so." not in text  # only the first sentence
    shown = len(re.findall(r"Remedy: Do \d\.", text))
    assert f"{9 - shown} more findings" in text


def test_the_worst_row_comes_first_and_has_the_figures_of_the_worse_mode() -> None:
    found = fabricated.flagged()
    rows = [row.split() for row in section(found, "9 BatchNorm2d layers", verbose=False)[2:8]]
    assert [row[1] for row in rows] == [layer.name for layer in worst_first(found.layers)[:6]]
    assert rows[0][:5] == ["✗", "layer2.0.downsample.1", "1.0", "31.7", "38.9"]


def test_the_limits_of_a_column_have_one_number_format() -> None:
    rows = [row.split() for row in section(causes.lag(), "9 BatchNorm2d layers", verbose=False) if row[:1] == "✗"]
    assert [row[3] for row in rows] == ["32.0", *5 * ["31.5"]]


def test_a_report_without_layers_is_short() -> None:
    assert "No layer could be judged." in said(parts.report([]), verbose=False)


# --- Stages -----------------------------------------------------------------------------------------------------------


def network(*names: str) -> list[Layer]:
    return [_layer(name, n=4.0) for name in names]


def _layer(name: str, n: float) -> Layer:
    return parts.layer(name, parts.path(n, seed=0), parts.path(n, seed=0))


def spelled(chosen: list[Layer], network: list[Layer] | None = None) -> list[tuple[str, int]]:
    return [(stage.name, len(stage.layers)) for stage in stages(chosen, network or chosen)]


def test_layers_of_the_blocks_of_a_stage_are_one_row() -> None:
    names = [f"layer3.{block}.bn{number}" for block in range(23) for number in (1, 2, 3)]
    rows = [(f"layer3.{{0..22}}.bn{number}", 23) for number in (1, 2, 3)]
    assert spelled(network("bn1", *names)) == [("bn1", 1), *rows]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["net.1", "net.4", "net.7"], "net.{1..7}"),
        (["bn1", "bn2", "bn3"], "bn{1..3}"),
        ([f"blocks.3.layer{number}.norm2" for number in (9, 10, 11)], "blocks.3.layer{9..11}.norm2"),
        ([f"layer{number}.0.downsample.1" for number in (1, 2, 3)], "layer{1..3}.0.downsample.1"),
    ],
)
def test_the_number_that_counts_the_blocks_varies(names: list[str], expected: str) -> None:
    assert spelled(network(*names)) == [(expected, 3)]


def test_two_layers_alike_keep_their_names() -> None:
    assert spelled(network("layer1.0.bn1", "layer1.1.bn1")) == [("layer1.0.bn1", 1), ("layer1.1.bn1", 1)]


def test_a_stage_has_no_gaps_and_its_layers_are_alike() -> None:
    layers = network(*(f"blocks.{block}.bn" for block in range(9)))
    layers[3] = _layer("blocks.3.bn", n=500.0)
    layers[8] = _layer("blocks.8.bn", n=16.0)
    chosen = [layer for layer in layers if layer is not layers[3]]
    assert spelled(chosen, layers) == [("blocks.{0..2}.bn", 3), ("blocks.{4..7}.bn", 4), ("blocks.8.bn", 1)]


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("modules", [0, 3, 5, 20])
def test_a_layer_has_one_spelling_in_all_tables(width: int, modules: int) -> None:
    base = causes.training()
    layers = [replace(layer, name=f"{'module.' * modules}{layer.name}") for layer in base.layers]
    text = text_of(replace(base, layers=tuple(layers)), width=width)
    spellings = re.findall(r"^[^\w\n]{2,3}(\S*layer3\.0\.bn2)  ", text, re.MULTILINE)
    assert len(spellings) == 3  # the layers, the shares, the backward pass
    assert len(set(spellings)) == 1
