"""Diagnoses in words: what is wrong, where, what it does and what to do; and the rules that found nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.text import Text

from bnprobe.records import EXEMPT, Diagnosis, Layer, Report, Verdict
from bnprobe.reports import figures
from bnprobe.reports.causes import SEVERITY_STYLES, SIGNS
from bnprobe.reports.layout import Page
from bnprobe.reports.whatif import doing
from bnprobe.rules import rule_of, title_of

MOST_DIAGNOSES = 5
"""So many diagnoses are shown, the first, unless all are asked for."""

_EXTENT = re.compile(r"(?P<extent>\d+ of \d+ layers?): ")

_CAUSE = re.compile(r"^\w+(?= in )")

_REMEDY = "Remedy:"
_MOST_NAMES = 4
_NAME_WIDTH = 32
_MOST_REASONS = 3


def findings(report: Report, page: Page, show_all: bool) -> list[Text]:
    """The diagnoses in their order, each with its evidence, remedy and consequences."""
    shown = report.diagnoses if show_all else report.diagnoses[:MOST_DIAGNOSES]
    numbered = len(report.diagnoses) > 1
    lines: list[Text] = []
    for number, diagnosis in enumerate(shown, start=1):
        lines += [Text(), *_diagnosis(diagnosis, f"{number} " if numbered else "", report, page, show_all)]
    left_out = len(report.diagnoses) - len(shown)
    if left_out:
        lines += [Text(), *page.paragraph(f"and {left_out} more; --all shows every one.", first="  ")]
    return [*lines, Text()] if lines else []


def rules(verdicts: Sequence[Verdict], page: Page, show_all: bool) -> list[Text]:
    """How many rules passed, and which were skipped and why."""
    failed, passed, skipped = _by_outcome(verdicts)
    parts = []
    if passed:
        parts.append(figures.count(len(passed), "rule") + " passed" + (f" ({', '.join(passed)})" if show_all else ""))
    if skipped:
        parts.append(f"{len(skipped)} skipped: {_reasons(skipped, show_all)}")
    text = ", ".join(parts)
    noun = "" if passed else "rules "
    lines = page.paragraph(noun + text + ".", first="  ", style="dim") if text else []
    lines += [line for text in _exempted(verdicts) for line in page.paragraph(text, first="  ", style="dim")]
    return [*_failed(verdicts, page), *lines] if show_all and failed else lines


def _exempted(verdicts: Sequence[Verdict]) -> list[str]:
    """Which layers the user exempts from which rules, by reason."""
    groups: dict[str, tuple[set[str], set[str]]] = {}
    for verdict in verdicts:
        if verdict.message.startswith(EXEMPT) and verdict.reason is not None:
            layers, codes = groups.setdefault(verdict.reason, (set(), set()))
            layers.add(verdict.layer or "the model")
            codes.add(verdict.rule)
    return [
        f"Exempt: {', '.join(sorted(layers)[:_MOST_NAMES])}{' and more' if len(layers) > _MOST_NAMES else ''} from"
        f" {', '.join(sorted(codes)[:_MOST_NAMES])}{' and more' if len(codes) > _MOST_NAMES else ''} ({reason})."
        for reason, (layers, codes) in groups.items()
    ]


def _diagnosis(diagnosis: Diagnosis, number: str, report: Report, page: Page, show_all: bool) -> list[Text]:
    start = f"  {page.clean(SIGNS[diagnosis.severity])} {number}"
    extent, message = _apart(diagnosis, len(report.layers))
    title = page.paragraph(_title(diagnosis, extent), style="bold", first=start)
    title[0].stylize(SEVERITY_STYLES[diagnosis.severity], 2, len(start))
    indent = " " * len(start)
    where = page.paragraph(_where(diagnosis, report, page, show_all), "dim", first=indent)
    said = page.paragraph(message, first=indent)
    remedy = page.paragraph(f"{_REMEDY} {diagnosis.remedy}", first=indent) if diagnosis.remedy else []
    for line in remedy[:1]:
        line.stylize("bold", len(indent), len(indent) + len(_REMEDY))
    measured = page.paragraph(_free_remedy(diagnosis, report), first=indent)
    consequences = page.paragraph(_consequences(diagnosis), first=indent)
    return [*title, *(line for line in [*where, *said, *remedy, *measured, *consequences] if line.plain.strip())]


def _free_remedy(diagnosis: Diagnosis, report: Report) -> str:
    """What the remedy without training gave that fits the cause."""
    rule = rule_of(diagnosis.rule)
    tried = next((remedy for remedy in report.remedies if rule is not None and remedy.name == rule.free_remedy), None)
    if tried is None:
        return ""
    for name, before, after in (
        ("loss", tried.before.loss, tried.after.loss),
        ("metric", tried.before.metric, tried.after.metric),
    ):
        if before is not None and after is not None:
            change = f"takes the {name} from {figures.score(before)} to {figures.score(after)}"
            return f"Measured on held-out data: {doing(tried.name).lower()} {change}."
    return ""


def _title(diagnosis: Diagnosis, extent: str) -> str:
    parts = [f"{_capitalized(title_of(diagnosis.rule, diagnosis.cause))} ({diagnosis.rule}): {extent}"]
    if diagnosis.impact is not None:
        parts.append(f"moves the outputs by {figures.relative(diagnosis.impact)}")
    return ", ".join(parts)


def _apart(diagnosis: Diagnosis, layers: int) -> tuple[str, str]:
    """How many layers it concerns, for the title, and the message without that and without a lone layer's name."""
    message = diagnosis.message
    if said := _EXTENT.match(message):
        return said["extent"], _capitalized(message[said.end() :])
    if len(diagnosis.layers) == 1:
        message = _capitalized(message.removeprefix(f"{diagnosis.layers[0]}: "))
    return _extent(diagnosis, layers), message


