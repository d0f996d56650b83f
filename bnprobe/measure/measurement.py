"""One physical batch after the other on its way through the paths, into the evidence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from bnprobe.errors import UserCodeError
from bnprobe.loading.samples import count_samples
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, join, to_device
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.extremes import Extremes, checked_further
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.interrupts import deferred_interrupts
from bnprobe.measure.layers import has_random_layers
from bnprobe.measure.memory import Chunks, Refusal
from bnprobe.measure.outputs import Contributions, relative_distance
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.measure.physical_batch import Emulation, agreement, agrees_as_far, as_sentence, checked, self_check
from bnprobe.measure.restore import preserved_random_state, random_state
from bnprobe.measure.scores import Found, score_outputs
from bnprobe.measure.session import Outputs, PathName, Session
from bnprobe.records import MEASURES

_DEVICE = 10.0
"""Two passes differ by chance if they do so by more than this many times what the device's rounding does."""

_BEYOND_ROUNDING = 1e-2
"""No device's rounding changes outputs by so much, in half precision either."""

_OTHER = 1e-3
"""Outputs, loss and metric that differ by less, relative, are the same but for rounding."""


@dataclass
class _Step:
    """One physical batch on its way through the paths.

    Attributes:
        given: The micro-batches, on the host.
        joined: The same as a physical batch, on the device.
        apart: The same samples as real micro-batches, for loss and metric; none where neither is given.
        size: Samples in each of them.
        copies: Of what the model itself gave, to be kept.
        inputs: Positions of the tensors of the batch that the model was called on.
    """

    given: list[Any]
    joined: Any
    apart: list[Any]
    size: int
    passes: dict[PathName, Pass] = field(default_factory=dict)
    outputs: dict[PathName, Any] = field(default_factory=dict)
    copies: dict[PathName, Outputs] = field(default_factory=dict)
    inputs: set[int] = field(default_factory=set)
    contributions: Contributions = field(default_factory=dict)
    scores: Found = field(default_factory=dict)


