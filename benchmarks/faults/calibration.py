"""Do the intervals of healthy layers hold the truth as often as they say, and are the p-values those of chance?

The truth comes from many more batches than a scan draws, by plain forward hooks on real batches: nothing of bnprobe's
own measurement is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from benchmarks.faults.cases import Case, healthy_case
from benchmarks.faults.measures import BatchStatistics, ImageStatistics, record, record_images, running
from benchmarks.faults.surgery import norms
from bnprobe.records import Interval, Layer

TRUTH_BATCHES = 300
"""Batches behind the truth; those of the eval path are regrouped again and again."""

SCAN_BATCHES = 16
"""Micro-batches of each scan: its intervals are about four times as wide as the truth's own error."""

REPEATS = 8
"""Scans of each healthy network, each on batches of its own."""

ROUNDING = 1e-9
"""A share that is known exactly, such as the propagation to the first layer, has an interval without width."""

ORDINARY = ("plain", "residual", "dense", "unet3d", "mlp")
"""Networks that call each layer once, so that a layer has one truth."""


@dataclass(frozen=True)
class Check:
    """One interval of one layer in one scan.

    Attributes:
        what: Which figure: "mismatch, train path", "share: lag", ...
        below, above: Whether the truth lies beyond the interval's end; neither: it is covered.
    """

    what: str
    network: str
    seed: int
    below: bool
    above: bool


@dataclass(frozen=True)
class PValue:
    """The composition test of one layer of a healthy network in one scan, as reported."""

    network: str
    seed: int
    scan: int
    p_value: float


def calibrate(network: str, seed: int, repeats: int = REPEATS) -> tuple[list[Check], list[PValue]]:
    """Scan one healthy network again and again, and compare every interval with the truth."""
    case = healthy_case(network, seed)
    truths = true_figures(case) if network in ORDINARY else []
    checks: list[Check] = []
    p_values: list[PValue] = []
    for repeat in range(repeats):
        report = case.scanned(SCAN_BATCHES, order=10_000 + repeat)
        for truth, layer in zip(truths, report.layers, strict=False):
            checks += [_check(what, network, seed, truth[what], found) for what, found in _intervals(layer)]
        found = [layer.composition.p_value for layer in report.layers if layer.composition]
        p_values += [PValue(network, seed, repeat, value) for value in found]
    return checks, p_values


def true_figures(case: Case, count: int = TRUTH_BATCHES) -> list[dict[str, float]]:
    """Mismatch of both paths and its shares, for each layer in network order; images are drawn independently."""
    sampling = replace(case.sampling, seed=case.sampling.seed + 77)
    train = record(case.model, case.training(), sampling, count, training=True)
    infer = record_images(case.model, case.training(), sampling, count)
    layers = zip(norms(case.model), train, infer, strict=True)
    return [_figures(norm, batches, images, sampling.batch_size) for norm, batches, images in layers]


def _figures(norm: nn.Module, train: BatchStatistics, infer: ImageStatistics, size: int) -> dict[str, float]:
    references = (running(norm), train.population(), infer.population())
    total, up_to_date, settled = (infer.expected_mismatch(size, *reference, norm.eps) for reference in references)
    return {
        "mismatch, train path": train.mismatch(*running(norm), norm.eps),
        "mismatch, eval path": total,
        "share: lag": total - up_to_date,
        "share: propagation": up_to_date - settled,
        "share: composition": 0.0,
        "share: small_batch": settled,
    }


def _intervals(layer: Layer) -> Iterator[tuple[str, Interval]]:
    if layer.train is not None:
        yield "mismatch, train path", layer.train.interval
    if layer.eval is not None:
        yield "mismatch, eval path", layer.eval.interval
    for share in ("lag", "propagation", "composition", "small_batch"):
        interval = getattr(layer.share_intervals, share, None)
        if interval is not None:
            yield f"share: {share}", interval


def _check(what: str, network: str, seed: int, truth: float, interval: Interval) -> Check:
    low, high = interval
    return Check(what, network, seed, below=truth < low - ROUNDING, above=high is not None and truth > high + ROUNDING)
