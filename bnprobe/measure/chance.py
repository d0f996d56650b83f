"""Do outputs know their own sample? What loss and metric are where every sample is given the output of another one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnprobe.errors import BnprobeError
from bnprobe.loading.returned import one_number
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, copy_tensors, tensors_of, to_device
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.scores import ScoreTable, run_together, score_outputs, scoring
from bnprobe.measure.session import Outputs, PathName, Session, rows_of
from bnprobe.records import MEASURES, Chance, ChanceValues, Measure
from bnprobe.stats.scores import Scores, paired_difference

SAMPLES = 256
"""Samples whose outputs are given to other samples."""

_FEWEST = 2
"""Micro-batches that there must be for that."""

KEPT_BYTES = 2**24
"""Outputs of a scan are kept up to this size, so that they need not be computed again."""

_SAME = 1e-6
"""A loss that changes by no more than this, relative, does not depend on which sample an output belongs to."""


class _Kept(NamedTuple):
    """What a physical batch of so many micro-batches, of so many samples each, gave on each path."""

    micro_batches: int
    size: int
    outputs: Mapping[PathName, Outputs]


@dataclass
class KeptOutputs:
    """Outputs of the model for the first micro-batches of a scan, where they are small.

    They stay in the process that computed them: pickled, this is empty.
    """

    _steps: list[_Kept] = field(default_factory=list)
    _bytes: int = 0
    _open: bool = True

    def copied(self, outputs: Outputs, samples: int) -> Outputs:
        """A copy of what so many samples gave on one path, for ``add``; empty where there is enough, or it is too much.

        It is to be made right after the pass: a model may write the next outputs into the same tensors.
        """
        if not self._open:
            return {}
        tensors = tensors_of(outputs)
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        if self._bytes > KEPT_BYTES or any(tensor.requires_grad for tensor in tensors):  # a graph holds much more
            self._steps.clear()
            self._open = False
            return {}
        return rows_of(outputs, 0, samples, samples)

    def add(self, copies: Mapping[PathName, Outputs], micro_batches: int, size: int) -> None:
        """Keep the copies of the next physical batch, of so many micro-batches of so many samples each."""
        if self._open and copies:
            self._steps.append(_Kept(micro_batches, size, copies))
            samples = sum(step.micro_batches * step.size for step in self._steps)
            self._open = samples < SAMPLES or self.micro_batches < _FEWEST

    @property
    def micro_batches(self) -> int:
        """How many there are outputs of."""
        return sum(step.micro_batches for step in self._steps)

    def of(self, path: PathName, micro_batches: int) -> list[tuple[int, int, Outputs]]:
        """Of the first so many, as far as there are any: how many are in each physical batch, their size and outputs.

        Where the path without random layers was not measured, it is the train path.
        """
        found, left = list[tuple[int, int, Outputs]](), micro_batches
        for step in self._steps:
            name: PathName = "train" if path == "steady" and path not in step.outputs else path
            if left <= 0 or name not in step.outputs:
                break
            used = min(left, step.micro_batches)
            own = rows_of(step.outputs[name], 0, used * step.size, step.micro_batches * step.size)
            found.append((used, step.size, own))
            left -= used
        return found

    def __reduce__(self) -> tuple[type[KeptOutputs], tuple[()]]:
        return KeptOutputs, ()


def chance_levels(
    session: Session,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    kept: KeptOutputs | None,
    most: int | None = None,
) -> tuple[tuple[Chance, ...], int]:
    """Loss and metric with every sample's own output, and with the output of a sample of another micro-batch.

    Outputs that say nothing about their sample score the same in both. On the path without random layers, and on the
    eval path. The other sample is from a micro-batch half the list away, since neighbours may be of one kind.

    Args:
        session: Installed.
        micro_batches: On the host; the first ones are enough.
        batching: How they run.
        kept: Their outputs, as far as these are known; None: they are not.
        most: Samples to use, at least two micro-batches; None, or more: ``SAMPLES``.

    Returns:
        One for each function; a mode is None where an output cannot be given to another sample (the function runs the
        model on something else, or samples differ in size), and where the value is one of the outputs alone, as where
        all samples have the same target. And how many samples were used.
    """
    found: dict[PathName, dict[str, ChanceValues]] = {"steady": {}, "eval": {}}
    largest = max(batch.samples for batch in micro_batches)
    some = micro_batches[: max(_FEWEST, min(SAMPLES, SAMPLES if most is None else most) // largest)]
    if len(some) >= _FEWEST:
        for path in found:
            with suppress(BnprobeError, CannotEmulateError):
                found[path] = dict(_chance(session, path, some, batching, kept))
    levels = (Chance(each, found["steady"].get(each), found["eval"].get(each)) for each in MEASURES)
    known = tuple(level for level in levels if level.training is not None or level.inference is not None)
    return known, sum(batch.samples for batch in some)


def _chance(
    session: Session, path: PathName, micro_batches: Sequence[MicroBatch], batching: Batching, kept: KeptOutputs | None
) -> Iterator[tuple[str, ChanceValues]]:
    own = ScoreTable()
    other: dict[Measure, list[Tensor]] = {}
    recorded: list[tuple[Any, int, Outputs]] = []

    def record(batches: list[Any], size: int, outputs: Outputs) -> None:
        own.add(score_outputs(session, path, batches, outputs, size))
        starts = range(0, size * len(batches), size)
        parts = [rows_of(outputs, start, start + size, size * len(batches)) for start in starts]
        recorded.extend((batch, size, part) for batch, part in zip(batches, parts, strict=True))

    known, left = [] if kept is None else kept.of(path, len(micro_batches)), list(micro_batches)
    if known:  # a pass sets the mode that loss and metric may ask for
        session.forward(path, to_device(left[0].data, session.device), Pass(left[0].samples, left[0].samples))
    for number, size, outputs in known:
        record([to_device(batch.data, session.device) for batch in left[:number]], size, outputs)
        del left[:number]
    run_together(session, path, left, batching, lambda *step: record(*step[:3]), scored=True)
    given = {"loss": session.functions.loss, "metric": session.functions.metric}
    functions = {measure: function for measure in MEASURES if (function := given[measure]) is not None}
    for measure, function in functions.items():
        with scoring(session, path, measure, function, recorded[0][1]) as call:
            for position, (batch, size, _) in enumerate(recorded):
                _, _, outputs = recorded[(position + len(recorded) // 2) % len(recorded)]
                value = call(copy_tensors(batch), rows_of(outputs, 0, size, size))
                other.setdefault(measure, []).append(one_number(measure, function, value).cpu())
    for measure, values in other.items():
        if (mine := own.scores(measure, path)) is None:
            continue
        theirs = Scores(torch.stack(values), mine.sizes)
        change = paired_difference(Scores(mine.batches, mine.sizes), theirs, shared=True)
        # Every output is used once on both sides: a value of the outputs alone has the same mean.
        if math.isfinite(theirs.mean) and abs(mine.mean - theirs.mean) > _SAME * abs(mine.mean):
            yield measure, ChanceValues(mine.mean, theirs.mean, change)
