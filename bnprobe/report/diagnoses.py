"""The end of a scan's report: the verdict, the diagnoses, the rules that found nothing, and the next command."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from bnprobe.numbers import IN_MODE, count, grouped
from bnprobe.records import EXEMPT, Diagnosis, Interval, Layer, Report, Severity, Verdict
from bnprobe.report import figures, next_step
from bnprobe.report.findings import MODEL
from bnprobe.report.further import doing
from bnprobe.report.layers import OUTPUT_CHANGE, on_samples, unmeasured, with_sign, worse_path, worst_first
from bnprobe.report.next_step import NextStep
from bnprobe.report.page import FINE, FLAGGED, SEVERITY_SIGNS, SEVERITY_STYLES, UNDECIDED, UNMEASURED, Page
from bnprobe.rules import RULES, effect, rule_of, title_of
from bnprobe.rules.shares import flagging_limit, flagging_size, noise_threshold

MOST_DIAGNOSES = 5
"""So many diagnoses are shown, the first, unless all are asked for."""

_EXTENT = re.compile(r"(?P<extent>\d+ of \d+ layers?): ")
"""How the message of a diagnosis begins that concerns several layers."""

_CONSEQUENCE = re.compile(r"^(?P<cause>\w+) in (?P<where>.*)$")
"""A consequence: a cause, and how many layers or "the outputs"."""

REMEDY, EXPLAINS = "Remedy:", "Also explains:"
_MOST_NAMES = 4
_MOST_REASONS = 3

# --- The verdict ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closing:
    """What to tell the reader at the end.

    Attributes:
        headline: The result in a sentence.
        sign: What stands before it.
        sentences: What qualifies it.
        step: What to do next.
        worst: Which layers are worst, where no diagnosis names them, a sentence or two.
    """

    headline: str
    sign: str
    sentences: tuple[str, ...]
    step: NextStep
    worst: str = ""


def closing_lines(end: Closing, report: Report, page: Page, show_all: bool) -> list[Text]:
    """The verdict, the diagnoses, the rules that found nothing, and the next command."""
    lines = page.verdict(end.sign, end.headline, [end.worst, *end.sentences])
    lines += findings(report, page, show_all)
    lines += rules(report.verdicts, page, show_all)
    lines += page.paragraph(end.step.why, first="  ")
    return lines + (page.command(end.step.command) if end.step.command is not None else [])


def closing(report: Report, command: str) -> Closing:
    """What to tell the reader at the end."""
    flagged = worst_first(with_sign(report.layers, FLAGGED))
    undecided = worst_first(with_sign(report.layers, UNDECIDED))
    fine = with_sign(report.layers, FINE)
    known = effect.inconsistency(report.summary.gaps, report.summary.chance)
    if flagged and known.main is not None and known.is_no_worse and _worst_severity(report) != "error":
        return _harmless(report, flagged, known.main, command)
    if flagged:
        return _flagged(report, flagged, command)
    if undecided and _worst_severity(report) != "error":
        return _undecided(report, undecided, command)
    return _clean(report, command) if fine or undecided else _nothing(report, command)


def _flagged(report: Report, flagged: list[Layer], command: str) -> Closing:
    undecided = len(with_sign(report.layers, UNDECIDED))
    also = [f"{count(undecided, 'more layer')} {_are(undecided)} undecided."] if undecided else []
    return Closing(
        headline=f"{_share(len(flagged), report)} flagged: training and inference normalize differently.",
        sign=FLAGGED,
        sentences=(*also, *_caveats(report)),
        step=_step(report, command, next_step.batch_size_step(report, command)),
        worst="" if report.diagnoses else _worst(flagged),
    )


def _harmless(report: Report, flagged: list[Layer], change: effect.Change, command: str) -> Closing:
    """Layers beyond their limit that cost neither loss nor metric."""
    return Closing(
        headline=f"{_share(len(flagged), report)} flagged, but {change.words(*effect.STATISTICS)}.",
        sign=SEVERITY_SIGNS["warning"],
        sentences=_caveats(report),
        step=_step(report, command, next_step.keep_step(command)),
        worst="" if report.diagnoses else _worst(flagged),
    )


def _undecided(report: Report, undecided: list[Layer], command: str) -> Closing:
    return Closing(
        headline=f"No layer is flagged, but {_share(len(undecided), report)} undecided.",
        sign=UNDECIDED,
        sentences=(*(_straddling(layer) for layer in undecided[:3]), *_caveats(report)),
        step=_step(report, command, next_step.more_batches_step(report.scan, command), only_errors=True),
    )


def _clean(report: Report, command: str) -> Closing:
    serious = _worst_severity(report)
    if serious is not None:
        return _other_problems(report, serious, command)
    known = effect.inconsistency(report.summary.gaps, report.summary.chance)
    if known.blemish is not None:
        return _worse_but_little(report, known.blemish, command)
    text = _within_limits(with_sign(report.layers, FINE), report)
    return Closing(
        headline=f"So far {text}" if report.scan.partial else text[0].upper() + text[1:],
        sign=FINE,
        sentences=_caveats(report),
        step=_step(report, command, next_step.keep_step(command)),
    )


def _worse_but_little(report: Report, change: effect.Change, command: str) -> Closing:
    """Too little, or on too few batches, for a finding of its own; but that is not clean."""
    return Closing(
        headline=f"No layer is flagged, but {change.words(*effect.STATISTICS)}.",
        sign=UNDECIDED,
        sentences=_caveats(report),
        step=_step(report, command, next_step.keep_step(command)),
    )


def _within_limits(fine: list[Layer], report: Report) -> str:
    """How good the layers are; one may be below its threshold where much of that is noise of batches."""
    every = len(fine) == len(report.layers)
    which = "every layer" if every else f"{len(fine)} of {count(len(report.layers), 'layer')}"
    single = every or len(fine) == 1
    worst = worst_first(fine)[0]
    if _values(worst) < worst.threshold:
        smallest = figures.path_equivalent(worse_path(worst.train, worst.eval))
        return (
            f"{which} {'is' if single else 'are'} within {'its' if single else 'their'} limit; the smallest n_eq is"
            f" {smallest}, in {worst.name}, whose limit is {_limit_in_words(worst)}."
        )
    limits = {layer.threshold for layer in fine}
    limit = f"{figures.plain(limits.pop())} values" if len(limits) == 1 else "its limit"
    modes = {mode for layer in fine for mode in ([layer.only_in] if layer.only_in else IN_MODE)}
    where = " and ".join(words for mode, words in IN_MODE.items() if mode in modes)
    return f"{which} {'behaves' if single else 'behave'} as if the batch were at least {limit}, {where}."


def _values(layer: Layer) -> float:
    """n_eq in the worse mode."""
    path = worse_path(layer.train, layer.eval)
    return math.inf if path is None or path.equivalent_batch_size is None else path.equivalent_batch_size


def _other_problems(report: Report, serious: Severity, command: str) -> Closing:
    undecided = len(with_sign(report.layers, UNDECIDED))
    so_far = "So far no" if report.scan.partial else "No"
    change = effect.inconsistency(report.summary.gaps, report.summary.chance)
    worse = change.main if change.is_worse else None
    found = _problems(report) if worse is None else worse.words(*effect.STATISTICS)
    return Closing(
        headline=f"{so_far} layer is flagged for its mismatch, but {found}.",
        sign=SEVERITY_SIGNS[serious],
        sentences=(
            *([f"{count(undecided, 'layer')} {_are(undecided)} undecided."] if undecided else []),
            *_caveats(report),
        ),
        step=_step(report, command, next_step.keep_step(command)),
    )


def _problems(report: Report) -> str:
    number = sum(diagnosis.severity != "info" for diagnosis in report.diagnoses)
    return f"{count(number, 'problem')} {'was' if number == 1 else 'were'} found"


def _step(report: Report, command: str, otherwise: NextStep, only_errors: bool = False) -> NextStep:
    """Finish what was cut short, then follow the diagnosis, unless it is a remark that concerns no flagged layer."""
    serious = _worst_severity(report)
    said = report.diagnoses[0].layers if report.diagnoses else ()
    followed = serious == "error" or (serious == "warning" and not only_errors)
    followed = followed or any(layer.flagged and layer.name in said for layer in report.layers)
    return next_step.interrupted_step(report, command) or (
        next_step.diagnosed_step(report, command) if followed else otherwise
    )


def _worst_severity(report: Report) -> Severity | None:
    """The worst severity of the diagnoses; None if there are none, or remarks only."""
    found = {diagnosis.severity for diagnosis in report.diagnoses}
    return "error" if "error" in found else "warning" if "warning" in found else None


def _nothing(report: Report, command: str) -> Closing:
    serious = _worst_severity(report)
    found = "" if serious is None else f", but {_problems(report)}"
    named = any(diagnosis.layers for diagnosis in report.diagnoses)
    judged = "compared in training and at inference" if named else "judged"
    return Closing(
        headline=f"No layer could be {judged}{found}.",
        sign=UNMEASURED if serious is None else SEVERITY_SIGNS[serious],
        sentences=(*_caveats(report), *_far_unscored(report)),
        step=_step(report, command, NextStep("The notes above say why.")),
    )


def _far_unscored(report: Report) -> Iterator[str]:
    """That statistics which training leaves as they are do not fit the data, where nothing says what that costs."""
    far = [layer for layer in report.layers if layer.train is None and _is_far(layer)]
    if not far or report.summary.gaps or report.scan.synthetic:
        return
    worst = max(far, key=lambda layer: layer.eval.mismatch if layer.eval else 0.0)
    assert worst.eval is not None
    yield (
        f"The running statistics of {count(len(far), 'layer')} do not fit the data, worst {worst.name} with D ="
        f" {figures.mismatch(worst.eval.mismatch)}. What that costs is not known: give a loss or metric, and held-out"
        " data, to try recalibrated ones."
    )


def _is_far(layer: Layer) -> bool:
    return layer.eval is not None and layer.eval.interval[0] > flagging_limit(layer)


def _share(number: int, report: Report) -> str:
    return f"{number} of {count(len(report.layers), 'layer')} {_are(number)}"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _worst(flagged: list[Layer]) -> str:
    first = flagged[0]
    others = [
        f"{layer.name} (n_eq {figures.path_equivalent(worse_path(layer.train, layer.eval))})" for layer in flagged[1:3]
    ]
    tail = f" Next worst: {', '.join(others)}." if others else ""
    if first.only_in is None and (first.train is None or first.eval is None):
        mode = IN_MODE["train" if first.train is None else "eval"]
        return f"Worst is {first.name}, which could not be measured {mode}.{tail}"
    mode = IN_MODE["train" if worse_path(first.train, first.eval) is first.train else "eval"]
    return f"Worst is {first.name}: {mode} it {_behaviour(first)}.{tail}"


def _behaviour(layer: Layer) -> str:
    path = worse_path(layer.train, layer.eval)
    if path is not None and path.mismatch >= 2:
        return f"differs more than small batches can explain, D = {figures.mismatch(path.mismatch)}"
    limit = flagging_size(layer)
    size = UNMEASURED if path is None else figures.below(path.equivalent_batch_size, limit)
    return f"behaves as if the batch were {size} values, and its limit is {_limit_in_words(layer)}"


def _limit_in_words(layer: Layer) -> str:
    """The n_eq below which the layer is flagged, and where that lies."""
    noise = noise_threshold(layer.threshold)
    if noise == layer.threshold or layer.shares is None:
        return figures.plain(flagging_size(layer))
    ends = f"{figures.plain(noise)} for noise of batches and {figures.plain(layer.threshold)} for all else"
    return f"{flagging_size(layer):.3g}, between {ends}"


def _straddling(layer: Layer) -> str:
    for limit, words in (
        (flagging_size(layer), _limit_in_words(layer)),
        (layer.threshold, figures.plain(layer.threshold)),
    ):
        for mode, path in (("train", layer.train), ("eval", layer.eval)):
            if path is not None and _contains(path.equivalent_batch_size_interval, limit):
                span = figures.equivalent_interval(path.equivalent_batch_size_interval)
                return f"{layer.name}: n_eq {IN_MODE[mode]} is {span} (95%), and its limit is {words}."
    return f"{layer.name} is undecided."


def _contains(interval: Interval, value: float) -> bool:
    low, high = interval
    return low <= value and (high is None or value <= high)


def _caveats(report: Report) -> tuple[str, ...]:
    frozen, others = unmeasured(report.layers)
    both = "both modes use the running statistics"
    scan = report.scan
    caveats = (
        (
            scan.partial,
            f"{scan.stopped.capitalize()} after {count(scan.batches, 'micro-batch')}: what was to follow is missing.",
        ),
        (frozen > 0, f"{count(frozen, 'layer')} {_are(frozen)} frozen: {both}."),
        (others > 0, f"{count(others, 'layer')} could not be measured in both modes."),
        *_in_one_mode(report),
        (bool(report.skipped), f"{count(len(report.skipped), 'layer')} skipped."),
        (scan.synthetic, "The inputs were generated: this shows structure and batch noise, not your data (exit 0)."),
    )
    return tuple(text for applies, text in caveats if applies)


def _in_one_mode(report: Report) -> Iterator[tuple[bool, str]]:
    """How many layers the model runs in one mode only."""
    for mode, where in IN_MODE.items():
        number = sum(layer.only_in == mode for layer in report.layers)
        yield number > 0, f"{count(number, 'layer')} {'runs' if number == 1 else 'run'} {where} only."


# --- The diagnoses ----------------------------------------------------------------------------------------------------


def findings(report: Report, page: Page, show_all: bool) -> list[Text]:
    """The diagnoses in their order, each with its evidence, remedy and consequences."""
    shown = report.diagnoses if show_all else report.diagnoses[:MOST_DIAGNOSES]
    numbered = len(report.diagnoses) > 1
    lines: list[Text] = []
    for number, finding in enumerate(findings_in_words(shown, report, show_all), start=1):
        lines += [Text(), *finding_lines(finding, f"{number} " if numbered else "", page)]
    left_out = len(report.diagnoses) - len(shown)
    if left_out:
        lines += [Text(), *page.paragraph(f"and {left_out} more; --all shows all.", first="  ")]
    if text := output_change(shown, report):
        lines += [Text(), *page.paragraph(text, "dim", first="  ")]
    return [*lines, Text()] if lines else []


@dataclass(frozen=True)
class Finding:
    """A diagnosis in words; what there is nothing to say about is empty.

    Attributes:
        severity: Of the diagnosis.
        rule: Code of the rule that found it.
        title: What is wrong, in how many layers, and what that does to the output.
        where: The layers, and where they are made.
        message: How that is known.
        remedy: What to do first.
        measured: What was measured of remedies.
        explains: What follows from it.
    """

    severity: Severity
    rule: str
    title: str
    where: str
    message: str
    remedy: str
    measured: str
    explains: str


def findings_in_words(diagnoses: Sequence[Diagnosis], report: Report, show_all: bool) -> list[Finding]:
    """The diagnoses of a report, in their order."""
    found: list[Finding] = []
    told: set[tuple[str, str]] = set()
    for diagnosis in diagnoses:
        # What was measured of a remedy holds for the model, and is said where it is first named.
        measured = [gain for gain in _gains(diagnosis, report) if gain not in told]
        told.update(measured)
        extent, message = _apart(diagnosis, len(report.layers))
        found.append(
            Finding(
                diagnosis.severity,
                diagnosis.rule,
                title=_title(diagnosis, extent),
                where=_where(diagnosis, report, show_all),
                message=message,
                remedy=diagnosis.remedy,
                measured=_in_sentences(measured),
                explains=consequences(diagnosis, report.verdicts, report.diagnoses),
            )
        )
    return found


def output_change(diagnoses: Sequence[Diagnosis], report: Report) -> str:
    """What the change of the output in the titles is; empty if none has one."""
    if all(diagnosis.impact is None for diagnosis in diagnoses):
        return ""
    where = f"these layers use batch statistics{on_samples(report)}"
    return f"Output change: {OUTPUT_CHANGE} {where}; where there are several causes, this one's part of it."


def rules(verdicts: Sequence[Verdict], page: Page, show_all: bool) -> list[Text]:
    """How many rules passed, and which were skipped and why."""
    failed, passed, skipped = _by_outcome(verdicts)
    parts = []
    if passed:
        parts.append(count(len(passed), "rule") + " passed" + (f" ({', '.join(passed)})" if show_all else ""))
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
            layers.add(verdict.layer or MODEL)
            codes.add(verdict.rule)
    return [
        f"Exempt: {', '.join(sorted(layers)[:_MOST_NAMES])}{' and more' if len(layers) > _MOST_NAMES else ''} from"
        f" {', '.join(sorted(codes)[:_MOST_NAMES])}{' and more' if len(codes) > _MOST_NAMES else ''} ({reason})."
        for reason, (layers, codes) in groups.items()
    ]


def finding_lines(found: Finding, number: str, page: Page) -> list[Text]:
    """A finding on the page, after its number."""
    start = f"  {page.clean(SEVERITY_SIGNS[found.severity])} {number}"
    title = page.paragraph(found.title, style="bold", first=start)
    title[0].stylize(SEVERITY_STYLES[found.severity], 2, len(start))
    indent = " " * len(start)
    where = page.paragraph(found.where, "dim", first=indent)
    said = page.paragraph(found.message, first=indent)
    remedy = page.paragraph(f"{REMEDY} {found.remedy}", first=indent) if found.remedy else []
    for line in remedy[:1]:
        line.stylize("bold", len(indent), len(indent) + len(REMEDY))
    gains = page.paragraph(found.measured, first=indent)
    also = page.paragraph(f"{EXPLAINS} {found.explains}." if found.explains else "", first=indent)
    return [*title, *(line for line in [*where, *said, *remedy, *gains, *also] if line.plain.strip())]


def _gains(diagnosis: Diagnosis, report: Report) -> list[tuple[str, str]]:
    """What the remedies without training gave that fit the cause: the samples, and a clause."""
    rule = rule_of(diagnosis.rule)
    if rule is None:
        return []
    clauses = []
    advised = effect.advised(report.remedies, report.summary.gaps, report.summary.chance)
    for name in (rule.free_remedy, *rule.also_tried):
        tried = effect.tried(report.remedies, name)
        if tried is None or (name in effect.ADVISED and tried is not advised):
            continue
        found = effect.of_remedy(tried, report.summary.gaps, report.summary.chance)
        if found.changes and (name == rule.free_remedy or found.standing == "better"):
            alone = " alone" if name == "recalibrated" and "recalibrat" not in diagnosis.remedy.lower() else ""
            data = count(tried.images, f"{tried.scored_on} {report.scan.sample}")
            clauses.append((data, f"{doing(tried.name).lower()}{alone} {_takes(found)}"))
    return clauses


def _in_sentences(measured: Sequence[tuple[str, str]]) -> str:
    """A sentence for each set of samples."""
    return " ".join(f"Measured on {data}: {'; '.join(clauses)}." for data, clauses in grouped(measured).items())


def _takes(found: effect.Effect) -> str:
    """What a remedy does, by the measure that decides; by all where none does, and one says more than another.

    The loss is never told alone where a metric was measured, too.
    """
    main, undecided = found.main, found.standing in ("same", "unclear")
    by_loss = main is not None and main.measure == "loss" and len(found.changes) > 1
    if main is None or by_loss or (undecided and len(set(map(_how_surely, found.changes))) > 1):
        moved = [f"{_from_to(each)} ({_how_surely(each)})" for each in found.changes if not _stays(each)]
        stay = [f"leaves the {each.measure} at {figures.score(each.before)}" for each in found.changes if _stays(each)]
        return " and ".join([*([f"takes {' and '.join(moved)}"] if moved else []), *stay])
    if _stays(main):
        return f"leaves the {main.measure} at {figures.score(main.before)}"
    helps = {"not surely": ", which does not surely help", "surely, but by little": ", surely, but by little"}
    return f"takes {_from_to(main)}{helps.get(_how_surely(main), '')}"


def _stays(change: effect.Change) -> bool:
    return figures.score(change.before) == figures.score(change.after)


def _from_to(change: effect.Change) -> str:
    return f"the {change.measure} from {figures.score(change.before)} to {figures.score(change.after)}"


def _how_surely(change: effect.Change) -> str:
    """Whether a change is significant, and enough to count."""
    if change.standing in ("better", "worse"):
        return "surely"
    return "surely, but by little" if effect.excludes_zero(change.interval) else "not surely"


def _title(diagnosis: Diagnosis, extent: str) -> str:
    parts = [f"{_capitalized(title_of(diagnosis.rule, diagnosis.cause))} ({diagnosis.rule}): {extent}"]
    if diagnosis.impact is not None:
        parts.append(f"output change {figures.relative(diagnosis.impact)}")
    return ", ".join(parts)


def _apart(diagnosis: Diagnosis, layers: int) -> tuple[str, str]:
    """How many layers it concerns, for the title; and the message without that and without a single layer's name."""
    message = diagnosis.message
    if said := _EXTENT.match(message):
        return said["extent"], _capitalized(message[said.end() :])
    if len(diagnosis.layers) == 1:
        message = _capitalized(message.removeprefix(f"{diagnosis.layers[0]}: "))
    return _extent(diagnosis, layers), message


