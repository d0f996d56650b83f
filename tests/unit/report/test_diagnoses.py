"""Where the mismatch at inference comes from, and what is wrong, as the terminal report tells it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import fabricated_causes as causes
import fabricated_parts as parts
import fabricated_reports as fabricated
import pytest
from rendered import said, section, text_of

from bnprobe.records import Composition, Diagnosis, Domains, Estimate, ExtraPass, Remedy, Report, Score, Shares
from bnprobe.report.diagnoses import consequences
from bnprobe.report.scan import effective_samples, one_line
from bnprobe.rules.shares import flagging_limit
from unit.rules.expect import failed

BARS = "Where the mismatch at inference comes from"


def share_rows(report: Report, width: int = 80) -> dict[str, str]:
    """The bar's row of each layer, by name."""
    lines = section(report, BARS, width=width)
    names = [layer.name for layer in report.layers]
    return {name: line for name in names for line in lines if line[3:].startswith(f"{name} ")}


def test_a_row_ends_in_d_the_largest_share_and_what_the_layer_moves() -> None:
    rows = share_rows(causes.lag())
    assert re.search(r"» +34\.1 +l 100% +41%$", rows["layer2.0.bn1"])
    assert re.search(r"l━━━┿\S*p? +0\.097 +l  92% +5\.9%$", rows["layer2.0.downsample.1"])
    assert rows["bn1"].endswith("~0.4%")


def test_a_wide_page_has_intervals_and_both_impacts() -> None:
    rows = share_rows(causes.lag(), width=120)
    assert re.search(r"stale statistics 100% \(98 to 100%\) +41% +38%$", rows["layer2.0.bn1"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"eval": None}, "(not measured at inference)"),
        ({"running_statistics": False}, "(no running statistics)"),
        ({}, "(could not be decomposed)"),
    ],
)
def test_a_layer_without_shares_says_why(changes: dict[str, Any], why: str) -> None:
    report = causes.lag()
    changed = replace(report.layers[4], shares=None, **changes)
    report = replace(report, layers=(*report.layers[:4], changed, *report.layers[5:]))
    assert why in share_rows(report)[changed.name]


def test_a_network_without_shares_says_so_in_a_sentence() -> None:
    layers = tuple(replace(layer, shares=None, running_statistics=False) for layer in causes.lag().layers)
    lines = section(replace(causes.lag(), layers=layers), BARS)
    assert " ".join(" ".join(lines[1:]).split()) == (
        "The mismatch of no layer could be decomposed: no running statistics."
    )


def test_shares_clearly_below_zero_are_named_in_the_legend_only() -> None:
    bars = " ".join(" ".join(section(causes.pair(), BARS)).split())
    assert "not drawn negative shares, which offset others: earlier layers (8 layers, down to -0.081 in" in bars
    assert "not drawn" not in said(causes.lag())


def test_the_model_has_a_bar_of_its_own() -> None:
    lines = section(causes.composition(), BARS)
    (model,) = [line for line in lines if "mean of 9 layers" in line]
    assert "s━c━" in model


@pytest.mark.parametrize(("batch_size", "correlation", "samples"), [(8, 0.83, 8 / 6.81), (8, 0.0, 8.0), (2, 1.0, 1.0)])
def test_a_batch_of_like_samples_is_worth_fewer(batch_size: int, correlation: float, samples: float) -> None:
    effect = 1 + (batch_size - 1) * correlation
    assert effective_samples(Composition(correlation, effect, 0.5), batch_size) == pytest.approx(samples)


def test_composition_is_put_in_words() -> None:
    found = said(causes.composition())
    assert "The samples of a batch of 8 are alike in 9 of 9 layers" in found
    assert "is up to 0.83, in layer3.0.downsample.1. There, a batch is worth only 1.2 samples drawn at random" in found
    assert "The samples of a batch of 32 are no more alike than samples drawn at random" in said(fabricated.healthy())


def test_calls_on_data_that_differ_are_named_worst_first() -> None:
    layers = tuple(
        parts.layer(f"bn{index}", None, None, calls_per_forward=2, domains=Domains(mismatch, None))
        for index, mismatch in enumerate((0.3, 0.9, 0.001))
    )
    found = said(replace(causes.domains(), layers=layers))
    assert "on different data: bn1 (2 calls, D = 0.900), bn0 (2 calls, D = 0.300). D is" in found


