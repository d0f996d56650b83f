"""Where the mismatch comes from, and what is wrong, as the terminal report tells it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import fabricated_causes as causes
import fabricated_parts as parts
import fabricated_reports as fabricated
import pytest
from rich.text import Text

from bnprobe.records import Cause, Composition, Diagnosis, Domains, Report
from bnprobe.reports import FORMATS, RenderOptions
from bnprobe.reports.causes import WORDS
from bnprobe.reports.findings import findings, rules
from bnprobe.reports.layout import Page
from bnprobe.reports.likeness import effective_images, likeness
from bnprobe.reports.shares import shares

PAGE = Page(80, unicode=True)


def text(lines: list[Text]) -> str:
    """The lines as one."""
    return "\n".join(line.plain.rstrip() for line in lines)


def flat(lines: list[Text]) -> str:
    """The words, however they are wrapped."""
    return " ".join(text(lines).split())


def share_rows(report: Report, page: Page = PAGE) -> dict[str, str]:
    """The bar's row of each layer, by name."""
    lines = text(shares(report, report.layers, page)).split("\n")
    names = [layer.name for layer in report.layers]
    return {name: line for name in names for line in lines if line[3:].startswith(f"{name} ")}


def test_a_row_ends_in_d_the_largest_share_and_what_the_layer_moves() -> None:
    rows = share_rows(causes.lag())
    assert re.search(r"» +34\.1 +l 100% +41%$", rows["layer2.0.bn1"])
    assert re.search(r"l━━━┿\S*p? +0\.097 +l  92% +5\.9%$", rows["layer2.0.downsample.1"])
    assert rows["bn1"].endswith("~0.4%")


def test_a_wide_page_has_intervals_and_both_impacts() -> None:
    rows = share_rows(causes.lag(), Page(120, unicode=True))
    assert re.search(r"lag 100% \(98 to 100%\) +41% +38%$", rows["layer2.0.bn1"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"eval": None}, "(not measured at inference)"),
        ({"running_statistics": False}, "(no running statistics)"),
        ({}, "(could not be taken apart)"),
    ],
)
def test_a_layer_without_shares_says_why(changes: dict[str, Any], why: str) -> None:
    report = causes.lag()
    changed = replace(report.layers[4], shares=None, **changes)
    report = replace(report, layers=(*report.layers[:4], changed, *report.layers[5:]))
    assert why in share_rows(report)[changed.name]


def test_a_network_without_shares_says_so_in_a_sentence() -> None:
    layers = tuple(replace(layer, shares=None, running_statistics=False) for layer in causes.lag().layers)
    said = flat(shares(replace(causes.lag(), layers=layers), layers, PAGE))
    assert said.endswith("The mismatch of no layer could be taken apart: no running statistics.")


def test_shares_clearly_below_zero_are_named_in_the_legend_only() -> None:
    said = flat(shares(causes.pair(), causes.pair().layers, PAGE))
    assert "not drawn clearly below 0, offsetting other shares: propagation (8 layers, down to -0.081 in" in said
    by_chance = causes.lag()
    assert "not drawn" not in text(shares(by_chance, by_chance.layers, PAGE))


def test_the_model_has_a_bar_of_its_own() -> None:
    lines = text(shares(causes.composition(), causes.composition().layers, PAGE)).split("\n")
    (model,) = [line for line in lines if "mean of 9 layers" in line]
    assert "s━c━" in model


@pytest.mark.parametrize(("batch_size", "correlation", "images"), [(8, 0.83, 8 / 6.81), (8, 0.0, 8.0), (2, 1.0, 1.0)])
def test_a_batch_of_like_images_tells_as_much_as_fewer(batch_size: int, correlation: float, images: float) -> None:
    effect = 1 + (batch_size - 1) * correlation
    assert effective_images(Composition(correlation, effect, 0.5), batch_size) == pytest.approx(images)


def test_composition_is_put_in_words() -> None:
    said = flat(likeness(causes.composition(), PAGE, show_all=False))
    assert "The images of a batch of 8 are alike in 9 of 9 layers" in said
    assert "is up to 0.83, in layer3.0.downsample.1. There, a batch tells as much as 1.2 images drawn at random" in said
    healthy = flat(likeness(fabricated.healthy(), PAGE, show_all=False))
    assert healthy.startswith("The images of a batch of 32 are no more alike than images drawn at random")


def test_calls_on_data_that_differ_are_named_worst_first() -> None:
    layers = tuple(
        parts.layer(f"bn{index}", None, None, calls_per_forward=2, domains=Domains(mismatch, None))
        for index, mismatch in enumerate((0.3, 0.9, 0.001))
    )
    said = flat(likeness(replace(causes.domains(), layers=layers), PAGE, show_all=False))
    assert "that differ: bn1 (2 calls, D = 0.900), bn0 (2 calls, D = 0.300). D is" in said


