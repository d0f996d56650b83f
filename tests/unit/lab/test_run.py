"""How experiments run: trials are kept and gone on with; figures depend on condition, seed and budget alone."""

from __future__ import annotations

import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import joblib
import pytest
import torch

from bnprobe import lab
from bnprobe.cli.lab import _write
from bnprobe.errors import OutputError, UsageError
from bnprobe.files import append
from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Experiment,
    MissingFigureError,
    Results,
    above,
    average,
    below,
    below_everywhere,
    bounded,
    cell,
    formula,
    mean_of,
    near,
    near_everywhere,
    within,
    worst,
)
from bnprobe.lab.run import TRIALS, concluded
from bnprobe.records import Claim, Estimate, LabChart, LabReport, LabSeries, Trial
from bnprobe.registry import load_code
from bnprobe.report import RenderOptions, render
from bnprobe.report import lab as lab_words
from bnprobe.report.html import picture_of_lab
from bnprobe.report.html.curves import curves

ROW = lab.ExperimentRow("dice", "Dice", "Are dice fair?", (), f"{__name__}:Dice", takes_data=False)


KILLED = 0.125
"""A budget with which the system ends the processes of a seed."""


class Dice(Experiment):
    """Draws that depend on torch's seed; counts its trials, and can fail at one of them."""

    ran: ClassVar[list[tuple[int, int]]] = []
    fails_at: ClassVar[int | None] = None

    def conditions(self, budget: Budget) -> Iterable[Mapping[str, int]]:
        return [{"sides": sides} for sides in (6, 20)]

    def trial(self, condition: Mapping[str, int], seed: int, budget: Budget) -> Mapping[str, float]:
        if len(Dice.ran) == Dice.fails_at:
            raise KeyboardInterrupt
        if budget.factor == KILLED and seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        Dice.ran.append((seed, condition["sides"]))
        return {"mean": torch.randint(condition["sides"], (budget.of(100),)).float().mean().item(), "none": math.nan}

    def answer(self, results: Results, budget: Budget) -> str:
        return "Means are not 0." if average(results.values("mean")) else "Means are 0."

    def claims(self, results: Results, budget: Budget) -> Iterable[Claim]:
        six = results.where(sides=6)
        yield above("Means are learned to be above 0.", "Mean", six.mean("mean"))
        yield above("Means are above 0.", "Mean", six.mean("mean"), trained=False)
        yield within("Means are below 6.", "Largest mean", six.largest("mean"), 6)

    def charts(self, results: Results, budget: Budget) -> Iterable[LabChart]:
        return ()


@pytest.fixture(autouse=True)
def dice() -> Iterable[None]:
    Dice.ran, Dice.fails_at = [], None
    with lab.EXPERIMENTS.including(ROW):
        yield


def rolled(folder: Path | None = None, **settings: object) -> LabReport:
    return lab.run("dice", folder, **{"seeds": 3, "jobs": 1, **settings})


def values(report: LabReport) -> list[object]:
    return [(trial.seed, trial.condition, trial.values) for trial in report.trials]


