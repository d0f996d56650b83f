"""The report of a finished repair: what was changed, what that was proved to give, and how to use the weights."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from bnprobe.errors import UsageError
from bnprobe.records import RepairRecord, Report, RequirementResult
from bnprobe.reports import figures, glyphs
from bnprobe.reports.beforeafter import from_reports
from bnprobe.reports.causes import SEVERITY_STYLES
from bnprobe.reports.documents import DocumentKind, dump
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, to_string
from bnprobe.reports.plan import kinds, listed, refused
from bnprobe.reports.proof import SIGNS, conclusion, proof
from bnprobe.reports.standing import STYLES
from bnprobe.reports.usage import Files, usage
from bnprobe.requirement import parse_requirement

__all__ = ["Files", "load_record", "record_json", "render_record"]

_RECORD = DocumentKind(RepairRecord, "repair record", "Repair again")
_MOST_DIGITS = 12
_STYLES = STYLES | {glyphs.WARNING: SEVERITY_STYLES["warning"]}


def render_record(
    record: RepairRecord,
    before: Report | None,
    after: Report | None,
    options: RenderOptions,
    files: Files | None = None,
) -> str:
    """The record as text in lines of at most ``options.width`` cells; what is to be pasted may be longer.

    Args:
        record: The record.
        before, after: The scans of the model as it was and as it is now; None where there was none.
        options: How it is to be written.
        files: What was written beside the weights.
    """
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    show_all = options.show_all
    parts = [
        _header(record, page),
        _changed(record, page, show_all),
        refused(record.plan, page, show_all) if record.plan else [],
        from_reports(before, after, page, show_all) if before and after else [],
        proof(record.proof, page, show_all) if record.proof else [],
        _notes(record, page),
        _closing(record, page),
        usage(record, files or Files(), page),
    ]
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return to_string(lines, options.color)


def record_json(record: RepairRecord) -> str:
    """The record as JSON; ``record.schema.json`` describes it.

    Raises:
        ValueError: If a figure is NaN or infinite, which the records do not allow.
    """
    return dump(record)


def load_record(text: str) -> RepairRecord:
    """Read a record back.

    Raises:
        UsageError: If the text is no repair record of this schema version; only fields with a default may be missing.
    """
    return _RECORD.load(text)


def _header(record: RepairRecord, page: Page) -> list[Text]:
    title = page.heading(f"{record.tool.name} {record.tool.version}: {record.action} of {record.model}")
    environment = record.environment
    rows = [
        *([("checkpoint", record.checkpoint)] if record.checkpoint else []),
        *([("training", text)] if (text := _training(record)) else []),
        ("device", f"{environment.device_name}, torch {environment.torch}, {_seeds(record.seeds)}"),
    ]
    return [*title, *page.labelled(rows)]


def _training(record: RepairRecord) -> str:
    """The optimizer, the length of the runs and the time that all of them took; empty where nothing was trained."""
    runs = [run for arm in record.proof.arms if arm.trained for run in arm.runs] if record.proof else []
    if not runs:
        return ""
    train: dict[str, Any] = record.settings.get("train") or {}
    optimizer = _call(train["optimizer"]) if train.get("optimizer") else "optimizer not recorded"
    schedule = f", {_call(train['schedule'])}" if train.get("schedule") else ""
    steps = f"up to {figures.count(max(run.steps for run in runs), 'step')}"
    time = f"{figures.count(len(runs), 'run')} in {_duration(sum(run.seconds for run in runs))}"
    return f"{optimizer}{schedule}; {steps}{_images(record)}; {time}"


def _images(record: RepairRecord) -> str:
    """Images of a step, where they are recorded."""
    train: dict[str, Any] = record.settings.get("train") or {}
    data: dict[str, Any] = record.settings.get("data") or {}
    size = train.get("batch_size") or data.get("batch_size")
    accumulated = train.get("accumulate") or 1
    if not size:
        return ""
    times = f"{accumulated} {glyphs.TIMES} " if accumulated > 1 else ""
    return f" of {times}{figures.count(size, 'image')}"


def _call(target: dict[str, Any]) -> str:
    """A class of the spec with its arguments, e.g. "SGD(lr=0.01)"."""
    arguments = ", ".join(f"{name}={value}" for name, value in (target.get("args") or {}).items())
    return f"{target.get('target', '?')}({arguments})"


def _duration(seconds: float) -> str:
    """A time, e.g. "4.2 s", "12 min", "3.4 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    counted = seeds == tuple(range(seeds[0], seeds[0] + len(seeds))) if seeds else False
    return f"seeds {seeds[0]} to {seeds[-1]}" if counted else f"seeds {', '.join(map(str, seeds))}"


