"""The report of a repair: what was changed, how it compares with its baselines, and how to use the weights."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from bnprobe.config.requirements import parse_requirement
from bnprobe.config.targets import conversion_call, settings_of
from bnprobe.errors import UsageError
from bnprobe.numbers import count, joined, percent
from bnprobe.records import Arm, Conclusion, Document, Ending, Estimate, Plan, Proof, RepairRecord, Report, Run
from bnprobe.report import figures
from bnprobe.report.figures import listed_in_line
from bnprobe.report.json import dump
from bnprobe.report.next_step import EXPORTED, chosen_options
from bnprobe.report.page import (
    ARROW,
    FINE,
    FLAGGED,
    STYLES,
    TIMES,
    UNDECIDED,
    UNMEASURED,
    WARNING,
    Page,
    RenderOptions,
    to_string,
)
from bnprobe.report.plan import deployment, kinds, refused
from bnprobe.report.table import Column, Mark, Names, dropping, table
from bnprobe.report.verify import before_and_after

_MOST_DIGITS = 12


@dataclass(frozen=True)
class Files:
    """Paths of the files written with the weights; None: not written."""

    record: str | None = None
    before: str | None = None
    after: str | None = None
    log: str | None = None


@dataclass(frozen=True)
class RepairReport(Document):
    """The result of a repair.

    Attributes:
        record: The record.
        before, after: The scans of the model as it was and as it is now; None where there was none.
        files: What was written with the weights.
    """

    record: RepairRecord
    before: Report | None = None
    after: Report | None = None
    files: Files = Files()


def render(report: RepairReport, options: RenderOptions) -> str:
    """The repair as text in lines of at most ``options.width`` cells; what is to be pasted may be longer.

    A comparison on held-out data says more than the layers before and after, which then are for those who ask.
    """
    page, show_all, record = Page.of(options), options.show_all, report.record
    whole = options.verbose or show_all
    layers = before_and_after(report.before, report.after, replaced(record), page, show_all) if report.before else []
    left_out = ["every layer before and after"] if layers and record.proof else []
    left_out += ["the lines of Python that load the weights"] if record.weights and not _must_be_made(record) else []
    hint = f"{page.whole} shows {joined(left_out)}." if left_out and not whole else ""
    parts = [
        _header(record, page),
        _changed(record, page, show_all),
        refused(record.plan, page, show_all) if record.plan else [],
        layers if whole or not record.proof else [],
        _proof(record.proof, page, show_all) if record.proof else [],
        page.section("Notes", record.notes),
        _closing(record, page, report.after),
        page.paragraph(hint, "dim") if hint else [],
        _usage(record, report.files, page, whole),
    ]
    return to_string(parts, options.color)


def _must_be_made(record: RepairRecord) -> bool:
    """Whether the weights are for another model than the user's: it is made in Python."""
    return record.plan is not None and not record.plan.deploys


def render_json(report: RepairReport, options: RenderOptions) -> str:
    """The record as JSON; ``record.schema.json`` describes it."""
    return dump(report.record, ascii_only=not options.unicode)


def _header(record: RepairRecord, page: Page) -> list[Text]:
    return [*page.heading(title(record)), *page.labelled(what_was_run(record))]


def title(record: RepairRecord) -> str:
    """What was done to what, and by what."""
    return f"{record.tool.name} {record.tool.version}: {record.action} of {record.model}"


def what_was_run(record: RepairRecord) -> list[tuple[str, str]]:
    """Weights, training and device, each with its label."""
    environment = record.environment
    return [
        *([("checkpoint", record.checkpoint)] if record.checkpoint else []),
        *([("training", text)] if (text := _training(record)) else []),
        ("device", f"{environment.device_name}, torch {environment.torch}, {_seeds(record.seeds)}"),
    ]


