"""The page of a monitor's log: what it draws at few and at many layers and samples, and what it says."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from fabricated_logs import BEGUN, EVERY, LAG, SMALL, course, found, healthy, held, layer, odd, sample

from bnprobe.records import LayerSample, ModeLoss, MonitorChange, MonitorLog
from bnprobe.report import watch
from bnprobe.report.html import step_charts
from support.pages import Page, page_of, said


def headline(page: Page) -> str:
    """The verdict, with its sign."""
    return said(page.all("h1")[0])


def rows(page: Page, chart: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows that a chart draws, those with these values."""
    return [row for row in page.data[chart] if wanted.items() <= row.items()]


@pytest.fixture(scope="module")
def page() -> Page:
    """The page of a log with findings."""
    return page_of(found())


# --- What it says -----------------------------------------------------------------------------------------------------


def test_the_verdict_says_what_was_found_when_and_where(page: Page) -> None:
    assert headline(page) == (
        "✗ Stale running statistics (BN203), 3 times from step 1,316 to 2,216, in layer7.bn; batches too small (BN201),"
        " at step 416, in layer1.bn."
    )
    many = replace(LAG, layers=tuple(f"bn{number}" for number in range(9)))
    others = [replace(SMALL, rule=f"XX{number}", cause=f"cause_{number}") for number in range(4)]
    assert headline(page_of(replace(BEGUN, findings=(many, *others)))) == (
        "✗ Stale running statistics (BN203), at step 1,316, in 9 layers; cause 0 (XX0), at step 416, in layer1.bn;"
        " cause 1 (XX1), at step 416, in layer1.bn; 2 more causes."
    )


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        (healthy(), "✓ No finding in 12 samples."),
        (replace(healthy(), taken=10_000), "✓ No finding in 10,000 samples."),
        (BEGUN, "– No sample was taken yet."),
        (MonitorLog("a.jsonl"), "– The run has not begun."),
        (
            replace(BEGUN, findings=(replace(LAG, severity="catastrophe", layers=()),)),
            "– Stale running statistics (BN203),",
        ),
    ],
)
def test_the_verdict_where_nothing_is_known(log: MonitorLog, verdict: str) -> None:
    assert headline(page_of(log)).startswith(verdict)


def test_each_rule_is_a_card_with_its_last_words_and_leads_to_its_manual(page: Page) -> None:
    cards = [card for card in page.all("article") if said(card).startswith(("✗", "!"))]
    assert [said(card) for card in cards] == [
        "✗ Stale running statistics (BN203) layer7.bn It still lags. Remedy: Raise the momentum. Found: 3 times, from"
        " step 1,316 (alarm at step 1,300) to step 2,216, whose words these are. What BN203 checks, and why",
        "! Batches too small (BN201) layer1.bn Too few values. Remedy: Use more. Found: at step 416 (alarm at step"
        " 400). What BN201 checks, and why",
    ]
    assert "running statistics" in said(page.by_id("rule-BN203"))


def test_findings_and_changes_stand_in_order(page: Page) -> None:
    table = page.table("Findings, and what the monitor changed")
    assert [(row["Step"].split()[-1], row["What"]) for row in table] == [
        *(("416", "BN201"), ("416", "renorm"), ("900", "undo"), ("1,316", "BN203"), ("1,616", "BN203")),
        *(("2,216", "BN203"), ("2,216", "recalibrate")),
    ]


def test_what_was_changed_skipped_and_damaged_is_said(page: Page) -> None:
    assert "Changed at the moment (renorm): layer2.bn." in said(page.all("header")[0])
    skipped = said(page.by_id("skipped"))
    assert all(text in skipped for text in ("2 layers", "it is frozen", "neck.bn", "head.bn"))
    notes = said(page.by_id("notes"))
    assert "1 line of the log could not be read" in notes
    assert "resumed at step 1,000" in notes


def test_the_last_sample_is_a_table_of_every_layer(page: Page) -> None:
    table = page.table("7 layers at step 2,400")
    assert [row["Layer"].split()[-1] for row in table] == list(found().samples[-1].layers)
    assert (table[6]["Layer"], table[6]["n_eq"], table[6]["Found"]) == ("✗ layer7.bn", "4.0", "BN203")
    assert (table[1]["Layer"], table[1]["Changed"]) == ("layer2.bn", "renorm")
    assert table[0]["Layer"] == "layer1.bn"  # without a sign: what was done about its finding was taken back


def test_few_samples_without_a_finding_are_said_to_be_few() -> None:
    few = "After 12 samples this says little: a D of twice its limit takes about 15 to be found."
    assert few in said(page_of(healthy()).all("header")[0])
    assert few not in page_of(replace(healthy(), taken=16)).words


def test_layers_in_eval_mode_are_marked_where_there_are_any(page: Page) -> None:
    shown = page_of(held())
    assert [(row["Layer"], row["Mode"]) for row in shown.table("2 layers at step 1,200")] == [
        ("layer1.bn", "train"),
        ("layer2.bn", "eval"),
    ]
    assert f"In eval mode in the last sample: layer2.bn. {watch.HELD}" in shown.words
    assert "Mode" not in page.table("7 layers at step 2,400")[0]
    assert watch.HELD not in page.words