def test_figures_depend_on_the_seed_alone_and_what_is_no_number_is_none() -> None:
    torch.manual_seed(1)
    first = rolled()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert values(rolled()) == values(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({trial.values["mean"] for trial in first.trials}) == 6
    assert {trial.values["none"] for trial in first.trials} == {None}


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    whole = rolled()
    Dice.ran, Dice.fails_at = [], 4
    with pytest.raises(KeyboardInterrupt):
        rolled(tmp_path)
    assert len(Dice.ran) == 4
    with (tmp_path / TRIALS).open("a") as file:
        file.write('{"condition": {"si')  # as if it had been killed while writing
    Dice.ran, Dice.fails_at = [], None
    assert values(rolled(tmp_path)) == values(whole)
    assert len(Dice.ran) == 2
    assert len((tmp_path / TRIALS).read_text().splitlines()) == 7
    Dice.ran = []
    assert values(rolled(tmp_path)) == values(whole)
    assert Dice.ran == []


def test_more_seeds_use_the_trials_that_are_there(tmp_path: Path) -> None:
    rolled(tmp_path, seeds=2)
    Dice.ran = []
    rolled(tmp_path, seeds=3)
    assert [seed for seed, _ in Dice.ran] == [2, 2]


def test_a_small_budget_decides_what_is_exact_and_leaves_open_what_is_learned() -> None:
    whole, part = rolled(), rolled(budget=0.5)
    assert whole.notes == ()
    assert "At budget 0.5 networks are trained for fewer steps" in part.notes[0]
    assert [claim.verdict for claim in whole.claims] == ["shown", "shown", "shown"]
    assert [claim.verdict for claim in part.claims] == ["open", "shown", "shown"]
    assert part.claims[0].evidence.endswith("the claim needs more than 0. Decided at budget 1.")
    assert "budget" not in part.claims[1].evidence
    assert whole.answer == "Means are not 0."
    assert part.answer == "A look at budget 0.5: Means are not 0."


def test_what_is_made_of_trials_is_made_again_of_those_that_were_kept() -> None:
    found = rolled()
    assert concluded(replace(found, claims=(), answer="")) == found
    nothing = concluded(replace(found, trials=()))
    assert (nothing.answer, {claim.verdict for claim in nothing.claims}) == ("", {"open"})


def test_fresh_begins_anew(tmp_path: Path) -> None:
    rolled(tmp_path)
    Dice.ran = []
    rolled(tmp_path, fresh=True)
    assert len(Dice.ran) == 6


def test_trials_of_another_budget_are_refused(tmp_path: Path) -> None:
    rolled(tmp_path)
    with pytest.raises(UsageError, match="another budget; give --fresh to begin anew, or another --output-dir"):
        rolled(tmp_path, budget=2.0)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """The trials of one would be kept as those of the budget of the other."""
    rolled(tmp_path)
    before = (tmp_path / TRIALS).read_text()
    holds = (
        "import pathlib, sys; from bnprobe.files import only_run\n"
        "with only_run(pathlib.Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holds, str(tmp_path / TRIALS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "holds\n"
        with pytest.raises(OutputError, match=r"Another run writes to .*, or give another --output-dir"):
            rolled(tmp_path, budget=2.0, fresh=True)
    assert (tmp_path / TRIALS).read_text() == before


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("the system has no /dev/full")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["bnprobe.lab.run"], "append", lambda path, text: append(full, text))
        with pytest.raises(OutputError, match="could not be written: No space left"):
            rolled(tmp_path)
    assert len(rolled(tmp_path).trials) == 6


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"condition": {"sides": 6}, "seed": 0, "values": [], "seconds": 1}',
        '{"condition": {"sides": 6}, "seed": 0, "values": {"mean": "x"}, "seconds": 1}',
        '{"condition": {"sides": 6}, "seed": 0, "values": {"mean": 1}, "seconds": "x"}',
    ],
)
def test_a_line_that_is_no_trial_is_run_again(tmp_path: Path, line: str) -> None:
    whole = rolled(tmp_path)
    lines = (tmp_path / TRIALS).read_text().splitlines()
    (tmp_path / TRIALS).write_text("\n".join([lines[0], line, *lines[2:]]))
    Dice.ran = []
    assert values(rolled(tmp_path)) == values(whole)
    assert Dice.ran == [(0, 6)]


def test_trials_of_other_images_in_the_same_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rolled(tmp_path)
    monkeypatch.setattr(sys.modules["bnprobe.lab.run"], "_described", lambda row, budget: "12 images more")
    with pytest.raises(UsageError, match="another data"):
        rolled(tmp_path)


