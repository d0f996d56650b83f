"""The gallery of experiments: ``python docs/gallery.py`` writes docs/lab/README.md from what the experiments found.

``bnprobe lab NAME --output-dir docs/lab/NAME`` writes the results of one; the page that opens in a browser, and the
trials one by one, are not kept. ``python docs/gallery.py NAME ...`` first makes claims, charts and answer of these
experiments anew of the trials that are kept, where their code has changed; for ``speed``, which names the machine, only
on the one that took the times.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bnprobe.lab.experiments import EXPERIMENTS
from bnprobe.lab.run import concluded
from bnprobe.records import LabReport
from bnprobe.report import lab, render
from bnprobe.report.html import picture_of_lab
from bnprobe.report.markdown import prose

FOLDER = Path(__file__).parent / "lab"
KEPT = ("RESULTS.md", "results.json")

INTRODUCTION = """\
# Experiments

What papers say about Batch Normalization and Batch Renormalization, measured. Each experiment is one command,
on data that needs no download, and says of each claim whether the figures show it, refute it or leave it open:

```sh
pip install "bnprobe[lab]"
bnprobe lab              # lists the experiments
bnprobe lab renorm       # up to ten minutes on two cores; --budget 0.1 for a look
```

`bnprobe-lab/renorm/` then holds `index.html`, a page with all charts, and the same figures as `results.json` and
`RESULTS.md`. Trials are kept as they are done: after Ctrl-C the same command goes on. `--data` takes a folder of
images, one folder in it for each class, or one with the files of CIFAR-10, which take about ten times as long;
`--seeds` and `--budget` say how much is run. With a budget below 1 networks may have learned little: claims about
training stay open, and only what is exact, or what a formula gives, is decided. The layers that are trained are in
`bnprobe/lab/layers.py`, written from their equations to be read, and tested against torch's.
"""


def found(name: str) -> LabReport:
    """What an experiment found, as it is kept here."""
    return LabReport.load(FOLDER / name / "results.json")


def names() -> list[str]:
    """The experiments whose results are kept here."""
    return [name for name in EXPERIMENTS.names() if (FOLDER / name / "results.json").is_file()]


def pages() -> dict[Path, str]:
    """Every page of results, and the gallery, by its path."""
    reports = [found(name) for name in names()]
    texts = {FOLDER / each.experiment / "RESULTS.md": _results(each) for each in reports}
    return {**texts, FOLDER / "README.md": "\n".join([INTRODUCTION, *map(_entry, reports)])}


def make_anew(name: str) -> None:
    """Write the results of an experiment, and its picture, with what today's code makes of its trials."""
    report = concluded(found(name))
    report.save(FOLDER / name / "results.json")
    (FOLDER / name / f"{name}.svg").write_text(picture_of_lab(report), encoding="utf-8")


def _results(report: LabReport) -> str:
    """The page of results, which leads to the equations."""
    link = f"[explanation/equations](../../{lab.DERIVED.removeprefix('docs/')})"
    return render(report, "markdown").replace(lab.DERIVED, link)


def _entry(report: LabReport) -> str:
    name = report.experiment
    refuted = [f"Refuted: {prose(claim.text)}" for claim in report.claims if claim.verdict == "refuted"]
    summary = filter(None, (prose(report.question), prose(report.answer), f"{prose(lab.one_line(report))}."))
    lines = [
        f"## {name}: {prose(report.title)}",
        f"{' '.join(summary)} [All figures]({name}/RESULTS.md)",
        *refuted,
        f"![{prose(report.charts[0].title)}]({name}/{name}.svg)",
    ]
    return "\n\n".join(lines) + "\n"


if __name__ == "__main__":
    for given in sys.argv[1:]:
        make_anew(given)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