def test_a_diagnosis_names_cause_rule_extent_impact_place_remedy_and_consequences() -> None:
    found = said(causes.lag())
    assert (
        "✗ 1 Stale running statistics (BN203): 1 of 9 layers, output change 41% layer2.0.bn1; model.py:31"
        " The running statistics are not those that training now settles on."
    ) in found
    assert "Remedy: Recalibrate the running statistics: bnprobe.recalibrate(model, batches)." in found
    assert "Also explains: mismatch from earlier layers (5 layers: layer2.0.bn2, layer2.0.downsample.1" in found


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("2 of 7 layers: too much noise. Worst is b: D.", "2 of 7 layers a, b Too much noise. Worst is b: D."),
        ("Noise.", "2 of 9 layers a, b Noise."),
    ],
)
def test_the_extent_is_said_once(message: str, shown: str) -> None:
    made = Diagnosis(
        "small_batch",
        "BN201",
        "error",
        ("a", "b"),
        None,
        message,
        "",
        ("dropout_before_norm in 2 layers", "inconsistency in the outputs"),
    )
    found = said(replace(fabricated.healthy(), diagnoses=(made,)))
    assert (
        f"✗ Batches too small (BN201): {shown} Also explains: dropout before BatchNorm (2 layers); worse at inference."
        in found
    )


def test_layer_names_are_printed_as_they_are_however_long() -> None:
    name = "backbone.encoder.stage_with_a_long_name.0.residual.normalization"
    made = Diagnosis("lag", "BN203", "error", (name,), None, f"{name}: it lags.", "", ())
    assert name in said(replace(fabricated.healthy(), diagnoses=(made,)))


def test_an_output_change_says_on_which_samples_it_was_measured() -> None:
    report = causes.lag()
    passes = (ExtraPass("impact", "how much", 16, 0.5),)
    found = said(replace(report, scan=replace(report.scan, passes=passes)))
    assert (
        "Output change: relative L2 change of the outputs if these layers use batch statistics, on 16 samples;" in found
    )
    assert "relative L2 change of the outputs if only this layer uses batch statistics, on 16 samples" in found


def test_a_lone_layer_is_not_named_twice() -> None:
    made = Diagnosis("lag", "BN203", "error", ("bn1",), None, "bn1: it lags.", "", ())
    found = said(replace(fabricated.healthy(), diagnoses=(made,)))
    assert "✗ Stale running statistics (BN203): 1 of 9 layers bn1 It lags." in found


def test_five_diagnoses_are_shown_in_their_order_and_the_rest_counted() -> None:
    found = text_of(causes.pair())
    assert re.findall(r"\((BN\d+)\)", found) == ["BN202", "BN201", "BN203", "BN204", "BN210"]
    assert "and 2 more; --all shows all." in found
    every = text_of(causes.pair(), show_all=True)
    assert re.findall(r"^  (.) \d .*\((BN\d+)\)", every, re.M)[-2:] == [("!", "BN105"), ("i", "BN106")]


def test_rules_that_passed_are_counted_and_those_skipped_have_a_reason() -> None:
    skipped = "15 rules passed, 3 skipped: BN301 needs training steps; BN302: one process; BN303 needs gradients."
    assert skipped in said(causes.lag())
    every = said(causes.lag(), show_all=True)
    assert "(BN102, BN103," in every
    assert "BN301 needs training steps: scan with --train-steps and a loss" in every
    assert "BN203 layer2.0.bn1: 1 of 9 layers: the running statistics" in every


def test_rules_skipped_for_one_reason_are_named_together() -> None:
    skipped = tuple(
        causes.verdict(rule, None, outcome="skipped", reason="needs data: run bnprobe scan")
        for rule in ("BN202", "BN201", "BN203")
    )
    found = said(replace(fabricated.healthy(), verdicts=skipped))
    assert " rules 3 skipped: BN201, BN202 and BN203 need data." in found


def test_a_rule_that_is_not_installed_is_headed_by_its_cause() -> None:
    strange = Diagnosis("cold_start", "ACME1", "error", ("bn1",), None, "It is cold.", "", ())
    found = said(replace(fabricated.healthy(), diagnoses=(strange,)))
    assert "✗ Cold start (ACME1): 1 of 9 layers bn1 It is cold." in found


def test_a_diagnosis_of_layers_that_are_not_in_the_report_still_prints() -> None:
    strange = Diagnosis("lag", "BN203", "error", ("gone",), None, "It lags.", "", ())
    assert "gone" in said(replace(fabricated.healthy(), diagnoses=(strange,)))


@pytest.mark.parametrize("name", ["lag", "composition", "pair", "flagged"])
def test_the_verdict_and_its_diagnoses_end_the_report(name: str) -> None:
    lines = text_of(fabricated.REPORTS[name]()).split("\n")
    headline = next(index for index, line in enumerate(lines) if line.startswith("✗ ") and "layers are" in line)
    assert lines[:headline].count(f"✗ {one_line(fabricated.REPORTS[name]())}.") == 1
    first = next(index for index, line in enumerate(lines) if re.match(r"  ✗ .*\(BN\d+\)", line))
    assert headline < first <= headline + 3
    assert not [line for line in lines[first:] if line.startswith(("Output", "Where the mismatch"))]