def consequences(diagnosis: Diagnosis, verdicts: Sequence[Verdict] = (), diagnoses: Sequence[Diagnosis] = ()) -> str:
    """What follows from it, by the titles of the rules that found it.

    Args:
        diagnosis: Whose consequences.
        verdicts: Of all rules; with them a lone layer is named.
        diagnoses: All of them: what has a diagnosis of its own is no consequence.
    """

    def in_words(said: re.Match[str]) -> str:
        title = next((rule.title for rule in RULES if rule.cause == said["cause"]), said["cause"].replace("_", " "))
        if said["where"] == "the outputs":
            return title
        own = {layer for other in diagnoses if other.cause == said["cause"] for layer in other.layers}
        found = [
            verdict.layer for verdict in verdicts if verdict.cause == said["cause"] and verdict.outcome == "failed"
        ]
        left = [layer for layer in found if layer is not None and layer not in own]
        return f"{title} ({left[0] if said['where'] == '1 layer' and len(left) == 1 else said['where']})"

    return "; ".join(_CONSEQUENCE.sub(in_words, text) for text in diagnosis.consequences)


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _extent(diagnosis: Diagnosis, layers: int) -> str:
    number = len(diagnosis.layers)
    if not number:
        return "the whole model"
    return f"all {count(layers, 'layer')}" if number == layers > 1 else f"{number} of {count(layers, 'layer')}"


def _where(diagnosis: Diagnosis, report: Report, show_all: bool) -> str:
    names = diagnosis.layers if show_all else diagnosis.layers[:_MOST_NAMES]
    listed = ", ".join(names)
    more = f" and {len(diagnosis.layers) - len(names)} more" if len(names) < len(diagnosis.layers) else ""
    places = _places(diagnosis, report)
    others = f" and {count(len(places) - 1, 'more line')}" if len(places) > 1 else ""
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
        # What to do about it, after a colon, and details in parentheses are for those who ask.
        why = reason if show_all else reason.partition(":")[0].partition(" (")[0]
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
            text = f"{verdict.rule} {verdict.layer or 'the model'}: {verdict.message}{value_in_words(verdict)}"
            lines += page.paragraph(text, first="  ", rest="    ")
    return lines


def value_in_words(verdict: Verdict) -> str:
    """What a rule measured, against its limit, in parentheses; empty if it measured nothing."""
    if verdict.value is None:
        return ""
    what = f"{verdict.unit}: " if verdict.unit else ""
    against = f", limit {figures.plain(verdict.limit)}" if verdict.limit is not None else ""
    return f" ({what}{figures.plain(verdict.value)}{against})"
