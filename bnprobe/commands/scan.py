"""``bnprobe scan``: load, measure both paths, measure what was asked for beyond them, judge, and report.

``scan_workload`` is the table of contents. ``measure_further`` adds the impact on the output, free remedies, training
steps and gradients. ``describe`` says what was run.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from bnprobe._version import __version__
from bnprobe.analysis.diagnosis import diagnose, groups_of, judge
from bnprobe.analysis.findings import Findings, assemble
from bnprobe.config.load import settings_from
from bnprobe.config.spec import OptimizerSpec, ScanSettings, Spec
from bnprobe.distributed import ALONE, Share, World
from bnprobe.errors import BnprobeError, UsageError
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.model import unwrapped, user_code
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.loading.order import deal, drawn_at_random, is_random, spread
from bnprobe.loading.samples import kind_of_sample
from bnprobe.loading.workload import Workload, load_workload
from bnprobe.measure.accumulators import SamplePool
from bnprobe.measure.batch import MicroBatch, to_device
from bnprobe.measure.causes import (
    SAMPLES_OF_EPS,
    batch_dependence,
    chance_levels,
    fitting_eps,
    padding_in,
    random_layers_before,
    randomness_of,
)
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.finite_data import data_set_size
from bnprobe.measure.gradients import measure_gradients
from bnprobe.measure.impact import SAMPLES, joint_impact, measure_impact
from bnprobe.measure.layers import LayerSet, anatomy, unmatched_globs
from bnprobe.measure.rank_agreement import Agreement, agree
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import (
    deferred_interrupts,
    preserved_generators,
    preserved_random_state,
    seed_everything,
    untouched,
)
from bnprobe.measure.scan_loop import measure_mixed, probe
from bnprobe.measure.session import Progress, Session, UserFunctions, no_progress
from bnprobe.measure.train_steps import MakeOptimizer, train_steps
from bnprobe.measure.what_if import what_if
from bnprobe.numbers import listed
from bnprobe.records import (
    SCHEMA_VERSION,
    Backward,
    Chance,
    Environment,
    ExtraPass,
    GradientAngle,
    Impact,
    Interval,
    Layer,
    Pool,
    Remedy,
    Report,
    Scan,
    Tool,
    Updates,
)
from bnprobe.rules.effect import inconsistency
from bnprobe.rules.facts import Anatomy, Facts, OtherEps, Padding, Randomness
from bnprobe.rules.shares import is_cause
from bnprobe.stats.composition import regrouped_batches

IMPACT_BYTES = 2**27
"""Upper limit on the norm-layer inputs of the samples that impacts are measured on; backward passes take twice that."""

IMPACT_PART = 8
"""Impacts are measured on one in this many samples, since each takes a dozen forward passes instead of two."""

WHAT_IF_IMAGES = 512
"""Samples of training and of held-out data that remedies are tried on; they are kept in host memory."""

TRIAL_SECONDS = 10.0
"""A trial that was not asked for scores the model in about this time, and there are some six of them."""

CHANCE_IMAGES = 256
"""Samples whose outputs are given to other samples."""

SCORED_PART = 4
"""Without held-out data one in this many training batches is left out of the statistics, and scores them."""

GRADIENT_BATCHES = 32
"""Micro-batches whose gradients are measured; the noise is then known to about 25%."""


def scan(
    model: nn.Module,
    batches: Any,
    batch_size: int | None = None,
    *,
    num_batches: int | None = None,
    evaluation: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    metric: Callable[[nn.Module, Any], Any] | None = None,
    optimizer: MakeOptimizer | None = None,
    batch_size_of: Callable[[Any], int] | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Report:
    """Measure every BN layer of ``model`` on ``batches``, in training and at inference.

    The model comes back bit-identical, also after an exception; so does the random state.

    Args:
        model: Any module, on any device.
        batches: A DataLoader or Dataset, or an iterable of micro-batches of ``batch_size`` samples.
        batch_size: Samples per micro-batch; a DataLoader is rebuilt with it. None: the loader's own.
        num_batches: Measure exactly this many micro-batches; None: until every layer is decided.
        evaluation: Held-out data, in the form of ``batches``; a DataLoader is read at its own batch size.
        forward, loss, metric: ``f(model, batch)``, as in a model file.
        optimizer: ``f(parameters)`` that gives the optimizer of ``train_steps``; None: SGD with lr 0.01.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.
        progress: Called with the micro-batches done, and those planned so far.
        **settings: Any field of ``bnprobe.config.spec.ScanSettings`` but ``batches``: max_batches, seed, device, ...

    Returns:
        The report; ``bnprobe.report.render`` writes it as text.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree; its ``report`` holds what was measured before.
    """
    given = settings_from({"batch_size": batch_size, "batches": num_batches, **settings})
    with preserved_random_state(), preserved_generators(batches, evaluation):
        seed_everything(given.seed)
        source = as_batch_source(batches, batch_size, batch_size_of=batch_size_of)
        held_out = None
        if evaluation is not None:
            held_out = as_batch_source(
                evaluation, source.batch_size, "the held-out data", as_given=True, batch_size_of=batch_size_of
            )
        inner, note = unwrapped(model)
        notes = (note,) if note else ()
        workload = Workload(
            inner, type(inner).__name__, None, source, held_out, forward, loss, metric, notes, optimizer
        )
        return scan_workload(workload, given, progress)


def scan_spec(spec: Spec, progress: Progress = no_progress, world: World = ALONE) -> Report:
    """Load what a spec names, and scan it; see ``scan_workload``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        return scan_workload(load_workload(spec), spec.settings(), progress, world)