@pytest.mark.parametrize(
    ("loss", "metric", "told"),
    [
        ((2.41, 2.38), (0.4, 0.3), "recalibrating takes the metric from 0.4 to 0.3."),
        (
            (2.41, 1.2),
            (0.4, 0.4),
            "recalibrating takes the loss from 2.41 to 1.2 (surely) and leaves the metric at 0.4.",
        ),
        ((2.41, 2.41), (0.4, 0.4), "recalibrating leaves the metric at 0.4."),
        (
            (2.41, 2.38),
            (0.4, 0.405),
            "recalibrating takes the loss from 2.41 to 2.38 (surely, but by little) and the metric from 0.4 to 0.405"
            " (not surely).",
        ),
        (
            (2.41, 2.38),
            (0.4, 0.415),
            "recalibrating takes the metric from 0.4 to 0.415, surely, but by little.",
        ),
    ],
)
def test_a_trial_is_told_by_the_measure_that_it_is_judged_by(
    loss: tuple[float, float], metric: tuple[float, float], told: str
) -> None:
    loss_change, metric_change = (
        Estimate(end - start, (end - start - 0.01, end - start + 0.01)) for start, end in (loss, metric)
    )
    before, after = (Score(*values) for values in zip(loss, metric, strict=True))
    remedy = Remedy("recalibrated", (), before, after, None, 384, "", loss_change, metric_change)
    stale = Diagnosis("lag", "BN203", "error", ("bn",), None, "bn: Stale.", "Recalibrate.")
    report = replace(causes.lag(), diagnoses=(stale,), remedies=(remedy,))
    assert f"Measured on 384 held-out samples: {told}" in " ".join(text_of(report).split())


def trial(name: str, after: float) -> Remedy:
    """A remedy without training that takes the metric from 0.4 to this value, surely."""
    change = Estimate(after - 0.4, (after - 0.41, after - 0.39))
    blend = 1.0 if name == "instance statistics" else None
    return Remedy(name, (), Score(None, 0.4), Score(None, after), None, 60, "", None, change, blend=blend)


def test_what_was_measured_of_a_remedy_is_said_once() -> None:
    first = Diagnosis("lag", "BN203", "error", ("bn",), None, "bn: Stale.", "Recalibrate.")
    second = replace(first, cause="dropout_before_norm", rule="BN107", layers=("bn2",), message="bn2: Dropout.")
    found = said(replace(causes.lag(), diagnoses=(first, second), remedies=(trial("recalibrated", 0.9),)))
    assert found.count("Measured on 60 held-out samples: recalibrating takes the metric from 0.4 to 0.9.") == 1


def test_small_batches_name_the_trials_that_are_surely_better() -> None:
    small = Diagnosis("small_batch", "BN201", "error", ("bn",), None, "bn: Few.", "Larger batches.")
    tried = (trial("instance statistics", 0.9), trial("batch statistics", 0.8), trial("recalibrated", 0.7))
    assert (
        "Measured on 60 held-out samples: normalizing at inference with the statistics of each sample takes the metric"
        " from 0.4 to 0.9; normalizing at inference with batch statistics takes the metric from 0.4 to 0.8. "
    ) in said(replace(causes.lag(), diagnoses=(small,), remedies=tried))
    no_gain = (trial("instance statistics", 0.3), trial("batch statistics", 0.4))
    assert "Measured on" not in said(replace(causes.lag(), diagnoses=(small,), remedies=no_gain))


def test_a_lone_layer_that_follows_is_named_where_it_is_clear_which_one_it_is() -> None:
    made = [failed("BN107", layer, "Dropout.") for layer in ("a", "b")]
    first = Diagnosis("dropout", "BN204", "error", ("a",), None, "", "", ("dropout_before_norm in 1 layer",))
    second = Diagnosis("dropout_before_norm", "BN107", "warning", ("b",), None, "", "")
    assert consequences(first, made, [first, second]) == "dropout before BatchNorm (a)"
    assert consequences(first, made, [first]) == "dropout before BatchNorm (1 layer)"


def test_the_mark_of_a_bar_is_the_limit_of_its_layer() -> None:
    noise = parts.layer("noise", parts.path(30, 1), parts.path(30, 1), shares=Shares(0.05, 0.0, 0.0, 0.0, 0.0, 0.0))
    stale = replace(noise, name="stale", shares=Shares(0.0, 0.0, 0.05, 0.0, 0.0, 0.0))
    report = parts.report([noise, stale])
    rows, limits = share_rows(report), {layer.name: flagging_limit(layer) for layer in report.layers}
    places = {name: min(row.find(sign) % 999 for sign in "│┿") for name, row in rows.items()}
    start = rows["noise"].index("s━")
    ends = {name: place - start for name, place in places.items()}
    assert ends["noise"] / ends["stale"] == pytest.approx(limits["noise"] / limits["stale"], rel=0.1)
    assert "for noise of batches n_eq 14, D 0.109; for all else n_eq 32, D 0.047" in said(report)