@dataclass
class Measurement:
    """Runs physical batches through the paths of ``evidence``, to which each is added wholly or not at all.

    Attributes:
        steady: What becomes evidence once the model is known to do more in train mode than to normalize by batch.
        more: Whether it does; None before the first step.
        samples_in: Tells how many samples a micro-batch has.
        scored: Loss and metric are taken, where they are given.
        extremes: The micro-batches that differ most in size, by which it is checked again whether they run together.
    """

    session: Session
    evidence: Evidence
    steady: PathEvidence | None = None
    more: bool | None = None
    samples_in: Callable[[Any], int | None] = count_samples
    scored: bool = True
    extremes: Extremes = field(default_factory=Extremes)

    def step(self, micro_batches: list[Any]) -> None:
        """Measure micro-batches that are not on the device yet, as one physical batch where that works.

        Raises:
            DeviceError: Not even one micro-batch fits into memory.
        """
        self._in_chunks(micro_batches, self._measure)

    def score(self, micro_batches: list[Any]) -> None:
        """Add the loss and metric of further micro-batches, and nothing else; as ``step``."""
        self._in_chunks(micro_batches, self._score)

    def _in_chunks(self, micro_batches: list[Any], run: Callable[[list[Any]], None]) -> None:
        self.check_again(micro_batches)
        at_once = len(micro_batches) if self.evidence.batching.emulation.trusted else 1
        chunks = Chunks(self.session.device, self.evidence.batch_size, at_once)
        chunks.run(micro_batches, run, self.refuse)
        if chunks.at_once < len(micro_batches):
            self.evidence.batching = replace(self.evidence.batching, at_once=chunks.at_once)

    def refuse(self, error: Refusal) -> None:
        """Go on with real micro-batches, which cannot run together for this reason."""
        self.settle()
        emulation = self.evidence.batching.emulation
        if emulation.trusted:
            self._go_on_apart(Emulation(False, as_sentence(error), emulation.check, {}))

    def check_again(self, micro_batches: list[Any]) -> None:
        """Go on with real micro-batches if some of these show that the model depends on the largest sample."""
        emulation, size = self.evidence.batching.emulation, self.evidence.batch_size
        found = (MicroBatch(batch, self.samples_in(batch) or size) for batch in micro_batches)
        verdict = checked_further(self.session, self.extremes, emulation, found)
        if verdict is not emulation:
            self._go_on_apart(verdict)

    def settle(self) -> None:
        """See by the self-check whether micro-batches run together, if that is still open."""
        self._check(None)

    def _check(self, step: _Step | None) -> None:
        """As ``settle``, but by a step if that holds the micro-batches that ran alone.

        Raises:
            CannotEmulateError: They do not, and did in this step.
        """
        batching = self.evidence.batching
        emulation, alone, opening = batching.emulation.closed, batching.emulation.alone, batching.emulation.opening
        if not alone:
            return
        self.evidence.batching = replace(batching, emulation=emulation)  # whatever is raised, nothing is left open
        check = None if step is None else agreement(self.session, alone, step.given, step.passes, step.outputs)
        if check is not None and check.passed:
            emulation = replace(emulation, check=check)
        else:
            emulation, _ = checked(self.session, list(opening), batching.batch_size, self_check)
            if check is not None:
                emulation = agrees_as_far(emulation, check)
        self.evidence.batching = replace(batching, emulation=emulation)
        if step is not None and not emulation.trusted:
            raise CannotEmulateError(emulation.reason)

    def _go_on_apart(self, refused: Emulation) -> None:
        later = "Later micro-batches run one by one. " if self.evidence.emulated else ""
        emulation = replace(refused, reason=later + refused.reason)
        self.evidence.batching = replace(self.evidence.batching, emulation=emulation)

    def _score(self, micro_batches: list[Any]) -> None:
        step = self._step_of(micro_batches)
        for path in self.evidence.paths:
            self._forward(path, step)
        with deferred_interrupts():
            self.evidence.scores.add(step.scores)
            self.evidence.kept_outputs.add(step.copies, len(micro_batches), step.size)

    def _measure(self, micro_batches: list[Any]) -> None:
        evidence, step = self.evidence, self._step_of(micro_batches)
        draws: dict[PathName, bool] = {path: self._forward(path, step) for path in evidence.paths if path != "steady"}
        self._check(step)
        repeat = self._repeat(step, draws["eval"]) if self.more is None else evidence.repeat
        random = self._is_random(draws) if self.more is None else evidence.random
        started = time.perf_counter()
        more = self._does_more(random, step) if self.more is None else self.more
        if more and "steady" not in step.passes:
            self._forward("steady", step)
        seconds = time.perf_counter() - started
        if "train" in draws:
            found = evidence.outputs.measure(step.joined, step.inputs, step.outputs["train"], step.outputs["eval"])
            step.contributions |= found
        with deferred_interrupts():
            self.more, evidence.random = more, random
            if more and self.steady is not None:
                evidence.paths["steady"] = self.steady
            evidence.steady_seconds += seconds
            evidence.repeat = repeat
            evidence.add(step.passes, step.contributions, step.scores, len(micro_batches))
            evidence.kept_outputs.add(step.copies, len(micro_batches), step.size)

    def _is_random(self, draws: Mapping[PathName, bool]) -> bool:
        """Whether training draws random numbers that inference does not; if both do, decided by the kinds of layers."""
        if not draws.get("train", False):
            return False
        return not draws["eval"] or has_random_layers(self.session.model, self.session.held)

    def _does_more(self, random: bool, step: _Step) -> bool:
        """Whether train mode does more than to normalize by batch, so that loss and metric are not those of inference.

        Random layers, heads that run in training only, a loss that asks self.training. It is found by running a step
        without all that: where nothing changes, the step is thrown away.
        """
        if random or "train" not in step.passes or not step.apart:
            return random
        with suppress(UserCodeError):  # which this mode alone may raise: nothing else needs it
            self._forward("steady", step)
            if _is_other(step, "train", "steady"):
                return True
        step.passes.pop("steady", None)
        step.copies.pop("steady", None)
        step.scores = {key: rows for key, rows in step.scores.items() if key[1] != "steady"}
        return False

    def _repeat(self, step: _Step, draws: bool) -> float | None:
        """Relative L2 distance of two eval-path passes over the same samples: 0 unless the model is random there.

        Nothing runs again where no random numbers were drawn and the self-check saw the same samples twice: only a
        model with a generator of its own could differ, and its outputs agreed.

        Where they differ, two passes with the same random state say what the device's own rounding does. A model with
        a generator of its own differs there as well, but by more than rounding.
        """
        emulation = self.evidence.batching.emulation
        agreed = emulation.trusted and emulation.check is not None and emulation.check.output_error <= _OTHER
        if agreed and not draws:
            return 0.0
        with preserved_random_state():
            repeat = relative_distance(self._eval_again(step), step.outputs["eval"])
        if not repeat:
            return repeat
        with preserved_random_state():
            first = self._eval_again(step)
        with preserved_random_state():
            device = relative_distance(self._eval_again(step), first) or 0.0
        return repeat if repeat > _DEVICE * device or repeat > _BEYOND_ROUNDING else 0.0

    def _eval_again(self, step: _Step) -> Any:
        return self.session.forward("eval", step.joined, self._pass("eval", step))[0]

    def _pass(self, path: PathName, step: _Step, per_sample: bool = False) -> Pass:
        """Real batches of any size count as one of the usual size, unless their samples are told apart."""
        batching = replace(self.evidence.batching, batch_size=step.size) if per_sample else self.evidence.batching
        return batching.pass_over(len(step.given), path, per_sample=per_sample)

    def _step_of(self, micro_batches: list[Any]) -> _Step:
        device, scored = self.session.device, self.scored and self.session.functions.scores
        apart = [to_device(batch, device) for batch in micro_batches] if scored else []
        size = self.samples_in(micro_batches[0]) or self.evidence.batch_size
        return _Step(micro_batches, to_device(join(micro_batches, size), device), apart, size)

    def _forward(self, path: PathName, step: _Step) -> bool:
        """Run one path; return whether it drew random numbers, which is checked in the first step only."""
        before = random_state() if self.more is None else None
        per_sample = path == "eval" and self.evidence.batching.emulation.trusted
        step.passes[path] = self._pass(path, step, per_sample)
        step.outputs[path], recorded = self.session.forward(path, step.joined, step.passes[path])
        if step.apart and self.steady is not None:
            step.copies[path] = self.evidence.kept_outputs.copied(recorded, step.size * len(step.given))
        if per_sample:
            self.evidence.batching.emulation.require_same_sizes(path, step.passes[path])
            self.evidence.batching.emulation.require_same_calls(path, step.passes[path])
        drew = before is not None and random_state() != before
        step.inputs |= {position for key in recorded for position in key}
        step.scores |= score_outputs(self.session, path, step.apart, recorded, step.size, self.evidence.scores)
        return drew


def _is_other(step: _Step, one: PathName, other: PathName) -> bool:
    """Whether two paths ran other layers, or gave other outputs, loss or metric, by more than rounding."""
    if step.passes[one].entered != step.passes[other].entered:
        return True
    apart = relative_distance(step.outputs[one], step.outputs[other])
    if apart is None or apart > _OTHER:
        return True
    for measure in MEASURES:
        rows = [step.scores[measure, path] for path in (one, other) if (measure, path) in step.scores]
        for mine, its in zip(*rows, strict=True) if len(rows) > 1 else ():
            if bool((mine.value - its.value).abs() > _OTHER * mine.value.abs()):
                return True
    return False
