"""Loss and metric of micro-batches, and of their samples one by one where they are means over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DataError, UserCodeError
from bnprobe.loading.model import BatchFunction
from bnprobe.loading.returned import one_number
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, join, pick, to_device
from bnprobe.measure.forward_pass import Blend, LayerStatistics, Pass
from bnprobe.measure.memory import Result
from bnprobe.measure.physical_batch import DIFFERENT_SIZES, Batching
from bnprobe.measure.restore import preserved_random_state
from bnprobe.measure.session import Outputs, PathName, Session, rows_of
from bnprobe.records import MEASURES, Measure, Score
from bnprobe.stats.scores import Scores

MOST_SAMPLES = 512
"""Samples per path that loss and metric are called on one by one; a call takes some 0.2 ms beside the function's own
time."""

_SAME = 1e-4
"""Relative difference of the mean over samples from the value of their micro-batch that rounding explains."""


@dataclass(frozen=True)
class Scored:
    """What a function of the user gave for one micro-batch.

    Attributes:
        value: For the micro-batch, float64.
        size: Its samples.
        samples: For each of its samples; None where that was not tried, or where ``value`` is not their mean.
        tried: Whether the samples were tried.
    """

    value: Tensor
    size: int
    samples: Tensor | None = None
    tried: bool = False


Found = dict[tuple[Measure, PathName], list[Scored]]


@dataclass
class ScoreTable:
    """Loss and metric of micro-batches, by path. Paths that are compared have the same micro-batches in the same order.

    Attributes:
        rows: What was added.
        most: Samples of each path that may be scored one by one.
    """

    rows: Found = field(default_factory=dict)
    most: int = MOST_SAMPLES

    def add(self, found: Found) -> None:
        """Add what one physical batch gave."""
        for key, rows in found.items():
            self.rows.setdefault(key, []).extend(rows)

    def merge(self, other: ScoreTable) -> None:
        """Add what was measured on other micro-batches."""
        self.add(other.rows)

    def part(self, chosen: slice) -> ScoreTable:
        """Some of the micro-batches."""
        return replace(self, rows={key: rows[chosen] for key, rows in self.rows.items()})

    def on_host(self) -> ScoreTable:
        """The same in host memory."""
        return replace(self, rows={key: [_on_host(row) for row in rows] for key, rows in self.rows.items()})

    def room(self, measure: Measure, path: PathName) -> int:
        """How many more samples to score one by one; 0 where the figure is no mean over samples."""
        if not self._by_sample(measure):
            return 0
        taken = sum(row.size for row in self.rows.get((measure, path), []) if row.samples is not None)
        return max(self.most - taken, 0)

    def scores(self, measure: Measure, path: PathName) -> Scores | None:
        """The figures of a path; None without any, or where their mean is not finite."""
        rows = self.rows.get((measure, path))
        if not rows:
            return None
        batches = torch.stack([row.value for row in rows]).cpu()
        if not bool(torch.isfinite(batches.mean())):
            return None
        sizes = torch.tensor([float(row.size) for row in rows], dtype=torch.float64)
        known = [row.samples.cpu() for row in rows if row.samples is not None]
        return Scores(batches, sizes, torch.cat(known) if known and self._by_sample(measure) else None)

    @property
    def count(self) -> int:
        """Samples of which there is a figure, on one path."""
        return max((sum(row.size for row in rows) for rows in self.rows.values()), default=0)

    def finite(self, measure: Measure, path: PathName) -> bool:
        """Whether the figures of a path have a finite mean, or there are none."""
        return (measure, path) not in self.rows or self.scores(measure, path) is not None

    def score(self, path: PathName) -> Score:
        """Means of loss and metric on one path; None where not given, or not finite."""
        loss, metric = (self.scores(measure, path) for measure in MEASURES)
        return Score(None if loss is None else loss.mean, None if metric is None else metric.mean)

    def _by_sample(self, measure: Measure) -> bool:
        """Whether the figure was the mean over samples wherever that was tried, on every path."""
        found = [row for (name, _), rows in self.rows.items() if name == measure for row in rows if row.tried]
        return all(row.samples is not None for row in found)


def _on_host(row: Scored) -> Scored:
    return replace(row, value=row.value.cpu(), samples=None if row.samples is None else row.samples.cpu())


def score_outputs(
    session: Session,
    path: PathName,
    micro_batches: Sequence[Any],
    outputs: Outputs,
    size: int,
    room: Mapping[Measure, int] | None = None,
) -> Found:
    """Loss and metric of micro-batches that a path was run on just now.

    They see real micro-batches, as in training, also where these ran together. Where they call the model on the
    batch's own tensors they get the output that is there already. So do single samples: they cost no forward pass.

    Args:
        micro_batches: On the device, ``size`` samples each.
        outputs: Of the model, for all of them.
        room: Samples to score one by one, by ``ScoreTable.room``; None: none.
    """
    found: Found = {}

    def each() -> Iterator[tuple[Any, Outputs]]:
        for position, batch in enumerate(micro_batches):
            start = position * size
            yield batch, rows_of(outputs, start, start + size, size * len(micro_batches))

    for measure in MEASURES:
        function: BatchFunction | None = getattr(session.functions, measure)
        if function is None:
            continue
        with session.calling(path, measure, function, Pass(size, size)) as call:
            values = [one_number(measure, function, call(*one)).to(session.device) for one in each()]
        rows = found[measure, path] = [Scored(value, size) for value in values]
        most = (room or {}).get(measure, 0) // size
        # Right after each other: it takes longer to prepare a call than to make it.
        with preserved_random_state(), scoring(session, path, measure, function) as call:
            for position, one in enumerate(islice(each(), most)):
                samples = score_samples(call, measure, function, *one, size, values[position])
                rows[position] = replace(rows[position], samples=samples, tried=True)
                if samples is None:
                    break
    return found


@contextmanager
def scoring(
    session: Session, path: PathName, measure: Measure, function: BatchFunction, samples: int = 1
) -> Iterator[Callable[[Any, Outputs], Any]]:
    """Call the user's function on batches of so many samples and the outputs that the model is to give.

    A call raises CannotEmulateError where the function runs the model on anything else.
    """
    pass_ = Pass(samples, samples)
    with session.calling(path, measure, function, pass_) as run:

        def call(batch: Any, outputs: Outputs) -> Any:
            value = run(batch, outputs)
            if pass_.entered:
                raise CannotEmulateError("it runs the model on something else than the batch's own tensors")
            return value

        yield call


def score_samples(
    call: Callable[[Any, Outputs], Any],
    measure: Measure,
    function: BatchFunction,
    batch: Any,
    outputs: Outputs,
    size: int,
    value: Tensor,
) -> Tensor | None:
    """The values of single samples, if their mean is the value of their micro-batch; else None.

    Args:
        call: Calls ``function`` on a batch, answering calls of the model with outputs; raises where these do not do.
        batch, outputs: Of the micro-batch.
        size: Samples in it.
        value: Of the micro-batch.
    """
    if size == 1:
        return value.reshape(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the function was not written for one sample
            values = [
                one_number(measure, function, call(pick(batch, [row], size), rows_of(outputs, row, row + 1, size)))
                for row in range(size)
            ]
    except Exception:  # whatever it is that the user's function cannot do with one sample
        return None
    samples = torch.stack(values).to(value)
    near = (samples.mean() - value).abs() <= _SAME * samples.abs().mean()
    return samples if bool(near) else None


def why_unscored(score: Callable[[], object], what: str = "Loss and metric", where: str = "held-out") -> str | None:
    """That loss or metric cannot be computed on some data, as without labels, and what was raised: a sentence.

    Args:
        score: Computes them on the first batch.
        what: Which of them.
        where: On which data.

    Returns:
        None if nothing was raised.
    """
    try:
        score()
    except (UserCodeError, DataError) as error:
        said = str(error).partition("\n")[0].rstrip(".:")
        return f"{what} cannot be computed on the {where} data: {said}."
    return None


def score_batches(
    session: Session,
    path: PathName,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    *,
    by_batch: frozenset[int] = frozenset(),
    statistics: LayerStatistics | None = None,
    blend: Blend | None = None,
    group: int | None = None,
    most: int = MOST_SAMPLES,
) -> ScoreTable:
    """Loss and metric of micro-batches, each of which the functions see by itself, and of samples where possible.

    Two tables of the same micro-batches are compared with ``stats.scores.paired_difference``.

    Args:
        session: Installed.
        micro_batches: Those of different sizes run one by one.
        batching: How they run.
        by_batch, statistics, blend: As in ``Pass``.
        group: Samples that batch statistics are taken of; None: the micro-batch, as where
            it does not divide into groups.

    Raises:
        DeviceError, UserCodeError, DataError: See ``Chunks`` and ``Session``.
    """
    table = ScoreTable()

    def score(batches: list[Any], size: int, outputs: Outputs, pass_: Pass) -> None:
        room = {measure: table.room(measure, path) for measure in MEASURES}
        table.add(score_outputs(session, path, batches, outputs, size, room))

    given = (session, path, micro_batches, batching, score)
    run_together(*given, by_batch=by_batch, statistics=statistics, blend=blend, group=group)
    return table


def run_together(
    session: Session,
    path: PathName,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    use: Callable[[list[Any], int, Outputs, Pass], Result],
    *,
    by_batch: frozenset[int] = frozenset(),
    statistics: LayerStatistics | None = None,
    blend: Blend | None = None,
    group: int | None = None,
) -> list[Result]:
    """Run micro-batches, as many at once as fill a physical batch.

    Args:
        session: Installed.
        micro_batches, batching, by_batch, statistics, blend, group: As in ``score_batches``.
        use: Gets the micro-batches of one forward pass on the device, the samples of each, their outputs, and the pass.

    Returns:
        What ``use`` gave for each forward pass.

    Raises:
        DeviceError, UserCodeError, DataError: See ``Chunks`` and ``Session``.
    """

    def run(chunk: list[MicroBatch]) -> Result:
        size, batches = chunk[0].samples, [batch.data for batch in chunk]
        if any(batch.samples != size for batch in chunk):
            raise CannotEmulateError(DIFFERENT_SIZES)
        how = replace(batching, batch_size=size)
        pass_ = how.pass_over(len(chunk), path, by_batch=by_batch, statistics=statistics or {}, blend=blend)
        pass_.batch_size = group if group and size % group == 0 else size
        _, outputs = session.forward(path, to_device(join(batches, size), session.device), pass_)
        return use([to_device(batch, session.device) for batch in batches], size, outputs, pass_)

    return batching.chunks(session.device).run(micro_batches, run)
