"""Do the intervals of healthy layers hold the truth as often as they say, and are the p-values those of chance?

The truth comes from many more batches than a scan draws, by plain forward hooks on real batches: nothing of bnprobe's
own measurement is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.faults.cases import Case, healthy_case, whole
from benchmarks.faults.measures import BatchStatistics, ImageStatistics, record, record_images, running
from benchmarks.faults.samples import Samples
from benchmarks.faults.surgery import norms
from bnprobe.records import Interval, Layer


@dataclass(frozen=True)
class Truth:
    """How much stands behind the truth.

    Attributes:
        batches: Of the train path, at least: whole epochs of the same data set, each in a new order. Of a part of an
            epoch heavy tails would leave more error than an interval is wide.
        orders: Of the data set, for the eval path, where samples do not depend on each other.
    """

    batches: int
    orders: int


FULL = Truth(batches=600, orders=100)
QUICK = Truth(batches=60, orders=5)
"""To see that it runs, or where figures are far from what they are held against."""

SCAN_BATCHES = 16
"""Micro-batches of each scan: its intervals are about four times as wide as the truth's own error."""

REPEATS = 8
"""Scans of each healthy network, each on batches of its own."""

ROUNDING = 1e-9
"""A share that is known exactly, such as the propagation to the first layer, has an interval without width."""

ORDINARY = ("plain", "residual", "dense", "unet3d", "mlp")
"""Networks that call each layer once, so that a layer has one truth."""


def heavy_tailed(samples: Samples) -> Samples:
    """Every sample times a factor of its own, lognormal with a standard deviation of 0.8: its fourth power has heavy
    tails."""
    return _scaled(samples, lambda count, generator: (0.8 * torch.randn(count, generator=generator)).exp())


def with_outliers(samples: Samples) -> Samples:
    """One sample in a hundred is 20 times as large."""
    return _scaled(samples, lambda count, generator: 1 + 19 * (torch.rand(count, generator=generator) < 0.01).float())


def _scaled(samples: Samples, factors: Callable[[int, torch.Generator], Tensor]) -> Samples:
    factor = factors(len(samples), torch.Generator().manual_seed(0))
    return replace(samples, inputs=samples.inputs * factor.view(-1, *[1] * (samples.inputs.dim() - 1)))


@dataclass(frozen=True)
class Setting:
    """What is scanned, and how far.

    Attributes:
        batches: Micro-batches of a scan; None: until it stops by itself.
        images: Samples in the data set; None: all.
        crop: What is done to the samples; the running statistics settle on them before the scan.
    """

    batches: int | None = SCAN_BATCHES
    images: int | None = None
    crop: Callable[[Samples], Samples] = whole


SETTINGS = {
    "": Setting(),
    ", automatic stop": Setting(None),
    ", all of 480 samples": Setting(None, images=480),
    ", lognormal samples": Setting(None, crop=heavy_tailed),
    ", outliers": Setting(None, crop=with_outliers),
}
"""By what is added to the names of the figures."""


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


def calibrate(network: str, seed: int, repeats: int = REPEATS, truth: Truth = FULL) -> tuple[list[Check], list[PValue]]:
    """Scan one healthy network again and again, in every setting, and compare every interval with the truth."""
    checks: list[Check] = []
    p_values: list[PValue] = []
    for name, setting in SETTINGS.items():
        case = replace(healthy_case(network, seed), prepared=setting.crop).drawn(images=setting.images)
        if name:
            if network not in ORDINARY:
                continue
            case = case.settled()
        case = case.with_options(what_if=False)  # remedies have no part in the intervals
        reports = [case.scanned(setting.batches, order=10_000 + repeat) for repeat in range(repeats)]
        values = [layer.values_per_channel for layer in reports[0].layers]
        true = true_figures(case, values, truth) if network in ORDINARY else []
        for repeat, report in enumerate(reports):
            for known, layer in zip(true, report.layers, strict=False):
                figures = _intervals(layer)
                checks += [_check(what + name, network, seed, known[what], found) for what, found in figures]
            if not name:
                found = [layer.composition.p_value for layer in report.layers if layer.composition]
                p_values += [PValue(network, seed, repeat, value) for value in found]
    return checks, p_values


