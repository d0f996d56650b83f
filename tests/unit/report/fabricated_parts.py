"""What made-up reports are built of: seeded samples of what a scan would measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

from bnprobe.records import (
    Distribution,
    Environment,
    Histogram,
    Layer,
    Output,
    PathMeasurement,
    PathValues,
    Report,
    Scan,
    SelfCheck,
    ShareIntervals,
    Shares,
    SkippedLayer,
    Summary,
    Tool,
)

R_EDGES = tuple(np.geomspace(1 / 4, 4, 33).tolist())
D_EDGES = tuple((0.1 * np.sinh(np.linspace(-math.asinh(100), math.asinh(100), 33))).tolist())
PROBABILITIES = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")


def theory(n: float) -> float:
    """D of i.i.d. Gaussian batches of n values: 2 (1 - e_n)."""
    return float(2 * (1 - math.sqrt(2 / n) * math.exp(gammaln(n / 2) - gammaln((n - 1) / 2))))


def equivalent(mismatch: float) -> float | None:
    """The n whose i.i.d. D is ``mismatch``."""
    if mismatch <= 0:
        return None
    if mismatch >= theory(1.0001):
        return 1.0
    return float(brentq(lambda n: theory(n) - mismatch, 1.0001, 1e9))


def histogram(values: np.ndarray, edges: tuple[float, ...]) -> Histogram:
    """Counts; the outer bins take what lies beyond."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(edges=edges, counts=tuple(int(count) for count in counts))


def distribution(values: np.ndarray, edges: tuple[float, ...], clipped: float, clipped_iid: float) -> Distribution:
    """All that is reported of the values of r or d."""
    quantiles = np.quantile(values, [float(p) for p in PROBABILITIES])
    return Distribution(
        mean=float(values.mean()),
        std=float(values.std()),
        min=float(values.min()),
        max=float(values.max()),
        quantiles=dict(zip(PROBABILITIES, quantiles.tolist(), strict=True)),
        histogram=histogram(values, edges),
        clipped=clipped,
        clipped_iid=clipped_iid,
    )


def path(n: float, seed: int, scale: float = 1.0, shift: float = 0.0, wide: float = 0.1) -> PathMeasurement:
    """A path whose batches hold ``n`` i.i.d. values, seen through running statistics that are off.

    Args:
        n: Values per channel and batch.
        seed: Of the sample.
        scale: True standard deviation / running standard deviation.
        shift: True mean - running mean, in running standard deviations.
        wide: Half width of the interval of the mismatch, relative.
    """
    random = np.random.default_rng(seed)
    r = scale * np.sqrt(random.chisquare(n - 1, 4096) / n)
    d = scale * random.normal(0, 1 / math.sqrt(n), 4096) + shift
    mismatch = float(np.mean(d**2 + (r - 1) ** 2))
    low, high = mismatch * (1 - wide), mismatch * (1 + wide)
    outside = float(np.mean((r > 3) | (r < 1 / 3)))
    return PathMeasurement(
        mismatch=mismatch,
        interval=(low, high),
        equivalent_batch_size=equivalent(mismatch),
        equivalent_batch_size_interval=(equivalent(high) or 1.0, equivalent(low)),
        r=distribution(r, R_EDGES, outside, outside),
        d=distribution(d, D_EDGES, float(np.mean(np.abs(d) > 5)), 0.0),
    )


