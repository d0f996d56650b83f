"""``speed``: what batch norm costs in a deployed network, what folding it away saves, and what 8 bits save beyond that.

At inference batch norm is an affine map of each channel, so the convolution before it can do its work. With its
sigma = sqrt(running_var + eps),

    weight' = weight * gamma / sigma,    bias' = (bias - running_mean) * gamma / sigma + beta

(Jacob et al. 2018, arXiv 1712.05877, section 3.2). The outputs are the same, and a pass over memory is saved.

A network of five convolutions is trained on images of 128 x 128 pixels, and run one image at a time in one thread: by
torch itself, and from the files of all formats that ``bnprobe export`` writes. In each format the network as it is,
the folded one and the one of 8 bits, where the format has it, run in turn, image by image, so that whatever else the
machine does meets all three. The 50th and 99th percentile of their times are held against a target of 9 ms.
"""

from __future__ import annotations

import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.commands.exporters import exporter_of, is_installed, quantized, shapes_of
from bnprobe.config.exporters import EXPORTERS
from bnprobe.errors import RepairError
from bnprobe.lab.data import batches, load
from bnprobe.lab.experiment import (
    NOT_NEGATIVE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    below,
    told,
    within,
)
from bnprobe.lab.networks import architecture, train
from bnprobe.numbers import joined, percent
from bnprobe.records import Claim, LabChart

SIDE, TARGET = 128, 9.0
"""Pixels along a side; milliseconds."""

MARGIN = 0.05
"""Share of the time that must be saved to count: less may be due to where in memory a network came to lie."""

TORCH, SCRIPT, EXPORT, ONNX = "torch", "torchscript", "torch-export", "onnx"
PLAIN, FOLDED, INT8 = "batch norm as it is", "batch norm folded", "8 bits"

CHANNELS = 16, 32, 64, 128, 128
BATCH, STEPS, RATE = 16, 300, 0.05
RUNS, WARM_UP = 1000, 10
"""Timed images of each variant, and those before them."""

COMPARED = 400
"""Held-out images whose class is compared."""

Run = Callable[[Tensor], Tensor]