@pytest.mark.parametrize("text", ["", "nothing\n", '{"experiment": "rates"}\n'])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / TRIALS).write_text(text)
    with pytest.raises(UsageError, match="--fresh"):
        rolled(tmp_path)
    assert (tmp_path / TRIALS).read_text() == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "above 0"),
        ({"budget": math.inf}, "above 0"),
        ({"budget": math.nan}, "above 0"),
        ({"budget": 1e308}, "at most 1,000"),
        ({"seeds": 10**9}, "at most 1,000"),
        ({"seeds": 0}, "one seed"),
        ({"jobs": 0}, "one process"),
        ({"data": "folder"}, "makes its own data"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rolled(**settings)
    assert Dice.ran == []


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean small-batch"):
        lab.run("smal-batch")


def test_several_processes_give_the_same() -> None:
    one, two = (lab.run("scratch", budget=0.01, seeds=2, jobs=jobs) for jobs in (1, 2))
    assert values(one) == values(two)


def test_there_are_no_more_processes_than_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counting(joblib.Parallel):
        def __init__(self, n_jobs: int, **settings: object) -> None:
            asked.append(n_jobs)
            super().__init__(n_jobs=1, **settings)

    monkeypatch.setattr(joblib, "Parallel", Counting)
    rolled(jobs=1000)
    assert asked == [6]


def test_results_without_a_chart_have_no_picture(tmp_path: Path) -> None:
    assert _write(rolled(), tmp_path, "bnprobe lab dice") == ["index.html", "RESULTS.md", "results.json"]


def test_a_process_that_the_system_ends_is_said_to_have_ended(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match="was ended by the system; the same command goes on"):
        rolled(tmp_path, budget=KILLED, jobs=2)
    assert not list(tmp_path.glob(".*.lock"))


def test_results_are_read_back_and_rendered(tmp_path: Path) -> None:
    found = lab.run("scratch", budget=0.01, seeds=2, jobs=1)
    found.save(tmp_path / "results.json")
    assert LabReport.load(tmp_path / "results.json") == found
    assert json.loads((tmp_path / "results.json").read_text())["experiment"] == "scratch"
    for format_ in ("terminal", "markdown", "html"):
        text = render(found, format_)
        for claim in found.claims:
            assert claim.text.split()[0] in text


def test_numbers_along_an_axis_are_written_out() -> None:
    steps = [float(step) for step in range(10, 260, 10)]
    chart = LabChart("steps", "Steps", "steps", "loss", (formula("twice", steps, lambda x: 2 * x),))
    drawn = picture_of_lab(replace(rolled(), charts=(chart,)))
    assert re.findall(r">(\d+\.?\d*e[+-]?\d+)<", drawn) == []
    assert {">200<", ">400<"} <= set(re.findall(r">\d+<", drawn))


def test_numbers_along_an_axis_do_not_run_together() -> None:
    rates = [0.0, 0.1, 0.3, 0.5, 0.7]
    chart = LabChart("rates", "Rates", "rate", "loss", (formula("twice", rates, lambda x: 100 + 100 * x),))
    drawn = picture_of_lab(replace(rolled(), charts=(chart,)))
    assert re.findall(r">(0(?:\.\d+)?)<", drawn) == ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]


# --- Words ------------------------------------------------------------------------------------------------------------


def test_columns_that_do_not_fit_the_terminal_go_on_below() -> None:
    x = (1.0, 2.0)
    some = [LabSeries(f"momentum {each}", x, (0.5, None), (0.4, None), (0.6, None)) for each in range(9)]
    late = LabSeries("the last one", x, (None, 0.7), (None, 0.6), (None, 0.8))
    chart = LabChart("many", "Many", "batches", "accuracy", (*some, late))
    text = render(replace(rolled(), charts=(chart,)), "terminal", RenderOptions(width=60))
    assert all(len(line) <= 60 for line in text.splitlines())
    assert len(re.findall("momentum", text)) == 9
    assert text.count("0.50 ± 0.10") == 9
    first, *_, last = text.partition("Many (accuracy)")[2].partition("✓ 3 of 3")[0].strip("\n").split("\n\n")
    assert re.findall(r"^  (\d)", first, re.MULTILINE) == ["1", "2"]
    assert "0.70 ± 0.10" in last
    assert "Not shown" not in text