def test_a_finding_without_layers_is_shown_like_others() -> None:
    page = page_of(held())
    assert headline(page) == "! Input shift (inputs), at step 600."
    assert [said(card) for card in page.all("article")] == [
        "! Input shift (inputs) Batches are not like those before. Remedy: Mix. Found: at step 600 (alarm at step 600)."
    ]
    assert [row["What"] for row in page.table("Findings, and what the monitor changed")] == ["inputs"]
    assert [row["label"] for row in page.data["modes-1/labels0"]] == ["inputs"]


def test_what_is_missing_has_no_part() -> None:
    assert page_of(healthy()).sections == ["loss", "course", "layers", "how"]
    assert page_of(BEGUN).sections == page_of(MonitorLog("a.jsonl")).sections == ["how"]
    log = replace(BEGUN, taken=1, samples=(replace(sample(100, []), output=None),))
    page = page_of(log)
    assert "The loss could not be computed again in eval mode, and the outputs could not be compared." in page.words
    assert "No layer with running statistics was called in any sample." in page.words
    assert page.charts == {}


# --- What it draws ----------------------------------------------------------------------------------------------------


def test_the_loss_in_both_modes_and_the_outputs_are_drawn_at_each_sample(page: Page) -> None:
    for mode, field in (("train mode", "train"), ("eval mode", "eval")):
        drawn = rows(page, "modes-1/rows", name=mode)
        assert [row["x"] for row in drawn] == [each.step for each in found().samples]
        for row, each in zip(drawn, found().samples, strict=True):
            assert row["y"] == pytest.approx(getattr(each.loss, field), rel=1e-4)
    assert {row["y"] for row in page.data["modes-2/rows"]} == {0.2}
    assert len(page.table("Loss in both modes")) == 24


def test_few_layers_have_a_curve_each_and_no_map() -> None:
    page = page_of(healthy())
    assert {row["name"] for row in page.data["curves-1/rows"]} == {"layer1.bn", "layer2.bn", "layer3.bn"}
    assert [row["y"] for row in rows(page, "curves-1/rows", name="layer2.bn")] == [pytest.approx(50.0)] * 12
    assert "map-1" not in page.charts


def test_limits_are_dotted_lines(page: Page) -> None:
    assert {row["label"]: row["y"] for row in page.data["curves-1/limits"]} == {"n_eq 32": 32.0, "n_eq 14": 14.0}


def test_of_many_layers_those_that_were_found_and_the_worst_have_curves_beside_the_median(page: Page) -> None:
    names = list(dict.fromkeys(row["name"] for row in page.data["curves-1/rows"]))
    assert names == ["layer7.bn", "layer1.bn", "layer2.bn", "layer3.bn", "layer4.bn", "median of 7 layers"]
    middle = rows(page, "curves-1/rows", name="median of 7 layers")
    assert [row["y"] for row in middle] == [pytest.approx(60.0, rel=1e-4)] * 24


def test_a_layer_that_got_worse_lately_is_among_the_worst() -> None:
    page = page_of(
        replace(
            BEGUN,
            taken=60,
            samples=tuple(
                sample(EVERY * number, [*([30.0] * 5), 500.0 if number <= 54 else 2.0, 400.0])
                for number in range(1, 61)
            ),
        )
    )
    assert next(iter(page.data["curves-1/rows"]))["name"] == "layer6.bn"


def test_the_map_has_a_row_for_each_layer_in_order_and_one_piece_for_each_kind_of_n_eq(page: Page) -> None:
    drawn = page.data["map-1/rows"]
    assert list(dict.fromkeys(row["name"] for row in drawn)) == list(found().samples[-1].layers)
    last = [(row["look"], row["text"], row["steps"], row["label"]) for row in drawn if row["name"] == "layer7.bn"]
    assert last == [
        ("heat-4", "40.0", "100 to 1,200", "✗ layer7.bn"),
        ("heat-1", "4.0", "1,300 to 2,400", "✗ layer7.bn"),
    ]
    pieces = [(row["x"], row["end"]) for row in drawn if row["name"] == "layer7.bn"]
    assert pieces == [(100, 1250), (1250, 2400)]


def test_of_very_many_layers_the_worst_are_in_the_map() -> None:
    log = replace(BEGUN, taken=20, samples=course(300, 20), findings=(replace(LAG, layers=("layer200.bn",)),))
    page = page_of(log)
    names = list(dict.fromkeys(row["name"] for row in page.data["map-1/rows"]))
    assert len(names) == 100
    assert {"layer1.bn", "layer200.bn", "layer300.bn"} <= set(names)
    assert names == sorted(names, key=lambda name: int(name[5:-3]))
    assert "200 layers with less mismatch not drawn." in page.words
    assert len(page.table("300 layers")) == 300


