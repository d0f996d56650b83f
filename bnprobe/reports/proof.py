"""The arms of a proof side by side, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from bnprobe.records import Arm, Conclusion, Ending, Proof, Run
from bnprobe.reports import estimates, figures, glyphs
from bnprobe.reports.layout import Page
from bnprobe.reports.nametable import Column, Mark, table

WRITTEN, CONTROL = glyphs.ARROW, "c"
"""What marks the arm whose weights are written, and the one that it is held against."""

SIGNS: dict[Conclusion, str] = {
    "better": glyphs.FINE,
    "same": glyphs.WARNING,
    "worse": glyphs.FLAGGED,
    "undecided": glyphs.UNDECIDED,
    "not_compared": glyphs.UNMEASURED,
}

_ENDINGS: dict[Ending, str] = {"finished": "finished", "early_stop": "early stop", "diverged": "diverged"}
_MOST_NOTES = 3

_TRAINED_CONTROL = "plain BN fine-tuned the same way"
_UNTRAINED = {"as is": "the model as it is", "recalibrated": "the recalibrated model"}
"""Arms that are no repairs of their own, in a sentence."""


def proof(found: Proof, page: Page, show_all: bool) -> list[Text]:
    """The table of arms, how to read it, and what is to be known of single runs."""
    seeds = max(len(arm.runs) for arm in found.arms)
    interval = f", mean and 95% interval of {seeds} seeds" if seeds > 1 else ""
    return [
        *page.heading(f"Proof: {figures.count(found.images_proving, 'evaluation image')}{interval}"),
        *_table(found, page),
        *_legend(found, page),
        *_clipping(found, page),
        *_diverged(found.arms, page, show_all),
        *(line for text in _gain(found) for line in page.paragraph(text, first="  ")),
    ]


def conclusion(found: Proof) -> str:
    """The verdict in a sentence."""
    repaired = _UNTRAINED.get(found.repaired, found.repaired)
    if found.control is None:
        return f"{_capitalized(repaired)}: scored, but not held against a control."
    trained = any(arm.name == found.control and arm.trained for arm in found.arms)
    control = _TRAINED_CONTROL if trained else _UNTRAINED.get(found.control, found.control)
    return {
        "better": f"{_capitalized(repaired)} is better than {control}.",
        "same": f"No gain of {repaired} over {control} is shown.",
        "worse": f"{_capitalized(repaired)} is worse than {control}.",
        "undecided": f"Whether {repaired} is better than {control} is not decided.",
        "not_compared": f"{_capitalized(repaired)} could not be compared with {control}.",
    }[found.conclusion]


def _gain(found: Proof) -> list[str]:
    """What the repair gained over its control, a sentence; nothing where that is not known."""
    if found.gain is None or found.control is None:
        return []
    arm = next(arm for arm in found.arms if arm.name == found.repaired)
    paired = f"95%, paired over {len(arm.runs)} seeds" if arm.trained else "95%, paired over the held-out batches"
    how = paired if found.gain.interval is not None else "one run, so no interval"
    value = estimates.estimate(found.gain, signed=True)
    return [f"Gain over {found.control} in the {found.measure}: {value} (+ is better; {how})."]


def _table(found: Proof, page: Page) -> list[Text]:
    arms = found.arms
    ended = [_ended(arm.runs) if arm.trained else "" for arm in arms]
    columns = [
        *_measures(arms, page),
        Column("best step", [_span([run.best_step for run in arm.runs]) if arm.trained else "" for arm in arms]),
        Column("steps", [_span([run.steps for run in arm.runs]) if arm.trained else "" for arm in arms]),
        Column("ended", ended, left=True),
    ]
    other = "loss" if found.measure == "metric" else "metric"
    names, marks = [arm.name for arm in arms], [_mark(arm, found) for arm in arms]
    kept = [column for column in columns if any(column.cells)]
    return table("arm", names, marks, kept, page, expendable=("steps", "best step", "ended", other))


def _measures(arms: Sequence[Arm], page: Page) -> list[Column]:
    """Loss and metric, where any arm has it."""
    columns = (("loss", [arm.loss for arm in arms]), ("metric", [arm.metric for arm in arms]))
    shown = [(heading, values) for heading, values in columns if any(value is not None for value in values)]
    return [Column(heading, estimates.column(values, page)) for heading, values in shown]


def _mark(arm: Arm, found: Proof) -> Mark:
    if arm.name == found.repaired:
        return Mark(WRITTEN, "bold green" if found.conclusion == "better" else "bold")
    return Mark(CONTROL, "cyan") if arm.name == found.control else Mark()


def _span(values: Sequence[int]) -> str:
    """The least and the greatest, e.g. "400–500"."""
    least, greatest = min(values), max(values)
    return f"{least}" if least == greatest else f"{least}{glyphs.UNMEASURED}{greatest}"


def _ended(runs: Sequence[Run]) -> str:
    """How the runs ended; only the odd ones are counted, as in "1 of 5 diverged"."""
    numbers: dict[Ending, int] = {}
    for run in runs:
        numbers[run.ending] = numbers.get(run.ending, 0) + 1
    if len(numbers) == 1:
        return _ENDINGS[runs[0].ending]
    odd = [f"{number} {_ENDINGS[ending]}" for ending, number in numbers.items() if ending != "finished"]
    return ", ".join(odd)


def _legend(found: Proof, page: Page) -> list[Text]:
    control = next((arm for arm in found.arms if arm.name == found.control), None)
    trained = control is not None and control.trained
    held = "its control: plain BN, same data, same steps, same seeds" if trained else "what it is held against"
    best = f"whose weights were kept, chosen on {figures.count(found.images_choosing, 'other image')}"
    entries = [(WRITTEN, "the repair"), *([(CONTROL, held)] if control else [])]
    entries += [("best step", best)] if any(arm.trained for arm in found.arms) and found.images_choosing else []
    lines = page.labelled([(page.clean(label), text) for label, text in entries])
    for line in lines:
        line.stylize("dim")
    return lines


def _clipping(found: Proof, page: Page) -> list[Text]:
    """How much Batch Renorm clipped in the end."""
    sentences = []
    for arm in found.arms:
        r = [run.clipped_r for run in arm.runs if run.clipped_r is not None]
        d = [run.clipped_d for run in arm.runs if run.clipped_d is not None]
        if r and d:
            means = figures.percent(sum(r) / len(r)), figures.percent(sum(d) / len(d))
            sentences.append(f"{arm.name} clipped {means[0]} of r and {means[1]} of d in the last tenth of its steps.")
    return [line for text in sentences for line in page.paragraph(text, first="  ")]


def _diverged(arms: Sequence[Arm], page: Page, show_all: bool) -> list[Text]:
    """Where and why runs diverged, the first few."""
    notes = [f"{arm.name}, seed {run.seed}: {run.note}" for arm in arms for run in arm.runs if run.note]
    shown = notes if show_all or len(notes) <= _MOST_NOTES + 1 else notes[:_MOST_NOTES]
    lines = [line for note in shown for line in page.paragraph(note, first="  ", rest="    ")]
    more = figures.count(len(notes) - len(shown), "more run")
    return lines + (
        page.paragraph(f"and {more}; --all shows every one.", first="  ") if len(shown) < len(notes) else []
    )


def _capitalized(text: str) -> str:
    """The first letter of a sentence; a repair's name stays as it is."""
    return text[:1].upper() + text[1:] if text in (_TRAINED_CONTROL, *_UNTRAINED.values()) else text
