"""May micro-batches run together as one physical batch? One emulated step against the same real micro-batches.

What may differ is rounding, which a network amplifies from layer to layer. How much this network does is measured too:
one micro-batch runs again with its inputs changed in the last digits. A model that mixes images shows a jump far above
that; a model that draws random numbers in eval mode cannot be told from one, and is not emulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnprobe.probing.batches import CannotEmulateError, join, map_leaves, tensors_of
from bnprobe.probing.grouping import Layout
from bnprobe.probing.intercept import Pass, Recorded, Slot
from bnprobe.probing.memory import Footprint
from bnprobe.probing.runner import PathName, Runner
from bnprobe.randomness import random_state
from bnprobe.records import SelfCheck
from bnprobe.stats.mismatch import distance

_AMPLIFICATION = 50.0
"""An error counts once it is this many times the effect of the changed last digits."""

_FLOOR = 1000.0
"""Errors below this many units in the last place are rounding, whatever the network."""

_BLIND = 0.3
"""A tolerance above this, in standard deviations, would let real mixing pass: the check cannot decide."""


@dataclass(frozen=True)
class Emulation:
    """Whether micro-batches run together, and what the check learned on the way.

    Attributes:
        trusted: Micro-batches may run together.
        reason: One sentence for the report.
        check: The comparison; None if it could not be made.
        layouts: For each path, the row layout of the calls that see several rows per image.
    """

    trusted: bool
    reason: str
    check: SelfCheck | None
    layouts: Mapping[str, Mapping[Slot, Layout]]

    def layouts_of(self, path: PathName) -> dict[Slot, Layout]:
        """The row layouts on one path; without random layers the train path's are the same."""
        return dict(self.layouts.get("train" if path == "steady" else path, {}))


