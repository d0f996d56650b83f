"""``bnprobe lab``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options

if TYPE_CHECKING:
    from rich.text import Text

    from bnprobe.lab.experiments import ExperimentRow
    from bnprobe.records import LabReport
    from bnprobe.report import RenderOptions
    from bnprobe.report.page import Page


def lab(
    name: Annotated[
        str | None, typer.Argument(help="The experiment. Default: a list of all experiments.", metavar="NAME")
    ] = None,
    budget: Annotated[
        float,
        options.option(
            options.RUN,
            "--budget",
            "Amount of work: 0.1 for a look, which decides nothing of what networks learn; 1 takes two cores ten"
            " minutes at most, with the digits.",
            "X",
        ),
    ] = 1.0,
    seeds: Annotated[int, options.option(options.RUN, "--seeds", "Trials of each condition.", "N")] = 5,
    jobs: Annotated[
        int | None,
        options.option(
            options.RUN, "--jobs", "Trials side by side (default: one for each core; one where times are taken).", "N"
        ),
    ] = None,
    fresh: Annotated[
        bool, options.option(options.RUN, "--fresh", "Begin anew: do not go on with the trials in the folder.")
    ] = False,
    data: Annotated[
        str | None,
        options.option(
            options.DATA,
            "--data",
            "A folder of images, one folder for each class, or of CIFAR-10's files, which take ten times as long"
            " (default: scikit-learn's digits).",
            "DIR",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        options.option(
            options.REPORT, "--output-dir", "Where trials, results and page go (default: bnprobe-lab/NAME).", "DIR"
        ),
    ] = None,
    show_all: Annotated[bool, options.option(options.REPORT, "--all", "Print every chart and table.")] = False,
) -> None:
    """Run an experiment on Batch Normalization: what is claimed, and what the figures say.

    The folder gets results.json, index.html, RESULTS.md and a picture. Trials are kept as they are done: after Ctrl-C,
    the same command goes on.

    Exit codes: 0 done, whatever was found, 2 error in usage, 3 interrupted.
    """
    from bnprobe.cli.console import print_report, progress_bar, typed_command
    from bnprobe.cli.processes import importing
    from bnprobe.cli.streams import say
    from bnprobe.lab.experiments import EXPERIMENTS

    if name is None:
        print_report(None, lambda document, options: _listing(EXPERIMENTS, options))
        return
    folder = output_dir or Path("bnprobe-lab") / EXPERIMENTS[name].name
    from bnprobe.errors import NothingToProbeError
    from bnprobe.files import require_folder
    from bnprobe.records import LabReport
    from bnprobe.report import RenderOptions, renderer

    renderer("html", LabReport)  # that nothing is missing is known before anything is measured
    require_folder(folder)
    with progress_bar(noun="trials") as show:
        with importing():
            from bnprobe.lab.run import run
        try:
            found = run(name, folder, budget=budget, seeds=seeds, data=data, jobs=jobs, fresh=fresh, progress=show)
        except KeyboardInterrupt:
            again = " without --fresh" if fresh else ""
            raise NothingToProbeError(
                f"Interrupted. What was measured is kept in {folder}: the same command{again} goes on."
            ) from None
    written = _write(found, folder, typed_command())
    print_report(found, renderer(options.TERMINAL, LabReport), RenderOptions(show_all=show_all))
    say(f"Written to {folder}: {', '.join(written)}.")


def _write(found: LabReport, folder: Path, command: str) -> list[str]:
    """Write results, page and picture, all or none; their names."""
    from bnprobe.files import write_all
    from bnprobe.printable import escaped_lines
    from bnprobe.report import RenderOptions, render
    from bnprobe.report.html import picture_of_lab

    names = {"index.html": "html", "RESULTS.md": "markdown", "results.json": "json"}
    how = RenderOptions(command=command)
    texts = {name: escaped_lines(render(found, format_, how)) for name, format_ in names.items()}
    if found.charts:
        texts[f"{found.experiment}.svg"] = picture_of_lab(found)
    write_all({folder / name: text for name, text in texts.items()}, force=True, option="--output-dir")
    return list(texts)


def _listing(rows: Iterable[ExperimentRow], options: RenderOptions) -> str:
    from bnprobe.report.page import Page, to_string

    page = Page.of(options)
    parts = [list(_row(row, page)) for row in rows]
    return to_string([*parts, page.paragraph("bnprobe lab NAME runs an experiment.")], options.color)


def _row(row: ExperimentRow, page: Page) -> Iterator[Text]:
    yield from page.paragraph(f"{row.name}: {row.title}", style="bold")
    yield from page.paragraph(row.question, first="  ")
    yield from page.paragraph("; ".join(row.sources) or "An open question.", style="dim", first="  ")
