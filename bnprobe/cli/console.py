"""What commands write for people: reports to stdout, progress to stderr."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from bnprobe.cli.streams import forget_odd_sizes, say, start, write_out, writing_to
from bnprobe.paths import placed
from bnprobe.printable import escaped, escaped_lines
from bnprobe.records import TrainingStep
from bnprobe.report import Renderer, RenderOptions, figures
from bnprobe.report.page import can_show_signs, clean


def print_report(
    document: object, render: Renderer, options: RenderOptions | None = None, command: str | None = None
) -> None:
    """Render a document for the terminal that stdout is, or the pipe, and write it there.

    Args:
        document: What is rendered.
        render: A format's function for it.
        options: How much is shown; what the terminal shows is seen to.
        command: The command that suggestions are variants of; None: the one that runs; empty: not known.

    Raises:
        OutputError: It could not be written.
    """
    asked, options = options or RenderOptions(), _terminal_options(typed_command() if command is None else command)
    options = replace(options, show_all=asked.show_all, verbose=asked.verbose)
    text = render(document, options)
    write_out(text if options.color else escaped_lines(text))


def follow(update: Callable[[], bool], render: Callable[[RenderOptions], str], options: RenderOptions) -> None:
    """Show what changes: on a terminal again and again until Ctrl-C, elsewhere once.

    Args:
        update: Called before each time; whether there is anything new.
        render: Gives the text.
        options: How much is shown.

    Raises:
        OutputError: It could not be written.
    """
    update()
    console = Console(file=start().stdout)
    if start().stdout is None or not console.is_terminal:
        print_report(None, lambda document, found: render(found), options, "")
        return

    def view() -> Text:
        found = _terminal_options("")
        return Text.from_ansi(render(replace(found, width=console.width, show_all=options.show_all)))

    width = console.width
    live = Live(view(), console=console, auto_refresh=False)
    with suppress(KeyboardInterrupt), writing_to(start().stdout), live:
        while True:
            time.sleep(_PAUSE)
            if update() or console.width != width:
                width = console.width
                live.update(view(), refresh=True)


def _terminal_options(command: str) -> RenderOptions:
    stdout = start().stdout
    return RenderOptions(
        width=_columns(stdout),
        color=stdout is not None and _takes_color(stdout),
        unicode=can_show_signs(None if stdout is None else stdout.encoding),
        folder=ci_folder(),
        command=command,
    )


def _takes_color(stdout: TextIO) -> bool:
    """Whether colours are wanted, and shown, by what rich goes by: the terminal, TERM, NO_COLOR and FORCE_COLOR."""
    console = Console(file=stdout)
    return console.color_system is not None and not console.no_color


_CHECKOUTS = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")
"""Environment variables in which GitHub and GitLab name the root of the repository."""


def ci_folder() -> str:
    """The folder in which the command was started, as seen from the root of the repository that a CI job checked out.

    Empty where there is no such job, or the command was started elsewhere.
    """
    here = placed(Path()).absolute()
    for name in _CHECKOUTS:
        root = os.environ.get(name)
        if root and here != Path(root) and here.is_relative_to(root):
            return here.relative_to(root).as_posix()
    return ""


def _columns(stdout: TextIO | None) -> int:
    """As ``shutil.get_terminal_size``, which would ask the stream that the user's code writes to."""
    forget_odd_sizes()  # which the user's code may have set
    if "COLUMNS" in os.environ:
        return int(os.environ["COLUMNS"])
    try:
        return os.get_terminal_size(stdout.fileno()).columns or _USUAL_WIDTH if stdout else _USUAL_WIDTH
    except (OSError, ValueError):
        return _USUAL_WIDTH


def typed_command() -> str:
    """The command line as typed."""
    return start().typed


_USUAL_WIDTH = 80
"""Columns where there is no terminal."""

_PAUSE = 0.5
"""Seconds between looks at what is followed."""

_SMOOTHING = 0.1
"""Weight of the newest loss in the smoothed one."""

_BAR_WIDTH, _NARROW_BAR_WIDTH = 24, 5
_NARROW = 100
_TIME_WIDTH = 7
_GAP = "  "


class _RateColumn(TextColumn):
    """Micro-batches per second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: object) -> Text:
        speed = getattr(task, "speed", None)
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


class _CountColumn(MofNCompleteColumn):
    """How many of how many are done, where that is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else Text()