def true_figures(case: Case, values: Sequence[int], truth: Truth = FULL) -> list[dict[str, float]]:
    """Mismatch of both paths and its shares, for each layer in network order.

    Args:
        values: Values per channel in a batch, of each layer.
    """
    sampling, samples = replace(case.sampling, seed=case.sampling.seed + 77), case.training()
    number = min(len(samples), sampling.images or len(samples))
    epoch = number // sampling.batch_size  # a partial last batch is dropped
    count = math.ceil(truth.batches / epoch) * epoch
    train, same = (record(case.model, samples, sampling, count, training=training) for training in (True, False))
    part = max(size for size in range(1, 129) if number % size == 0)  # no sample may be left over
    images = record_images(case.model, samples, replace(sampling, batch_size=part), number // part)
    infer = [_reordered(one, sampling.batch_size, truth.orders) for one in images]
    train = [_freed_of_chance(*paths) for paths in zip(train, same, infer, strict=True)]
    layers = zip(norms(case.model), train, infer, values, strict=True)
    return [_figures(norm, *paths, number) for norm, *paths, number in layers]


def _freed_of_chance(train: BatchStatistics, same: BatchStatistics, exact: BatchStatistics) -> BatchStatistics:
    """The train path, less the error that the eval path has on the same batches; the first layer is then exact."""
    mean, variance = (getattr(exact, name).mean(0) - getattr(same, name).mean(0) for name in ("mean", "variance"))
    return BatchStatistics(train.mean + mean, train.variance + variance)


def _reordered(images: ImageStatistics, size: int, count: int) -> BatchStatistics:
    """Batches of all samples, in one random order after the other, so many of them."""
    generator = torch.Generator().manual_seed(0)
    number = len(images.mean)
    orders = [torch.randperm(number, generator=generator)[: number // size * size] for _ in range(count)]
    found = [images.regrouped(order, size) for order in orders]
    return BatchStatistics(torch.cat([one.mean for one in found]), torch.cat([one.variance for one in found]))


def _figures(norm: nn.Module, train: BatchStatistics, infer: BatchStatistics, values: int) -> dict[str, float]:
    """``values``: per channel in a batch."""
    ways = [_way(path, norm, values) for path in (train, infer)]
    distances = [_distance(_settled(path, way, values), norm) for path, way in zip((train, infer), ways, strict=True)]
    first = distances.index(min(distances))  # the ladder starts at the path that explains the running statistics best
    nearest, way = (train, infer)[first], ways[first]
    references = (running(norm), _settled(nearest, way, values), _settled(infer, way, values))
    total, up_to_date, settled = (infer.mismatch(*reference, norm.eps) for reference in references)
    return {
        "mismatch, train path": train.mismatch(*running(norm), norm.eps),
        "mismatch, eval path": total,
        "share: lag": total - up_to_date,
        "share: propagation": up_to_date - settled,
        "share: composition": 0.0,
        "share: small_batch": settled,
    }


def _settled(batches: BatchStatistics, way: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """What running statistics converge to, at a batch size between that of the batches (0) and all data (1)."""
    mean, variance = batches.population()
    unbiased = batches.variance.mean(0) * values / (values - 1)
    return mean, unbiased + way * (variance - unbiased)


def _way(batches: BatchStatistics, norm: nn.Module, values: int) -> Tensor:
    """The batch size, from 0 to 1, that explains the running variances best: docs/decisions/0010."""
    (_, low), (_, high) = (_settled(batches, torch.tensor(end), values) for end in (0.0, 1.0))
    scale, (_, variance) = high + norm.eps, running(norm)
    position = ((variance - low) * (high - low) / scale.square()).sum() / ((high - low) / scale).square().sum()
    return position.nan_to_num(0.0).clamp(0, 1)


def _distance(reference: tuple[Tensor, Tensor], norm: nn.Module) -> float:
    """Mean square distance of the running statistics from ``reference``, in its standard deviations."""
    (mean, variance), (own_mean, own_variance) = reference, running(norm)
    scale, own = (variance + norm.eps).sqrt(), (own_variance + norm.eps).sqrt()
    return float((((own_mean - mean) / scale).square() + (own / scale - 1).square()).mean())


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
