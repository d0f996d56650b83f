"""What a scan measures beyond the two paths: effects, remedies, what tells causes apart, training steps, gradients.

``measure_further`` is the table of contents. It runs in the session that measured the paths, on the micro-batches that
were kept for it (``batches_to_keep``).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor, nn

from bnprobe.config.spec import OptimizerSpec, ScanSettings
from bnprobe.errors import BnprobeError
from bnprobe.loading.model import user_code
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.measure.batch import MicroBatch, to_device
from bnprobe.measure.causes import (
    batch_dependence,
    fitting_eps,
    padding_in,
    random_layers_before,
    randomness_of,
)
from bnprobe.measure.chance import chance_levels
from bnprobe.measure.draw import PARTS
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.gradients import measure_gradients
from bnprobe.measure.impact import FEWEST_PASSES, SAMPLES, Impacts
from bnprobe.measure.scores import Found, ScoreTable
from bnprobe.measure.session import Announce, Session, announce_nothing
from bnprobe.measure.train_steps import MakeOptimizer, train_steps
from bnprobe.measure.trial import MicroBatchStatistics
from bnprobe.measure.what_if import FEWEST_TRIED, what_if
from bnprobe.records import (
    HELD_OUT,
    MEASURES,
    REST_IN_EVAL,
    SCORING,
    WITHOUT_RANDOM,
    Backward,
    Chance,
    ExtraPass,
    GradientAngle,
    Impact,
    Layer,
    Remedy,
    Updates,
)
from bnprobe.rules.facts import Anatomy, OtherEps, Padding, Randomness
from bnprobe.wording import option

IMPACT_BYTES = 2**27
"""Upper limit on the norm-layer inputs of the samples that impacts are measured on; backward passes take twice that."""

IMPACT_SHARE = 1 / 15
"""Passes that impacts take, forward and backward, as a part of those of the two paths over all samples."""

IMPACT_PASSES = 32
"""Passes over one sample that impacts take at least, however few samples were scanned: four over eight samples."""

WHAT_IF_IMAGES = 512
"""Samples of training and of held-out data that remedies are tried on; they are kept in host memory."""

TRIAL_SECONDS = 10.0
"""Scoring the model takes at most about this long where trials were not asked for; some 15 such passes are made."""

PASS_WORK = 2**29
"""Values at norm layers in a pass, each times the channels of its layer: a convolution before it multiplies about as
often for every value. A pass that was not asked for may take so much, and in any case as many samples as the scan has
measured; one that takes more is dear."""

_ASKED_FOR = "asked for"

SCORED_PART = 4
"""Without held-out data one in this many training batches is left out of the statistics, and scores them."""

_SCORED = slice(None, None, SCORED_PART)

GRADIENT_BATCHES = 32
"""Micro-batches whose gradients are measured; the noise is then known to about 25%."""


@dataclass(frozen=True)
class Wanted:
    """What is of use, by what the two paths gave, beside what the settings ask for.

    Attributes:
        effects: What layers do to the output, and what tells causes apart: of no use where nothing is wrong.
        remedies: Try the free remedies.
        scored: There is a loss or metric, and it may be called on further passes.
        stale: Names of flagged layers whose running statistics are wrong.
    """

    effects: bool
    remedies: bool
    scored: bool
    stale: Sequence[str] = ()


@dataclass
class Further:
    """Results by layer index, or by name where rules read them so, and their cost.

    ``effects`` goes on to measure what groups of layers do to the output. ``announce`` is told of each measurement;
    ``under_way`` is the one that runs, or that raised.
    """

    announce: Announce = announce_nothing
    impacts: dict[int, Impact] = field(default_factory=dict)
    backward: dict[int, Backward] = field(default_factory=dict)
    updates: dict[int, Updates] = field(default_factory=dict)
    angle: GradientAngle | None = None
    remedies: tuple[Remedy, ...] = ()
    chance: tuple[Chance, ...] = ()
    batch_dependence: float | None = None
    other_eps: OtherEps | None = None
    padding: Padding | None = None
    randomness: Randomness | None = None
    random_before: Mapping[str, tuple[str, ...]] | None = None
    passes: list[ExtraPass] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frozen_lag: Mapping[str, float] = field(default_factory=dict)
    batch_at_inference: dict[str, bool] = field(default_factory=dict)
    effects: Impacts | None = None
    under_way: str | None = None

    def added_to(self, layer: Layer, index: int) -> Layer:
        """The layer with what was measured of it."""
        return replace(
            layer,
            impact=self.impacts.get(index),
            backward=self.backward.get(index),
            updates=self.updates.get(index),
        )

    def traced(self, anatomy: Sequence[Anatomy]) -> tuple[Anatomy, ...]:
        """The layers with the random layers that feed them, where a forward pass could be followed."""
        known = self.random_before or {}
        return tuple(replace(one, dropouts_before=known.get(one.name, one.dropouts_before)) for one in anatomy)

    @contextmanager
    def counted(self, name: str, reason: str, samples: int = 0) -> Iterator[Callable[[int], None]]:
        """Announce a measurement, and note its cost when it ends; nothing if it raises.

        Args:
            samples: That it takes, where that is known before; else what is yielded is to be called with them.
        """
        taken = [samples]
        self.announce(name if reason == _ASKED_FOR else reason)
        started, self.under_way = time.perf_counter(), f"{name} ({reason})"
        yield taken.append
        self.under_way = None
        self.passes.append(ExtraPass(name, reason, sum(taken), time.perf_counter() - started))


def batches_to_keep(settings: ScanSettings, batch_size: int, remedies: bool = False) -> int:
    """Micro-batches to keep for the measurements that the settings request, and for trying remedies."""
    images = WHAT_IF_IMAGES if remedies else SAMPLES
    trained = settings.train_steps or 0
    return max(2, images // batch_size, trained, GRADIENT_BATCHES if settings.gradients else 0)


def measure_further(
    found: Further,
    session: Session,
    evidence: Evidence,
    settings: ScanSettings,
    wanted: Wanted,
    make_optimizer: MakeOptimizer | None = None,
) -> None:
    """Everything that is of use or asked for, into ``found``; ``session`` is not installed.

    Args:
        make_optimizer: For training steps; None: SGD at a learning rate of 0.01.

    Raises:
        BnprobeError: See the single measurements; what was measured before is in ``found``.
    """
    found.passes += _passes_so_far(evidence)
    with session.installed():
        if wanted.effects:
            _measure_impacts(found, session, evidence, settings.thorough)
        if wanted.remedies or settings.what_if:
            _try_remedies(found, session, evidence, settings)
    _train(found, session, evidence, settings, make_optimizer)
    with session.installed():
        _tell_apart(found, session, evidence, settings, wanted)


def joint_impacts(
    session: Session, evidence: Evidence, further: Further, groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], float | None]:
    """For groups of layers, the change of the outputs if all layers of a group normalize with their batches.

    None where it cannot be measured. Errors and Ctrl-C are not raised: the report that this is for is worth more. After
    a scan that ended early nothing more is run.
    """
    positions = {layer.name: layer.index for layer in session.layers.layers}
    known: dict[frozenset[int], float | None] = {}

    def measured(names: tuple[str, ...]) -> float | None:
        layers = frozenset(positions[name] for name in names if positions[name] in further.impacts)
        if not layers or evidence.partial or further.effects is None:
            return None
        alone = further.impacts[next(iter(layers))].exact if len(layers) == 1 else None
        if alone is not None:
            return alone
        if layers not in known:
            known[layers] = None
            with suppress(BnprobeError, KeyboardInterrupt), session.installed():
                known[layers] = further.effects.together(layers)
        return known[layers]

    return {names: measured(names) for names in groups}


def _passes_so_far(evidence: Evidence) -> Iterator[ExtraPass]:
    """Passes that were measured beside the two paths, with their reasons."""
    if evidence.steady is not None:
        name, reason = WITHOUT_RANDOM, "the model draws random numbers in training"
        if not evidence.random:
            name, reason = REST_IN_EVAL, "train mode does more than to normalize by batch"
        yield ExtraPass(name, reason, evidence.samples, evidence.steady_seconds)
    if evidence.scoring_seconds:
        more = evidence.scores.count - evidence.samples
        yield ExtraPass(SCORING, "of further samples, for their intervals", more, evidence.scoring_seconds)
    if evidence.held_out is not None:
        held_out = evidence.held_out
        yield ExtraPass(HELD_OUT, "to measure the data shift", held_out.samples, held_out.seconds)
    if evidence.mixed is not None:
        mixed = evidence.mixed
        yield ExtraPass(
            "batches drawn at random", "to tell small from non-i.i.d. batches", mixed.samples, mixed.seconds
        )


def _measure_impacts(found: Further, session: Session, evidence: Evidence, thorough: bool) -> None:
    """What each layer does to the output, within ``IMPACT_SHARE`` of the scan unless thorough."""
    memory = IMPACT_BYTES // (4 * max(_values_per_sample(session, evidence), 1))
    passes = max(IMPACT_PASSES, int(IMPACT_SHARE * 2 * evidence.samples))
    images = SAMPLES if thorough else min(SAMPLES, passes // FEWEST_PASSES)
    batches = max(2, min(images, memory) // evidence.batch_size)
    some = [to_device(batch, session.device) for batch in evidence.micro_batches[:batches]]
    samples = len(some) * evidence.batch_size
    found.effects = Impacts(session, some, evidence.batching, bool(evidence.by_batch["eval"]))
    with found.counted("impact", "how much each layer changes the output", samples):
        found.impacts = found.effects.of_each(None if thorough else passes // max(samples, 1))


def _try_remedies(found: Further, session: Session, evidence: Evidence, settings: ScanSettings) -> None:
    """Try the free remedies on held-out data; without any, on training batches that the statistics do not see."""
    training, held_out = _some(evidence), evidence.held_out
    held_out = None if held_out is None or held_out.unscored else held_out
    data: Literal["held-out", "training"] = "training" if held_out is None else "held-out"
    if held_out is None:
        scored, scoring, scores = training[_SCORED], evidence.batching, evidence.scores.part(_SCORED)
        training = [batch for position, batch in enumerate(training) if position % SCORED_PART]
    else:
        scored, scoring, scores = _some(held_out), held_out.batching, held_out.scores
    if not training or not scored:
        return
    asked, batching = bool(settings.what_if), evidence.batching
    whole = asked or settings.thorough
    usable = sum(batch.samples for batch in (*training, *scored))
    brief = False
    if not whole:
        cheap = _cheap_samples(session, evidence)
        most = max(evidence.samples, cheap)
        training, scored = (batches[: _filled(batches, most)] for batches in (training, scored))
        brief = cheap < max(sum(batch.samples for batch in batches) for batches in (training, scored))
    before = None if evidence.repeat or not evidence.alone else _as_loaded(session, scores, scored)
    with found.counted("what-if", _ASKED_FOR if asked else "to try remedies before they are advised") as took:
        tried = what_if(
            session,
            training,
            scored,
            batching,
            scoring,
            goal=settings.goal,
            goal_is_known=settings.goal_is_known,
            scored_on=data,
            larger=asked,
            seconds=None if whole else TRIAL_SECONDS,
            # Without held-out data those of the scan are of the samples that are scored, too.
            micro_batch=None if held_out is None else micro_batch_statistics(session, evidence),
            population=evidence.population,
            before=before,
            brief=brief,
        )
        took(tried.samples)
    found.remedies, found.frozen_lag = tried.remedies, tried.frozen
    found.notes += tried.untried
    if any(remedy.cut_short for remedy in tried.remedies):
        found.notes.append(
            "To save time, remedies that were worse on a part of the samples were scored on no more;"
            f" {option('--thorough', True)} scores them on all."
        )
    whose = "training" if held_out is None else "training and held-out"
    if tried.remedies and tried.samples < usable:
        found.notes.append(
            f"To save time, remedies were tried on {tried.samples} of the {usable} {whose} samples at hand;"
            f" {option('--thorough', True)} tries them on all."
        )


def _as_loaded(session: Session, scores: ScoreTable, batches: Sequence[MicroBatch]) -> ScoreTable | None:
    """What the scan scored these micro-batches on the eval path, where it has a figure for each of them."""
    rows: Found = {
        (measure, "eval"): scores.rows.get((measure, "eval"), [])[: len(batches)]
        for measure in MEASURES
        if getattr(session.functions, measure) is not None
    }
    sizes = [batch.samples for batch in batches]
    return ScoreTable(rows) if all([row.size for row in each] == sizes for each in rows.values()) else None


def _filled(batches: Sequence[MicroBatch], samples: int) -> int:
    """The micro-batches that so many samples fill, at least ``FEWEST_TRIED``."""
    filled = bisect_right(list(accumulate(batch.samples for batch in batches)), samples)
    return max(filled, FEWEST_TRIED)


def _values_per_sample(session: Session, evidence: Evidence) -> int:
    """The values of one sample at all norm layers."""
    layers = session.layers.layers
    values = sum(values * layers[index].info.channels for (index, _), values in evidence.values.items())
    return values // evidence.batch_size


def _cheap_samples(session: Session, evidence: Evidence) -> int:
    """The samples of a pass of ``PASS_WORK``."""
    layers = session.layers.layers
    work = sum(values * layers[index].info.channels ** 2 for (index, _), values in evidence.values.items())
    return int(PASS_WORK * evidence.batch_size // max(work, 1))


def micro_batch_statistics(session: Session, evidence: Evidence) -> MicroBatchStatistics:
    """What the scan measured on the train path, all but the norms in eval mode, in units of running statistics.

    Of the layers that normalize there as plain BN does.
    """
    path = evidence.steady or evidence.train
    averaged: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(1 + PARTS)]  # all, then without each part
    pooled: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(1 + PARTS)]
    parts = range(1, 1 + min(PARTS, evidence.batches))
    for layer in session.layers.layers:
        info, slots = layer.info, [slot for slot in path.calls if slot[0] == layer.index]
        if not slots or info.corrects or info.running_mean is None or info.running_variance is None:
            continue
        means = path.together(tuple((slot,) for slot in slots)).folded(PARTS).means()
        square = info.running_variance.cpu().double() + info.eps_of_channels
        mean = info.running_mean.cpu().double() + means.d * square.sqrt()
        device = info.running_mean.device
        for row in (0, *parts):
            averaged[row][layer.index] = mean[row].to(device), (means.variance[row] * square).to(device)
            pooled[row][layer.index] = mean[row].to(device), (means.pooled[row] * square).to(device)
    batches = f"{evidence.batches} micro-batches of {evidence.batch_size} training samples, as in training"
    others = [(averaged[row], pooled[row]) for row in parts]
    return MicroBatchStatistics(averaged[0], pooled[0], batches, others, evidence.sampled)


def _some(evidence: Evidence) -> list[MicroBatch]:
    """The micro-batches that remedies are tried on."""
    return evidence.counted[: max(2, WHAT_IF_IMAGES // evidence.batch_size)]


def _train(
    found: Further,
    session: Session,
    evidence: Evidence,
    settings: ScanSettings,
    make_optimizer: MakeOptimizer | None,
) -> None:
    """Training steps and gradients, where they are asked for."""
    size = evidence.batch_size
    if settings.train_steps:
        steps, make = settings.train_steps, _guarded(make_optimizer or load_optimizer(OptimizerSpec()))
        with found.counted("training steps", _ASKED_FOR, steps * size):
            trained = train_steps(session, evidence.micro_batches, make, steps)
            found.updates = {
                index: replace(updates, repeated=trained.repeated.get(index, 0.0))
                for index, updates in trained.updates.items()
            }
    if settings.gradients:
        batches = evidence.micro_batches[:GRADIENT_BATCHES]
        with found.counted("gradients", _ASKED_FOR, len(batches) * size):
            found.backward, found.angle = measure_gradients(session, batches, seed=settings.seed)


def _guarded(make_optimizer: MakeOptimizer) -> MakeOptimizer:
    """Turn errors of the user's optimizer factory into UserCodeError."""

    def make(parameters: list[nn.Parameter]) -> Any:
        with user_code("making the optimizer of the training steps"):
            return make_optimizer(parameters)

    return make


