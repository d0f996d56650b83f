"""The state of a running scan, and one step of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from bnprobe.probing.accumulate import Path
from bnprobe.probing.anatomy import has_random_layers
from bnprobe.probing.batches import CannotEmulateError, join, to_device
from bnprobe.probing.chunks import Chunks
from bnprobe.probing.emulation import Emulation, as_sentence
from bnprobe.probing.intercept import Pass, Recorded, Slot
from bnprobe.probing.interrupts import deferred_interrupts
from bnprobe.probing.output import Contributions, OutputSums, user_values
from bnprobe.probing.runner import PathName, Runner
from bnprobe.randomness import random_state

TWO_PATHS: tuple[PathName, PathName] = ("train", "eval")


@dataclass
class _Step:
    """One physical batch on its way through the paths.

    Attributes:
        joined: The physical batch, on the device.
        apart: The same images as real micro-batches, for loss and metric.
        micro_batches: How many there are.
        inputs: Positions of the tensors of the batch that the model was called on.
    """

    joined: Any
    apart: list[Any]
    micro_batches: int
    passes: dict[PathName, Pass] = field(default_factory=dict)
    outputs: dict[PathName, Any] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    contributions: Contributions = field(default_factory=dict)


@dataclass
class Measurement:
    """The state of a running scan: everything is added at the end of a step, wholly or not at all.

    Attributes:
        batches: Micro-batches measured on both paths.
        at_once: Micro-batches per physical batch.
        largest: Images of the largest physical batch that ran.
        emulation: Whether micro-batches may run together.
        paths: What is measured of every step; the evaluation data needs the eval path only.
        steady: The train path without random layers; measured only where there are any.
        random: Whether there are; None before the first step.
        steady_seconds: What measuring ``steady`` took.
        values, by_batch, entered, functional: As in ``Evidence``.
    """

    runner: Runner
    batch_size: int
    emulation: Emulation
    at_once: int
    train: Path
    steady: Path
    eval: Path
    batch_sizes: dict[int, Path]
    output: OutputSums
    paths: tuple[PathName, ...] = TWO_PATHS
    random: bool | None = None
    steady_seconds: float = 0.0
    batches: int = 0
    largest: int = 0
    values: dict[Slot, int] = field(default_factory=dict)
    by_batch: dict[PathName, set[int]] = field(default_factory=lambda: {"train": set(), "steady": set(), "eval": set()})
    entered: set[int] = field(default_factory=set)
    functional: set[str] = field(default_factory=set)

    def step(self, micro_batches: list[Any]) -> None:
        """Measure micro-batches that are not on the device yet, as one physical batch where that works.

        Raises:
            DeviceError: Not even one micro-batch fits into memory.
        """
        chunks = Chunks(self.runner.device, self.batch_size, len(micro_batches))
        chunks.run(micro_batches, self._measure, self._refused)
        if chunks.at_once < len(micro_batches):
            self.at_once = chunks.at_once

    def _refused(self, error: CannotEmulateError) -> None:
        self.emulation = Emulation(False, as_sentence(error), self.emulation.check, {})

    def _measure(self, micro_batches: list[Any]) -> None:
        step = _Step(to_device(join(micro_batches), self.runner.device), self._apart(micro_batches), len(micro_batches))
        draws = [self._forward(path, step) for path in self.paths]
        random = self._is_random(draws) if self.random is None else self.random
        started = time.perf_counter()
        if random:
            self._forward("steady", step)
        seconds = time.perf_counter() - started
        if self.paths == TWO_PATHS:
            outputs = (step.outputs[path] for path in TWO_PATHS)
            step.contributions |= self.output.measure(step.joined, step.inputs, *outputs)
        with deferred_interrupts():
            self.random = random
            self.steady_seconds += seconds
            self._add(step.passes)
            self.output.add(step.contributions)
            self.batches += len(micro_batches)
            self.largest = max(self.largest, len(micro_batches) * self.batch_size)

    def _is_random(self, draws: list[bool]) -> bool:
        """Whether training draws random numbers that inference does not, as far as can be told if both draw some."""
        drew = dict(zip(self.paths, draws, strict=True))
        if not drew.get("train", False):
            return False
        return not drew["eval"] or has_random_layers(self.runner.model)

    def _apart(self, micro_batches: list[Any]) -> list[Any]:
        """The micro-batches one by one, where loss or metric want them."""
        wanted = self.runner.functions.loss or self.runner.functions.metric
        return [to_device(batch, self.runner.device) for batch in micro_batches] if wanted else []

    def _forward(self, path: PathName, step: _Step) -> bool:
        """Run one path; whether it drew random numbers, as far as that is not known from an earlier step."""
        before = random_state() if self.random is None else None
        step.passes[path] = self._pass(path, step.micro_batches)
        step.outputs[path], recorded = self.runner.forward(path, step.joined, step.passes[path])
        drew = before is not None and random_state() != before
        step.inputs |= {position for key in recorded for position in key}
        step.contributions |= user_values(self.runner, path, step.apart, recorded, self.batch_size)
        return drew

    def _pass(self, path: PathName, micro_batches: int) -> Pass:
        images = micro_batches * self.batch_size
        per_image = path == "eval" and self.emulation.trusted
        return Pass(images, self.batch_size, per_image=per_image, layouts=self.emulation.layouts_of(path))

    def _add(self, passes: dict[PathName, Pass]) -> None:
        for pass_ in reversed(passes.values()):
            for slot, record in pass_.records.items():
                self.values.setdefault(slot, record.values)
            self.entered |= pass_.entered
            self.functional |= pass_.functional
        for name, path in (("train", self.train), ("steady", self.steady)):
            if name in passes:
                path.add(self._comparable(name, passes[name], by_batch=True))
        eval_ = passes["eval"]
        records = self._comparable("eval", eval_, by_batch=False)
        # Real micro-batches say nothing about batches of another size.
        others = self.batch_sizes.values() if self.emulation.trusted else ()
        for path in (self.eval, *others):
            path.add(records)

    def _comparable(self, path: PathName, pass_: Pass, by_batch: bool) -> dict[Slot, Recorded]:
        """The calls that normalize as this path should, of selected layers with running statistics."""
        layers = self.runner.layers.layers
        self.by_batch[path] |= {index for (index, _), record in pass_.records.items() if record.by_batch}
        return {
            slot: record
            for slot, record in pass_.records.items()
            if record.by_batch == by_batch
            and layers[slot[0]].selected
            and layers[slot[0]].info.running_mean is not None
        }
