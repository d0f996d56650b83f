"""How alike the images of a batch are, and how different the domains of a shared layer, in words."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.text import Text

from bnprobe.records import Composition, Domains, Layer, Report
from bnprobe.reports import figures, stacked
from bnprobe.reports.layout import Page

_SIGNIFICANT = 0.01
"""Corrected p-values below this are no chance."""

_SLIGHT = 0.05
"""A larger intraclass correlation would matter if it were sure."""

_MOST_SHARED = 5


def likeness(report: Report, page: Page, show_all: bool) -> list[Text]:
    """What the composition of batches and shared layers mean, a sentence each."""
    sentences = [*_batches(report), *_domains(report.layers, show_all)]
    return [line for sentence in sentences for line in page.paragraph(sentence)]


def effective_images(composition: Composition, batch_size: int) -> float:
    """Images drawn at random that tell as much of the mean as one batch does."""
    return batch_size / max(composition.design_effect, 1e-9)


def _batches(report: Report) -> list[str]:
    measured = [(layer, layer.composition) for layer in report.layers if layer.composition is not None]
    if not measured:
        return []
    size = report.scan.batch_size
    alike = [(layer, found) for layer, found in measured if found.p_value < _SIGNIFICANT]
    if not alike:
        most = max(0.0, *(found.intraclass_correlation for _, found in measured))
        sure = "no more" if most < _SLIGHT else "not surely more"
        return [
            f"The images of a batch of {size} are {sure} alike than images drawn at random"
            f" (intraclass correlation at most {most:.2f}, {figures.count(len(measured), 'layer')})."
        ]
    worst, found = max(alike, key=lambda pair: pair[1].intraclass_correlation)
    tells = effective_images(found, size)
    typical = f"{median(effective_images(other, size) for _, other in alike):.2g}"
    middle = f" (median of these layers: {typical})" if typical != f"{tells:.2g}" else ""
    return [
        f"The images of a batch of {size} are alike in {len(alike)} of {figures.count(len(measured), 'layer')}:"
        f" their intraclass correlation (0: drawn at random, 1: all the same) is up to"
        f" {found.intraclass_correlation:.2f}, in {worst.name}. There, a batch tells as much as {tells:.2g} images"
        f" drawn at random{middle}."
    ]


def _domains(layers: Sequence[Layer], show_all: bool) -> list[str]:
    found = [(layer, layer.domains) for layer in layers if layer.domains is not None]
    apart = [(layer, domains) for layer, domains in found if domains.mismatch > stacked.limit(layer.threshold)]
    if not apart:
        return []
    apart.sort(key=lambda pair: pair[1].mismatch, reverse=True)
    shown = apart if show_all else apart[:_MOST_SHARED]
    more = f" and {len(apart) - len(shown)} more (--all)" if len(shown) < len(apart) else ""
    listed = ", ".join(_distance(layer, domains) for layer, domains in shown)
    return [
        f"Called several times per forward pass, on data that differ: {listed}{more}. D is the distance of each call's"
        " statistics from those of all calls together, which is what the running statistics hold. In the bars it counts"
        " as composition: batches of one call each are no mixture of all."
    ]


def _distance(layer: Layer, domains: Domains) -> str:
    span = figures.span(domains.interval)
    around = f"; 95%: {span}" if span else ""
    calls = f"{layer.calls_per_forward} calls"
    return f"{layer.name} ({calls}, D = {figures.mismatch(domains.mismatch)}{around})"
