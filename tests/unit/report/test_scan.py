"""What holds for every terminal report, whatever the layers are called and however wide the page is."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

import fabricated_parts as parts
import fabricated_reports as fabricated
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rendered import said
from rich.cells import cell_len

from bnprobe.records import Diagnosis, ExtraPass, Output, Report, SkippedLayer
from bnprobe.report import RenderOptions, renderer
from bnprobe.report.page import FINE, FLAGGED, UNMEASURED
from bnprobe.report.scan import one_line, output_in_words

render = renderer("terminal", Report)

AWKWARD = (
    "[red]",
    "[/]",
    "[bold]x[/bold]",
    "a" * 300,
    ":smile:",
    "\x1b[2J",
    "two\nlines",
    "\u7d22\u5f15" * 30,
    "\\",
)
WHOLE = RenderOptions(verbose=True)
NAMES = st.lists(st.one_of(st.text(min_size=1), st.sampled_from(AWKWARD)), min_size=3, max_size=3, unique=True)
BASE = fabricated.undecided()


def named(names: list[str]) -> Report:
    """A report in which layers, aliases, notes and skipped layers carry these names."""
    pairs = zip(BASE.layers, names, strict=True)
    layers = [replace(layer, name=name, aliases=tuple(names), note=f"Like {name}.") for layer, name in pairs]
    skipped = tuple(SkippedLayer(name, "Norm", "unknown") for name in names)
    return replace(BASE, layers=tuple(layers), skipped=skipped)


@settings(max_examples=60, deadline=None)
@given(names=NAMES, width=st.integers(30, 160), unicode=st.booleans(), verbose=st.booleans())
def test_no_line_is_wider_than_the_page_or_ends_in_a_blank(
    names: list[str], width: int, unicode: bool, verbose: bool
) -> None:
    text = render(named(names), RenderOptions(width=width, unicode=unicode, verbose=verbose))
    lines = text.removesuffix("\n").split("\n")
    assert max(map(cell_len, lines)) <= max(width, 40)
    assert [line for line in lines if line != line.rstrip()] == []
    assert unicode or text.isascii()


@settings(max_examples=40, deadline=None)
@given(names=NAMES)
def test_different_layers_stay_different_in_the_table(names: list[str]) -> None:
    lines = render(named(names), RenderOptions(width=60)).split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("   layer")) + 1
    assert len({line[3:20] for line in lines[start : start + 3]}) == 3


def test_markup_and_control_sequences_in_names_are_shown_and_not_obeyed() -> None:
    text = render(named(["[red]", "\x1b[2J", "two\nlines"]), RenderOptions(color=True))
    assert "[red]" in text
    assert "\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "two lines" in text


def test_the_environment_does_not_change_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = fabricated.flagged()
    before = render(report, RenderOptions(color=True))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    assert render(report, RenderOptions(color=True)) == before


def test_a_large_network_shows_its_worst_layers_in_network_order_and_counts_the_rest() -> None:
    report = fabricated.many()
    text = render(report, WHOLE)
    assert table_signs(text) == ["✓"] * 16 + ["✗"] * 6 + ["✗3", "✗2", "✗1"]
    assert "35 layers with less mismatch not shown (✓ 35 fine); --all shows all." in text
    assert len(table_signs(render(report, RenderOptions(show_all=True)))) == 60


def test_flagged_layers_are_kept_before_worse_looking_ones_that_are_not() -> None:
    many = fabricated.many()
    first = replace(many.layers[0], flagged=True)
    text = render(replace(many, layers=(first, *many.layers[1:])), WHOLE)
    assert first.name[-20:] in text
    assert len(table_signs(text)) == 25


def test_a_layer_measured_on_one_path_only_is_not_called_fine() -> None:
    signs = table_signs(render(fabricated.overflow(), WHOLE))
    assert signs == [FINE, f"{FLAGGED}1", UNMEASURED, f"{FLAGGED}2"]


def test_a_report_without_layers_says_so() -> None:
    report = parts.report([], output=Output(None, None, None, None, None))
    text = render(report, RenderOptions())
    assert "No layer could be judged." in text
    assert "n_eq" not in text


def table_signs(text: str) -> list[str]:
    """The signs of the layers, from the heading of the first table to its last row."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("   layer")) + 1
    rows = takewhile(lambda line: line[:1] in (FINE, FLAGGED, UNMEASURED), lines[start:])
    return [line[:3].strip() for line in rows]


