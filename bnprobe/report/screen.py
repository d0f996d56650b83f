"""The report of a scan on one screen: the verdict, the worst layers, why, what to do, and the next command.

What it leaves out is named in a line; ``bnprobe.report.scan`` has the whole report.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from bnprobe.numbers import count, joined, listed
from bnprobe.records import Gap, Layer, Report
from bnprobe.report import charts, figures, further, scan
from bnprobe.report.baseline import known
from bnprobe.report.diagnoses import closing, finding_lines, findings_in_words
from bnprobe.report.layers import has_overflowed, sign_of, worse_path, worst_first
from bnprobe.report.next_step import NextStep, advised_step
from bnprobe.report.page import FLAGGED, UNDECIDED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Mark, TableLayout, fit, layer_names, table
from bnprobe.rules.shares import flagging_size

MOST_LINES = 40
"""Less is shown of findings, layers and notes until the report has no more lines."""

MOST_ROWS = 9
"""So many layers, or stages of layers alike, are shown at most."""

_NEAREST = 3
"""So many layers are shown where none is flagged or undecided."""


@dataclass(frozen=True)
class _Room:
    """How much is shown.

    Attributes:
        layers: Rows of the table of layers.
        told: Findings with their layers, their reason and what was measured of the remedy; at least one.
        named: Further findings, with the remedy alone.
        notes: Notes on the scan and on layers.
        whole: Findings that are told are so in all that is known of them.
    """

    layers: int
    told: int
    named: int
    notes: int
    whole: bool = False


_MUCH_TO_LITTLE = (
    _Room(MOST_ROWS, 3, 3, 3, whole=True),
    _Room(MOST_ROWS, 3, 3, 3),
    _Room(7, 2, 3, 2),
    _Room(7, 1, 4, 2),
    _Room(5, 1, 3, 1),
    _Room(3, 1, 2, 0),
)


def render(report: Report, options: RenderOptions) -> str:
    """The report as text in lines of at most ``options.width`` cells: on a screen, or the whole where it is wanted."""
    if options.verbose or options.show_all:
        return scan.render(report, options)
    page = Page.of(options)
    for room in _MUCH_TO_LITTLE:
        parts = [part for part in _parts(report, page, options.command, room) if part]
        if sum(len(part) + 1 for part in parts) <= MOST_LINES:
            break
    return to_string(parts, options.color)


def _parts(report: Report, page: Page, command: str, room: _Room) -> list[list[Text]]:
    end = closing(report, command)
    steps = next_steps(report, end.step, command)
    notes = [*report.scan.notes, *(f"{', '.join(names)}: {note}" for note, names in _notes(report))]
    return [
        scan.header(report, page, scan.ON_SCREEN),
        page.verdict(end.sign, end.headline, [*end.sentences, *effect_in_words(report)]),
        _layers(report, room.layers, page),
        scan.at_batch_sizes(report.layers, page),
        _findings(report, page, room),
        known(report.baseline, page, show_all=False),
        page.section("Measured besides", _besides(report)),
        page.section("Notes", notes[: room.notes], rest="    "),
        page.paragraph(_left_out(report, len(notes), room, page), "dim"),
        [line for step in steps for line in (*page.paragraph(step.why), *page.command(step.command or ""))],
    ]


def next_steps(report: Report, last: NextStep, command: str) -> list[NextStep]:
    """What was measured to help without training, where that is not the last step anyway, and the last step."""
    advised = advised_step(report, command)
    return [last] if advised is None or advised == last else [advised, last]


# --- The effect on the outputs ----------------------------------------------------------------------------------------


def effect_in_words(report: Report) -> list[str]:
    """Loss and metric in both modes and on held-out data, and how far the outputs are apart."""
    output, gaps = report.summary.output, report.summary.gaps
    apart = scan.output_in_words(replace(output, kl_divergence=None), scores=not gaps)
    return [" ".join(text for text in (_levels(gaps), *apart) if text)]


def _levels(gaps: Sequence[Gap]) -> str:
    """E.g. "Loss 0.003 in training, 2.05 at inference; metric 1 and 0.285."."""
    clauses = []
    for gap in gaps:
        levels = [(gap.training, "in training"), (gap.inference, "at inference"), (gap.held_out, "on held-out data")]
        said = [f"{figures.score(value)} {where}" for value, where in levels if value is not None]
        clauses.append(f"{gap.measure} {', '.join(said)}")
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


# --- The worst layers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A layer, or layers alike that follow each other in the network, as the blocks of a stage do.

    Attributes:
        layers: In network order.
        worst: The one whose figures are shown.
        name: Of the layer; of several a pattern such as "layer3.{0..22}.bn1".
    """

    layers: tuple[Layer, ...]
    worst: Layer
    name: str


_FEWEST_ALIKE = 3
"""So many layers alike are worth a row of their own."""

_ALIKE = 2.0
"""Layers are alike where one mismatch is at most so many times another."""

_NUMBER = re.compile(r"\d+")