def _training(record: RepairRecord) -> str:
    """The optimizer, the length of the runs and the time that all of them took; empty where nothing was trained."""
    runs = [run for arm in record.proof.arms if arm.trained for run in arm.runs] if record.proof else []
    if not runs:
        return ""
    train: dict[str, Any] = record.settings.get("train") or {}
    optimizer = _call(train["optimizer"]) if train.get("optimizer") else "optimizer not recorded"
    schedule = f", {_call(train['schedule'])}" if train.get("schedule") else ""
    steps = f"up to {count(max(run.steps for run in runs), 'step')}"
    time = f"{count(len(runs), 'run')} in {figures.duration(sum(run.seconds for run in runs))}"
    return f"{optimizer}{schedule}; {steps}{_samples(record)}; {time}"


def _samples(record: RepairRecord) -> str:
    """Samples of a step, where they are recorded."""
    train: dict[str, Any] = record.settings.get("train") or {}
    data: dict[str, Any] = record.settings.get("data") or {}
    size = train.get("batch_size") or data.get("batch_size")
    accumulated = train.get("accumulate") or 1
    if not size:
        return ""
    times = f"{accumulated} {TIMES} " if accumulated > 1 else ""
    return f" of {times}{count(size, 'sample')}"


def _call(target: dict[str, Any]) -> str:
    """A class of the spec with its arguments, e.g. "SGD(lr=0.01)"."""
    arguments = ", ".join(f"{name}={value}" for name, value in (target.get("args") or {}).items())
    return f"{target.get('target', '?')}({arguments})"