def scan_workload(
    workload: Workload, settings: ScanSettings, progress: Progress = no_progress, world: World = ALONE
) -> Report:
    """Scan a model that is loaded already; it comes back bit-identical, and so does the random state.

    Args:
        world: Processes that all call this with the same model, data and settings: each measures its share of the
            micro-batches, process 0 merges the results, and all return its report.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    check_requested(settings, workload)
    with untouched(workload.model):
        seed_everything(settings.seed)
        session = session_of(workload, settings)
        agreement = agree(workload.model, session.layers.selected, world)
        evidence = _probe(workload, session, settings, progress, world)
        report = None
        if evidence is not None:
            facts = replace(_facts(workload, session), processes=world.size, rank_mismatch=agreement.mismatch)
            notes = (*_on_processes(world, agreement), *_on_hidden(workload.model, evidence))
            report = _report(workload, settings, session, facts, evidence, notes)
    # A Ctrl-C that reaches the others while they wait has reached process 0 too, which answers it.
    with suppress(KeyboardInterrupt), deferred_interrupts():
        report = world.share(report)
    assert report is not None  # process 0 has one, or has raised
    return report


def session_of(workload: Workload, settings: ScanSettings) -> Session:
    """The workload's model on its device, with its layers found and the user's functions at hand."""
    functions = UserFunctions(workload.forward, workload.loss, workload.metric)
    return Session.open(workload.model, workload.settings(settings), functions, synthetic=workload.source.synthetic)


def _facts(workload: Workload, session: Session) -> Facts:
    """What rules may know of the model and the data alone."""
    return Facts(
        anatomy(session.layers, workload.model),
        images=workload.source.images,
        drop_last=workload.source.drop_last,
        held_out=workload.held_out is not None,
        own_order=workload.source.own_order,
        averaged=workload.averaged[0],
        averaged_beside=workload.averaged[1],
    )


def _probe(
    workload: Workload, session: Session, settings: ScanSettings, progress: Progress, world: World
) -> Evidence | None:
    """The two paths on the training data, and the eval path on the held-out data."""
    source, held_out = spread(workload.source, settings.seed, settings.batch_sizes), workload.held_out
    size, keep = source.batch_size, wanted_batches(settings, source.batch_size, can_try_remedies(workload, settings))
    # Micro-batches that are regrouped to larger batches are measured by one process.
    share = Share(world.rank, world.size, math.lcm(size, *settings.batch_sizes) // size)
    source = deal(source, share)
    reader, held_out_reader = Reader(source.batches, size, keep, share, source.dealt), None
    if held_out is not None:
        share = Share(world.rank, world.size)
        held_out = deal(spread(held_out, settings.seed, mixed=True), share)
        size, dealt, most = held_out.batch_size, held_out.dealt, held_out.most
        keep = wanted_batches(settings, size, can_try_remedies(workload, settings))
        held_out_reader = Reader(held_out.batches, size, keep, share, dealt, most, any_size=True)
    with session.installed():
        evidence = probe(session, reader, settings, progress, held_out_reader, world)
    if evidence is not None:
        evidence.population = data_set_size(source, evidence.batches * source.batch_size)
    return evidence


def can_try_remedies(workload: Workload, settings: ScanSettings) -> bool:
    """Whether remedies can be compared, and may be: there is something to score by, and real data to score on."""
    scored = workload.loss is not None or workload.metric is not None
    return scored and not workload.source.synthetic and settings.what_if is not False


def wanted_batches(settings: ScanSettings, batch_size: int, remedies: bool = False) -> int:
    """Micro-batches to keep for the measurements that the settings request, and for trying remedies."""
    images = WHAT_IF_IMAGES if remedies else SAMPLES
    trained = settings.train_steps or 0
    return max(2, images // batch_size, trained, GRADIENT_BATCHES if settings.gradients else 0)


def _report(
    workload: Workload, settings: ScanSettings, session: Session, facts: Facts, evidence: Evidence, notes: Sequence[str]
) -> Report:
    """Measure what goes beyond the two paths, apply the rules, and write the report."""
    findings = _with_mixed_batches(workload, session, settings, evidence, assemble(evidence, settings))
    evidence, further = _beyond(workload, session, settings, evidence, findings, facts)
    output = replace(findings.summary.output, batch_dependence=further.batch_dependence)
    summary = replace(findings.summary, output=output, gradient_angle=further.angle, chance=further.chance)
    scan = describe(workload, settings, evidence, further, session.device)
    scan = replace(scan, notes=(*scan.notes, *notes, *_on_new_models(facts)))
    layers = with_further(findings.layers, facts.anatomy, further, session.layers)
    facts = replace(
        facts,
        anatomy=_with_traced(facts.anatomy, further.random_before),
        layers={layer.name: layer for layer in layers},
        scan=scan,
        output=summary.output,
        gaps=summary.gaps,
        remedies=further.remedies,
        called=frozenset(layer.name for layer in session.layers.layers if layer.index in evidence.entered),
        samples_alone=frozenset(
            layer.name for layer in session.layers.layers if evidence.runs_samples_alone(layer.index)
        ),
        chance=summary.chance,
        other_eps=further.other_eps,
        padding=further.padding,
        randomness=further.randomness,
        batch_at_inference=further.batch_at_inference,
        goal_is_known="goal" in settings.model_fields_set,
    )
    verdicts = judge(facts, settings.rules)
    impacts = joint_impacts(session, evidence, further, groups_of(verdicts, facts))
    report = Report(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", __version__),
        environment=environment(session.device),
        scan=scan,
        summary=summary,
        layers=layers,
        skipped=findings.skipped,
        verdicts=verdicts,
        diagnoses=diagnose(verdicts, facts, impacts),
        remedies=further.remedies,
    )
    if evidence.failure is not None:
        evidence.failure.report = report
        raise evidence.failure
    return report


def _with_mixed_batches(
    workload: Workload, session: Session, settings: ScanSettings, evidence: Evidence, findings: Findings
) -> Findings:
    """The findings, with the share of non-i.i.d. batches of flagged layers whose samples could not be regrouped.

    A loader that draws at random has i.i.d. batches; any other over an indexable data set is read once more, in batches
    drawn at random. Batches that differ in size cannot be compared with others.
    """
    open_ = any(layer.flagged and layer.shares and layer.shares.composition is None for layer in findings.layers)
    if not open_ or evidence.partial or evidence.sizes:
        return findings
    evidence.random_order = is_random(workload.source) or not workload.source.own_order
    source = None if evidence.random_order else drawn_at_random(workload.source, settings.seed)
    if source is not None:
        with suppress(BnprobeError, KeyboardInterrupt), session.installed():
            measure_mixed(session, evidence, Reader(source.batches, source.batch_size), no_progress)
    return assemble(evidence, settings)


def _beyond(
    workload: Workload,
    session: Session,
    settings: ScanSettings,
    evidence: Evidence,
    findings: Findings,
    facts: Facts,
) -> tuple[Evidence, Further]:
    """Measure what goes beyond the two paths; if it fails or is interrupted, the report has the paths alone."""
    further = Further()
    if evidence.partial:
        return evidence, further
    off = inconsistency(findings.summary.gaps).is_worse or any(
        layer.flagged or layer.undecided or layer.domains for layer in findings.layers
    )
    tried = can_try_remedies(workload, settings) and (off or _is_doubtful(findings, facts, settings))
    try:
        measure_further(further, session, evidence, settings, workload.make_optimizer, impact=off, remedies=tried)
        tell_apart(further, session, evidence, findings, off=off, scored=can_try_remedies(workload, settings))
    except BnprobeError as error:
        evidence = replace(evidence, stopped="failed", failure=error)
    except KeyboardInterrupt:
        evidence = replace(evidence, stopped="interrupted")
    return evidence, further


def _is_doubtful(findings: Findings, facts: Facts, settings: ScanSettings) -> bool:
    """Whether something may be wrong although no layer is flagged: a rule fails, or a step of the gap is surely bad."""
    layers = {layer.name: layer for layer in findings.layers}
    output, gaps = findings.summary.output, findings.summary.gaps
    known = replace(facts, layers=layers, output=output, gaps=gaps)
    if any(verdict.outcome == "failed" for verdict in judge(known, settings.rules)):
        return True
    return any(
        _is_worse(interval, gap.goal)
        for gap in gaps
        for interval in (gap.inconsistency_interval, gap.generalization_interval)
    )


def _is_worse(interval: Interval | None, goal: Literal["max", "min"]) -> bool:
    """Whether a change is surely to the worse."""
    if interval is None:
        return False
    low, high = interval
    return low > 0 if goal == "min" else high is not None and high < 0


@dataclass
class Further:
    """Results by layer index, or by name where rules read them so, and their cost."""

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
    batch_at_inference: dict[str, bool] = field(default_factory=dict)


def measure_further(
    found: Further,
    session: Session,
    evidence: Evidence,
    settings: ScanSettings,
    make_optimizer: MakeOptimizer | None = None,
    *,
    impact: bool = True,
    remedies: bool = False,
) -> None:
    """Everything that the settings ask for, into ``found``.

    Args:
        impact: Measure what layers do to the output: of no use where every layer is fine.
        remedies: Try the free remedies, whether or not that was asked for.
        make_optimizer: For training steps; None: SGD at a learning rate of 0.01.

    Raises:
        BnprobeError: See the single measurements; what was measured before is in ``found``.
    """
    found.passes += _passes_so_far(evidence)
    size = evidence.batch_size
    with session.installed():
        if impact:
            some = _first_images(session, evidence)
            with _counted(found, "impact", "how much each layer changes the output", len(some) * size):
                found.impacts = measure_impact(session, some, evidence.batching)
        if remedies or settings.what_if:
            _try_remedies(found, session, evidence, settings)
    if settings.train_steps:
        steps, make = settings.train_steps, _guarded(make_optimizer or load_optimizer(OptimizerSpec()))
        with _counted(found, "training steps", "asked for", steps * size):
            trained = train_steps(session, evidence.micro_batches, make, steps)
            found.updates = {
                index: replace(updates, repeated=trained.repeated.get(index, 0.0))
                for index, updates in trained.updates.items()
            }
    if settings.gradients:
        batches = evidence.micro_batches[:GRADIENT_BATCHES]
        with _counted(found, "gradients", "asked for", len(batches) * size):
            found.backward, found.angle = measure_gradients(session, batches, seed=settings.seed)


def tell_apart(
    found: Further, session: Session, evidence: Evidence, findings: Findings, *, off: bool, scored: bool
) -> None:
    """Measure what tells one cause from another, where the findings so far leave it open, into ``found``.

    Args:
        off: Something is wrong at all.
        scored: There is a loss or metric, and it may be called on further passes.
    """
    batches, sizes = evidence.micro_batches, [batch.samples for batch in evidence.counted]
    with session.installed():
        found.random_before = random_layers_before(session, batches[0], sizes[0]) if batches else None
        if batches and findings.summary.output.repeat:
            with _counted(found, "random numbers", "what draws them at inference", sizes[0]):
                found.randomness = randomness_of(session, batches[0], sizes[0])
        left = session.left_in_train_mode()
        layers = [layer for layer in session.layers.selected if layer.index in evidence.by_batch["eval"]]
        found.batch_at_inference = {
            layer.name: layer.index in left for layer in layers if layer.info.running_mean is not None
        }
        if layers:
            found.batch_dependence = batch_dependence(session, batches, sizes)
        if not off:
            return
        samples = sum(sizes)
        if scored:
            most = max(2, CHANCE_IMAGES // max(sizes))
            with _counted(found, "chance", "what outputs of other samples score", sum(sizes[:most])):
                found.chance = chance_levels(session, evidence.counted[:most], evidence.batching)
        if not any(is_cause(layer, "lag") for layer in findings.layers):
            return  # the rest is said of stale statistics
        stale = [
            layer.name
            for layer in findings.layers
            if layer.flagged and layer.shares and max(layer.shares.lag, layer.shares.propagation) > 0
        ]
        with _counted(found, "eps", "whether the statistics fit another eps", min(samples, SAMPLES_OF_EPS)):
            found.other_eps = fitting_eps(session, evidence.counted, evidence.batching, stale)
        found.padding = padding_in(batches, [] if evidence.held_out is None else evidence.held_out.micro_batches)


def _passes_so_far(evidence: Evidence) -> Iterator[ExtraPass]:
    """Passes that were measured beside the two paths, with their reasons."""
    if evidence.steady is not None:
        name, reason = "train path without random layers", "the model draws random numbers in training"
        if not evidence.random:
            name, reason = "train path with the rest in eval mode", "train mode does more than to normalize by batch"
        yield ExtraPass(name, reason, evidence.samples, evidence.steady_seconds)
    if evidence.scoring_seconds:
        more = evidence.scores.count - evidence.samples
        yield ExtraPass("loss and metric", "of further samples, for their intervals", more, evidence.scoring_seconds)
    if evidence.held_out is not None:
        held_out = evidence.held_out
        yield ExtraPass("held-out data", "to measure the data shift", held_out.samples, held_out.seconds)
    if evidence.mixed is not None:
        mixed = evidence.mixed
        yield ExtraPass(
            "batches drawn at random", "to tell small from non-i.i.d. batches", mixed.samples, mixed.seconds
        )


def _first_images(session: Session, evidence: Evidence) -> list[Any]:
    """The micro-batches that impacts are measured on, on the device."""
    layers = session.layers.layers
    numbers = sum(values * layers[index].info.channels for (index, _), values in evidence.values.items())
    memory = IMPACT_BYTES * evidence.batch_size // (4 * max(numbers, 1))
    images = min(SAMPLES, memory, evidence.samples // IMPACT_PART)
    number = max(2, images // evidence.batch_size)
    return [to_device(batch, session.device) for batch in evidence.micro_batches[:number]]


def _try_remedies(found: Further, session: Session, evidence: Evidence, settings: ScanSettings) -> None:
    """Try the free remedies on held-out data; without any, on training batches that the statistics do not see."""
    training, held_out = _some(evidence), evidence.held_out
    held_out = None if held_out is None or held_out.unscored else held_out
    data: Literal["held-out", "training"] = "training" if held_out is None else "held-out"
    if held_out is None:
        scored, scoring = training[::SCORED_PART], evidence.batching
        training = [batch for position, batch in enumerate(training) if position % SCORED_PART]
    else:
        scored, scoring = _some(held_out), held_out.batching
    if not training or not scored:
        return
    asked, batching = bool(settings.what_if), evidence.batching
    reason = "asked for" if asked else "to try remedies before they are advised"
    options: dict[str, Any] = {"goal": settings.goal, "scored_on": data, "larger": asked}
    started = time.perf_counter()
    tried = what_if(session, training, scored, batching, scoring, seconds=None if asked else TRIAL_SECONDS, **options)
    found.remedies, found.notes = tried.remedies, [*found.notes, *tried.untried]
    found.passes.append(ExtraPass("what-if", reason, tried.samples, time.perf_counter() - started))


def _some(evidence: Evidence) -> list[MicroBatch]:
    """The micro-batches that remedies are tried on."""
    return evidence.counted[: max(2, WHAT_IF_IMAGES // evidence.batch_size)]


def _guarded(make_optimizer: MakeOptimizer) -> MakeOptimizer:
    """Turn errors of the user's optimizer factory into UserCodeError."""

    def make(parameters: list[nn.Parameter]) -> Any:
        with user_code("making the optimizer of the training steps"):
            return make_optimizer(parameters)

    return make