def test_letters_are_explained_where_they_are_used() -> None:
    nothing = rolled()
    assert lab_words.symbols(nothing) == []
    assert "Symbols" not in render(nothing, "html")
    told = replace(nothing, notes=("Of 3-D volumes the n_eq is small; a B-spline's d' is not ours.",))
    assert [symbol for symbol, _ in lab_words.symbols(told)] == ["D", "r", "d", "n_eq", "derived in"]
    for format_ in ("terminal", "markdown", "html"):
        text = " ".join(render(told, format_).replace("\\", "").split())
        assert "how many independent normal values a batch is worth" in text
        assert lab_words.DERIVED in text


def test_results_say_the_answer_the_unit_and_the_command_that_gives_them() -> None:
    chart = LabChart("time", "Median time", "format", "milliseconds", (formula("twice", [1.0], lambda x: 2 * x),))
    found = replace(rolled(budget=0.5, seeds=2), charts=(chart,), folder="my images")
    for format_ in ("terminal", "markdown", "html"):
        text = " ".join(render(found, format_).split())
        assert "Means are not 0." in text
        assert "Median time (milliseconds)" in text
        assert text.index("Means are not 0.") < text.index("Left open") < text.index("Median time")
    for format_ in ("markdown", "html"):
        assert "bnprobe lab dice --data 'my images' --budget 0.5 --seeds 2" in html.unescape(render(found, format_))


# --- Claims -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "is_above", "is_below"),
    [
        ((0.1, 0.3), "shown", "refuted"),
        ((-0.3, -0.1), "refuted", "shown"),
        ((-0.1, 0.1), "open", "open"),
        (None, "open", "open"),
    ],
)
def test_a_claim_is_decided_by_its_interval(interval: tuple[float, float] | None, is_above: str, is_below: str) -> None:
    found = Estimate(0.0 if interval is None else sum(interval) / 2, interval)
    assert above("It is above.", "Difference", found).verdict == is_above
    assert below("It is below.", "Difference", found).verdict == is_below


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.95, 1.05), "shown"), ((0.8, 1.05), "open"), ((1.2, 1.3), "refuted"), ((0.5, 0.8), "refuted"), (None, "open")],
)
def test_equivalence_needs_the_whole_interval(interval: tuple[float, float] | None, verdict: str) -> None:
    found = None if interval is None else Estimate(sum(interval) / 2, interval)
    assert near("It is one.", "Figure", found, 0.1).verdict == verdict


def test_equivalence_everywhere_is_decided_where_it_is_worst() -> None:
    good, wide, bad = Estimate(1.0, (0.98, 1.02)), Estimate(1.0, (0.5, 1.5)), Estimate(1.2, (1.15, 1.25))

    def verdict(**found: Estimate | None) -> tuple[str, str]:
        claim = near_everywhere("It is one.", "Figure at", found, 0.1)
        return claim.verdict, claim.evidence.partition(",")[0]

    assert verdict(a=good, b=Estimate(1.0, (0.95, 1.0))) == ("shown", "Figure at b")
    assert verdict(a=good, b=wide) == ("open", "Figure at b")
    assert verdict(a=good, b=wide, c=bad) == ("refuted", "Figure at c")
    assert verdict(a=good, b=None) == ("open", "Figure at b")


def test_what_holds_everywhere_is_decided_by_the_worst_and_not_by_the_largest_mean() -> None:
    sure, wide, beyond = Estimate(1.04, (1.03, 1.045)), Estimate(1.0, (0.9, 1.1)), Estimate(1.2, (1.1, 1.3))
    claims = [
        below_everywhere("It is below.", "D", found, 1.05)
        for found in ({"here": sure}, {"here": sure, "there": wide}, {"here": wide, "there": beyond}, {"here": None})
    ]
    assert [claim.verdict for claim in claims] == ["shown", "open", "refuted", "open"]
    assert "D there, which of 2 decides: 1.00" in claims[1].evidence


