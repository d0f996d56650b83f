"""Pages of HTML in a real browser: charts, sorting, filtering, keyboard, dark mode, print, hostile names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fabricated_logs as logs
import pytest
from fabricated_documents import document
from fabricated_reports import batch_sizes, flagged, healthy, many
from hard_documents import HOSTILE, deep, hostile, with_curves

from bnprobe.records import Report
from bnprobe.report.page import clean
from bnprobe.report.repair import RepairReport
from browser.opened import NARROW, WIDE, Open
from support import repairs

DOCUMENTS: dict[str, Any] = {
    "flagged": flagged,
    "healthy": healthy,
    "batch sizes": batch_sizes,
    "training": lambda: document("scan", "training"),
    "overflow": lambda: document("scan", "overflow"),
    "many layers": many,
    "sweep": lambda: document("sweep", "momentum"),
    "repair": lambda: document("repair", "better"),
    "record": lambda: RepairReport(with_curves(repairs.RECORDS["better"]())),
    "verify": lambda: document("verify", "failed"),
    "log": lambda: document("log", "found"),
    "log of many layers": lambda: replace(logs.BEGUN, taken=40, samples=logs.course(100, 40), findings=(logs.LAG,)),
    "odd log": lambda: document("log", "odd"),
}


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_charts_are_drawn_and_the_page_fits_its_window(show: Open, name: str, size: tuple[int, int]) -> None:
    page = show(DOCUMENTS[name](), size).page
    places = page.locator(".chart")
    for index in range(places.count()):
        drawn = places.nth(index).locator("svg")
        assert drawn.count() == 1
        assert drawn.locator(".mark-rect path, .mark-symbol path, .mark-line path, .mark-rule line").count() > 0
        box = drawn.bounding_box()
        assert box["height"] > 80
        assert box["width"] >= min(places.nth(index).bounding_box()["width"] * 0.9, size[0] * 0.8)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_table_of_layers_fits_a_wide_window_and_a_name_a_line(show: Open) -> None:
    page = show(document("scan", "lag"), WIDE).page
    table = page.locator("#layers .scroll")
    assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    names = page.locator("#layers tbody th")
    small = page.locator("#layers tbody td").first.bounding_box()["height"]
    assert all(names.nth(index).bounding_box()["height"] == small for index in range(names.count()))


def test_every_name_below_a_chart_is_shown(show: Open) -> None:
    page = show(flagged(), WIDE).page
    shown = page.locator("#shares .mark-text.role-axis-label text").all()
    visible = [each.text_content() for each in shown if each.get_attribute("opacity") != "0"]
    assert [name.split()[-1] for name in visible if "bn" in name or "downsample" in name] == [
        layer.name for layer in flagged().layers
    ]


def test_a_column_is_sorted_by_mouse(show: Open) -> None:
    opened = show(flagged())
    before = opened.names()
    heading = opened.page.get_by_role("columnheader", name="n_eq eval").last
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    falling = opened.names()
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    rising = opened.names()
    layers = sorted(flagged().layers, key=lambda layer: layer.eval.equivalent_batch_size if layer.eval else 0.0)
    assert rising == [layer.name for layer in layers] == falling[::-1]
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert opened.names() == before


def test_a_column_is_sorted_by_keyboard_and_that_is_said(show: Open) -> None:
    opened = show(flagged())
    opened.page.locator("#layers thead button", has_text="Layer").focus()
    opened.page.keyboard.press("Enter")
    assert opened.names() == sorted(layer.name for layer in flagged().layers)
    assert opened.page.locator("#said").inner_text() == "Sorted by Layer, ascending"
    opened.page.keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.textContent") == "Depth"
    opened.page.keyboard.press("Space")
    assert opened.names() == [layer.name for layer in flagged().layers][::-1]


def test_what_was_not_measured_is_sorted_last(show: Open) -> None:
    report: Any = document("scan", "overflow")
    opened = show(report)
    button = opened.page.locator("#layers thead button", has_text="n_eq eval")
    for _ in range(2):
        button.click()
        assert opened.names()[0] == "bn1"  # the only one that could be measured


def test_layers_are_filtered_by_words_and_by_sign(show: Open) -> None:
    report = flagged()
    opened = show(report)
    field = opened.page.get_by_role("searchbox")
    field.fill("LAYER2 bn")
    assert opened.names() == [name for layer in report.layers if "layer2" in (name := layer.name) and "bn" in name]
    field.fill("")
    opened.page.get_by_role("checkbox", name="fine").uncheck()
    assert opened.names() == [layer.name for layer in report.layers if layer.flagged]
    assert opened.page.locator("output").inner_text() == f"{len(opened.names())} of {len(report.layers)} rows"
    field.fill("no such layer")
    assert opened.names() == []


def test_a_filter_is_reached_and_left_by_keyboard(show: Open) -> None:
    opened = show(flagged())
    opened.page.get_by_role("searchbox").focus()
    opened.page.keyboard.type("downsample")
    assert all("downsample" in name for name in opened.names())
    opened.page.keyboard.press("Enter")  # which must not send a form
    opened.page.keyboard.press("Tab")
    opened.page.keyboard.press("Space")
    assert opened.page.evaluate("document.activeElement.type") == "checkbox"


def test_a_pointer_shows_the_figures_of_a_layer_and_a_click_leads_to_its_row(show: Open) -> None:
    report = flagged()
    opened = show(report)
    column = opened.columns("spread-2").nth(4)
    told = opened.tip_at(column)
    assert opened.page.locator("#tip .head").inner_text() == report.layers[4].name
    assert "90% of them" in told
    column.click()
    row = opened.page.locator("tr:target")
    assert report.layers[4].name in row.inner_text()
    opened.page.keyboard.press("Escape")
    assert opened.page.locator("#tip").is_hidden()


def test_a_pointer_shows_what_happened_at_a_step_of_a_run_and_what_a_layer_was_like(show: Open) -> None:
    opened = show(logs.found())
    mark = opened.page.locator("#modes-1 svg .mark-rule.role-mark").last.locator("line").nth(1)
    assert opened.tip_at(mark, force=True) == "Stale running statistics (BN203) step 1,316 layers layer7.bn"
    pieces = opened.page.locator("#map-1 svg .mark-rect.role-mark path")
    assert pieces.count() == 8  # of seven layers; the last one changed once
    left_of_the_marks = {"x": 12, "y": 5}
    assert opened.tip_at(pieces.last, position=left_of_the_marks) == "layer7.bn n_eq 4.0 steps 1,300 to 2,400"


def test_labels_of_what_happened_are_above_the_chart_and_within_it(show: Open) -> None:
    page = show(logs.found(), NARROW).page
    for chart in ("modes-1", "curves-1", "map-1"):
        svg = page.locator(f"#{chart} svg").bounding_box()
        labels = page.locator(f"#{chart} svg .mark-text.role-mark text", has_text="BN203")
        assert labels.count() == 3
        plot = page.locator(f"#{chart} svg .mark-rule.role-mark line").last.bounding_box()
        for index in range(3):
            box = labels.nth(index).bounding_box()
            assert svg["y"] <= box["y"] < box["y"] + box["height"] <= plot["y"] + 4
            assert svg["x"] <= box["x"] < box["x"] + box["width"] <= svg["x"] + svg["width"]


def test_a_link_opens_what_is_folded(show: Open) -> None:
    opened = show(flagged())
    link = opened.page.locator("article a").first
    target = opened.page.locator(link.get_attribute("href") or "")
    assert target.get_attribute("open") is None
    link.click()
    assert target.get_attribute("open") is not None
    assert target.locator("dl").is_visible()


def test_colours_follow_the_scheme_also_in_charts(show: Open) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = show(flagged(), scheme=scheme).page
        seen[scheme] = [
            _brightness(page.evaluate("getComputedStyle(document.body).backgroundColor")),
            _brightness(page.evaluate("getComputedStyle(document.body).color")),
            _brightness(page.evaluate("getComputedStyle(document.querySelector('.chart svg .role-axis text')).fill")),
        ]
    (light, dark_ink, dark_label), (dark, light_ink, light_label) = seen["light"], seen["dark"]
    assert light > 230 > dark_label > dark_ink
    assert dark < 40 < light_label < light_ink


def _brightness(colour: str) -> float:
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


def test_it_prints_in_light_colours_within_the_paper(show: Open) -> None:
    page = show(flagged(), scheme="dark").page
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.set_viewport_size({"width": 700, "height": 900})
    page.emulate_media(media="print")
    assert _brightness(page.evaluate("getComputedStyle(document.body).backgroundColor")) == 255
    assert page.locator("nav").is_hidden()
    assert page.locator("form.filter").is_hidden()
    widths = page.evaluate(
        "[...document.querySelectorAll('.chart svg')].map((svg) => svg.getBoundingClientRect().right)"
    )
    assert max(widths) <= 700


def test_it_can_be_read_without_scripts(show: Open) -> None:
    page = show(flagged(), scripts=False).page
    assert page.locator("h1").is_visible()
    assert page.locator("noscript p").first.is_visible()
    page.locator("#shares summary").click()
    assert page.locator("#shares table").is_visible()
    assert page.locator("button.copy").first.is_hidden()


def test_parts_have_their_roles_and_names(show: Open) -> None:
    page = show(flagged()).page
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("navigation", name="On this page").count() == 1
    assert page.get_by_role("region", name="All layers").count() == 1
    assert page.get_by_role("search").count() == 1
    assert page.get_by_role("img", name="Bars of 9 layers in depth order.").count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("bad", [text for text in HOSTILE if len(text) < 100], ids=range(len(HOSTILE) - 1))
def test_hostile_names_show_as_text_in_charts_and_under_the_pointer(show: Open, bad: str) -> None:
    names = iter(range(1_000_000))
    report = hostile(batch_sizes(), lambda text: f"{bad}#{next(names)}")
    opened = show(report)
    head = opened.page.locator("#tip .head")
    opened.tip_at(opened.columns("shares-1").nth(1))
    assert " ".join(head.inner_text().split()) == " ".join(clean(report.layers[1].name, unicode=True).split())
    opened.tip_at(opened.page.locator("#batch-sizes-1 svg .mark-symbol.role-mark path").last)
    shown = {" ".join(clean(layer.name, unicode=True).split()) for layer in report.layers}
    assert " ".join(head.inner_text().split()) in shown
    assert opened.page.locator("script").count() == 4
    assert opened.page.locator("img, iframe, b").count() == 0


def test_a_network_of_800_layers_is_drawn_sorted_and_filtered(show: Open) -> None:
    report: Report = deep(800)
    opened = show(report)
    assert opened.columns("shares-1").count() == 800
    opened.page.locator("#shares .wide").focus()  # wider than the window, so that arrow keys scroll it
    assert opened.page.evaluate("document.activeElement.className") == "wide"
    opened.page.locator("#layers thead button", has_text="Depth").click()
    assert opened.names()[0] == report.layers[-1].name
    opened.page.get_by_role("searchbox").fill("799.bn")
    assert opened.names() == ["stages.88.799.bn"]
