"""Pages of HTML: valid, accessible, self-contained, and with what the documents say."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import altair
import fabricated_reports as fabricated
import pytest
from fabricated_documents import CASES, document
from hard_documents import HOSTILE, deep, hostile, with_curves
from pydantic import TypeAdapter

from bnprobe.errors import UsageError
from bnprobe.numbers import mismatch
from bnprobe.records import SOURCES, Gap, Layer, Record, RepairRecord, Report, SweepReport, TableReport, Verification
from bnprobe.report import FORMATS, RenderOptions, batch_effects, diagnoses, further, render, sweep, verify, watch
from bnprobe.report import repair as repairs_in_words
from bnprobe.report.html import network_charts
from bnprobe.report.html.vega import log_scale
from bnprobe.report.json import dump, load_as, load_document
from bnprobe.report.page import FINE, FLAGGED, clean
from bnprobe.report.repair import RepairReport
from bnprobe.rules import RULES
from bnprobe.rules.docs import manual
from bnprobe.stats.theory import mismatch_iid
from support import repairs
from support.pages import Page, between, digest, page_of, said

KINDS = ("scan", "sweep", "repair", "verify", "log", "table")
PAGES = [case for case in CASES if case[0] in KINDS]
COMMAND = "bnprobe scan model.py --batch-size 2 --format html"


@pytest.fixture(scope="module", params=PAGES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Kind and name of a document."""
    found: tuple[str, str] = request.param
    return found


@cache
def made(kind: str, name: str) -> Page:
    """The page of a document, parsed strictly."""
    return page_of(document(kind, name), command=COMMAND)


@pytest.fixture
def page(case: tuple[str, str]) -> Page:
    """The page of the case."""
    return made(*case)


# --- Every page -------------------------------------------------------------------------------------------------------


def test_it_has_a_language_a_title_and_one_main_heading(page: Page) -> None:
    assert page.root.get("lang") == "en"
    assert said(page.all("title")[0]) != ""
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("header")) == len(page.all("nav")) == 1