def _tell_apart(found: Further, session: Session, evidence: Evidence, settings: ScanSettings, wanted: Wanted) -> None:
    """What tells one cause from another, where the paths leave it open."""
    batches, sizes = evidence.micro_batches, [batch.samples for batch in evidence.counted]
    found.random_before = random_layers_before(session, batches[0], sizes[0]) if batches else None
    if batches and evidence.repeat:
        with found.counted("random numbers", "what draws random numbers at inference", sizes[0]):
            found.randomness = randomness_of(session, batches[0], sizes[0])
    left = session.left_in_train_mode()
    layers = [layer for layer in session.layers.selected if layer.index in evidence.by_batch["eval"]]
    found.batch_at_inference = {
        layer.name: layer.index in left for layer in layers if layer.info.running_mean is not None
    }
    if layers:
        found.batch_dependence = batch_dependence(session, batches, sizes)
    if not wanted.effects:
        return
    if wanted.scored:
        with found.counted("chance", "what outputs of other samples score") as took:
            kept = evidence.kept_outputs if evidence.alone else None
            most = None if settings.thorough else max(evidence.samples, _cheap_samples(session, evidence))
            found.chance, samples = chance_levels(session, evidence.counted, evidence.batching, kept, most)
            took(samples)
    if wanted.stale:
        with found.counted("eps", "whether the statistics fit another eps") as took:
            found.other_eps, samples = fitting_eps(session, evidence.counted, evidence.batching, wanted.stale)
            took(samples)
        found.padding = padding_in(batches, [] if evidence.held_out is None else evidence.held_out.micro_batches)
