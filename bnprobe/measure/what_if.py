"""What each free remedy would give, measured on held-out data. The model's own statistics do not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from bnprobe.errors import UsageError
from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.memory import plan_small
from bnprobe.measure.physical_batch import Batching, as_sentence
from bnprobe.measure.population import steady_population
from bnprobe.measure.scores import ScoreTable
from bnprobe.measure.session import Session
from bnprobe.measure.trial import RAISES, REFUSALS, MicroBatchStatistics, Trial, Tried
from bnprobe.records import Goal

_LAYER_PASSES = 4096
"""Samples times layers for the statistics that are taken layer by layer, each in a pass of its own."""

FEWEST_TRIED = 8
"""Micro-batches that remedies are tried on at least, where there are so many."""


def what_if(
    session: Session,
    training: Sequence[MicroBatch],
    held_out: Sequence[MicroBatch],
    batching: Batching,
    scoring: Batching | None = None,
    *,
    goal: Goal = "max",
    goal_is_known: bool = True,
    scored_on: Literal["held-out", "training"] = "held-out",
    larger: bool = True,
    seconds: float | None = None,
    micro_batch: MicroBatchStatistics | None = None,
    population: int | None = None,
    before: ScoreTable | None = None,
    brief: bool = False,
) -> Tried:
    """Loss and metric on the held-out batches, eval path, as loaded and with each remedy.

    * "recalibrated": the population statistics of the training data as running statistics. Where samples cannot be
      mixed, they are taken on the train path and on the eval path, and the better ones count, as in
      ``bnprobe recalibrate``.
    * "evaluation statistics": those of the held-out data.
    * "batch statistics": every held-out batch normalizes with its own statistics, in batches of the scanned size
      where the held-out batches divide into such.
    * "instance statistics": every sample with its own, where it gives every layer more than one value per channel.
    * "instance renorm": the outputs of these and of the running statistics, half and half. This one and the next
      are scored on every other micro-batch.
    * "example weighing": every sample's own moments mixed into the running ones, with one weight for all layers. The
      weight is chosen on some of the others.
    * "statistics per call": in layers that are called more than once, every call has those of its own data. Where
      ``bnprobe.nn.domain`` says in the user's code what the calls are of, those of one domain share theirs.
    * "micro-batch statistics, averaged" and "..., pooled": ``micro_batch``, where they differ from each other and from
      the recalibrated ones, as ``bnprobe recalibrate`` takes them with ``--path micro-batch-...``.
    * "recalibrated with frozen layers": as "recalibrated", but in the layers, too, that model.train() leaves in eval
      mode; only where there are such layers. The control is "recalibrated", where that changes any layer: what is left
      is the effect of the frozen ones.
    * "batch statistics, batches of N": the same in larger batches, as far as data and memory allow and samples of
      different batches may be mixed. Loss and metric see these larger batches, and a metric may not be a mean over
      samples: the control is the model as loaded, scored in batches of the same size.

    Instance renorm, example weighing and statistics per call are conversions: ``bnprobe convert`` recalibrates first
    unless that is surely worse. So do these, and so does their control. They are tried where all layers concerned
    derive from torch's BN.

    The layers concerned are those that are selected, keep running statistics and, but for the frozen ones, update them
    in training. Population statistics are pooled over all samples, their variance is unbiased, like that of the
    buffers, and they are cast to the buffers' dtype; see ``steady_population``.

    Where the interval of a change would be sure, it also covers which data the statistics were taken of, by those of
    all but a quarter of it (docs/decisions/0040). A conversion has the statistics of its control: there it does not.

    A remedy that cannot be tried, because the model mixes samples or raises on other batches than the loader's, is left
    out with the reason.

    Args:
        session: Installed.
        training, held_out: Both are bounded by the caller.
        batching: How the training batches run.
        scoring: How the held-out batches run; None: the same way.
        goal: Whether a larger or a smaller metric is better.
        goal_is_known: Whether the user said so.
        scored_on: Where ``held_out`` comes from. Statistics of training data as evaluation data say nothing.
        larger: Whether to try larger batches too.
        seconds: What scoring the model once may take, by the first two micro-batches; others are left out, down to 8.
            None: no limit.
        micro_batch: Statistics of micro-batches as in training, of other data than what is scored; None: not known.
        population: Samples of the training data, where it is a finite set that is always the same.
        before: Scores of the model as loaded on the held-out batches, one of each; None: not known.
        brief: As in ``Trial``.

    Returns:
        In this order, but that frozen layers come right after "recalibrated"; none if no layer is concerned. Both need
        training batches.

    Raises:
        UsageError: There is neither loss nor metric, or no held-out batch.
    """
    _require_a_measure(session, held_out)
    how = (goal, goal_is_known, scored_on)
    trial = Trial(session, scoring or batching, *how, held_out, population=population, brief=brief)
    most = _LAYER_PASSES
    try:
        if seconds is not None:
            each = trial.seconds_per_sample()
            trial, training = replace(trial, batches=_within(held_out, seconds, each)), _within(training, seconds, each)
            most = min(most, int(seconds / each))
        before = trial.score() if before is None else before.part(slice(len(trial.batches)))
        own, footprint = steady_population(session, trial.batches, trial.batching)
    except REFUSALS as error:
        return Tried(untried=(f"No remedy was tried. {as_sentence(error, RAISES)}",))
    trial = replace(trial, means=before.known_means(), together=plan_small(footprint, session.device))
    layers = frozenset(own.statistics())
    frozen: dict[str, float] = {}
    if training:
        statistics_of = partial(trial.statistics_of, training, batching, footprint, most)
        frozen = trial.recalibrations(statistics_of, layers, before)
    if not layers:
        return trial.tried(training, frozen)
    if scored_on == "held-out":
        trial.of_evaluation_data(own, before)
    trial.by_batch(layers, batching.batch_size, own, before)
    trial.by_sample(layers, own, before)
    trial.by_call(own.shared() & layers, training, batching, before)
    if micro_batch is not None:
        trial.of_micro_batches(layers, micro_batch, before)
    if larger:
        trial.larger_batches(layers, before, footprint)
    return trial.tried(training, frozen)


def _within(batches: Sequence[MicroBatch], seconds: float, each: float) -> Sequence[MicroBatch]:
    """The first micro-batches, whose samples take ``each`` so long, that fit into the time."""
    usual = max(batch.samples for batch in batches) if batches else 1
    return batches[: max(FEWEST_TRIED, int(seconds / (each * usual)))]


def _require_a_measure(session: Session, held_out: Sequence[MicroBatch]) -> None:
    if session.functions.loss is None and session.functions.metric is None:
        raise UsageError(
            "What-if compares remedies by a loss or metric, but there is neither. Add loss(model, batch) or"
            " metric(model, batch) to the model file, or name one in the spec."
        )
    if not held_out:
        raise UsageError(
            "What-if measures remedies on held-out data, but there is none. Add load_eval_data(batch_size) to the"
            " model file, or name eval_data in the spec."
        )