def test_a_diagnosis_names_cause_rule_extent_impact_place_remedy_and_consequences() -> None:
    said = flat(findings(causes.lag(), PAGE, show_all=False))
    assert said.startswith(
        "✗ 1 Lagging running statistics (BN203): 1 of 9 layers, moves the outputs by 41% layer2.0.bn1; model.py:31"
        " The running statistics are not those that training now settles on."
    )
    assert "Remedy: Recalibrate the running statistics: bnprobe.recalibrate(model, batches)." in said
    assert "Comes with it: propagation in 5 layers: layer2.0.bn2, layer2.0.downsample.1" in said


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("2 of 7 layers: too much noise. Worst is b: D.", "2 of 7 layers a, b Too much noise. Worst is b: D."),
        ("Noise.", "2 of 9 layers a, b Noise."),
    ],
)
def test_the_extent_is_said_once(message: str, said: str) -> None:
    made = Diagnosis(
        "small_batch", "BN201", "error", ("a", "b"), None, message, "", ("dropout_before_norm in 2 layers",)
    )
    shown = flat(findings(replace(fabricated.healthy(), diagnoses=(made,)), PAGE, show_all=False))
    assert shown == f"✗ Batches too small (BN201): {said} Comes with it: dropout before norm in 2 layers."


def test_a_lone_layer_is_not_named_twice() -> None:
    made = Diagnosis("lag", "BN203", "error", ("bn1",), None, "bn1: it lags.", "", ())
    shown = flat(findings(replace(fabricated.healthy(), diagnoses=(made,)), PAGE, show_all=False))
    assert shown == "✗ Lagging running statistics (BN203): 1 of 9 layers bn1 It lags."


def test_five_diagnoses_are_shown_in_their_order_and_the_rest_counted() -> None:
    said = text(findings(causes.pair(), PAGE, show_all=False))
    assert re.findall(r"\((BN\d+)\)", said) == ["BN202", "BN201", "BN203", "BN204", "BN210"]
    assert "and 2 more; --all shows every one." in said
    every = text(findings(causes.pair(), PAGE, show_all=True))
    assert re.findall(r"^  (.) \d .*\((BN\d+)\)", every, re.M)[-2:] == [("!", "BN105"), ("i", "BN106")]


def test_rules_that_passed_are_counted_and_those_skipped_have_a_reason() -> None:
    verdicts = causes.lag().verdicts
    short = flat(rules(verdicts, PAGE, show_all=False))
    assert short == (
        "15 rules passed, 3 skipped: BN301 needs training steps; BN302: one process; BN303 needs gradients."
    )
    every = flat(rules(verdicts, PAGE, show_all=True))
    assert "(BN102, BN103," in every
    assert "BN301 needs training steps: scan with --train-steps and a loss" in every
    assert "BN203 layer2.0.bn1: 1 of 9 layers: the running statistics" in every


def test_rules_skipped_for_one_reason_are_named_together() -> None:
    skipped = [
        causes.verdict(rule, None, outcome="skipped", reason="needs data: run bnprobe scan")
        for rule in ("BN202", "BN201", "BN203")
    ]
    assert flat(rules(skipped, PAGE, show_all=False)) == "rules 3 skipped: BN201, BN202 and BN203 need data."


def test_every_cause_has_words() -> None:
    assert set(WORDS) == set(Cause.__args__)
    assert len(set(WORDS.values())) == len(WORDS)


def test_a_diagnosis_of_layers_that_are_not_in_the_report_still_prints() -> None:
    strange = Diagnosis("lag", "BN203", "error", ("gone",), None, "It lags.", "", ())
    assert "gone" in text(findings(replace(fabricated.healthy(), diagnoses=(strange,)), PAGE, show_all=False))


@pytest.mark.parametrize("name", ["lag", "composition", "pair", "flagged"])
def test_the_verdict_and_its_diagnoses_end_the_report(name: str) -> None:
    lines = FORMATS["terminal"](fabricated.REPORTS[name](), RenderOptions()).split("\n")
    headline = next(index for index, line in enumerate(lines) if line.startswith("✗ ") and "layers are" in line)
    first = next(index for index, line in enumerate(lines) if re.match(r"  ✗ .*\(BN\d+\)", line))
    assert headline < first <= headline + 3
    assert not [line for line in lines[first:] if line.startswith(("Output", "Where the mismatch"))]
