"""Loss and metric of micro-batches, and of their samples one by one where they are means over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DataError, UserCodeError
from bnprobe.loading.model import BatchFunction
from bnprobe.loading.returned import one_number
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, copy_tensors, join, one_by_one, to_device
from bnprobe.measure.forward_pass import Blend, LayerStatistics, Pass
from bnprobe.measure.memory import SMALL_SAMPLES, Result, plan_small
from bnprobe.measure.physical_batch import Batching, footprint_of
from bnprobe.measure.restore import preserved_random_state, random_state
from bnprobe.measure.session import Outputs, PathName, Session, outputs_one_by_one, rows_of
from bnprobe.records import MEASURES, Measure, Score
from bnprobe.stats.scores import Scores

MOST_SAMPLES = 512
"""Samples per path that loss and metric are called on one by one; a call takes some 0.05 ms beside the function's own
time."""

_ENOUGH = 16
"""Micro-batches on which a figure that is the mean over samples of each of them counts as such on the others, too."""

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
        means: What is known to be a mean over samples before anything is added.
    """

    rows: Found = field(default_factory=dict)
    most: int = MOST_SAMPLES
    means: frozenset[Measure] = frozenset()

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

    def known_means(self) -> frozenset[Measure]:
        """Figures that are known to be means over samples, so that micro-batches need not be scored by themselves."""
        tried = {measure: sum(row.tried for row in self._rows_of(measure)) for measure in MEASURES}
        enough = (measure for measure in MEASURES if measure in self.means or tried[measure] >= _ENOUGH)
        return frozenset(measure for measure in enough if self._by_sample(measure))

    def scores(self, measure: Measure, path: PathName) -> Scores | None:
        """The figures of a path; None without any, or where their mean is not finite."""
        rows = self.rows.get((measure, path))
        if not rows:
            return None
        batches = torch.stack([row.value for row in rows]).cpu()
        if not bool(torch.isfinite(batches.mean())):
            return None
        sizes = torch.tensor([float(row.size) for row in rows], dtype=torch.float64)
        by_sample = self._by_sample(measure)
        known = [row.samples.cpu() for row in rows if by_sample and row.samples is not None]
        is_mean = bool(known) or (by_sample and measure in self.means)
        return Scores(batches, sizes, torch.cat(known) if known else None, is_mean)

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
        return all(row.samples is not None for row in self._rows_of(measure) if row.tried)

    def _rows_of(self, measure: Measure) -> list[Scored]:
        return [row for (name, _), rows in self.rows.items() if name == measure for row in rows]


def _on_host(row: Scored) -> Scored:
    return replace(row, value=row.value.cpu(), samples=None if row.samples is None else row.samples.cpu())


def score_outputs(
    session: Session,
    path: PathName,
    micro_batches: Sequence[Any],
    outputs: Outputs,
    size: int,
    table: ScoreTable | None = None,
) -> Found:
    """Loss and metric of micro-batches that a path was run on just now.

    They see real micro-batches, as in training, also where these ran together. Where they call the model on the
    batch's own tensors they get the output that is there already. So do single samples: they cost no forward pass.

    A figure that has been the mean over samples on ``_ENOUGH`` micro-batches is taken of the samples alone, and once of
    all micro-batches together, which must agree; else it is taken of each micro-batch as before.

    Args:
        micro_batches: On the device, ``size`` samples each.
        outputs: Of the model, for all of them.
        table: What was scored before, which says of how many samples the figures are of use one by one; None: of none.
    """
    found: Found = {}
    for measure in MEASURES:
        function: BatchFunction | None = getattr(session.functions, measure)
        if function is None or not micro_batches:
            continue
        one = _Scoring(session, path, measure, function, micro_batches, outputs, size)
        most = 0 if table is None else table.room(measure, path) // size
        rows: list[Scored] = []
        if table is not None and measure in table.known_means() and (not table.most or most >= len(micro_batches)):
            rows = one.together(by_sample=most > 0)
        found[measure, path] = rows or one.apart(most)
    return found


@dataclass(frozen=True)
class _Scoring:
    """One function on micro-batches that ran together; see ``score_outputs``."""

    session: Session
    path: PathName
    measure: Measure
    function: BatchFunction
    micro_batches: Sequence[Any]
    outputs: Outputs
    size: int

    @property
    def total(self) -> int:
        return self.size * len(self.micro_batches)

    def apart(self, most: int) -> list[Scored]:
        """Each micro-batch, and the single samples of the first ``most``."""
        values = self._values(self.micro_batches)
        rows = [Scored(value, self.size) for value in values]
        if most and rows:
            samples = self._samples(values[:most], self.micro_batches[:most], self.size)
            known = [None] * len(rows[:most]) if samples is None else samples
            rows[:most] = [replace(row, samples=each, tried=True) for row, each in zip(rows, known, strict=False)]
        return rows

    def together(self, by_sample: bool) -> list[Scored]:
        """All micro-batches as one, and by their samples what each is; nothing where these do not say it."""
        with suppress(UserCodeError, DataError):  # which may be right: joined tensors are plain ones
            whole = [join(list(self.micro_batches), self.size)]
            values = self._values(whole)
            if not by_sample:
                return [Scored(values[0], self.total)]
            if (samples := self._samples(values, whole, self.total)) is not None:
                return [Scored(row.mean(), self.size, row, tried=True) for row in samples.view(-1, self.size)]
        return []

    def _values(self, batches: Sequence[Any]) -> Tensor:
        """Of batches of equal size, float64."""
        size = self.total // len(batches)
        with self.session.calling(self.path, self.measure, self.function, Pass(size, size)) as call:
            parts = (rows_of(self.outputs, start, start + size, self.total) for start in range(0, self.total, size))
            returned = (call(copy_tensors(batch), part) for batch, part in zip(batches, parts, strict=True))
            values = [one_number(self.measure, self.function, value) for value in returned]
        return torch.stack(values).to(self.session.device)

    def _samples(self, values: Tensor, batches: Sequence[Any], size: int) -> Tensor | None:
        """What ``score_samples`` gives for batches of ``size`` with these values: micro-batches, or all as one."""
        own = rows_of(self.outputs, 0, size * len(batches), self.total)
        with preserved_random_state(), scoring(self.session, self.path, self.measure, self.function) as call:
            return score_samples(call, self.measure, self.function, samples_apart(batches, own, size), values, size)