def _seeds(seeds: tuple[int, ...]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    counted = seeds == tuple(range(seeds[0], seeds[0] + len(seeds))) if seeds else False
    return f"seeds {seeds[0]} to {seeds[-1]}" if counted else f"seeds {', '.join(map(str, seeds))}"


def _changed(record: RepairRecord, page: Page, show_all: bool) -> list[Text]:
    """Which layers were converted or recalibrated."""
    lines: list[Text] = []
    if record.plan is not None and record.plan.changes:
        lines += page.heading(conversion(record.plan))
        lines += page.paragraphs(conversions(record.plan, show_all), rest="    ")
    return [*lines, *_recalibrated(record, page, show_all)]


def conversion(plan: Plan) -> str:
    """What how many layers were converted to, and what chose them."""
    total = len(plan.changes) + len(plan.refused) + plan.untouched
    return (
        f"Converted to {plan.to}: {len(plan.changes)} of {count(total, 'normalization layer')}, chosen by {plan.source}"
    )


def conversions(plan: Plan, show_all: bool) -> list[str]:
    """Which layers became what, and what else has changed, a line each."""
    texts = []
    for words, number in kinds(plan.changes):
        names = [change.name for change in plan.changes if f"{change.kind} {ARROW} {change.to}" == words]
        texts.append(f"{number} {TIMES} {words}: {listed_in_line(names, show_all)}")
    notes = dict.fromkeys(change.note for change in plan.changes if change.note)
    return [*texts, *(f"Note: {note.removesuffix('.')}." for note in notes)]


def replaced(record: RepairRecord) -> dict[str, str]:
    """What the converted layers have become, by name."""
    return {} if record.plan is None else {change.name: change.to for change in record.plan.changes}


def _recalibrated(record: RepairRecord, page: Page, show_all: bool) -> list[Text]:
    """Layers whose running statistics were recalibrated; they are listed unless they are those converted."""
    if not record.recalibrated:
        return []
    if recalibrates_the_converted(record):
        return page.paragraph(RECALIBRATED_FIRST, first="  ")
    lines = page.heading(recalibration(record))
    return [*lines, *page.paragraph(listed_in_line(record.recalibrated, show_all), first="  ")]


RECALIBRATED_FIRST = "Their running statistics were recalibrated first."


def recalibration(record: RepairRecord) -> str:
    """Of how many layers the running statistics were recalibrated."""
    return f"Running statistics recalibrated: {count(len(record.recalibrated), 'layer')}"


def recalibrates_the_converted(record: RepairRecord) -> bool:
    """Whether the layers that were recalibrated are those that were converted."""
    plan = record.plan
    return plan is not None and {change.name for change in plan.changes} == set(record.recalibrated)


def _closing(record: RepairRecord, page: Page, after: Report | None) -> list[Text]:
    """The verdict, the flags, and what was required; ``after`` is the scan of the new model."""
    lines = page.verdict(*verdict(record), [record.proof.message if record.proof else "", *flags(record, after)])
    for sign, text in warnings(record):
        lines += page.paragraph(text, f"bold {STYLES[sign].split()[-1]}", first=f"  {page.clean(sign)} ")
    for mark, text in requirements(record):
        line = page.paragraph(text, first=f"  {page.clean(mark)} ")
        line[0].stylize(STYLES[mark], 2, 3)
        lines += line
    return lines


def warnings(record: RepairRecord) -> list[tuple[str, str]]:
    """What speaks against the weights: a sign and a sentence each."""
    found, proof = [], record.proof
    if proof is not None and proof.surely_worse:
        refused = "Written because of --force: " if record.weights else "Nothing was written: "
        found.append((FLAGGED, refused + worse_than_as_is(record)))
    elif proof is not None and proof.below_recalibrated:
        found.append((WARNING, _below_recalibrated(proof)))
    if proof is not None and proof.below_converted:
        found.append((WARNING, _below_converted(proof)))
    return found


def requirements(record: RepairRecord) -> list[tuple[str, str]]:
    """What was required and what was measured: a sign and a clause each."""
    found = []
    for requirement in record.requirements:
        value = requirement.value
        told = "not measured" if value is None else _telling(requirement.text, value, requirement.held)
        found.append((FINE if requirement.held else FLAGGED, f"{requirement.text}: {told}"))
    return found


def verdict(record: RepairRecord) -> tuple[str, str]:
    """The sign of the verdict, and the verdict."""
    failed = sum(not requirement.held for requirement in record.requirements)
    if failed:
        number, verb = count(len(record.requirements), "requirement"), "are" if failed > 1 else "is"
        compared = f" {_conclusion(record.proof)}" if record.proof else ""
        return FLAGGED, f"{failed} of {number} {verb} not met.{compared}"
    if record.proof is not None:
        sign = _SIGNS[record.proof.conclusion]
        beaten = record.proof.below_recalibrated or record.proof.below_converted
        return WARNING if sign == FINE and beaten else sign, _conclusion(record.proof)
    done = "Converted" if record.action == "convert" else "Recalibrated"
    return UNMEASURED, f"{done}. Nothing was scored, so the gain is not known."


def _model(record: RepairRecord) -> str:
    """What the command made, as a sentence names it."""
    return "the recalibrated model" if record.action == "recalibrate" else "the repaired model"


def worse_than_as_is(record: RepairRecord) -> str:
    """That the weights lose against those as loaded, by how much, and what to do; for records where they do."""
    proof = record.proof
    assert proof is not None  # else nothing was compared
    data = count(proof.images_proving, f"{proof.scored_on} sample")
    trained = _arm(proof, proof.repaired).trained
    force = "" if record.weights else f" {'--resume --force' if trained else '--force'} writes the others all the same."
    training = "" if trained or record.action == "recalibrate" else " Training may help (--finetune)."
    return (
        f"{_model(record)} scores worse than the model as loaded, {_against(proof, proof.repaired, 'as is')} on {data}."
        f" As loaded is best: keep those weights.{training}{force}"
    )


def _below_recalibrated(proof: Proof) -> str:
    """That recalibration alone is the better remedy, and by how much."""
    training = "" if _arm(proof, proof.repaired).trained else ", or train the repaired model (--finetune)"
    scores = _against(proof, "recalibrated", proof.repaired)
    return f"Recalibrating alone is better, {scores}: use bnprobe recalibrate{training}."


def _below_converted(proof: Proof) -> str:
    """That the conversion without training is the better remedy, and by how much."""
    scores = _against(proof, f"{proof.repaired} untrained", proof.repaired)
    return f"The conversion without training is better, {scores}: leave out --finetune."


def _arm(proof: Proof, name: str) -> Arm:
    return next(arm for arm in proof.arms if arm.name == name)


def _against(proof: Proof, one: str, other: str) -> str:
    """The scores of an arm against those of another, e.g. "metric 0.51 against 0.98 and loss 1.2 against 0.1"."""
    judges = ("metric", "loss") if proof.measure == "metric" else ("loss",)
    pairs = [(name, getattr(_arm(proof, one), name), getattr(_arm(proof, other), name)) for name in judges]
    return " and ".join(
        f"{name} {_scored(left)} against {_scored(right)}" for name, left, right in pairs if left or right
    )


def _scored(value: Estimate | None) -> str:
    return "not finite" if value is None else figures.score(value.mean)


def flags(record: RepairRecord, after: Report | None) -> list[str]:
    """Flagged layers before and after; of layers that the later scan did not measure no number is given."""
    before, found = record.flagged_before, record.flagged_after
    if before is None:
        return [] if found is None else [f"Flagged layers: {found}."]
    if after is None:
        return [f"Flagged layers: {before} before; {_model(record)} was not scanned."]
    measured = {layer.name for layer in after.layers}
    if found is not None and all(name in measured for name in replaced(record)):
        return [f"Flagged layers: {before} {ARROW} {found}."]
    why = "a scan cannot measure the converted ones"
    if found is not None:
        why = "the converted ones give the same output in training and at inference by construction"
    others = f"{after.summary.flagged or 'none'} of the {count(len(measured), 'layer')} measured after"
    return [f"Flagged layers: {before} before, {others}; {why}."]


def _telling(text: str, value: float, held: bool) -> str:
    """The fewest digits, from four on, that show on which side of the limit the value is."""
    try:
        holds = parse_requirement(text).holds
    except UsageError:  # a record written by hand
        return figures.plain(value)
    digits = 4
    while holds(float(f"{value:.{digits}g}")) != held and digits < _MOST_DIGITS and math.isfinite(value):
        digits += 1
    return f"{value:.{digits}g}"


# --- The repaired model and its baselines -----------------------------------------------------------------------------

WRITTEN, BASELINE = ARROW, "b"
"""What marks the arm whose weights are written, and the one that it is compared with."""

_SIGNS: dict[Conclusion, str] = {
    "better": FINE,
    "same": WARNING,
    "worse": FLAGGED,
    "undecided": UNDECIDED,
    "not_compared": UNMEASURED,
}

_ENDINGS: dict[Ending, str] = {"finished": "finished", "early_stop": "early stop", "diverged": "diverged"}
_MOST_NOTES = 3

_TRAINED_BASELINE = "plain BN fine-tuned the same way"
_UNTRAINED = {"as is": "the model as it is", "recalibrated": "the recalibrated model"}
"""Arms that are no repairs of their own, in a sentence."""


def _proof(found: Proof, page: Page, show_all: bool) -> list[Text]:
    """The table of arms, how to read it, and what is to be known of single runs."""
    return [
        *page.heading(comparison(found)),
        *_table(found, page),
        *_legend(found, page),
        *page.paragraphs(clipped(found)),
        *_diverged(found.arms, page, show_all),
        *page.paragraphs(gain(found)),
    ]


def comparison(found: Proof) -> str:
    """What the arms were scored on, and what their intervals are."""
    seeds = max(len(arm.runs) for arm in found.arms)
    interval = f": mean and 95% interval of {seeds} seeds" if seeds > 1 else ""
    which = f" ({found.which})" if found.which else ""
    return f"Comparison on {count(found.images_proving, f'{found.scored_on} sample')}{which}{interval}"


def _conclusion(found: Proof) -> str:
    """The verdict in a sentence."""
    repaired = _UNTRAINED.get(found.repaired, found.repaired)
    if found.is_recalibration:
        return (
            f"At inference {repaired} is the recalibrated model: what it gains is recalibration's. The conversion"
            " changes training only."
        )
    if found.control is None:
        return f"{_capitalized(repaired)}: scored, but not compared with a baseline."
    trained = any(arm.name == found.control and arm.trained for arm in found.arms)
    baseline = _TRAINED_BASELINE if trained else _UNTRAINED.get(found.control, found.control)
    return {
        "better": f"{_capitalized(repaired)} is better than {baseline}.",
        "same": f"No significant gain (95%) of {repaired} over {baseline}.",
        "worse": f"{_capitalized(repaired)} is worse than {baseline}.",
        "undecided": f"Whether {repaired} is better than {baseline} is not decided.",
        "not_compared": f"{_capitalized(repaired)} could not be compared with {baseline}.",
    }[found.conclusion]


_SINGLE_PRECISION = 1e-6
"""The relative difference of two scores that is rounding of the values they are means of."""


def gain(found: Proof) -> list[str]:
    """What the repair gained over its baseline, a sentence; nothing where that is not known."""
    gained, control = (found.over_as_is, "as is") if found.is_recalibration else (found.gain, found.control)
    if gained is None or control is None:
        return []
    runs = len(next(arm for arm in found.arms if arm.name == found.repaired).runs)
    paired = f"95%, paired over {runs} seeds" if runs > 1 else f"95%, paired over the {found.scored_on} data"
    how = paired if gained.interval is not None else "no interval"
    value = "0, to rounding" if _is_rounding(gained, found) else figures.estimate(gained, with_sign=True)
    return [f"Gain over {control} in the {found.measure}: {value} (positive: better; {how})."]


def _is_rounding(gained: Estimate, found: Proof) -> bool:
    """Whether a gain, with its interval, is below what numbers of single precision tell apart."""
    scores = [score.mean for arm in found.arms if (score := getattr(arm, found.measure)) is not None]
    ends = (gained.mean, *(end for end in gained.interval or () if end is not None))
    return max(map(abs, ends)) < _SINGLE_PRECISION * max(map(abs, scores), default=0.0)


def _table(found: Proof, page: Page) -> list[Text]:
    arms = found.arms
    columns = [
        *_measures(arms, page),
        Column("best step", [span([run.best_step for run in arm.runs]) if arm.trained else "" for arm in arms]),
        Column("steps", [span([run.steps for run in arm.runs]) if arm.trained else "" for arm in arms]),
        Column("ended", [ended(arm.runs) if arm.trained else "" for arm in arms], "left"),
    ]
    names = Names([arm.name for arm in arms], heading="model", marks=[_mark(arm, found) for arm in arms])
    other = "loss" if found.measure == "metric" else "metric"
    kept = [column for column in columns if any(column.cells)]
    # Names are words here, which are not cut.
    return table(names, dropping(kept, ("steps", "best step", "ended", other)), page)


def _measures(arms: Sequence[Arm], page: Page) -> list[Column]:
    """Loss and metric, where any arm has it."""
    columns = (("loss", [arm.loss for arm in arms]), ("metric", [arm.metric for arm in arms]))
    shown = [(heading, values) for heading, values in columns if any(value is not None for value in values)]
    return [Column(heading, figures.estimates(values, page)) for heading, values in shown]


def _mark(arm: Arm, found: Proof) -> Mark:
    if arm.name == found.repaired:
        return Mark(WRITTEN, "bold green" if found.conclusion == "better" else "bold")
    return Mark(BASELINE, "cyan") if arm.name == found.control else Mark()


def span(values: Sequence[int]) -> str:
    """The least and the greatest, e.g. "400–500"."""
    least, greatest = min(values), max(values)
    return f"{least}" if least == greatest else f"{least}{UNMEASURED}{greatest}"


def ended(runs: Sequence[Run]) -> str:
    """How the runs ended; only the odd ones are counted, as in "1 of 5 diverged"."""
    numbers = Counter(run.ending for run in runs)
    if len(numbers) == 1:
        return _ENDINGS[runs[0].ending]
    odd = [f"{number} {_ENDINGS[ending]}" for ending, number in numbers.items() if ending != "finished"]
    return ", ".join(odd)


def _legend(found: Proof, page: Page) -> list[Text]:
    return page.labelled(arms_legend(found), "dim")


def arms_legend(found: Proof) -> list[tuple[str, str]]:
    """How to read the table of arms."""
    control = next((arm for arm in found.arms if arm.name == found.control), None)
    trained = control is not None and control.trained
    compared = "the baseline: plain BN, same data, same steps, same seeds" if trained else "the baseline"
    best = f"the step whose weights were kept, chosen on {count(found.images_choosing, 'other sample')}"
    made = "the recalibrated model" if found.repaired == "recalibrated" else "the repair"
    entries = [(WRITTEN, made), *([(BASELINE, compared)] if control else [])]
    entries += [("best step", best)] if any(arm.trained for arm in found.arms) and found.images_choosing else []
    return entries


def clipped(found: Proof) -> list[str]:
    """How much Batch Renorm clipped in the end."""
    sentences = []
    for arm in found.arms:
        r = [run.clipped_r for run in arm.runs if run.clipped_r is not None]
        d = [run.clipped_d for run in arm.runs if run.clipped_d is not None]
        if r and d:
            means = percent(sum(r) / len(r)), percent(sum(d) / len(d))
            sentences.append(f"{arm.name} clipped {means[0]} of r and {means[1]} of d in the last tenth of its steps.")
    return sentences


def diverged(arms: Sequence[Arm]) -> list[str]:
    """Where and why runs diverged."""
    return [f"{arm.name}, seed {run.seed}: {run.note}" for arm in arms for run in arm.runs if run.note]


def _diverged(arms: Sequence[Arm], page: Page, show_all: bool) -> list[Text]:
    """The first few of these."""
    notes = diverged(arms)
    shown = notes if show_all or len(notes) <= _MOST_NOTES + 1 else notes[:_MOST_NOTES]
    lines = page.paragraphs(shown, rest="    ")
    more = count(len(notes) - len(shown), "more run")
    return lines + (
        page.paragraph(f"and {more}; {page.every} shows all.", first="  ") if len(shown) < len(notes) else []
    )


def _capitalized(text: str) -> str:
    """The first letter of a sentence; a repair's name stays as it is."""
    return text[:1].upper() + text[1:] if text in (_TRAINED_BASELINE, *_UNTRAINED.values()) else text


# --- Using the weights ------------------------------------------------------------------------------------------------

_DIGEST_SHOWN = 16
_INDENT = "  "
_NAMES_WRITTEN_OUT = 3


NOT_WRITTEN = "No weights were written."


def _usage(record: RepairRecord, files: Files, page: Page, whole: bool) -> list[Text]:
    """What was written, and what to do with it; nothing if nothing was written."""
    if record.weights is None:
        return page.paragraph(NOT_WRITTEN)
    lines = [*_written(record, record.weights, files, page)]
    in_python = whole or _must_be_made(record)
    lines += page.paragraph(loading(record) if in_python else _loading(record))
    if in_python:
        lines += [Text(f"    {page.clean(line)}", "bold") for line in python_lines(record, record.weights, files)]
    for why, command in commands(record, record.weights, files):
        lines += [*page.paragraph(why), *page.command(command)]
    return lines


def loading(record: RepairRecord) -> str:
    """Whether the weights load into the user's model, what to change where they do not, and what `python_lines` are."""
    return f"{_loading(record)} In Python:"


def _loading(record: RepairRecord) -> str:
    if not record.tracked:
        return "The weights load strictly into your own model." if record.plan is None else deployment(record.plan)
    places = list(dict.fromkeys(place for place in record.tracked.values() if place))
    where = f" in {', '.join(places)}" if places else ""
    return (
        f"The weights hold running statistics for {count(len(record.tracked), 'layer')} that keep none in your model:"
        f" remove track_running_stats=False{where} (or make it True), and they load. Until then load_state_dict() stops"
        " at unexpected keys (running_mean, running_var, num_batches_tracked); bnprobe's own commands accept the file"
        " as it is (--checkpoint)."
    )


def _written(record: RepairRecord, weights: str, files: Files, page: Page) -> list[Text]:
    inner = Page(page.width - len(_INDENT), page.unicode)
    labelled = inner.labelled(written(record, weights, files))
    return [*page.heading(WRITTEN_FILES), *(Text(_INDENT) + line for line in labelled), Text()]


WRITTEN_FILES = "Written"


def written(record: RepairRecord, weights: str, files: Files) -> list[tuple[str, str]]:
    """The files, each with its label."""
    digest = f" (SHA-256 {record.weights_sha256[:_DIGEST_SHOWN]}...)" if record.weights_sha256 else ""
    return [
        ("weights", f"{weights}{digest}"),
        *([("record", files.record)] if files.record else []),
        *([("scan before", files.before)] if files.before else []),
        *([("scan after", files.after)] if files.after else []),
        *([("log", files.log)] if files.log else []),
    ]


def python_lines(record: RepairRecord, weights: str, files: Files) -> list[str]:
    """Lines that load the weights; a model that does not deploy as it is is converted first."""
    imports = ["from safetensors.torch import load_file"]
    load = [f"weights = load_file({_quoted(weights)})", "model.load_state_dict(weights)"]
    plan = record.plan
    if plan is None or plan.deploys:
        return [*imports, *load]
    settings = settings_of(plan.to, record.settings.get("repair") or {})
    if len(plan.changes) > _NAMES_WRITTEN_OUT and files.record is not None:
        imports = ["import json", "from pathlib import Path", "import bnprobe", *imports]
        opened = f"record = json.loads(Path({_quoted(files.record)}).read_bytes())"
        names = [opened, 'layers = [layer["name"] for layer in record["plan"]["changes"]]']
    else:
        imports = ["import bnprobe", *imports]
        names = [f"layers = [{', '.join(_quoted(change.name) for change in plan.changes)}]"]
    return [
        *imports,
        *names,
        f"model = {conversion_call('layers', plan.to, settings)}",
        *load,
    ]


def _quoted(text: str) -> str:
    """A string of Python."""
    return json.dumps(text, ensure_ascii=False)


def commands(record: RepairRecord, weights: str, files: Files) -> list[tuple[str, str]]:
    """What to do with the weights: why, and the command."""
    found = []
    if files.before and files.after:
        verify = shlex.join(["bnprobe", "verify", files.before, files.after])
        found.append((_why_verify(record), verify))
    carried = chosen_options(record.command or "", EXPORTED)
    export = shlex.join(["bnprobe", "export", _target(record), "--checkpoint", weights, *carried])
    if record.plan is None or record.plan.deploys:
        found.append((f"To export {_model(record)} and check its outputs:", export))
    return found


def _why_verify(record: RepairRecord) -> str:
    """What the comparison of the scans is about, and that it will fail where layers are left that are flagged."""
    left = record.flagged_after
    if left is None:
        return "To compare the two scans (exit code 1, because nothing is known of the converted layers):"
    if not left:
        return "To compare the two scans, as in CI:"
    are = "is" if left == 1 else "are"
    return (
        "To compare the layers of the two scans, not the scores (exit code 1 while a layer is flagged, and"
        f" {left} still {are}):"
    )


def _target(record: RepairRecord) -> str:
    """What the user's command named, e.g. a spec file; else the model."""
    words = shlex.split(record.command) if record.command else []
    after = words[words.index(record.action) + 1 :] if record.action in words else []
    return after[0] if after and not after[0].startswith("-") else record.model