def self_check(runner: Runner, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    """Compare one emulated step of the given micro-batches (on the device) with real ones.

    Returns:
        The verdict, and what one image takes in memory.
    """
    before = random_state()
    verdict, image = _check(runner, "check train", micro_batches, batch_size)
    if random_state() != before:
        # What was drawn differs from run to run: without dropout and the like there is something to compare.
        verdict, image = _check(runner, "check", micro_batches, batch_size)
    if verdict.trusted:
        # Batch statistics can hide a mixing of images that shows with running ones, e.g. of batch_norm by hand.
        verdict = _worse(verdict, _check(runner, "check eval", micro_batches, batch_size)[0])
    return verdict, image


def check_images(runner: Runner, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    """As ``self_check``, on the eval path alone: whether images are independent of each other there."""
    return _check(runner, "check eval", micro_batches, batch_size)


def _worse(verdict: Emulation, inference: Emulation) -> Emulation:
    """What both checks say together; the first one is trusted."""
    if not inference.trusted or verdict.check is None or inference.check is None:
        return inference
    one, other = verdict.check, inference.check
    worst = SelfCheck(
        output_error=max(one.output_error, other.output_error),
        statistic_error=max(one.statistic_error, other.statistic_error),
        tolerance=max(one.tolerance, other.tolerance),
        passed=True,
        first_layer=None,
    )
    return replace(verdict, check=worst, layouts={**verdict.layouts, **inference.layouts})


def _check(runner: Runner, path: PathName, micro_batches: list[Any], batch_size: int) -> tuple[Emulation, Footprint]:
    reals = [Pass(batch_size, batch_size) for _ in micro_batches]
    outputs = [runner.forward(path, batch, real)[0] for batch, real in zip(micro_batches, reals, strict=True)]
    sizes = [record.bytes // batch_size for record in reals[0].records.values()]
    image = Footprint(total=sum(sizes), largest=max(sizes, default=0))
    shaken = Pass(batch_size, batch_size)
    shaken_output, _ = runner.forward(path, _shake(micro_batches[0]), shaken)
    try:
        emulated = Pass(batch_size * len(micro_batches), batch_size, references=_references(reals))
        output, _ = runner.forward(path, join(micro_batches), emulated)
        if emulated.records.keys() != reals[0].records.keys():
            raise CannotEmulateError("the layers are called differently in a larger batch")
    except CannotEmulateError as error:
        return Emulation(False, as_sentence(error), None, {}), image
    unit = _unit(runner)
    check, blind = _judge(runner, reals, shaken, emulated, unit)
    images = batch_size * len(micro_batches)
    output_error = _output_error(outputs, output, images)
    output_tolerance = unit * _FLOOR + _AMPLIFICATION * _output_error(outputs[:1], shaken_output, batch_size)
    passed = check.passed and output_error <= output_tolerance <= _BLIND
    check = SelfCheck(output_error, check.statistic_error, check.tolerance, passed, check.first_layer)
    reason = _reason(check, blind or output_tolerance > _BLIND, batch_size)
    layouts = {"eval" if path == "check eval" else "train": emulated.layouts}
    return Emulation(passed, reason, check, layouts), image


def _judge(runner: Runner, reals: list[Pass], shaken: Pass, emulated: Pass, unit: float) -> tuple[SelfCheck, bool]:
    """Walk through the calls in order; the tolerance grows with the amplification seen so far."""
    tolerance = unit * _FLOOR
    worst = 0.0
    for slot, real in _references(reals).items():
        eps = runner.layers.layers[slot[0]].info.eps
        first = reals[0].records[slot]
        moved = _difference(shaken.records.get(slot), first.mean, first.variance, eps)
        tolerance = max(tolerance, unit * _FLOOR + _AMPLIFICATION * moved)
        error = _difference(emulated.records[slot], *real, eps)
        worst = max(worst, error)
        blind = not tolerance <= _BLIND
        if blind or not error <= tolerance:
            name = runner.layers.layers[slot[0]].name
            return SelfCheck(0.0, worst, tolerance, False, name), blind
    return SelfCheck(0.0, worst, tolerance, True, None), False


def _references(reals: list[Pass]) -> dict[Slot, tuple[Tensor, Tensor]]:
    """Statistics of all real micro-batches, per call."""
    slots = [slot for slot in reals[0].records if all(slot in real.records for real in reals)]
    return {slot: _stack([real.records[slot] for real in reals]) for slot in slots}


def _stack(records: list[Recorded]) -> tuple[Tensor, Tensor]:
    return torch.cat([record.mean for record in records]), torch.cat([record.variance for record in records])


def _difference(record: Recorded | None, mean: Tensor, variance: Tensor, eps: float) -> float:
    if record is None or record.mean.shape != mean.shape:
        return torch.inf
    # What overflows does so in both: on the eval path that is a symptom to report, no sign of mixing.
    return distance(_finite(record.mean), _finite(record.variance), _finite(mean), _finite(variance), eps)


def _shake(batch: Any) -> Any:
    """The same batch with its floating values changed by about four units in the last place."""
    generator = torch.Generator().manual_seed(0)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        return leaf + leaf * noise * (4 * torch.finfo(leaf.dtype).eps)

    return map_leaves(batch, change)


def _unit(runner: Runner) -> float:
    """Unit in the last place of the dtype that the model computes in."""
    dtypes = [parameter.dtype for parameter in runner.model.parameters() if parameter.is_floating_point()]
    widest = torch.float64 if dtypes and all(dtype == torch.float64 for dtype in dtypes) else torch.float32
    coarsest = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(widest).eps)
    # Of half-precision models a thousand units would be everything: take what a statistic of many values loses.
    return min(coarsest, 0.05 / _FLOOR)


def _output_error(outputs: list[Any], joint: Any, images: int) -> float:
    """Relative L2 difference of the real outputs, put together, and the emulated one."""
    error = norm = 0.0
    for parts, whole in zip(zip(*map(tensors_of, outputs), strict=False), tensors_of(joint), strict=False):
        if any(part.dim() == 0 for part in parts):
            continue
        per_image = whole.dim() > 0 and whole.shape[0] % images == 0
        if not per_image or not whole.is_floating_point() or sum(part.shape[0] for part in parts) != whole.shape[0]:
            continue
        difference = min(_relative(part, whole) for part in _arrangements(parts, images))
        weight = float(_finite(whole.double()).square().sum())
        error += difference**2 * weight
        norm += weight
    return (error / norm) ** 0.5 if norm > 0 else error


def _arrangements(parts: tuple[Tensor, ...], images: int) -> list[Tensor]:
    """The rows of several outputs in the order of one: one after the other, or block by block."""
    plain = torch.cat(parts)
    blocks = plain.shape[0] // images
    if blocks == 1:
        return [plain]
    return [plain, torch.cat([part.chunk(blocks)[block] for block in range(blocks) for part in parts])]


def _relative(value: Tensor, reference: Tensor) -> float:
    value, reference = _finite(value.double()), _finite(reference.double())
    return float((value - reference).norm()) / (float(reference.norm()) or 1.0)


def _finite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def as_sentence(error: CannotEmulateError) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


def _reason(check: SelfCheck, blind: bool, batch_size: int) -> str:
    if check.passed:
        return f"Statistics are taken per group of {batch_size} image{'s' if batch_size > 1 else ''}."
    if blind:
        return "The forward pass is random, or too sensitive to rounding to be checked."
    return "The model mixes the images of a batch."