def test_exactness() -> None:
    assert [within("Exact.", "Error", found, 1e-6).verdict for found in (1e-7, 1e-3, math.nan)] == [
        "shown",
        "refuted",
        "open",
    ]


def test_an_interval_is_students_and_differences_are_paired_by_seed() -> None:
    trials = [Trial({"arm": arm}, seed, {"x": 10.0 * seed + arm}, 0.0) for seed in range(4) for arm in (1, 2)]
    results = Results(trials)
    difference = results.where(arm=2).less("x", results.where(arm=1))
    assert difference == Estimate(1.0, (1.0, 1.0))
    ratio = results.where(arm=2).over("x", results.where(arm=1))
    assert ratio is not None
    assert ratio.mean == pytest.approx((2 / 1 + 12 / 11 + 22 / 21 + 32 / 31) / 4)
    same = results.where(arm=1)
    assert same.less("x", same, "none") is None
    assert mean_of([1e9, 1e9, 1e9 + 0.01]).interval != (1e9, 1e9)  # no cancellation
    assert mean_of([1.0, 1.5]) == Estimate(1.25, None)
    assert mean_of([0.1 + 0.2, 0.3, 0.3]) == Estimate(0.3, (0.3, 0.3))  # they differ by rounding alone
    spread = mean_of([1.0, 2.0, 3.0])
    assert spread is not None
    assert spread.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    with pytest.raises(ValueError, match="name the whole condition"):
        results.mean("x")


def test_a_figure_of_several_trials_is_made_seed_by_seed_where_none_is_missing() -> None:
    values = {(1, 0): 1.0, (2, 0): 2.0, (1, 1): 11.0, (2, 1): 12.0, (2, 2): 22.0}
    results = Results(
        Trial({"arm": arm}, seed, {"x": values[arm, seed]} if (arm, seed) in values else {}, 0.0)
        for seed in range(3)
        for arm in (1, 2)
    )
    found = results.mean_over_seeds(lambda one: one.value("x", arm=2) - one.value("x", arm=1))
    assert found == Estimate(1.0, None)  # of two seeds
    assert results.mean_over_seeds(lambda one: one.value("x", arm=3)) is None
    averaged = results.averaged("x")
    assert averaged is not None
    assert averaged.mean == pytest.approx((1.5 + 11.5 + 22) / 3)
    assert results.largest("none", "x") == 22
    assert math.isnan(results.largest("none"))
    named = results.several_series("arm", {"x": "figure", "none": "nothing"})
    assert [(each.name, each.x, each.y) for each in named] == [
        ("figure", (1.0, 2.0), (6.0, 12.0)),
        ("nothing", (1.0, 2.0), (None, None)),
    ]


def test_two_seeds_that_are_alike_decide_nothing() -> None:
    assert above("It is above.", "Mean", mean_of([0.4, 0.4])).verdict == "open"
    assert above("It is above.", "Mean", mean_of([0.4, 0.4, 0.4])).verdict == "shown"


def test_what_is_no_number_in_one_trial_is_not_exact() -> None:
    """Else the worst deviation of all would be passed over."""
    trials = [Trial({}, seed, {"error": value}, 0.0) for seed, value in enumerate((1e-9, None, 1e-8))]
    assert within("Exact.", "Error", Results(trials).largest("error"), 1e-6).verdict == "open"
    assert within("Exact.", "Error", Results(trials[::2]).largest("error"), 1e-6).verdict == "shown"
    assert math.isnan(worst([1.0, math.nan, 0.5]))


