"""Scans side by side: which differences are sure, in which order the layers stand, and what cannot be compared."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bnprobe.commands.compare import compare
from bnprobe.errors import UsageError
from bnprobe.records import Comparison, Layer, Report
from bnprobe.report import render
from bnprobe.report.compare import course, most_changed, words
from bnprobe.testing import make_layer, make_path
from unit.report.fabricated_parts import report as report_of


def layer(name: str, mismatch: float, relative: float | None = 0.1) -> Layer:
    """A layer whose D has this 95% interval, as a factor to both sides."""
    ends = (mismatch / (1 + (relative or 0)), None if relative is None else mismatch * (1 + relative))
    path = replace(make_path(mismatch), interval=ends)
    return make_layer(name, train=path, eval=path)


def compared(*reports: Report) -> Comparison:
    return compare({f"{number}.json": report for number, report in enumerate(reports)})


def trends(found: Comparison) -> dict[str, str]:
    return {each.name: each.trend for each in found.layers}


def test_which_differences_are_sure() -> None:
    before = report_of([layer(name, 0.1) for name in ("same", "better", "worse", "near", "gone")])
    after = report_of([layer("same", 0.1), layer("better", 0.08), layer("worse", 0.13), layer("near", 0.11)])
    assert trends(compared(before, after)) == {
        "same": "same",
        "better": "better",
        "worse": "worse",
        "near": "unsure",
        "gone": "unknown",
    }


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    """Two scans whose ln D are normal around true values: the slow, obvious reference."""
    random, error, truth = np.random.default_rng(0), 0.1, math.log(1.3)
    hits, trials = 0, 4000
    for _ in range(trials):
        first, last = random.normal(0, error), random.normal(truth, error)
        ends = [(math.exp(value - 1.96 * error), math.exp(value + 1.96 * error)) for value in (first, last)]
        made = [
            replace(make_path(math.exp(value)), interval=interval)
            for value, interval in zip((first, last), ends, strict=True)
        ]
        found = compared(*(report_of([make_layer("a", train=path, eval=path)]) for path in made)).layers[0]
        assert found.ratio_interval is not None
        low, high = found.ratio_interval
        hits += low <= math.exp(truth) <= (high or math.inf)
    assert hits / trials == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("first", "last", "ratio", "interval", "trend", "said"),
    [
        (layer("a", 0.1, None), layer("a", 0.4), 4.0, (0.0, 4.4), "unsure", "not sure: no upper end"),
        (layer("a", 0.1, None), layer("a", 0.05), 0.5, (0.0, 0.55), "better", "surely better"),
        (layer("a", 0.1), layer("a", 0.2, None), 2.0, (2 / 1.1, None), "worse", "surely worse"),
        (layer("a", 7.6), layer("a", 0.019, None), 0.0025, (0.0025 / 1.1, None), "unsure", "not sure: no upper end"),
        (layer("a", 0.1, None), layer("a", 0.4, None), 4.0, None, "unsure", "not sure: no upper end"),
        (layer("a", 0.0), layer("a", 0.1), None, None, "unsure", "not sure: D is 0"),
        (layer("a", 0.0), layer("a", 0.0), None, None, "same", "no change"),
    ],
)
def test_without_an_end_only_the_other_one_can_make_a_change_sure(
    first: Layer, last: Layer, ratio: float | None, interval: tuple[float, float | None] | None, trend: str, said: str
) -> None:
    found = compared(report_of([first]), report_of([last])).layers[0]
    assert found.ratio == pytest.approx(ratio)
    assert (found.ratio_interval or ()) == pytest.approx(interval or ())
    assert (found.trend, words(found)) == (trend, said)


def test_layers_are_in_network_order_and_points_in_that_of_time() -> None:
    one = report_of([layer("a", 0.1), layer("c", 0.1)])
    two = report_of([layer("a", 0.2), layer("b", 0.1), layer("c", 0.3)])
    found = compared(one, two, two)
    assert [each.name for each in found.layers] == ["a", "b", "c"]
    assert [None if point is None else point.mismatch for point in found.layers[1].points] == [None, 0.1, 0.1]
    assert [scan.worst for scan in found.scans] == ["a", "c", "c"]
    assert course(found.layers[0]) == "▁██"
    assert course(found.layers[1]) == " ▁▁"


def test_what_differs_beside_the_weights_is_noted() -> None:
    found = compared(report_of([layer("a", 0.1)], batch_size=2), report_of([layer("a", 0.1)], batch_size=8, seed=3))
    assert found.notes[0] == "1.json: The batch size differs: 2 before, 8 after."
    assert found.notes[1].startswith("1.json: The seed differs:")


def test_what_cannot_be_compared() -> None:
    one = report_of([layer("a", 0.1)])
    with pytest.raises(UsageError, match="A comparison takes two reports or more"):
        compared(one)
    with pytest.raises(
        UsageError, match=r"The reports are of different models.* Give reports of scans of one model\.$"
    ):
        compared(one, one, report_of([layer("b", 0.1)]))


def test_the_report_says_what_is_sure_and_that_nothing_has_changed() -> None:
    one = report_of([layer("a", 0.1), layer("b", 0.1)])
    two = report_of([layer("a", 0.02), layer("b", 0.101)])
    text = render(compared(one, two))
    assert "From 0.json to 1.json: 1 of 2 layers surely better, none surely worse." in text
    assert "× 0.2 (0.17 to 0.23)  surely better" in text
    assert "over time" not in text
    assert "over time" in render(compared(one, one, two))
    assert "From 0.json to 1.json: no change." in render(compared(one, one))


def test_of_many_layers_those_that_changed_most_are_shown() -> None:
    many = [layer(f"layer{number}.bn", 0.1) for number in range(40)]
    moved = [layer(each.name, 0.1 * (1 + number % 7)) for number, each in enumerate(many)]
    text = render(compared(report_of(many), report_of(moved)))
    assert "28 layers that changed less, or less surely, not shown; --all shows all." in " ".join(text.split())
    assert text.count("surely worse\n") == 12


def test_the_worst_layer_is_shown_and_wide_intervals_stand_behind_narrow_ones() -> None:
    before = [layer("worst", 9.0), layer("wide", 0.1), *(layer(f"bn{number}", 0.1) for number in range(12))]
    after = [layer("worst", 0.02, None), layer("wide", 0.001, 40.0), *(layer(each.name, 0.05) for each in before[2:])]
    found = compared(report_of(before), report_of(after))
    shown = [each.name for each in most_changed(found, show_all=False)]
    assert shown == ["worst", "wide", *(f"bn{number}" for number in range(10))]
    assert "× 0.0022 (over 0.002) not sure: no upper end" in " ".join(render(found).split())


def test_reports_without_names_are_numbered_and_what_is_none_is_refused() -> None:
    before, after = report_of([layer("a", 0.1)]), report_of([layer("a", 0.2)])
    assert [scan.name for scan in compare([before, after]).scans] == ["1", "2"]
    with pytest.raises(
        UsageError, match=r"Expected the report of a scan for report 2, but got .*x\.json.*Report\.load"
    ):
        compare([before, "x.json"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="Expected a list of reports, or a dictionary of them by name"):
        compare(before)  # type: ignore[arg-type]