@contextmanager
def scoring(
    session: Session, path: PathName, measure: Measure, function: BatchFunction, samples: int = 1
) -> Iterator[Callable[[Any, Outputs], Any]]:
    """Call the user's function on batches of so many samples and the outputs that the model is to give.

    A call may write into what it gets. It raises CannotEmulateError where the function runs the model on anything else.
    """
    pass_ = Pass(samples, samples)
    with session.calling(path, measure, function, pass_, again=False) as run:

        def call(batch: Any, outputs: Outputs) -> Any:
            value = run(batch, outputs)
            if pass_.entered:
                raise CannotEmulateError("it runs the model on something else than the batch's own tensors")
            return value

        yield call


def samples_apart(batches: Sequence[Any], outputs: Outputs, size: int) -> Iterator[tuple[Any, Outputs]]:
    """The samples of batches of ``size`` one by one, copied, each with its outputs."""
    samples = (sample for batch in batches for sample in one_by_one(batch, size))
    return zip(samples, outputs_one_by_one(outputs, size * len(batches)), strict=True)


def score_samples(
    call: Callable[[Any, Outputs], Any],
    measure: Measure,
    function: BatchFunction,
    singles: Iterable[tuple[Any, Outputs]],
    values: Tensor,
    size: int,
) -> Tensor | None:
    """The values of single samples, shape (batches, size), if their means are the values of batches; else None.

    Args:
        call: Calls ``function`` on a batch, answering calls of the model with outputs; raises where these do not do.
        singles: As ``samples_apart`` gives them.
        values: Of batches of ``size`` samples each.
    """
    if size == 1:
        return values.unsqueeze(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the function was not written for one sample
            found = [one_number(measure, function, call(*single)) for single in singles]
    except Exception:  # whatever it is that the user's function cannot do with one sample
        return None
    samples = torch.stack(found).to(values).view(-1, size)
    near = (samples.mean(1) - values).abs() <= _SAME * samples.abs().mean(1)
    return samples if bool(near.all()) else None


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
    means: frozenset[Measure] = frozenset(),
) -> ScoreTable:
    """Loss and metric of micro-batches, each of which the functions see by itself, and of samples where possible.

    Two tables of the same micro-batches are compared with ``stats.scores.paired_difference``.

    Args:
        session: Installed.
        micro_batches: Consecutive ones of the same size may run together.
        batching: How they run.
        by_batch, statistics, blend: As in ``Pass``.
        group: Samples that batch statistics are taken of; None: the micro-batch, as where
            it does not divide into groups.
        most, means: As in ``ScoreTable``.

    Raises:
        DeviceError, UserCodeError, DataError: See ``Chunks`` and ``Session``.
    """
    table = ScoreTable(most=most, means=means)

    def score(batches: list[Any], size: int, outputs: Outputs, pass_: Pass) -> None:
        table.add(score_outputs(session, path, batches, outputs, size, table))

    given = (session, path, micro_batches, batching, score)
    run_together(*given, by_batch=by_batch, statistics=statistics, blend=blend, group=group, scored=True)
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
    scored: bool = False,
) -> list[Result]:
    """Run micro-batches, as many at once as fill a physical batch.

    Of a small network more may run at once where they are scored only and no random numbers are drawn, which the first
    pass tells: what is drawn depends on what runs together.

    Args:
        session: Installed.
        micro_batches, batching, by_batch, statistics, blend, group: As in ``score_batches``.
        scored: Only outputs are of use: no moments of layers that normalize with running statistics are recorded.
        use: Gets the micro-batches of one forward pass on the device, the samples of each, their outputs, and the pass.

    Returns:
        What ``use`` gave for each forward pass.

    Raises:
        DeviceError, UserCodeError, DataError: See ``Chunks`` and ``Session``.
    """

    chunks = batching.chunks(session.device)
    may_grow = scored and batching.emulation.trusted and batching.at_once * batching.batch_size < SMALL_SAMPLES

    def run(chunk: list[MicroBatch]) -> Result:
        nonlocal may_grow
        size, batches = chunk[0].samples, [batch.data for batch in chunk]
        how, before = replace(batching, batch_size=size), random_state() if may_grow else None
        answers = {"by_batch": by_batch, "statistics": statistics or {}, "blend": blend}
        pass_ = how.pass_over(len(chunk), path, moments=may_grow or not scored, **answers)
        pass_.batch_size = group if group and size % group == 0 else size
        _, outputs = session.forward(path, to_device(join(batches, size), session.device), pass_)
        if may_grow and chunks.at_once == batching.at_once and random_state() == before:
            chunks.at_once = max(chunks.at_once, plan_small(footprint_of(pass_), session.device) // size)
        may_grow = False
        return use([to_device(batch, session.device) for batch in batches], size, outputs, pass_)

    alike = groupby(micro_batches, key=attrgetter("samples"))
    return [result for _, group in alike for result in chunks.run(list(group), run)]