def test_what_intervals_are_over_is_said_once() -> None:
    for format_ in ("terminal", "markdown", "html"):
        words = {seeds: " ".join(render(rolled(seeds=seeds), format_).split()) for seeds in (1, 2, 3)}
        assert words[1].count("of one seed, without intervals, which need 3") == 1
        assert words[2].count("means over 2 seeds, without intervals, which need 3") == 1
        assert words[3].count("means over 3 seeds") == 1
        assert "± 0:" not in words[3]
        alike = replace(rolled(), claims=(above("It is above.", "Mean", mean_of([0.4, 0.4, 0.4])),))
        assert " ".join(render(alike, format_).split()).count(": all seeds gave the same") == 1


def test_intervals_end_at_the_bounds_of_their_figures() -> None:
    x, y = (1.0, 2.0, 3.0), (0.5, 0.97, 0.5)
    measured = LabSeries("measured", x, y, (-0.1, 0.9, None), (1.1, 1.04, None))
    share = LabChart("share", "Shares", "x", "accuracy", (measured,), bounds=SHARE)
    (cut,) = bounded(share).series
    assert (cut.low, cut.high) == ((0, 0.9, None), (1, 1, None))
    assert [lab_words.value_at(cut, place) for place in range(3)] == ["0.5 ± 0.5", "0.97 (0.9 to 1)", "0.5"]
    (cut,) = bounded(replace(share, bounds=(None, None), y_scale="log")).series
    assert (cut.low, cut.high) == ((0, 0.9, None), (1.1, 1.04, None))  # what is drawn on such an axis is positive
    (same,) = bounded(replace(share, bounds=(None, None))).series
    assert same == measured
    assert cell(Estimate(0.97, (0.9, 1.04)), SHARE) == "0.97 (0.9 to 1)"
    assert cell(Estimate(0.97, (0.9, 1.04))) == "0.97 ± 0.07"


def test_axes_end_at_the_bounds_too() -> None:
    series = LabSeries("measured", (1.0, 2.0), (0.3, 1.0), (0.0, 0.98), (0.7, 1.0))
    share = LabChart("share", "Shares", "x", "accuracy", (series,), bounds=SHARE)
    scales = re.findall(r"'domain': \[(0\.?\d*), (1\.?\d*)\]", str(curves(share)))
    assert {tuple(map(float, each)) for each in scales} == {(0, 1)}
    drawn = curves(bounded(replace(share, bounds=(None, None), y_scale="log")))
    assert [row["low"] for row in drawn["datasets"]["measured"]] == [0.3, 0.98]  # from 0 on, as far as is drawn


@pytest.mark.parametrize("name", lab.EXPERIMENTS.names())
def test_of_no_figures_nothing_is_concluded(name: str) -> None:
    """As where every training diverged."""
    budget = Budget(0.02, 1)
    experiment = load_code(lab.EXPERIMENTS[name].code, name, UsageError)
    trials = [Trial(dict(condition), 0, {}, 0.0) for condition in experiment.conditions(budget)]
    results = Results(trials)
    with pytest.raises(MissingFigureError):
        experiment.answer(results, budget)
    assert {claim.verdict for claim in experiment.claims(results, budget)} == {"open"}
    assert list(experiment.charts(results, budget))
    for tables_or_notes in (experiment.tables, experiment.notes):
        list(tables_or_notes(results, budget))


def test_a_series_leaves_out_what_diverged() -> None:
    losses = [(2.0, 1.0), (4.0, None), None]
    results = Results(Trial({}, seed, {"loss": found}, 0.0) for seed, found in enumerate(losses))
    found = results.along("loss", [1, 2], "with")
    assert (found.name, found.x, found.y) == ("with", (1, 2), (3.0, 1.0))


def test_an_experiment_that_takes_times_runs_in_this_process_alone() -> None:
    with lab.EXPERIMENTS.including(replace(ROW, name="timed", alone=True)):
        lab.run("timed", seeds=3, jobs=2)
    assert Dice.ran == [(seed, sides) for seed in range(3) for sides in (6, 20)]
