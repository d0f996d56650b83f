"""The page of a scan: the verdict and what to do first, then the network, then all that was measured."""

from __future__ import annotations

from collections.abc import Iterator

from bnprobe.records import BaselineComparison, Report, leading
from bnprobe.report import baseline, diagnoses, figures, further
from bnprobe.report import mismatch as sources
from bnprobe.report import scan as words
from bnprobe.report.html import network_charts
from bnprobe.report.html.effects import backward, clipping, output, remedies, steps, updates
from bnprobe.report.html.network import (
    batch_sizes,
    figure_cells,
    figure_columns,
    layer_table,
    network,
    output_change,
    remark,
)
from bnprobe.report.html.page import (
    Block,
    Card,
    Cell,
    Column,
    Document,
    Facts,
    Fold,
    Row,
    Section,
    Table,
    Text,
    Tiles,
)
from bnprobe.report.html.parts import environment, next_step, points, reproduce, skipped_cards
from bnprobe.report.html.rules import rule_folds
from bnprobe.report.layers import sign_of, worse_path, worst_first
from bnprobe.report.page import ARROW, SEVERITY_SIGNS, UNDECIDED, RenderOptions
from bnprobe.rules import rule_of

MOST_WORST = 5
"""So many of the worst layers stand at the top."""


def scan_page(report: Report, options: RenderOptions) -> Document:
    """The page of a scan."""
    end = diagnoses.closing(report, options.command)
    verdict = end.headline if end.sign == UNDECIDED else f"{words.one_line(report)}."
    said = [] if verdict == end.headline else [end.headline]
    return Document(
        title=words.title(report),
        sign=end.sign,
        verdict=verdict,
        sentences=(*said, *end.sentences),
        top=(Tiles(tuple(_tiles(report))), *next_step(end.step)),
        sections=(
            Section("causes", "Causes, and what to do", tuple(_causes(report))),
            *([] if report.baseline is None else [_known(report.baseline)]),
            Section("worst", "The worst layers", tuple(_worst(report))),
            Section("network", "The network, from input to output", tuple(network(report)), "The network"),
            Section("layers", "All layers", tuple(layer_table(report))),
            Section("sizes", "Other batch sizes", tuple(batch_sizes(report))),
            Section("output", words.OUTPUT, tuple(output(report)), "Output"),
            Section("gap", further.gap_title(report.summary.gaps), tuple(steps(report)), "Step by step"),
            Section("remedies", "Remedies without training", tuple(remedies(report, options, end.step))),
            Section("clipping", words.CLIPPING, tuple(clipping(report)), "Clipping"),
            Section("backward", further.BACKWARD, tuple(backward(report)), "Backward pass"),
            Section("updates", further.UPDATES, tuple(updates(report)), "Training steps"),
            Section("skipped", "Layers that could not be judged", tuple(skipped_cards(report.skipped)), "Skipped"),
            Section("notes", "Notes", _notes(report)),
            Section("rules", "Every rule, and what it found", tuple(rule_folds(report.verdicts)), "Rules"),
            Section("how", "How this was measured", tuple(_how(report, options)), "How measured"),
        ),
        data={network_charts.LAYERS: network_charts.network_data(report.layers)},
    )


# --- What one wants first ---------------------------------------------------------------------------------------------


def _tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    yield "Layers flagged", f"{report.summary.flagged} of {report.summary.layers}", _counts(report)
    measured = [layer for layer in report.layers if worse_path(layer.train, layer.eval) is not None]
    if measured:
        worst = worst_first(measured)[0]
        path = worse_path(worst.train, worst.eval)
        yield "n_eq of the worst layer", figures.path_equivalent(path), worst.name
    output = report.summary.output
    if output.relative_l2 is not None:
        yield "Outputs apart", figures.relative(output.relative_l2), "training against inference"
    yield from _score_tiles(report)


def _counts(report: Report) -> str:
    others = (("undecided", report.summary.undecided), ("skipped", report.summary.skipped))
    return ", ".join(f"{number} {what}" for what, number in others if number)


def _score_tiles(report: Report) -> Iterator[tuple[str, str, str]]:
    """What batch statistics against running statistics do to the metric, else to the loss."""
    gaps = {gap.measure: gap for gap in report.summary.gaps}
    measure = leading(tuple(gaps))
    if measure is None:
        return
    gap = gaps[measure]
    text = f"{figures.score(gap.without_noise)} {ARROW} {figures.score(gap.inference)}"
    yield measure.capitalize(), text, further.LEVELS_AND_STEPS["inconsistency"]


def _causes(report: Report) -> Iterator[Block]:
    for found in diagnoses.findings_in_words(report.diagnoses, report, show_all=False):
        paragraphs = [("", found.message), (diagnoses.REMEDY, found.remedy), ("", found.measured)]
        paragraphs += [(diagnoses.EXPLAINS, f"{found.explains}.")] if found.explains else []
        known = rule_of(found.rule) is not None
        yield Card(
            SEVERITY_SIGNS[found.severity],
            found.title,
            found.where,
            tuple((word, text) for word, text in paragraphs if text),
            (f"What {found.rule} checks, and why", f"rule-{found.rule}") if known else None,
        )
    if text := diagnoses.output_change(report.diagnoses, report):
        yield Text((text,), dim=True)


def _known(found: BaselineComparison) -> Section:
    """The findings against those that are known."""
    points = Text(tuple(baseline.sentences(found, show_all=True)))
    return Section("baseline", baseline.heading(found), (points,), "Known findings")


def _worst(report: Report) -> Iterator[Block]:
    worst = [layer for layer in worst_first(report.layers) if layer.flagged or layer.undecided][:MOST_WORST]
    if not worst:
        return
    rows = {row.name: row for row in sources.share_rows(report, worst)}
    columns = [Column("Layer", number=False), *figure_columns(), Column("Most of it (95%)", number=False)]
    impacts = any(layer.impact for layer in worst)
    columns += [Column("Output change")] if impacts else []
    yield Table(
        "The worst layers, with the largest part of their mismatch at inference",
        tuple(columns),
        tuple(
            Row(
                (
                    Cell(layer.name, sign=sign_of(layer), note=remark(layer)),
                    *figure_cells(layer),
                    Cell(sources.largest_share(rows[layer.name], words=True) or f"({rows[layer.name].why_not})"),
                    *([output_change(layer)] if impacts else []),
                )
            )
            for layer in worst
        ),
    )


def _notes(report: Report) -> tuple[Block, ...]:
    of_layers = words.layers_by_note(report.layers).items()
    told = (f"{figures.listed_in_line(names, show_all=False)}: {note}" for note, names in of_layers)
    return points([*report.scan.notes, *told])


# --- How it was measured ----------------------------------------------------------------------------------------------


def _how(report: Report, options: RenderOptions) -> Iterator[Block]:
    yield Facts((*words.what_was_run(report), *environment(report.environment)))
    if sentences := words.cost(report.scan):
        yield Fold(words.COST, points(sentences))
    yield from reproduce(options.command)
