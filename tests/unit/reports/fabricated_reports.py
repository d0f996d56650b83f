"""Reports made up for the tests of the formats, from seeded samples of what a scan would measure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammaln

from bnprobe.records import (
    BatchSizePoint,
    CallMeasurement,
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
    **changes: Any,
) -> Layer:
    """A layer whose flags follow from its figures."""
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
    return replace(made, **changes)


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

OUTPUT = Output(0.382, 0.125, 0.3127, PathValues(0.312, 1.94), PathValues(0.91, 0.64))


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
        ),
        layers=tuple(layers),
        skipped=skipped,
    )


def _resnet_names(blocks: tuple[int, ...], norms: int = 2) -> list[str]:
    names = ["bn1"]
    for stage, number in enumerate(blocks, start=1):
        for block in range(number):
            names += [f"layer{stage}.{block}.bn{norm + 1}" for norm in range(norms)]
            names += [f"layer{stage}.{block}.downsample.1"] if block == 0 and stage > 1 else []
    return names


def healthy() -> Report:
    """A small network at batch size 32: every layer fine."""
    sizes = (2048, 1900, 1500, 480, 400, 350, 128, 120, 44)
    names = _resnet_names((1, 1, 1))
    layers = [
        layer(
            name,
            path(n, seed),
            path(n * 1.1, seed + 50),
            16 << seed // 3,
            values_per_channel=2048 >> seed // 2,
        )
        for seed, (name, n) in enumerate(zip(names, sizes, strict=False))
    ]
    return report(
        layers,
        output=Output(0.014, 0.004, 0.00021, PathValues(0.0312, 0.0306), None),
        batch_size=32,
        batches=16,
        images=512,
        left_out=29,
        checkpoint="sample_configs/digits/healthy.safetensors",
        emulation="Statistics are taken per group of 32 images.",
    )


def flagged() -> Report:
    """The same network at batch size 2; one layer's statistics are also off."""
    sizes = (90, 60, 38.5, 12, 9.2, 8, 3.1, 2.4, 2)
    layers = [
        layer(
            name,
            path(n, seed),
            path(n * 1.05, seed + 50, scale=2.6 if seed == 5 else 1.0, shift=6.0 if seed == 5 else 0.0),
            16 << seed // 3,
            values_per_channel=128 >> seed // 2,
        )
        for seed, (name, n) in enumerate(zip(_resnet_names((1, 1, 1)), sizes, strict=False))
    ]
    return report(layers)


def many(number_flagged: int = 9) -> Report:
    """60 layers and more: a deep network, the last stages flagged."""
    names = [
        f"features.denseblock{block}.denselayer{index}.norm{norm}"
        for block, size in ((1, 6), (2, 10), (3, 14))
        for index in range(1, size + 1)
        for norm in (1, 2)
    ]
    sizes = np.geomspace(4000, 50, len(names) - number_flagged).tolist()
    sizes += np.linspace(9, 2, number_flagged).tolist()
    layers = [
        layer(name, path(n, seed), path(n, seed + 99), 128)
        for seed, (name, n) in enumerate(zip(names, sizes, strict=True))
    ]
    return report(layers, model="torchvision:densenet121", checkpoint=None, data="val/, 5,000 images")


def undecided() -> Report:
    """Two layers whose intervals reach across the threshold; the batches that were allowed are used up."""
    layers = [
        layer("stem.bn", path(400, 1), path(420, 2)),
        layer("block.0.bn", path(34, 3, wide=0.3), path(60, 4)),
        layer("block.1.bn", path(36, 5, wide=0.4), path(31, 6, wide=0.3)),
    ]
    return report(layers, stopped="max_batches", output=Output(0.12, None, None, None, None))


def partial() -> Report:
    """Ctrl-C after three batches."""
    layers = [
        layer("bn1", path(3, 1, wide=0.5), path(3.2, 2, wide=0.5)),
        layer("bn2", path(500, 3), path(500, 4)),
    ]
    return report(layers, batches=3, images=6, stopped="interrupted", partial=True, seconds=0.4)