def _consequences(diagnosis: Diagnosis) -> str:
    """What follows from it; a cause is put in words, as it is nowhere else a code."""
    listed = "; ".join(_CAUSE.sub(lambda said: said[0].replace("_", " "), text) for text in diagnosis.consequences)
    return f"Comes with it: {listed}." if listed else ""


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _extent(diagnosis: Diagnosis, layers: int) -> str:
    number = len(diagnosis.layers)
    if not number:
        return "the whole model"
    return (
        f"all {figures.count(layers, 'layer')}"
        if number == layers > 1
        else f"{number} of {figures.count(layers, 'layer')}"
    )


def _where(diagnosis: Diagnosis, report: Report, page: Page, show_all: bool) -> str:
    names = diagnosis.layers if show_all else diagnosis.layers[:_MOST_NAMES]
    listed = ", ".join(names if show_all else page.shorten(names, _NAME_WIDTH)) if names else ""
    more = f" and {len(diagnosis.layers) - len(names)} more" if len(names) < len(diagnosis.layers) else ""
    places = _places(diagnosis, report)
    others = f" and {figures.count(len(places) - 1, 'more line')}" if len(places) > 1 else ""
    place = f"{'; ' if listed else ''}{', '.join(places) if show_all else places[0] + others}" if places else ""
    return listed + more + place


def _places(diagnosis: Diagnosis, report: Report) -> list[str]:
    """Where the layers were made, each place once, in the layers' order."""
    layers: dict[str, Layer] = {layer.name: layer for layer in report.layers}
    found = [layers[name].location for name in diagnosis.layers if name in layers]
    said = [
        verdict.location
        for verdict in report.verdicts
        if verdict.rule == diagnosis.rule and verdict.outcome == "failed"
    ]
    return list(dict.fromkeys(place for place in [*said, *found] if place))


def _by_outcome(verdicts: Sequence[Verdict]) -> tuple[list[str], list[str], dict[str, str]]:
    """Codes of the rules that failed, of those that passed and never failed, and of the skipped with the reason."""
    failed = sorted({verdict.rule for verdict in verdicts if verdict.outcome == "failed"})
    passed = sorted({verdict.rule for verdict in verdicts if verdict.outcome == "passed"} - set(failed))
    skipped = {
        verdict.rule: verdict.reason or ""
        for verdict in sorted(verdicts, key=lambda verdict: verdict.rule)
        if verdict.outcome == "skipped" and verdict.rule not in {*failed, *passed}
    }
    return failed, passed, skipped


def _reasons(skipped: dict[str, str], show_all: bool) -> str:
    """The skipped rules, those of one reason together."""
    groups: dict[str, list[str]] = {}
    for rule, reason in skipped.items():
        # What to do about it, after a colon, is for those who ask.
        why = reason if show_all else reason.partition(":")[0]
        groups.setdefault(why.removesuffix("."), []).append(rule)
    texts = [_because(codes, reason) for reason, codes in groups.items()]
    shown = texts if show_all else texts[:_MOST_REASONS]
    more = "; and more (--all)" if len(shown) < len(texts) else ""
    return "; ".join(shown) + more


def _because(codes: Sequence[str], reason: str) -> str:
    listed = " and ".join(filter(None, [", ".join(codes[:-1]), codes[-1]]))
    if reason.startswith("needs "):
        return f"{listed} {reason if len(codes) == 1 else 'need ' + reason.removeprefix('needs ')}"
    return f"{listed}: {reason}" if reason else listed


def _failed(verdicts: Sequence[Verdict], page: Page) -> list[Text]:
    """Every verdict that failed, and every layer that a rule left out, for those who want it layer by layer."""
    lines = page.heading("Every finding")
    for verdict in verdicts:
        if verdict.outcome == "failed" or (verdict.outcome == "skipped" and verdict.layer is not None):
            text = f"{verdict.rule} {verdict.layer or 'the model'}: {verdict.message}{_measured(verdict)}"
            lines += page.paragraph(text, first="  ", rest="    ")
    return lines


def _measured(verdict: Verdict) -> str:
    if verdict.value is None:
        return ""
    unit = f" {verdict.unit}" if verdict.unit else ""
    against = f", limit {figures.plain(verdict.limit)}" if verdict.limit is not None else ""
    return f" ({figures.plain(verdict.value)}{unit}{against})"