class _LeftColumn(TimeRemainingColumn):
    """The time that is left, or where that is not known the time that has passed."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total is not None else TimeElapsedColumn().render(task)


@contextmanager
def progress_bar(shown: bool = True, noun: str = "micro-batches") -> Iterator[ScanUpdates]:
    """A progress bar with rate and remaining time; nothing if stderr is not a terminal, or not ``shown``.

    Args:
        shown: Whether to show anything.
        noun: What is counted.
    """
    with _scan_bar(shown) as bar:
        yield ScanUpdates(bar, noun)


@contextmanager
def repair_bars(shown: bool = True) -> Iterator[tuple[Callable[[int, int], None], Callable[[TrainingStep], None]]]:
    """A progress bar for scans and one for training; only the one updated last is visible.

    Two bars at once would overwrite each other. The training bar shows the run, steps, smoothed loss, last score, the
    fractions of clipped r and d, and the remaining time of the run; what does not fit the width is left out, starting
    from the end. If stderr is not a terminal, as in a CI log, one line per evaluation is printed instead.

    Args:
        shown: Whether to show anything.

    Yields:
        A function to call with the micro-batches done and planned, and one to call with each training step.
    """
    scan, training = _scan_bar(shown), _training_bar(shown)
    show_scan, show_step = ScanUpdates(scan), _training_updates(training, shown)

    def update_scan(done: int, planned: int) -> None:
        training.stop()
        show_scan(done, planned)  # first, or the old state of the bar would reappear
        scan.start()

    def update_training(step: TrainingStep) -> None:
        scan.stop()
        show_step(step)
        training.start()

    scan.start()
    try:
        yield update_scan, update_training
    finally:
        scan.stop()
        training.stop()


def _scan_bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_WIDTH),
        _CountColumn(),
        _RateColumn(),
        _LeftColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not (shown and _moves(console)))


def _moves(console: Console) -> bool:
    """Whether it is a terminal. rich takes a file for one where FORCE_COLOR is set, as in many CI jobs."""
    return console.is_terminal and console.file.isatty()


class ScanUpdates:
    """The bar of a scan: call it with what is done and planned, and ``announce`` what is measured after that."""

    def __init__(self, bar: Progress, noun: str = "micro-batches") -> None:
        self._bar, self._noun = bar, noun
        self._task = bar.add_task("loading", total=None)

    def __call__(self, done: int, planned: int) -> None:
        """Show how many are done."""
        if done < self._bar.tasks[0].completed:  # another scan, with its own rate
            self._bar.reset(self._task)
        self._bar.update(self._task, description=self._noun, completed=done, total=planned)

    def announce(self, what: str) -> None:
        """Show what is measured from now on, which has no count."""
        self._bar.refresh()  # how far it came, which a fast scan would never show
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=None)


def _training_bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=_bar_width(console)),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    return Progress(*columns, console=console, transient=True, disable=not (shown and _moves(console)))


def _training_updates(bar: Progress, shown: bool) -> Callable[[TrainingStep], None]:
    if bar.disable:
        return _print_evaluation if shown else lambda step: None
    return _TrainingBar(bar, bar.add_task("training", total=None, figures="", visible=False)).update


class _TrainingBar:
    """State of the training bar between the steps of a run."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._run = ""
        self._loss: float | None = None
        self._seen: dict[str, str] = {}

    def update(self, step: TrainingStep) -> None:
        """Show one step; the first step of another run starts a new bar."""
        run = f"{escaped(step.arm)} #{step.seed}"
        if run != self._run:
            self._run, self._loss, self._seen = run, None, {}
            self._bar.reset(self._task, total=step.steps, description=self._run, visible=True)
        self._loss = _smoothed(self._loss, step.loss)
        now = {"score": _score(step), "clipped": _clipped(step, "clip", digits=0)}
        self._seen |= {name: text for name, text in now.items() if text}
        parts = [f"loss {figures.score(self._loss)}", *(self._seen.get(name, "") for name in ("score", "clipped"))]
        # The other columns, and the blanks between them.
        counted = 2 * len(str(step.steps)) + 1
        fixed = cell_len(self._run) + _bar_width(self._bar.console) + counted + _TIME_WIDTH + 4
        room = self._bar.console.width - fixed
        self._bar.update(self._task, completed=step.step, figures=_fitting(parts, room))


def _bar_width(console: Console) -> int:
    return _BAR_WIDTH if console.width >= _NARROW else _NARROW_BAR_WIDTH


def _print_evaluation(step: TrainingStep) -> None:
    """Print one line if the step was evaluated."""
    if step.score is None:
        return
    held_out = f"held-out {_score(step)}"
    parts = filter(None, [f"loss {figures.score(step.loss)}", held_out, _clipped(step, "clipped", digits=1)])
    text = f"{step.arm}, seed {step.seed}: step {step.step}/{step.steps}, {', '.join(parts)}"
    say(clean(text, unicode=False))


def _smoothed(before: float | None, loss: float) -> float:
    """Exponential moving average; it restarts after a loss that is not finite, which is shown unsmoothed."""
    if before is None or not (math.isfinite(before) and math.isfinite(loss)):
        return loss
    return before + _SMOOTHING * (loss - before)


def _score(step: TrainingStep) -> str:
    """The metric on held-out data, or the loss if there is no metric; empty if the step was not evaluated."""
    if step.score is None:
        return ""
    if step.score.metric is not None:
        return f"metric {figures.score(step.score.metric)}"
    return f"loss {'-' if step.score.loss is None else figures.score(step.score.loss)}"


def _clipped(step: TrainingStep, word: str, digits: int) -> str:
    """The fractions of r and d that are clipped; empty if not measured."""
    parts = (("r", step.clipped_r), ("d", step.clipped_d))
    known = [f"{name} {value:.{digits}%}" for name, value in parts if value is not None]
    return f"{word} {' '.join(known)}" if known else ""


def _fitting(parts: list[str], room: int) -> str:
    """As many parts as fit, from the first on."""
    text = ""
    for part in filter(None, parts):
        longer = f"{text}{_GAP}{part}" if text else part
        if cell_len(longer) > room:
            break
        text = longer
    return text
