"""Reports made up for the tests of the formats."""

from __future__ import annotations

from dataclasses import replace

import fabricated_causes as causes
import numpy as np
from fabricated_parts import (
    equivalent,
    layer,
    path,
    report,
    resnet_names,
    theory,
)

from bnprobe.records import (
    BatchSizePoint,
    CallMeasurement,
    Composition,
    Impact,
    Output,
    PathValues,
    Report,
    SelfCheck,
    SkippedLayer,
)


def healthy() -> Report:
    """A small network at batch size 32: every layer fine."""
    sizes = (2048, 1900, 1500, 480, 400, 350, 128, 120, 44)
    names = resnet_names((1, 1, 1))
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
    random = Composition(0.004, 1.12, 0.71)
    layers = [replace(made, composition=random, impact=Impact(0.001, None, None)) for made in layers]
    made = report(
        layers,
        output=Output(0.014, 0.004, 0.00021, PathValues(0.0312, 0.0306), None, predicts_labels=True),
        batch_size=32,
        batches=16,
        images=512,
        left_out=29,
        checkpoint="sample_configs/digits/healthy.safetensors",
        emulation="Statistics are taken per group of 32 images.",
        pool=causes.POOL,
    )
    return causes.diagnosed(made, [])


def flagged() -> Report:
    """The same network at batch size 2; one layer's statistics are also off."""
    sizes = (90, 60, 38.5, 12, 9.2, 8, 3.1, 2.4, 2)
    layers = [
        layer(
            name,
            path(n, seed),
            path(n * 1.05, seed + 50, scale=2.6 if seed == 5 else 1.0, shift=6.0 if seed == 5 else 0.0),
            16 << seed // 3,
            because={"lag": 0.985} if seed == 5 else None,
            values_per_channel=128 >> seed // 2,
        )
        for seed, (name, n) in enumerate(zip(resnet_names((1, 1, 1)), sizes, strict=False))
    ]
    made = report(layers, pool=causes.POOL)
    off = [one for one in layers if one.flagged]
    small = causes.diagnosis(
        "BN201",
        [one for one in off if one.name != "layer2.0.downsample.1"],
        0.35,
        "5 of 9 layers: a batch of 2 holds too few values to stand for the data.",
        "Use larger batches, or replace these layers: bnprobe.convert(model, layers, to=...).",
    )
    lag = causes.diagnosis(
        "BN203",
        [one for one in off if one.name == "layer2.0.downsample.1"],
        0.21,
        "1 of 9 layers: its running statistics are not those that training settles on.",
        "Recalibrate: bnprobe.recalibrate(model, batches).",
    )
    return causes.diagnosed(made, [small, lag])


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
            because={"composition": 0.92},
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
    stuck = layer("bn2", path(500, 3, shift=1.5), path(500, 4, shift=1.5), because={"lag": 0.998})
    layers = [
        replace(right, batch_sizes=tuple(_point(size, 200 * size) for size in SIZES)),
        replace(stuck, batch_sizes=tuple(_point(size, 1.6) for size in SIZES)),
    ]
    return report(layers)


SIZES = (1, 2, 4, 8, 16, 32, 64)


def _point(size: int, n: float, limit: float = 32.0) -> BatchSizePoint:
    mismatch = theory(n)
    interval = (0.9 * mismatch, 1.1 * mismatch)
    return BatchSizePoint(size, 256 // size, mismatch, interval, equivalent(mismatch), theory(limit))


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
    **causes.REPORTS,
}