def test_headings_go_down_one_step_at_a_time(page: Page) -> None:
    levels = [int(element.tag[1]) for element in page.elements if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_ids_are_unique_and_what_refers_to_them_finds_them(page: Page) -> None:
    ids = [element.get("id") for element in page.elements if element.get("id")]
    assert len(ids) == len(set(ids))
    links = [element.get("href", "") for element in page.all("a")]
    assert {link[1:] for link in links} <= set(ids)
    assert {element.get("aria-labelledby") for element in page.elements} - {None} <= set(ids)


def test_every_table_has_a_caption_and_heads_of_columns_and_rows(page: Page) -> None:
    for table in page.all("table"):
        assert said(table.find("caption")) != ""
        assert all(cell.get("scope") == "col" for cell in table.findall("thead/tr/th"))
        for row in table.findall("tbody/tr"):
            assert row[0].tag == "th"
            assert row[0].get("scope") == "row"
            assert len(row) == len(table.findall("thead/tr/th"))


def test_every_chart_says_what_it_shows_and_has_a_table(page: Page) -> None:
    assert {place.get("id") for place in page.all("div", class_="chart")} == page.charts.keys()
    for figure in page.all("figure"):
        assert all(place.get("aria-label") for place in figure.iter("div") if "chart" in place.get("class", "").split())
        following = page.elements[page.elements.index(figure) :]
        assert next((element for element in following if element.tag == "table"), None) is not None


def test_every_sign_is_a_word_for_those_who_do_not_see_it(page: Page) -> None:
    for sign in page.all("span", class_="sign"):
        assert sign.get("role") == "img"
        assert sign.get("aria-label") in sign.get("class", "").split()


@pytest.mark.parametrize(
    "shown",
    [
        *(("scan", "batch_sizes"), ("scan", "data_shift"), ("sweep", "momentum"), ("repair", "better")),
        *(("verify", "large"), ("log", "found"), ("log", "odd"), ("table", "all")),
    ],
    ids="-".join,
)
def test_charts_are_valid_vega_lite(shown: tuple[str, str]) -> None:
    found = made(*shown).charts
    assert found
    for spec in found.values():
        altair.Chart.from_dict({**spec, "datasets": {}})


def test_charts_draw_data_that_the_page_has(page: Page) -> None:
    for place, spec in page.charts.items():
        named = set(re.findall(r'"data": \{"name": "(\w+)"\}', json.dumps(spec)))
        assert named <= {*spec["datasets"], network_charts.LAYERS}
        assert all(f"{place}/{name}" in page.data for name in spec["datasets"])
        assert network_charts.LAYERS not in named or page.data[network_charts.LAYERS]


def test_a_specification_holds_no_data_and_no_expression(page: Page) -> None:
    text = json.dumps(page.charts)
    for word in ('"values": [{', '"expr"', '"calculate"', '"filter"', '"href"', '"url"', '"signal"', "labelExpr"):
        assert word not in text


def test_nothing_is_loaded_and_only_the_scripts_and_styles_of_the_page_work(page: Page) -> None:
    policy = dict(
        part.split(" ", 1)
        for part in next(meta for meta in page.all("meta") if meta.get("http-equiv")).get("content", "").split("; ")
    )
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["script-src"].split() == [digest(script) for script in between(page.text, "script")]
    assert policy["style-src"].split() == [digest(style) for style in between(page.text, "style")]
    assert [link.get("href") for link in page.all("link")] == ["data:,"]
    loading = {"src", "srcset", "action", "formaction", "poster", "background", "style"}
    assert not [element for element in page.elements if loading & set(element.attrib)]
    assert not [name for element in page.elements for name in element.attrib if name.startswith("on")]


def test_it_is_ascii_of_readable_size(page: Page) -> None:
    assert page.text.isascii()
    assert page.text.endswith("</html>\n")
    assert not set(page.text) & set(map(chr, [*range(9), *range(11, 32), 127]))
    assert len(page.text) < 1_400_000


def test_parts_that_are_empty_are_left_out(page: Page) -> None:
    for section in page.all("section"):
        assert len(section) > 1
    assert [link.get("href") for link in page.all("nav")[0].iter("a")] == [f"#{name}" for name in page.sections]


def test_the_same_report_gives_the_same_bytes(case: tuple[str, str], page: Page) -> None:
    assert render(document(*case), "html", RenderOptions(command=COMMAND)) == page.text


def test_a_report_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(dump(fabricated.batch_sizes()), encoding="utf-8")
    code = (
        "import sys, hashlib; from pathlib import Path; from bnprobe.report import render;"
        "from bnprobe.records import Report; from bnprobe.report.json import read_as;"
        "print(hashlib.sha256(render(read_as(Path(sys.argv[1]), Report), 'html').encode()).hexdigest())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(report)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    own = render(fabricated.batch_sizes(), "html").encode()
    assert found.stdout.strip() == hashlib.sha256(own).hexdigest()


RECORDS: dict[str, type[Record]] = {"sweep": SweepReport, "table": TableReport, "verify": Verification}


def test_records_that_were_read_back_give_the_same_page(case: tuple[str, str], page: Page) -> None:
    kind, _ = case
    found: Any = document(*case)
    if kind == "scan":
        read: Any = load_as(Report, dump(found))
    elif kind == "repair":
        record = TypeAdapter(RepairRecord).validate_json(dump(found.record), strict=True)
        read = replace(found, record=record)
    elif kind == "log":
        read = load_document(render(found, "json"))
    else:
        text = json.dumps(asdict(found))
        read = TypeAdapter(RECORDS[kind]).validate_json(text, strict=True)
    assert render(read, "html", RenderOptions(command=COMMAND)) == page.text


# --- What it says -----------------------------------------------------------------------------------------------------


def test_the_verdict_is_that_of_the_terminal(case: tuple[str, str], page: Page) -> None:
    found: Any = document(*case)
    if case[0] == "scan":
        end = diagnoses.closing(found, COMMAND)
        expected = end.headline
        step = end.step.when_saved
        assert step is None or (step.command or step.why) in page.words
    elif case[0] == "repair":
        _, expected = repairs_in_words.verdict(found.record)
    elif case[0] == "log":
        expected = watch.one_line(found)
    else:
        closings = {"verify": lambda: verify.closing(found)[1], "table": lambda: batch_effects.one_line(found)}
        expected = closings.get(case[0], lambda: sweep.one_line(found))()
    assert " ".join(expected.split()) in said(page.all("header")[0])


def scanned(name: str) -> tuple[Report, Page]:
    """A report of a scan and its page."""
    report: Any = document("scan", name)
    return report, made("scan", name)


def test_causes_stand_first_with_their_remedies_and_lead_to_the_manual_of_their_rule() -> None:
    report, page = scanned("flagged")
    assert page.sections[0] == "causes"
    cards = page.all("article")
    assert len(cards) == len(report.diagnoses)
    for card, diagnosis in zip(cards, report.diagnoses, strict=True):
        assert f"Remedy: {diagnosis.remedy}" in said(card)
        link = next(card.iter("a")).get("href", "")
        assert link == f"#rule-{diagnosis.rule}"
        rule = next(rule for rule in RULES if rule.code == diagnosis.rule)
        assert manual(rule).summary in said(page.by_id(link[1:]))


def test_every_rule_is_there_with_its_outcome() -> None:
    report, page = scanned("flagged")
    for code in {verdict.rule for verdict in report.verdicts}:
        outcomes = {verdict.outcome for verdict in report.verdicts if verdict.rule == code}
        shown = said(page.by_id(f"rule-{code}").find("summary"))
        expected = next(outcome for outcome in ("failed", "passed", "skipped") if outcome in outcomes)
        assert expected in shown


def test_the_table_has_every_layer_in_depth_order_with_its_figures() -> None:
    report, page = scanned("flagged")
    rows = page.table(f"{len(report.layers)} layers")
    assert [row["Layer"].split()[1] for row in rows] == [layer.name for layer in report.layers]
    for row, layer in zip(rows, report.layers, strict=True):
        assert layer.train is not None
        assert layer.eval is not None
        assert row["D, worse"] == mismatch(max(layer.train.mismatch, layer.eval.mismatch))
        assert ("\N{BALLOT X}" in row["Layer"]) == layer.flagged


def test_shares_are_stacked_in_order_and_a_bar_that_does_not_fit_keeps_its_proportions() -> None:
    report, page = scanned("flagged")
    rows = page.data[network_charts.LAYERS]
    assert [row["cut"] is not None for row in rows].count(True) == 1
    for row, layer in zip(rows, report.layers, strict=True):
        assert layer.shares is not None
        parts = [max(source.of(layer.shares) or 0.0, 0.0) for source in SOURCES]
        scale = 1.0 if row["cut"] is None else row["cut"] / sum(parts)
        place = 0.0
        for index, share in enumerate(parts):
            if share:
                assert row[f"a{index}"] == pytest.approx(scale * place, rel=1e-3, abs=1e-5)
                assert row[f"b{index}"] == pytest.approx(scale * (place + share), rel=1e-3)
            else:
                assert row[f"a{index}"] is row[f"b{index}"] is None
            place += share


def test_quantiles_of_r_and_d_are_those_of_training() -> None:
    report, page = scanned("flagged")
    for row, layer in zip(page.data[network_charts.LAYERS], report.layers, strict=True):
        assert layer.train is not None
        for name, values in (("r", layer.train.r), ("d", layer.train.d)):
            for place, key in enumerate(("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")):
                assert row[f"{name}{place}"] == pytest.approx(values.quantiles[key], rel=1e-4, abs=1e-9)


def test_batch_sizes_have_the_curve_of_theory_from_the_scanned_size() -> None:
    report, page = scanned("batch_sizes")
    rows = [row for row in page.data["batch-sizes-1/told"] if row["role"].startswith("worst")]
    layer = next(layer for layer in report.layers if layer.name == rows[0]["name"])
    assert layer.eval is not None
    assert layer.eval.equivalent_batch_size is not None
    for row in rows:
        n_eq = layer.eval.equivalent_batch_size * row["size"] / report.scan.batch_size
        assert row["theory"] == pytest.approx(mismatch_iid(n_eq), rel=1e-3)


def test_steps_lead_from_one_level_to_the_next() -> None:
    names = [name for kind, name in PAGES if kind == "scan"]
    found = [(report, page) for report, page in map(scanned, names) if report.summary.gaps]
    assert found
    for report, page in found:
        for number, gap in enumerate(report.summary.gaps, start=1):
            rows = page.data[f"steps-{number}/rows"]
            for before, step, after in zip(rows[::2], rows[1::2], rows[2::2], strict=False):
                assert step["start"] == pytest.approx(before["end"], rel=1e-3)
                assert step["end"] == pytest.approx(after["end"], rel=1e-3, abs=1e-6)
            assert rows[0]["end"] == pytest.approx(gap.training, rel=1e-3)
            assert rows[-1]["end"] == pytest.approx(gap.inference if gap.held_out is None else gap.held_out, rel=1e-3)


def test_a_step_for_the_worse_is_known_by_its_colour_where_the_goal_is_known() -> None:
    gap = Gap("metric", 0.9, 0.9, 0.4, None, 0.0, -0.5, None, "max", None, (-0.6, -0.4), samples=64)
    report = fabricated.healthy()
    looks = {}
    for known in (True, False):
        found = replace(gap, goal_is_known=known)
        page = page_of(replace(report, summary=replace(report.summary, gaps=(found,))))
        looks[known] = [row["look"] for row in page.data["steps-1/rows"]]
        assert further.LEVELS_AND_STEPS["inconsistency"] in page.words
    assert looks == {True: ["before", "bad", "before"], False: ["before", "after", "before"]}


def test_what_was_not_measured_has_no_part() -> None:
    healthy = scanned("healthy")[1]
    for missing in ("causes", "worst", "sizes", "gap", "remedies", "clipping", "backward", "updates", "skipped"):
        assert missing not in healthy.sections
    assert {"network", "layers", "output", "rules", "how"} <= set(healthy.sections)


def test_every_optional_part_is_shown_by_some_report() -> None:
    seen = {section for kind, name in PAGES if kind == "scan" for section in scanned(name)[1].sections}
    assert seen == {
        *("causes", "worst", "network", "layers", "sizes", "output", "gap", "remedies", "clipping", "backward"),
        *("updates", "skipped", "notes", "rules", "how"),
    }


def test_skipped_layers_are_named_with_the_reason() -> None:
    report, page = scanned("skipped")
    text = said(page.by_id("skipped"))
    for layer in report.skipped:
        assert layer.name in text
        assert layer.reason in text


def test_a_page_does_not_say_how_to_save_it() -> None:
    assert "To save the report:" in render(fabricated.healthy(), "terminal")
    assert "To save the report:" not in page_of(fabricated.healthy()).words


def test_the_command_that_gave_the_report_is_there_where_it_is_known() -> None:
    report = fabricated.healthy()
    assert COMMAND in said(page_of(report, command=COMMAND).by_id("how"))
    for unknown in ("", RenderOptions.command):
        assert "The command that gave" not in page_of(report, command=unknown).words


# --- Sweep, repair, verification --------------------------------------------------------------------------------------


def test_the_page_of_a_sweep_has_every_layer_and_the_rates() -> None:
    report: Any = document("sweep", "momentum")
    page = made("sweep", "momentum")
    measured = [layer.name for layer in report.layers if layer.eval]
    assert [row["Layer"].split()[1] for row in page.table("Batch size from which on")] == measured
    assert {row["name"] for row in page.data["batch-sizes-1/rows"]} == set(measured)
    worst = max(report.layers, key=lambda layer: layer.eval[0].mismatch if layer.eval else 0.0)
    assert [row["limit"] for row in page.data["batch-sizes-1/limit"]] == [
        pytest.approx(point.limit, rel=1e-4) for point in worst.eval
    ]
    points = report.momentum.model.points
    assert len(page.data["rates-1/rows"]) == 3 * len(points)
    best = {(row["start"], row["rate"]) for row in page.data["rates-1/best"]}
    assert best == {("loaded", "0.3"), ("converged", "cumulative"), ("shifted", "0.3")}


def test_the_page_of_a_table_shows_every_batch_and_the_rows_before_and_after() -> None:
    report: Any = document("table", "all")
    page = made("table", "all")
    rows = page.table("3 plates")
    assert [row["plate"].split()[-1] for row in rows] == ["P1", "P2", "P3"]
    assert [row["n_eq"] for row in rows] == ["49.2", "1.0", "41.0"]
    cells = page.data["heatmap-1/rows"]
    assert [(cell["batch"][-2:], cell["feature"], cell["d"], cell["look"]) for cell in cells[2:5]] == [
        ("P1", "IL10", "+0", "after"), ("P2", "IL6", "+5.2", "bad"), ("P2", "TNF", "-1.3", "after"),
    ]  # fmt: skip
    assert [cell["depth"] for cell in cells[3:5]] == [1.0, 0.65]
    assert {cell["batch"][-2:] for cell in page.data["heatmap-2/rows"]} == {"P1", "P3"}  # one row has no r
    for chart, drawn in (
        ("projection-1/rows", report.projection.before),
        ("projection-2/rows", report.projection.after),
    ):
        assert sorted((row["x"], row["y"]) for row in page.data[chart]) == sorted(drawn)
    assert sum(row["features"] for row in page.data["p-values-1/rows"]) == len(report.features)


def test_the_page_of_a_repair_compares_its_arms_with_intervals_and_seeds() -> None:
    report: Any = document("repair", "better")
    page, proof = made("repair", "better"), report.record.proof
    rows = page.data["comparison-1/rows"]
    assert [row["label"] for row in rows] == [arm.name for arm in proof.arms]
    for row, arm in zip(rows, proof.arms, strict=True):
        assert row["end"] == pytest.approx(arm.metric.mean, rel=1e-3)
        if arm.metric.interval:
            assert (row["low"], row["high"]) == pytest.approx(arm.metric.interval, rel=1e-3)
    seeds = page.data["comparison-1/seeds"]
    assert len(seeds) == sum(len(arm.runs) for arm in proof.arms if len(arm.runs) > 1)
    assert "bnprobe verify repaired.before.json repaired.after.json" in page.words


def test_the_page_of_a_record_has_training_curves() -> None:
    record = with_curves(repairs.RECORDS["better"]())
    page = page_of(RepairReport(TypeAdapter(RepairRecord).validate_json(dump(record), strict=True)))
    assert "training" in page.sections
    assert record.proof is not None
    trained = {arm.name for arm in record.proof.arms if arm.trained}
    losses, metrics = page.data["curves-1/rows"], page.data["curves-3/rows"]
    assert {row["name"] for row in metrics} == trained
    assert {row["x"] for row in losses} == {250}  # a loss that is not finite is a gap
    assert {row["x"] for row in metrics} == {0, 250, 500}
    runs = sum(len(arm.runs) for arm in record.proof.arms if arm.trained)
    assert len(page.table("Every run")) == runs


def test_a_record_alone_has_no_layers_and_no_curves() -> None:
    page = page_of(RepairReport(repairs.RECORDS["better"]()))
    assert "layers" not in page.sections
    assert "training" not in page.sections


def test_the_page_of_a_verification_has_every_layer_before_and_after() -> None:
    found: Any = document("verify", "failed")
    page = made("verify", "failed")
    rows = page.data["before-after-1/rows"]
    assert [row["name"] for row in rows] == [layer.name for layer in found.layers]
    assert len(page.table("D is the larger")) == len(found.layers)
    assert said(page.all("header")[0]).startswith("bnprobe 0.1.0: verify of sample_configs/digits/model.py:load_model")
    for problem in found.problems:
        assert problem in page.words


# --- Hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        *(("scan", "training"), ("scan", "batch_sizes"), ("sweep", "momentum"), ("repair", "better")),
        *(("verify", "failed"), ("log", "found"), ("table", "all")),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("first", [0, 5, 10])
def test_names_words_and_paths_show_as_text(kind: tuple[str, str], first: int) -> None:
    changes: dict[str, str] = {}

    def changed(text: str) -> str:
        bad = HOSTILE[(len(changes) + first) % len(HOSTILE)]
        return changes.setdefault(text, f"{bad}#{len(changes)}")

    before = made(*kind)
    page = page_of(hostile(document(*kind), changed))  # strictly parsed
    assert not {element.tag for element in page.elements} & {"img", "b", "iframe", "object", "embed", "base"}
    assert between(page.text, "script") == between(before.text, "script")
    test_nothing_is_loaded_and_only_the_scripts_and_styles_of_the_page_work(page)
    test_a_specification_holds_no_data_and_no_expression(page)
    test_it_is_ascii_of_readable_size(page)
    shown = page.words + json.dumps(page.data, ensure_ascii=False)
    assert not [char for char in shown if not char.isprintable() and char not in "\n "]
    found: Any = document(*kind)
    names = list(found.samples[-1].layers) if kind[0] == "log" else [each.name for each in getattr(found, "layers", ())]
    for name in names:
        assert " ".join(clean(changes[name], unicode=True).split()) in page.words


# --- Sizes, and what is not installed ---------------------------------------------------------------------------------


def test_a_network_of_800_layers_stays_small() -> None:
    report = deep(800)
    page = page_of(report)
    assert len(page.text) < 4_000_000
    assert len(page.data[network_charts.LAYERS]) == 800
    assert len({row["label"] for row in page.data[network_charts.LAYERS]}) == 800
    assert len(page.table("800 layers")) == 800


def test_flagged_layers_are_named_below_an_axis_however_many_there_are() -> None:
    for number in (9, 60, 300):
        signs = [FLAGGED if place % 50 == 7 else FINE for place in range(number)]
        names = [f"backbone.stage.{place // 10}.block.{place % 10}.downsample.norm" for place in range(number)]
        labels = network_charts.axis_labels(names, signs)
        shown = [label for label in labels if not label.startswith(" ")]
        assert len(set(labels)) == number
        assert min(number, 40) <= len(shown) <= 60
        flagged = [labels[place] for place in range(number) if signs[place] == FLAGGED]
        assert all(label.startswith(FLAGGED) and label.endswith(".norm") for label in flagged)


@pytest.mark.parametrize("values", [(0.004, 0.9), (0.0004, 1.2), (1e-4, 1e4), (0.02, 0.05)])
def test_a_logarithmic_axis_counts_in_1_2_5_or_in_decades(values: tuple[float, float]) -> None:
    axis = log_scale(values, "D")[1]
    ticks = axis["values"]
    assert axis["tickCount"] == len(ticks)  # of more than that Vega would leave out every second one
    first = {float(f"{tick:e}".partition("e")[0]) for tick in ticks}
    assert first in ({1.0}, {1.0, 2.0, 5.0}, {2.0, 5.0})
    assert 2 <= len(ticks) <= 9


def test_the_worst_layers_are_drawn_of_many_at_each_batch_size() -> None:
    report = document("scan", "batch_sizes")
    assert isinstance(report, Report)
    layers: tuple[Layer, ...] = tuple(
        replace(report.layers[index % len(report.layers)], name=f"{index}.bn") for index in range(200)
    )
    page = page_of(replace(report, layers=layers))
    drawn = {row["name"] for row in page.data["batch-sizes-1/rows"]}
    assert 60 <= len(drawn) <= 62
    assert len(page.table("D at inference by batch size")) == 200


def test_an_empty_network_has_a_page() -> None:
    report = fabricated.healthy()
    summary = replace(report.summary, layers=0, flagged=0)
    page = page_of(replace(report, layers=(), summary=summary))
    assert "layers" not in page.sections
    assert "No layer could be judged." in page.words


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnprobe.registry.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'--format html needs vl_convert: pip install "bnprobe\[html\]"\.'):
        render(fabricated.healthy(), "html")
    monkeypatch.setattr("bnprobe.registry.find_spec", lambda name: None if name == "altair" else name)
    with pytest.raises(UsageError, match=r'--format html needs altair: pip install "bnprobe\[html\]"\.'):
        render(fabricated.healthy(), "html")


def test_the_row_names_the_documents_it_supports() -> None:
    assert set(FORMATS["html"].documents) == {
        *("LabReport", "MonitorLog", "RepairReport", "Report", "SweepReport", "TableReport", "Verification")
    }


def test_the_libraries_of_pages_are_imported_only_for_a_page() -> None:
    code = "import sys, bnprobe.report; print({'altair', 'jinja2', 'vl_convert', 'markupsafe'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