def _changed(record: RepairRecord, page: Page, show_all: bool) -> list[Text]:
    """Which layers were converted or recalibrated."""
    lines: list[Text] = []
    if record.plan is not None and record.plan.changes:
        plan = record.plan
        total = len(plan.changes) + len(plan.refused) + plan.untouched
        lines += page.heading(
            f"Converted to {plan.to}: {len(plan.changes)} of {figures.count(total, 'normalization layer')},"
            f" chosen by {plan.source}"
        )
        for words, number in kinds(plan.changes):
            names = [change.name for change in plan.changes if f"{change.kind} {glyphs.ARROW} {change.to}" == words]
            lines += page.paragraph(
                f"{number} {glyphs.TIMES} {words}: {listed(names, show_all)}", first="  ", rest="    "
            )
        for note in dict.fromkeys(change.note for change in plan.changes if change.note):
            lines += page.paragraph(f"Note: {note.removesuffix('.')}.", first="  ", rest="    ")
    return [*lines, *_recalibrated(record, page, show_all)]


def _recalibrated(record: RepairRecord, page: Page, show_all: bool) -> list[Text]:
    """Layers whose statistics were taken anew; they are listed unless they are those converted."""
    if not record.recalibrated:
        return []
    number = figures.count(len(record.recalibrated), "layer")
    if record.plan is not None and {change.name for change in record.plan.changes} == set(record.recalibrated):
        return page.paragraph("Their running statistics were taken anew first.", first="  ")
    lines = page.heading(f"Running statistics taken anew: {number}")
    return [*lines, *page.paragraph(listed(record.recalibrated, show_all), first="  ")]


def _notes(record: RepairRecord, page: Page) -> list[Text]:
    lines = [line for note in record.notes for line in page.paragraph(note, first="  ")]
    return [*page.heading("Notes"), *lines] if lines else []


def _closing(record: RepairRecord, page: Page) -> list[Text]:
    """The verdict, the flags, and what was required."""
    sign, headline = _verdict(record)
    lines = page.paragraph(headline, style="bold", first=f"{page.clean(sign)} ")
    lines[0].stylize(_STYLES[sign], 0, 1)
    sentences = [record.proof.message if record.proof else "", *_flagged(record)]
    lines += [line for text in sentences if text for line in page.paragraph(text, first="  ")]
    for requirement in record.requirements:
        mark = glyphs.FINE if requirement.held else glyphs.FLAGGED
        line = page.paragraph(_requirement(requirement), first=f"  {page.clean(mark)} ")
        line[0].stylize(STYLES[mark], 2, 3)
        lines += line
    return lines


def _verdict(record: RepairRecord) -> tuple[str, str]:
    failed = sum(not requirement.held for requirement in record.requirements)
    if failed:
        number, verb = figures.count(len(record.requirements), "requirement"), "do" if failed > 1 else "does"
        verdict = f" {conclusion(record.proof)}" if record.proof else ""
        return glyphs.FLAGGED, f"{failed} of {number} {verb} not hold.{verdict}"
    if record.proof is not None:
        return SIGNS[record.proof.conclusion], conclusion(record.proof)
    done = "Converted" if record.action == "convert" else "Recalibrated"
    return glyphs.UNMEASURED, f"{done}, but nothing was scored: what it gains is not known."


def _flagged(record: RepairRecord) -> list[str]:
    before, after = record.flagged_before, record.flagged_after
    if after is None:
        return [] if before is None else [f"Flagged layers: {before} before; the repaired model was not scanned."]
    return [f"Flagged layers: {after}."] if before is None else [f"Flagged layers: {before} {glyphs.ARROW} {after}."]


def _requirement(requirement: RequirementResult) -> str:
    if requirement.value is None:
        return f"{requirement.text}: not measured"
    return f"{requirement.text}: {_telling(requirement.text, requirement.value, requirement.held)}"


def _telling(text: str, value: float, held: bool) -> str:
    """As few digits, from four on, as leave no doubt on which side of the limit the value is."""
    try:
        holds = parse_requirement(text).holds
    except UsageError:  # a record written by hand
        return figures.plain(value)
    digits = 4
    while holds(float(f"{value:.{digits}g}")) != held and digits < _MOST_DIGITS and math.isfinite(value):
        digits += 1
    return f"{value:.{digits}g}"