def stages(chosen: Sequence[Layer], network: Sequence[Layer]) -> list[Stage]:
    """The layers, those that are alike in one stage: sign, main source, and about the mismatch.

    Args:
        chosen: In network order.
        network: All layers.
    """
    wanted = {layer.name for layer in chosen}
    sizes = Counter(pattern for layer in network for pattern in _patterns(layer.name))
    runs: list[list[Layer]] = []
    latest: dict[_Pattern, list[Layer]] = {}
    for layer in network:
        patterns = _patterns(layer.name)
        own = next((pattern for pattern in patterns if sizes[pattern] >= _FEWEST_ALIKE), (layer.name, ""))
        run = latest.get(own)
        for pattern in patterns:
            latest.pop(pattern, None)  # a run has no gaps
        if layer.name in wanted:
            if run is None or not _are_alike([*run, layer]):
                run = []
                runs.append(run)
            run.append(layer)
            latest[own] = run
    folded = [each for run in runs for each in ([run] if len(run) >= _FEWEST_ALIKE else ([layer] for layer in run))]
    places = {layer.name: place for place, layer in enumerate(network)}
    folded.sort(key=lambda run: places[run[0].name])
    return [Stage(tuple(run), worst_first(run)[0], _spelled(run)) for run in folded]


_Pattern = tuple[str, str]


def _patterns(name: str) -> list[_Pattern]:
    """What is before and after each number in a name: names of one pattern differ in that number alone.

    The likeliest to count blocks come first: "layer3.12.bn1" is block 12 of its stage, and no third bn1 or layer.
    """
    leaf = name.rpartition(".")[2]
    start = len(name) - (0 if leaf.isdecimal() else len(leaf))
    numbers = list(_NUMBER.finditer(name))
    ordered = [
        *(each for each in reversed(numbers) if each.start() < start),
        *(n for n in numbers if n.start() >= start),
    ]
    return [(name[: found.start()], name[found.end() :]) for found in ordered]


def _are_alike(layers: Sequence[Layer]) -> bool:
    kinds = {(sign_of(layer), (charts.largest(layer.shares) or (None,))[0]) for layer in layers}
    paths = [worse_path(layer.train, layer.eval) for layer in layers]
    found = [path.mismatch for path in paths if path is not None]
    return (
        len(kinds) == 1 and len(found) in (0, len(layers)) and max(found, default=0) <= _ALIKE * min(found, default=0)
    )


def _spelled(run: Sequence[Layer]) -> str:
    first, last = run[0].name, run[-1].name
    if len(run) == 1:
        return first
    before, after = next(pattern for pattern in _patterns(first) if pattern in _patterns(last))
    numbers = [name[len(before) : len(name) - len(after)] for name in (first, last)]
    return f"{before}{{{'..'.join(numbers)}}}{after}"


def _rows(layers: Sequence[Layer]) -> list[Stage]:
    """The flagged and undecided layers in stages, the worst first; where there are none, those nearest to a limit."""
    chosen = [layer for layer in layers if sign_of(layer) in (FLAGGED, UNDECIDED)]
    measured = [layer for layer in worst_first(layers) if worse_path(layer.train, layer.eval) is not None]
    if not chosen:
        return [Stage((layer,), layer, layer.name) for layer in measured[:_NEAREST]]
    order = {layer.name: place for place, layer in enumerate(worst_first(chosen))}
    return sorted(stages(chosen, layers), key=lambda stage: order[stage.worst.name])


def worst_rows(report: Report, most: int = MOST_ROWS) -> tuple[list[Stage], list[Column], int]:
    """The worst rows, worst first, with their figures, and how many more rows there are."""
    rows = _rows(report.layers)
    shown = rows[:most]
    return shown, _columns([stage.worst for stage in shown], [len(stage.layers) for stage in shown]), len(rows[most:])


def _layers(report: Report, most: int, page: Page) -> list[Text]:
    """The table of the worst rows, and how to read it."""
    shown, columns, more = worst_rows(report, most)
    if not shown:
        return []
    marks = [Mark.of(sign_of(stage.worst)) for stage in shown]
    names = layer_names([stage.name for stage in shown], [layer.name for layer in report.layers], page, marks)
    layouts = [TableLayout([each for each in columns if each.heading not in left_out]) for left_out in _DISPENSABLE]
    fitting, _ = fit(layouts, names, page)
    return [
        *page.heading(scan.layers_by_sign(report.layers) + (". The worst:" if more else "")),
        *table(names, [TableLayout(fitting)], page),
        *page.paragraph(_legend({column.heading for column in fitting}), "dim"),
    ]


_ALIKE_LAYERS, _LIMIT, _MISMATCH, _MOSTLY, _OUTPUT = "layers", "limit", "D", "most of it", "output\nchange"

_DISPENSABLE = (
    *((), (_LIMIT,), (_LIMIT, _MISMATCH), (_LIMIT, _OUTPUT), (_LIMIT, _MISMATCH, _OUTPUT)),
    *((_LIMIT, _MOSTLY), (_LIMIT, _MOSTLY, _OUTPUT), (_LIMIT, _MISMATCH, _MOSTLY, _OUTPUT)),
)
"""Columns that are left out until the names fit: as little as need be."""