def test_the_header_names_the_held_out_data_and_calls_samples_what_they_are() -> None:
    report = fabricated.healthy()
    known = {"data": "load_data of model.py (1437 samples)", "held_out": "load_eval_data of model.py (360 samples)"}
    scan = replace(report.scan, sample="image", held_out_images=256, **known)
    found = said(replace(report, scan=scan))
    assert "data load_data of model.py (1,437 images)" in found
    assert "held-out load_eval_data of model.py (360 images); 256 images measured" in found
    assert f"= {report.scan.images:,} images in" in found
    every = said(replace(report, scan=replace(scan, held_out_images=360)))
    assert "held-out load_eval_data of model.py (360 images) checkpoint" in every


def test_the_header_says_how_long_all_took_where_that_is_much_more_than_the_paths() -> None:
    report = fabricated.healthy()
    passes = [
        ExtraPass("held-out data", "", 64, 1.5),
        ExtraPass("what-if", "", 64, 3.0),
        ExtraPass("chance", "", 64, 0.6),
    ]
    for seconds, words in ((2.0, "images in 2.0 s, 5.6 s in all; "), (9.0, "images in 9.0 s; ")):
        scan = replace(report.scan, sample="image", seconds=seconds, passes=tuple(passes))
        assert words in said(replace(report, scan=scan))


@pytest.mark.parametrize(
    ("severities", "words"),
    [
        (["error", "warning", "error"], "6 of 9 layers flagged, 2 errors, 1 warning: batches too small"),
        (["info"], "6 of 9 layers flagged"),
        ([], "6 of 9 layers flagged"),
    ],
)
def test_the_verdict_in_one_line_stands_first_and_once(severities: list[str], words: str) -> None:
    made = [Diagnosis("small_batch", "BN201", severity, ("a",), None, "Noise.", "") for severity in severities]
    report = replace(fabricated.flagged(), diagnoses=tuple(made))
    assert one_line(report) == words
    parts_ = render(report, WHOLE).split("\n\n")
    assert parts_[1] == f"✗ {words}."


def test_of_a_layer_that_is_called_many_times_the_worst_call_is_shown() -> None:
    base = fabricated.shared()
    twice = base.layers[1]
    calls = tuple(replace(twice.calls[index == 5], index=index) for index in range(8))
    worst = max(calls, key=lambda call: max(path.mismatch for path in (call.train, call.eval) if path))
    report = replace(base, layers=(base.layers[0], replace(twice, calls_per_forward=8, calls=calls)))
    text = render(report, WHOLE)
    assert [line for line in text.splitlines() if "call " in line and "of 8" in line] == [
        line for line in text.splitlines() if f"worst: call {worst.index + 1} of 8" in line
    ]
    assert "the worst call is shown; --all shows all." in " ".join(text.split())
    everything = render(report, RenderOptions(show_all=True))
    assert [f"call {index} of 8" in everything for index in range(1, 9)] == [True] * 8
    assert "worst: call" not in render(base, WHOLE)


@pytest.mark.parametrize(
    ("flagged", "undecided", "line"),
    [
        (0, 0, "1 error: stale running statistics; no layer flagged"),
        (0, 1, "1 error: stale running statistics; no layer flagged, 1 undecided"),
        (2, 1, "2 of 3 layers flagged, 1 undecided, 1 error: stale running statistics"),
    ],
)
def test_where_no_layer_is_flagged_the_findings_come_first(flagged: int, undecided: int, line: str) -> None:
    found = Diagnosis("lag", "BN203", "error", (), None, "m", "r")
    summary = replace(BASE.summary, layers=3, flagged=flagged, undecided=undecided)
    assert one_line(replace(BASE, summary=summary, diagnoses=(found,))) == line


def test_problems_are_told_where_no_layer_could_be_judged() -> None:
    found = Diagnosis("no_running_stats", "BN104", "error", (), None, "m", "r")
    nothing = parts.report([], output=Output(None, None, None, None, None))
    text = render(replace(nothing, diagnoses=(found,)), RenderOptions())
    assert "✗ No layer could be judged, but 1 problem was found." in text


def test_a_class_that_changes_for_no_sample_is_said_in_words() -> None:
    def told(changed: float) -> str:
        return " ".join(output_in_words(Output(0.1, changed, None, None, None), scores=False))

    assert "The largest of the outputs is another one for none of the samples." in told(0.0)
    assert "is another one for <0.1% of the samples." in told(0.0001)