def layer(
    name: str,
    train: PathMeasurement | None,
    eval: PathMeasurement | None,
    channels: int = 64,
    kind: str = "BatchNorm2d",
    threshold: float = 32.0,
    values_per_channel: int = 98,
    because: dict[str, float] | None = None,
    **changes: Any,
) -> Layer:
    """A layer whose flags follow from its figures.

    Args:
        because: Parts of the eval-path mismatch by source; what is left is small batch.
    """
    measured = [measurement for measurement in (train, eval) if measurement is not None]
    limit = theory(threshold)
    flagged = any(measurement.interval[0] > limit for measurement in measured)
    straddling = any(
        measurement.interval[0] <= limit < (measurement.interval[1] or math.inf) for measurement in measured
    )
    made = Layer(
        name=name,
        aliases=(),
        kind=kind,
        channels=channels,
        eps=1e-5,
        momentum=0.1,
        batches_tracked=1200,
        calls_per_forward=1,
        values_per_channel=values_per_channel,
        running_statistics=True,
        threshold=threshold,
        flagged=flagged,
        undecided=straddling and not flagged,
        note=None,
        train=train,
        eval=eval,
    )
    if eval is not None:
        made = replace(made, **taken_apart(eval.mismatch, because or {"lag": 0.012, "composition": 0.006}))
    return replace(made, **changes)


def taken_apart(mismatch: float, because: dict[str, float]) -> dict[str, Any]:
    """Shares that add up to the mismatch, with intervals: the fields of a layer.

    Args:
        mismatch: D of the eval path.
        because: Parts of it by source; a data shift comes on top.
    """
    values = dict.fromkeys(("composition", "lag", "dropout", "propagation"), 0.0)
    values |= {source: part * mismatch for source, part in because.items()}
    shift = values.pop("data_shift", None)
    rest = mismatch - sum(values.values())
    shares = Shares(small_batch=rest, data_shift=shift, **values)
    spread = 0.02 * mismatch
    ends = {name: (value - spread, value + spread) for name, value in values.items()}
    around = None if shift is None else (0.9 * shift, 1.1 * shift)
    intervals = ShareIntervals(small_batch=(rest - spread, rest + spread), data_shift=around, **ends)
    return {"shares": shares, "share_intervals": intervals}


def mean_shares(layers: Sequence[Layer]) -> Shares | None:
    """The model's shares."""
    found = [made.shares for made in layers if made.shares is not None]
    if not found:
        return None
    means = {}
    for field in fields(Shares):
        values = [value for share in found if (value := getattr(share, field.name)) is not None]
        means[field.name] = sum(values) / len(values) if values else None
    return Shares(**means)


SCAN = Scan(
    model="sample_configs/digits/model.py:load_model",
    data="load_data() of model.py, 1,437 images of shape (1, 8, 8)",
    synthetic=False,
    checkpoint="sample_configs/digits/batch2.safetensors",
    batch_size=2,
    batches=128,
    batches_requested=None,
    images=256,
    left_out=0,
    emulated=True,
    physical_batch=64,
    emulation="Statistics are taken per group of 2 images.",
    self_check=SelfCheck(4.1e-7, 9.6e-7, 1.2e-5, True, None),
    seed=0,
    device="cpu",
    dtype="float32",
    autocast=None,
    stopped="decided",
    partial=False,
    seconds=1.84,
)

OUTPUT = Output(0.382, 0.125, 0.3127, PathValues(0.312, 1.94), PathValues(0.91, 0.64), predicts_labels=True)


def report(
    layers: list[Layer],
    skipped: tuple[SkippedLayer, ...] = (),
    output: Output = OUTPUT,
    **scan: Any,
) -> Report:
    """A report of these layers; the counts of the summary follow."""
    return Report(
        schema_version=1,
        tool=Tool("bnprobe", "0.1.0"),
        environment=Environment("3.11.9", "2.13.0+cpu", "Linux-6.1-x86_64", "x86_64", 2),
        scan=replace(SCAN, **scan),
        summary=Summary(
            layers=len(layers),
            flagged=sum(made.flagged for made in layers),
            undecided=sum(made.undecided for made in layers),
            skipped=len(skipped),
            output=output,
            shares=mean_shares(layers),
        ),
        layers=tuple(layers),
        skipped=skipped,
    )


def resnet_names(blocks: tuple[int, ...], norms: int = 2) -> list[str]:
    """Names of a residual network's layers."""

    names = ["bn1"]
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            names += [f"layer{stage}.{block}.bn{norm + 1}" for norm in range(norms)]
            names += [f"layer{stage}.{block}.downsample.1"] if block == 0 and stage > 1 else []
    return names