def _columns(layers: Sequence[Layer], alike: Sequence[int]) -> list[Column]:
    paths = [None if has_overflowed(layer) else worse_path(layer.train, layer.eval) for layer in layers]
    mostly = [charts.mostly(layer.shares) for layer in layers]
    changes = [figures.output_change(layer.impact) for layer in layers]
    return [
        *([Column(_ALIKE_LAYERS, [str(number) for number in alike])] if max(alike, default=1) > 1 else []),
        Column("n_eq", [figures.path_equivalent(path) for path in paths], "point"),
        Column(_LIMIT, [figures.equivalent_batch_size(flagging_size(layer)) for layer in layers], "point"),
        Column(_MISMATCH, [figures.path_mismatch(path) for path in paths], "point"),
        *([Column(_MOSTLY, mostly, "left")] if any(mostly) else []),
        *([Column(_OUTPUT, changes, "point")] if any(changes) else []),
    ]


def _legend(headings: Container[str]) -> str:
    folded = " (of several layers, the worst)" if _ALIKE_LAYERS in headings else ""
    change = " Output change: relative L2, if this layer alone uses batch statistics (~ estimate)."
    return (
        f"n_eq: in its worse mode it behaves as if the batch were so many values{folded}; flagged when surely below the"
        " limit. D: mean squared difference between normalizing by batch and by running statistics."
        f"{change if _OUTPUT in headings else ''}"
    )


# --- Why, and what to do ----------------------------------------------------------------------------------------------


def _findings(report: Report, page: Page, room: _Room) -> list[Text]:
    """The first findings with their reason, the next with their remedy alone, remarks by their title."""
    numbered = len(report.diagnoses) > 1
    found = findings_in_words(report.diagnoses[: room.told + room.named], report, show_all=False)
    lines: list[Text] = []
    for number, finding in enumerate(found, start=1):
        remark = finding.severity == "info" and number > 1
        if number > room.told or remark:
            remedy = "" if remark else finding.remedy
            finding = replace(finding, where="", message="", remedy=remedy, measured="", explains="")
        elif not room.whole:
            finding = replace(finding, message=_first_sentence(finding.message), explains="")
        lines += finding_lines(finding, f"{number} " if numbered else "", page)
    return lines


_SENTENCE = re.compile(r".+?[.?!]\)?(?= [A-Z(]|$)", re.DOTALL)


def _first_sentence(text: str) -> str:
    found = _SENTENCE.match(text)
    return text if found is None else found[0]


def _besides(report: Report) -> Iterator[str]:
    """What was asked for beyond the layers, a sentence each: the best remedy, the backward pass, training steps."""
    told = any(finding.measured for finding in findings_in_words(report.diagnoses[:1], report, show_all=False))
    if report.remedies and not told and (best := further.remedies_in_words(report)[2]):
        yield f"Without training: {best[:1].lower()}{best[1:]}"
    noisy = [(layer, layer.backward) for layer in report.layers if layer.backward is not None]
    if noisy:
        worst, noise = max(noisy, key=lambda pair: pair[1].noise)
        size = figures.equivalent_batch_size(noise.equivalent_batch_size)
        yield f"The backward pass of {worst.name} is the noisiest, as of {size} values."
    moved = [(layer, layer.updates) for layer in report.layers if layer.updates is not None]
    if moved:
        odd = [layer.name for layer, updates in moved if not further.is_as_configured(layer, updates)]
        yield (
            f"Training steps do not update {listed(odd, _NEAREST)} as configured."
            if odd
            else further.as_configured(len(moved))
        )


def _notes(report: Report) -> Iterator[tuple[str, Sequence[str]]]:
    for note, names in scan.layers_by_note(report.layers).items():
        yield note, names if len(names) <= _NEAREST else (*names[:_NEAREST], f"{len(names) - _NEAREST} more")


# --- What is left out -------------------------------------------------------------------------------------------------


def _left_out(report: Report, notes: int, room: _Room, page: Page) -> str:
    """One sentence."""
    number, findings = len(report.layers), len(report.diagnoses) - room.told - room.named
    every = "" if page.python else f" (--all: all {number})"
    layers = "every layer" if number <= scan.MOST_LAYERS else f"{scan.MOST_LAYERS} layers{every}"
    found = {
        f"{layers} with histograms of r and d and all parts of D": number > 0,
        count(findings, "more finding"): findings > 0,
        count(notes - room.notes, "more note"): notes > room.notes,
        "what was skipped": bool(report.skipped),
        "the steps to held-out data" if report.scan.held_out else "the steps to inference": bool(report.summary.gaps),
        "all remedies that were tried": bool(report.remedies),
        "the backward pass": any(layer.backward for layer in report.layers),
        "the training steps": any(layer.updates for layer in report.layers),
        "the rules that passed": bool(report.verdicts),
    }
    return f"{page.whole} shows {joined([what for what, applies in found.items() if applies] or ['more'])}."