@contextmanager
def _counted(found: Further, name: str, reason: str, images: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found.passes.append(ExtraPass(name, reason, images, time.perf_counter() - started))


def with_further(
    layers: Sequence[Layer], anatomy: Sequence[Anatomy], found: Further, among: LayerSet
) -> tuple[Layer, ...]:
    """Add the further results to the layers, and their places in the user's code."""
    positions = {layer.name: layer.index for layer in among.layers}
    places = {layer.name: layer.location for layer in anatomy}
    return tuple(
        replace(
            layer,
            location=places.get(layer.name),
            impact=found.impacts.get(positions[layer.name]),
            backward=found.backward.get(positions[layer.name]),
            updates=found.updates.get(positions[layer.name]),
        )
        for layer in layers
    )


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
        if not layers or evidence.partial:
            return None
        alone = further.impacts[next(iter(layers))].exact if len(layers) == 1 else None
        if alone is not None:
            return alone
        if layers not in known:
            known[layers] = None
            with suppress(BnprobeError, KeyboardInterrupt), session.installed():
                some = _first_images(session, evidence)
                known[layers] = joint_impact(session, some, evidence.batching, layers)
        return known[layers]

    return {names: measured(names) for names in groups}


def describe(
    workload: Workload, settings: ScanSettings, evidence: Evidence, further: Further, device: torch.device
) -> Scan:
    """What was run, for the report."""
    source, sizes = workload.source, evidence.sizes.values()
    parameter = next(workload.model.parameters(), None)
    return Scan(
        model=workload.model_name,
        data=source.description,
        synthetic=source.synthetic,
        checkpoint=workload.checkpoint,
        batch_size=round(evidence.samples / evidence.batches) if sizes else evidence.batch_size,
        batches=evidence.batches,
        batches_requested=settings.batches,
        images=evidence.samples,
        left_out=evidence.left_out,
        emulated=evidence.emulated,
        physical_batch=evidence.physical_batch,
        emulation=evidence.batching.emulation.reason,
        self_check=evidence.batching.emulation.check,
        seed=settings.seed,
        device=str(device),
        dtype="none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        autocast=settings.autocast,
        stopped=evidence.stopped,
        partial=evidence.partial,
        seconds=evidence.seconds,
        notes=(*workload.notes, *source.notes, *_remarks(settings, evidence), *further.notes),
        passes=tuple(further.passes),
        pool=_pool(evidence),
        unselected=tuple(layer.name for layer in evidence.layers.layers if not layer.selected),
        size_range=(min(sizes), max(sizes)) if len(set(sizes)) > 1 else None,
        held_out=None if workload.held_out is None else workload.held_out.description,
        held_out_images=None if evidence.held_out is None else evidence.held_out.samples,
        sample=kind_of_sample(evidence.micro_batches[0]) if evidence.micro_batches else "sample",
    )


def _pool(evidence: Evidence) -> Pool | None:
    images = max((pool.mean.shape[0] for pool in evidence.eval.pool().values()), default=0)
    if not images or not evidence.batching.emulation.trusted:
        return None
    return Pool(images, evidence.eval[SamplePool].bytes, regrouped_batches(images, evidence.batch_size))


def _remarks(settings: ScanSettings, evidence: Evidence) -> Iterator[str]:
    """What the reader should know about the scan as a whole."""
    yield from unmatched_globs(settings, evidence.layers)
    if evidence.held_out is not None and evidence.held_out.unscored:
        yield (
            "The held-out data was measured without loss and metric, which cannot be computed on it (no labels?):"
            f" {evidence.held_out.unscored.rstrip('.')}. Its shift is judged by mean and variance alone."
        )
    if evidence.sizes and len(set(evidence.sizes.values())) == 1:
        yield (
            f"The batches have {round(evidence.samples / evidence.batches)} samples, not {evidence.batch_size} as asked"
            " for: all figures are for batches as they are."
        )
    for size in evidence.batch_sizes:
        if evidence.samples < 2 * size:
            needed = f"Batch size {size} needs at least {2 * size} samples"
            yield f"{needed}, and {evidence.samples} were measured: raise --batches."


def _on_new_models(facts: Facts) -> Iterator[str]:
    """A note where nothing was trained."""
    if facts.is_new:
        yield "All BN layers are as in a new model: statistics, weights and biases. Was a checkpoint forgotten?"


def _with_traced(
    anatomy: Sequence[Anatomy], random_before: Mapping[str, tuple[str, ...]] | None
) -> tuple[Anatomy, ...]:
    """The layers with the random layers that feed them, where a forward pass could be followed."""
    known = random_before or {}
    return tuple(replace(one, dropouts_before=known.get(one.name, one.dropouts_before)) for one in anatomy)


def _on_processes(world: World, agreement: Agreement) -> Iterator[str]:
    """Notes on a scan in several processes."""
    if world.size > 1:
        yield f"{world.size} processes each measured part of the micro-batches; the results were merged."
    if agreement.note:
        yield agreement.note


def _on_hidden(model: nn.Module, evidence: Evidence) -> Iterator[str]:
    """A note on layers in train mode that torch does not know of; one in eval mode may be hidden on purpose."""
    registered = set(model.modules())
    called = [layer for layer in evidence.layers.layers if layer.index in evidence.entered and layer.module.training]
    hidden = [layer.name for layer in called if layer.module not in registered]
    if hidden:
        yield (
            f"A plain list or dictionary holds {listed(hidden)}: train(), eval(), to() and state_dict() do not reach"
            " them. Use nn.ModuleList or nn.ModuleDict."
        )


def environment(device: torch.device) -> Environment:
    """Where it ran."""
    on_cuda = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        platform=platform.platform(terse=True),
        device_name=torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        threads=torch.get_num_threads(),
    )


def check_requested(settings: ScanSettings, workload: Workload) -> None:
    """Refuse before anything is measured what could not be measured in the end.

    Raises:
        UsageError: Names the option and what it lacks.
    """
    for option, wanted in (("--train-steps", settings.train_steps), ("--gradients", settings.gradients)):
        if wanted and workload.loss is None:
            raise UsageError(f"{option} needs loss(model, batch) in the model file, or a loss that the spec names.")
    if settings.what_if and workload.loss is None and workload.metric is None:
        raise UsageError("--what-if needs loss(model, batch) or metric(model, batch), in the model file or the spec.")
    if settings.what_if and workload.held_out is None:
        raise UsageError(
            "--what-if needs held-out data: add load_eval_data(batch_size) to the model file, or eval_data to the spec."
        )


def whole(report: Report) -> Report:
    """A scan that ran to its end: what was interrupted is nothing to repair by.

    Raises:
        KeyboardInterrupt: The scan was interrupted, and printed what it had measured.
    """
    if report.scan.stopped == "interrupted":
        raise KeyboardInterrupt
    return report