def test_findings_changes_and_where_the_run_was_resumed_are_marks_of_every_chart(page: Page) -> None:
    for chart in ("modes-1", "modes-2", "curves-1", "map-1"):
        marks = {(row["x"], row["says"], row["look"]) for row in page.data[f"{chart}/marks"]}
        assert marks == {
            (416, "Batches too small (BN201)", "undecided"),
            *((step, "Stale running statistics (BN203)", "flagged") for step in (1316, 1616, 2216)),
            *((416, "renorm", "ink"), (900, "undo", "ink"), (2216, "recalibrate", "ink")),
            (1000, "The run was resumed", "unmeasured"),
        }
        labels = [row["label"] for lane in range(3) for row in page.data.get(f"{chart}/labels{lane}", ())]
        assert {"BN201", "BN203", "renorm", "undo", "recalibrate"} <= set(labels)


def test_labels_of_marks_do_not_cover_each_other() -> None:
    marks = tuple(step_charts.Mark(step, "BN203", "", "", "flagged") for step in range(0, 1000, 10))
    spec = step_charts.lines([], "step", "y", course=step_charts.Course(0, 1000, marks))
    lanes = [rows for name, rows in spec["datasets"].items() if name.startswith("labels")]
    assert len(lanes) == 3
    for lane in lanes:
        places = sorted(row["x"] for row in lane)
        assert len(places) >= 8
        assert all(later - earlier > 80 for earlier, later in pairwise(places))
        assert places[0] > 40
        assert places[-1] < 960


def test_a_mark_whose_label_is_longer_than_the_chart_has_none() -> None:
    marks = (step_charts.Mark(500, "w" * 500, "", "", "flagged"), step_charts.Mark(500, "BN203", "", "", "flagged"))
    spec = step_charts.lines([], "step", "y", course=step_charts.Course(0, 1000, marks))
    assert [row["label"] for row in spec["datasets"]["labels0"]] == ["BN203"]
    assert len(spec["datasets"]["marks"]) == 2


def test_what_was_found_again_and_again_is_one_mark_where_there_is_no_room_for_more() -> None:
    findings = tuple(replace(LAG, step=step) for step in range(1000))
    log = replace(BEGUN, taken=12, samples=course(3, 12), findings=findings)
    marks = page_of(log).data["modes-1/marks"]
    assert len(marks) <= 210
    assert marks[0]["says"] == "Stale running statistics (BN203), 6 times"


def test_of_very_many_samples_each_point_is_a_mean() -> None:
    samples = tuple(sample(EVERY * number, [20.0, 90.0], ModeLoss(number, 1.0)) for number in range(1, 1001))
    page = page_of(replace(BEGUN, taken=4000, samples=samples))
    drawn = rows(page, "modes-1/rows", name="train mode")
    assert len(drawn) == 200
    assert (drawn[0]["x"], drawn[0]["y"]) == (300, 3.0)
    assert [row["y"] for row in rows(page, "curves-1/rows", name="layer1.bn")] == [pytest.approx(20.0)] * 200
    assert "Each point is a mean over 5 samples." in page.words
    assert "Of 4,000 samples 1,000 were read for the charts, evenly." in page.words
    assert len(page.text) < 1_400_000


def test_what_is_not_finite_is_a_cross_and_what_is_not_there_is_nothing() -> None:
    page = page_of(odd())
    assert [(row["name"], row["x"]) for row in page.data["modes-1/odd"]] == [("eval mode", 300)]
    assert [(row["name"], row["x"]) for row in page.data["curves-1/odd"]] == [
        ("layer1.bn", step) for step in (100, 200, 300)
    ]
    assert [row["x"] for row in rows(page, "curves-1/rows", name="layer3.bn")] == [100, 300]
    assert {row["y"] for row in rows(page, "curves-1/rows", name="layer2.bn")} == {10_000.0}
    assert {row["text"] for row in rows(page, "curves-1/rows", name="layer2.bn")} == {"∞"}
    assert "Crosses at the bottom: not finite." in page.words


def test_a_loss_below_zero_is_drawn() -> None:
    samples = tuple(sample(EVERY * number, [20.0], ModeLoss(-100.0 / number, 50.0)) for number in range(1, 5))
    page = page_of(replace(BEGUN, taken=4, samples=samples))
    assert [row["y"] for row in rows(page, "modes-1/rows", name="train mode")] == [
        -100.0,
        -50.0,
        pytest.approx(-33.333),
        -25.0,
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300, -1e300, 1e-300, math.inf])
def test_any_figure_has_a_page(value: float) -> None:
    layers = {"bn": LayerSample(value, value, value, value), "other": layer(4.0)}
    each = replace(sample(2**62, []), output=value, loss=ModeLoss(value, value), layers=layers)
    change = MonitorChange(0, "thing", ())
    log = replace(BEGUN, every=0, taken=2, samples=(each, each), changes=(change,), step=2**62)
    assert {"modes-1", "modes-2", "curves-1"} <= set(page_of(log).charts)


def test_the_same_in_one_line() -> None:
    assert repr(healthy()) == "<MonitorLog: ResNet, No finding in 12 samples>"
    assert watch.one_line(found()) in repr(found())