class Speed(Experiment):
    """Each format with the variants that it has."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """The formats whose packages are there."""
        return [{"format": name} for name in (TORCH, SCRIPT, EXPORT, ONNX) if not _missing(name)]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Times of all variants of a format, taken in turn, and how far their answers agree."""
        format_, images = str(condition["format"]), load(budget.data)
        model = _trained(seed, budget)
        folded = fold(model)
        shown, test = _enlarged(images.train[: 4 * BATCH]), _enlarged(images.test[: budget.of(COMPARED, 20)])
        with torch.no_grad():
            variants = {name: _runner(format_, each, shown) for name, each in ((PLAIN, model), (FOLDED, folded))}
            eight = _of_8_bits(format_, model, folded, shown)
            if eight is not None:
                variants[INT8] = eight
            answers = {name: torch.cat([run(image) for image in test.split(1)]) for name, run in variants.items()}
            began, worked = time.perf_counter(), time.process_time()
            times = _times(variants, test, budget.of(RUNS, 20))
            share = (time.process_time() - worked) / (time.perf_counter() - began)
        found = {}
        for name, taken in times.items():
            found[f"p50, {name}"], found[f"p99, {name}"] = (float(taken.quantile(q)) for q in (0.5, 0.99))
        plain = answers[PLAIN]
        agreement = (answers[INT8].argmax(1) == plain.argmax(1)).double().mean().item() if INT8 in answers else None
        return {
            **found,
            "time of folded over plain": (times[FOLDED] / times[PLAIN]).median().item(),
            "time of 8 bits over folded": (times[INT8] / times[FOLDED]).median().item() if INT8 in times else None,
            "share of a core": share,
            "difference of folded": ((answers[FOLDED] - plain).abs().max() / plain.abs().max()).item(),
            "same class with 8 bits": agreement,
            "accuracy": (plain.argmax(1) == images.test_labels[: len(test)]).double().mean().item(),
        }

    def answer(self, results: Results, budget: Budget) -> str:
        """How exact and how much faster, and the slowest format."""
        formats = [str(name) for name in results.levels("format")]
        times = [f"{told(results.where(format=each).mean('time of folded over plain'))} in {each}" for each in formats]
        slowest = results.mean_over_seeds(lambda one: max(one.value(f"p99, {FOLDED}", format=each) for each in formats))
        return (
            f"Folding changes outputs by {told(results.largest('difference of folded'))} of the largest, and the time"
            f" of an image is so many times that before: {joined(times)}. The 99th percentile in the slowest format is"
            f" {told(slowest)} ms, where {TARGET:g} ms are the target."
        )

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """Whether folding is exact and faster, whether the target is met, and what 8 bits change."""
        by_format = {str(name): results.where(format=name) for name in results.levels("format")}
        yield within(
            "Folded batch norm gives the same outputs, but for rounding.",
            "Largest difference over the largest output, in all formats",
            results.largest("difference of folded"),
            1e-5,
        )
        for name, found in by_format.items():
            yield below(
                f"Folding makes {name} faster by {MARGIN:.0%} or more.",
                "Time of an image folded over that as it is, median over images",
                found.mean("time of folded over plain"),
                1 - MARGIN,
                trained=False,
            )
        yield below(
            f"At {SIDE} x {SIDE} the 99th percentile of the folded network is under {TARGET:g} ms in every format.",
            f"99th percentile in the slowest format, in ms, on {_machine()}",
            results.mean_over_seeds(lambda one: max(one.value(f"p99, {FOLDED}", format=name) for name in by_format)),
            TARGET,
            trained=False,
        )
        for name in _with_8_bits(results):
            yield above(
                f"8 bits keep the class of 99% of images in {name}.",
                "Share of held-out images with the same class",
                by_format[name].mean("same class with 8 bits"),
                0.99,
            )
        for name in _with_8_bits(results):
            yield below(
                f"8 bits make {name} faster than the folded network by {MARGIN:.0%} or more.",
                "Time of an image with 8 bits over that folded, median over images",
                by_format[name].mean("time of 8 bits over folded"),
                1 - MARGIN,
                trained=False,
            )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Both percentiles."""
        for name, title, figure in (
            ("median", "Median time of an image", "p50"),
            ("tail", "99th percentile of the time of an image", "p99"),
        ):
            variants = {f"{figure}, {variant}": variant for variant in (PLAIN, FOLDED, INT8)}
            times = results.several_series("format", variants)
            legend = (f"The target is {TARGET:g} ms.",)
            yield LabChart(name, title, "format", "milliseconds", times, legend, bounds=NOT_NEGATIVE)

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """Where times were taken, and what was not measured."""
        yield (
            f"Times are of one image, enlarged to {SIDE} x {SIDE} pixels, in one thread on {_machine()}."
            f"{_left(results)}"
        )
        images = load(budget.data)
        yield f"{architecture(_network(images.train.shape[1], images.classes))} {SIDE} x {SIDE} pixels go in."
        if ONNX in results.levels("format"):
            yield (
                f"{ONNX}: torch.onnx.export folds batch norm itself, so that the network as it is and the folded one"
                " are written as the same operations."
            )
        else:
            yield f'{ONNX} was not measured: it needs {_missing(ONNX)}. Run: pip install "bnprobe[lab]".'
        for name in (SCRIPT, ONNX):
            if name in results.levels("format") and name not in _with_8_bits(results):
                yield (
                    f"8 bits were not measured in {name}: this torch or machine, or a package that is missing, does not"
                    " allow it."
                )


def _with_8_bits(results: Results) -> list[str]:
    """The formats in which the network of 8 bits was measured."""
    formats = results.levels("format")
    return [str(name) for name in formats if results.where(format=name).values("same class with 8 bits")]


def _left(results: Results) -> str:
    """What other programs left of a core, a sentence with a space before it; empty: nothing was measured."""
    share = results.averaged("share of a core")
    if share is None:
        return ""
    part = percent(min(share.mean, 1.0))
    return f" Other programs left it {part} of a core; to wait lengthens the 99th percentile most."


def _machine() -> str:
    """The processor, as far as the system says, and the number of cores."""
    named = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), named)
    except OSError:
        pass
    return f"{named} with {os.cpu_count()} cores"


# --- The network ------------------------------------------------------------------------------------------------------


def _network(channels: int, classes: int) -> nn.Sequential:
    """Five convolutions of stride 2 with torch's batch norm, which exporters know."""
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, *CHANNELS)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[-1], classes))


