"""The progress of training: one bar on a terminal, one line per evaluation elsewhere."""

from __future__ import annotations

import io
import math
import re
from contextlib import redirect_stderr
from typing import Any

import pytest
from rich.cells import cell_len

from bnprobe.cli.console import repair_bars
from bnprobe.records import Score, TrainingStep


class Terminal(io.StringIO):
    """A stderr that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def last_frame(stream: Terminal) -> str:
    """What stood on the terminal when the bar was taken away."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")
    return [line for line in plain.split("\n") if line.strip()][-1]


def step(number: int, arm: str = "batch-renorm", seed: int = 1, loss: float = 0.5, **given: Any) -> TrainingStep:
    return TrainingStep(arm, seed, number, 500, loss, 0.01, **given)


def shown(stream: io.StringIO, *steps: TrainingStep) -> None:
    """Run the bar with these steps; stderr is the stream."""
    with redirect_stderr(stream), repair_bars() as (_, show):
        for each in steps:
            show(each)


def test_the_bar_shows_the_run_and_all_its_figures_on_80_columns(terminal: Terminal) -> None:
    shown(terminal, step(120, score=Score(0.2, 0.958), clipped_r=0.034, clipped_d=0.0), step(121))
    frame = last_frame(terminal)
    assert frame.startswith("batch-renorm #1 ")
    assert "121/500" in frame
    assert frame.rstrip().endswith("loss 0.5  metric 0.958  clip r 3% d 0%")
    assert cell_len(frame) <= 80


def test_the_loss_is_smoothed_within_a_run_and_begins_anew_with_the_next(terminal: Terminal) -> None:
    shown(terminal, step(1, loss=1.0), step(2, loss=2.0))
    assert "loss 1.1" in last_frame(terminal)
    shown(terminal, step(1, loss=1.0, score=Score(None, 0.7)), step(1, seed=2, loss=4.0))
    assert "#2" in last_frame(terminal)
    assert last_frame(terminal).rstrip().endswith("loss 4")


def test_a_loss_that_is_not_finite_is_shown_and_does_not_stick(terminal: Terminal) -> None:
    shown(terminal, step(1, loss=1.0), step(2, loss=math.nan))
    assert "loss nan" in last_frame(terminal)
    shown(terminal, step(1, loss=1.0), step(2, loss=math.inf), step(3, loss=3.0))
    assert "loss 3" in last_frame(terminal)


def test_what_does_not_fit_is_left_out(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "62")
    shown(terminal, step(120, score=Score(0.2, 0.958), clipped_r=0.034, clipped_d=0.0))
    assert last_frame(terminal).rstrip().endswith("loss 0.5  metric 0.958")


def test_a_name_is_no_markup(terminal: Terminal) -> None:
    shown(terminal, step(1, arm="[red]x"))
    assert "[red]x #1" in last_frame(terminal)


def test_the_bar_leaves_nothing_behind(terminal: Terminal) -> None:
    shown(terminal, step(1))
    assert terminal.getvalue().rstrip("\r").endswith("\x1b[2K")


def test_a_run_without_steps_draws_no_bar(terminal: Terminal) -> None:
    shown(terminal)
    assert "training" not in terminal.getvalue()


def test_a_log_gets_one_line_for_each_evaluation() -> None:
    log = io.StringIO()
    shown(
        log,
        step(49),
        step(50, score=Score(0.31, 0.958), clipped_r=0.034, clipped_d=0.0),
        step(51),
        step(100, arm="frozen", score=Score(0.29, None)),
        step(150, arm="frozen", score=Score(None, None)),
    )
    assert log.getvalue().splitlines() == [
        "batch-renorm, seed 1: step 50/500, loss 0.5, held-out metric 0.958, clipped r 3.4% d 0.0%",
        "frozen, seed 1: step 100/500, loss 0.5, held-out loss 0.29",
        "frozen, seed 1: step 150/500, loss 0.5, held-out loss -",
    ]


def test_of_two_bars_only_the_one_called_last_is_on_the_terminal(terminal: Terminal) -> None:
    with redirect_stderr(terminal), repair_bars() as (show_scan, show_step):
        show_scan(3, 8)
        show_step(step(120))
        show_scan(5, 8)
    seen = re.findall(r"3/8|120/500|5/8", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()))
    assert set(seen) == {"3/8", "120/500", "5/8"}
    assert seen == sorted(seen, key=["3/8", "120/500", "5/8"].index)
    assert terminal.getvalue().rstrip("\r").endswith("\x1b[2K")


def test_both_bars_are_silent_in_a_log_but_for_evaluations() -> None:
    log = io.StringIO()
    for shown_ in (True, False):
        with redirect_stderr(log), repair_bars(shown_) as (show_scan, show_step):
            show_scan(3, 8)
            show_step(step(49))
            show_step(step(50, score=Score(None, 0.958)))
    assert log.getvalue() == "batch-renorm, seed 1: step 50/500, loss 0.5, held-out metric 0.958\n"


def test_other_processes_show_nothing(terminal: Terminal) -> None:
    with redirect_stderr(terminal), repair_bars(shown=False) as (_, show):
        show(step(50, score=Score(None, 0.958)))
    assert terminal.getvalue() == ""