def skipped() -> Report:
    """Layers that could not be judged, for several reasons, beside fine ones."""
    layers = [
        layer("encoder.norm", path(800, 1), path(790, 2)),
        layer(
            "encoder.instance",
            None,
            None,
            running_statistics=False,
            note="It keeps no running statistics (track_running_stats=False): nothing to compare with.",
        ),
    ]
    reason = "its class is not known to bnprobe"
    left_out = tuple(SkippedLayer(f"decoder.blocks.{index}.norm", "FancyNorm", reason) for index in range(9))
    unused = (SkippedLayer("head.bn", "BatchNorm1d", "no forward pass called it"),)
    return report(
        layers,
        left_out + unused,
        notes=("The last batch held 1 image of 2 and was left out.",),
        emulated=False,
        physical_batch=2,
        emulation="The model mixes the images of a batch.",
        self_check=SelfCheck(0.031, 0.42, 1.2e-5, False, "encoder.norm"),
    )


def shared() -> Report:
    """A discriminator that sees real and fake batches, with layers of several kinds and thresholds."""
    calls = (
        CallMeasurement(0, 128, path(120, 1), path(118, 2)),
        CallMeasurement(1, 128, path(120, 3, shift=0.9), path(118, 4, shift=0.9)),
    )
    layers = [
        layer("generator.bn", path(64, 5), path(70, 6), 32, kind="BatchNorm1d"),
        layer(
            "discriminator.bn",
            path(120, 7, shift=0.45),
            path(118, 8, shift=0.45),
            threshold=16.0,
            aliases=("critic.bn", "ema.discriminator.bn"),
            calls_per_forward=2,
            calls=calls,
        ),
    ]
    output = Output(0.21, None, None, None, None, "The output is no tensor of class scores.")
    return report(layers, output=output)


def overflow() -> Report:
    """Running statistics so wrong that the eval path overflowed."""
    note = "On the eval path its input is not finite from micro-batch 1 on."
    layers = [
        layer("bn1", path(300, 1), path(310, 2)),
        layer("bn2", path(300, 3), None, flagged=True, note=note),
        layer("bn3", path(280, 4), None, note=note),
        layer("bn4", path(16, 5), None, note=note),
    ]
    output = Output(None, None, None, None, None, "The eval path gave values that are not finite.")
    return report(layers, output=output)


def batch_sizes() -> Report:
    """The flagged network, measured at seven batch sizes; 16 is enough for every layer."""
    layers = [
        replace(made, batch_sizes=tuple(_point(size, 20 * size * (9 - index) / 9) for size in SIZES))
        for index, made in enumerate(flagged().layers)
        if made.name != "layer2.0.downsample.1"
    ]
    return report(layers)


def no_batch_size_helps() -> Report:
    """One layer is as wrong at every batch size."""
    right = layer("bn1", path(400, 1), path(420, 2))
    stuck = layer("bn2", path(500, 3, shift=1.5), path(500, 4, shift=1.5))
    layers = [
        replace(right, batch_sizes=tuple(_point(size, 200 * size) for size in SIZES)),
        replace(stuck, batch_sizes=tuple(_point(size, 1.6) for size in SIZES)),
    ]
    return report(layers)


SIZES = (1, 2, 4, 8, 16, 32, 64)


def _point(size: int, n: float) -> BatchSizePoint:
    mismatch = theory(n)
    return BatchSizePoint(size, 256 // size, mismatch, (0.9 * mismatch, 1.1 * mismatch), equivalent(mismatch))


REPORTS = {
    "healthy": healthy,
    "flagged": flagged,
    "many": many,
    "undecided": undecided,
    "partial": partial,
    "skipped": skipped,
    "shared": shared,
    "overflow": overflow,
    "batch_sizes": batch_sizes,
    "no_batch_size_helps": no_batch_size_helps,
}