@functools.lru_cache(maxsize=1)
def _trained(seed: int, budget: Budget) -> nn.Sequential:
    """The network after training, in eval mode."""
    images = load(budget.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(images.train.shape[1], images.classes)
        draws = torch.Generator().manual_seed(seed)
        steps = batches(images.train, images.train_labels, BATCH, budget.of(STEPS, 10), draws)
        train(model, ((_enlarged(pixels), labels) for pixels, labels in steps), RATE)
    return model.eval()


def _enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)


@torch.no_grad()
def fold(model: nn.Sequential) -> nn.Sequential:
    """A copy in which each convolution does the work of the batch norm behind it, which is gone.

    Args:
        model: In eval mode; each ``nn.BatchNorm2d`` in it follows an ``nn.Conv2d`` with a bias.
    """
    layers: list[nn.Module] = []
    for layer in deepcopy(model):
        if not isinstance(layer, nn.BatchNorm2d):
            layers.append(layer)
            continue
        convolution = layers[-1]
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        assert layer.running_mean is not None
        assert layer.running_var is not None
        scale = layer.weight / (layer.running_var + layer.eps).sqrt()
        convolution.weight *= scale.reshape(-1, 1, 1, 1)
        convolution.bias.copy_((convolution.bias - layer.running_mean) * scale + layer.bias)
    return nn.Sequential(*layers).eval()


# --- Formats ----------------------------------------------------------------------------------------------------------


def _missing(format_: str) -> str:
    """Packages that a format needs and that are not installed, in words."""
    if format_ == TORCH:
        return ""
    row = EXPORTERS[format_]
    needed = (*row.packages, *filter(None, [row.runtime]))
    return " and ".join(package for package in needed if not is_installed(package))


def _runner(format_: str, model: nn.Module, images: Tensor) -> Run:
    """The model, written in a format with two images as an example, and read again."""
    if format_ == TORCH:
        return model
    content = _written(format_, model, images)
    if format_ == ONNX:
        return _session(content)
    run = exporter_of(EXPORTERS[format_]).read(content)
    return lambda image: run((image,))


def _written(format_: str, model: nn.Module, images: Tensor) -> bytes:
    example = (images[:2],)
    return exporter_of(EXPORTERS[format_]).write(model, example, shapes_of(example, 2)).content


def _session(content: bytes) -> Run:
    """ONNX Runtime with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def _of_8_bits(format_: str, model: nn.Module, folded: nn.Module, images: Tensor) -> Run | None:
    """Weights and activations have 8 bits, in ranges that some images show; None: not in this format, or not here."""
    if format_ == ONNX:
        return _quantized_onnx(_written(ONNX, folded, images), images)
    if format_ != SCRIPT:
        return None
    try:
        return _runner(SCRIPT, quantized(model, [(part,) for part in images.split(BATCH)]), images)
    except RepairError:
        return None


def _quantized_onnx(content: bytes, images: Tensor) -> Run:
    """By ONNX Runtime's static quantization."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static, shape_inference

    argument = onnx.load_from_string(content).graph.input[0].name
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "made"))
        given.write_bytes(content)

        class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
            """The images, in batches."""

            left = iter(images.split(BATCH))

            def get_next(self) -> dict[str, object] | None:
                part = next(self.left, None)
                return None if part is None else {argument: part.numpy()}

        shape_inference.quant_pre_process(given, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, made, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return _session(made.read_bytes())


def _times(variants: Mapping[str, Run], images: Tensor, runs: int) -> dict[str, Tensor]:
    """Milliseconds of each run of each variant; all run on an image before the next, in another order each time."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(-WARM_UP, runs):
        image = images[number % len(images)][None]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.perf_counter()
            variants[name](image)
            if number >= 0:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: torch.tensor(values) for name, values in taken.items()}
