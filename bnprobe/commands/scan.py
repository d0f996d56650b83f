"""``bnprobe scan``: load, measure both paths, measure what was asked for beyond them, judge, and report.

``scan_workload`` is the table of contents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from bnprobe._version import __version__
from bnprobe.analysis.description import describe, environment, notes_on, notes_on_goal
from bnprobe.analysis.diagnosis import diagnose, groups_of, judge
from bnprobe.analysis.findings import Findings, assemble
from bnprobe.config.spec import ScanSettings, Spec
from bnprobe.distributed import ALONE, Share, World
from bnprobe.errors import BnprobeError, UsageError
from bnprobe.loading.arguments import check_call, lacking
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.model import unwrapped
from bnprobe.loading.order import deal, drawn_at_random, is_random, require_same_data, spread
from bnprobe.loading.workload import Workload, load_workload
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.finite_data import data_set_size
from bnprobe.measure.further import Further, Wanted, batches_to_keep, joint_impacts, measure_further
from bnprobe.measure.interrupts import Restore, deferred_interrupts
from bnprobe.measure.layers import anatomy
from bnprobe.measure.rank_agreement import agree
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import preserved_generators, preserved_random_state, seed_everything, untouched
from bnprobe.measure.scan_loop import measure_mixed, probe
from bnprobe.measure.session import Announce, Progress, Session, UserFunctions, announce_nothing, no_progress
from bnprobe.measure.train_steps import MakeOptimizer
from bnprobe.records import SCHEMA_VERSION, Report, Tool
from bnprobe.rules.effect import excludes_zero, inconsistency
from bnprobe.rules.facts import Facts
from bnprobe.rules.selection import codes, selected
from bnprobe.rules.shares import is_cause, mismatch_limit
from bnprobe.wording import from_python


@from_python
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
    select: Sequence[str] = (),
    ignore: Sequence[str] = (),
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
        select: Only rules of these codes or prefixes, e.g. "BN2"; none: all.
        ignore: No rules of these codes or prefixes.
        progress: Called with the micro-batches done, and those planned so far.
        **settings: Any field of ``bnprobe.config.spec.ScanSettings`` but ``batches``: max_batches, seed, device, ...

    Returns:
        The report. ``print`` shows it as the command line does.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree; its ``report`` holds what was measured before.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.scan(model, loader, batch_size=2, num_batches=16)
        >>> report
        <Report: Sequential, 1 of 1 layer flagged, 1 error: batches too small>
        >>> report.ok
        False
        >>> report["1"].eval.equivalent_batch_size < 14
        True
        >>> [diagnosis.rule for diagnosis in report.diagnoses]
        ['BN201']
    """
    functions = {"forward": forward, "loss": loss, "metric": metric, "optimizer": optimizer}
    given = check_call(
        model,
        {**functions, "batch_size_of": batch_size_of},
        {"batch_size": batch_size, "batches": num_batches, **_rules(select, ignore), **settings},
        scan,
    )
    selected(given.rules)
    if lacks := lacking(given, loss, metric, evaluation):
        raise UsageError("\n".join(lacks))
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


def _rules(select: Sequence[str], ignore: Sequence[str]) -> dict[str, Any]:
    """The setting that they make; none where neither is given."""
    named = {"select": codes(select), "ignore": codes(ignore)}
    return {"rules": named} if any(named.values()) else {}


def scan_spec(
    spec: Spec, progress: Progress = no_progress, world: World = ALONE, announce: Announce = announce_nothing
) -> Report:
    """Load what a spec names, and scan it; see ``scan_workload``.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        return scan_workload(load_workload(spec), spec.settings(), progress, world, announce)


def scan_workload(
    workload: Workload,
    settings: ScanSettings,
    progress: Progress = no_progress,
    world: World = ALONE,
    announce: Announce = announce_nothing,
) -> Report:
    """Scan a model that is loaded already; it comes back bit-identical, and so does the random state.

    Args:
        world: Processes that all call this with the same model, data and settings: each measures its share of the
            micro-batches, process 0 merges the results, and all return its report.
        announce: Told of what is measured after the two paths.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    settings = workload.settings(settings)
    _check_requested(settings, workload)
    with untouched(workload.model) as kept:
        seed_everything(settings.seed)
        session = _session_of(workload, settings, kept.restores)
        agreement = agree(workload.model, session.layers.selected, world)
        require_same_data(workload.source, workload.held_out, world)
        evidence = _probe(workload, session, settings, progress, world)
        # Without what a framework offered for other batches than these.
        workload = workload.scored_by(session.functions.loss, session.functions.metric)
        report = None
        if evidence is not None:
            facts = replace(_facts(workload, session), processes=world.size, rank_mismatch=agreement.mismatch)
            notes = [*notes_on(workload.model, evidence, facts, agreement), *filter(None, [evidence.other_samples])]
            report = _report(workload, settings, session, facts, evidence, notes, Further(announce))
    # A Ctrl-C that reaches the others while they wait has reached process 0 too, which answers it.
    with suppress(KeyboardInterrupt), deferred_interrupts():
        report = world.share(report)
    assert report is not None  # process 0 has one, or has raised
    return report


def _session_of(workload: Workload, settings: ScanSettings, kept: Sequence[Restore]) -> Session:
    """The workload's model on its device, with its layers found and the user's functions at hand."""
    functions = UserFunctions(workload.forward, workload.loss, workload.metric, workload.offered)
    synthetic = workload.source.synthetic
    return Session.open(workload.model, settings, functions, synthetic=synthetic, kept=kept)


def _facts(workload: Workload, session: Session) -> Facts:
    """What rules may know of the model and the data alone."""
    return Facts(
        anatomy(session.layers, workload.model, session.held),  # their flags are those of the last pass
        images=workload.source.images,
        drop_last=workload.source.drop_last,
        held_out=workload.held_out is not None,
        own_order=workload.source.own_order,
        composed=workload.source.composed,
        averaged=workload.averaged[0],
        averaged_beside=workload.averaged[1],
        undone=workload.undone,
    )


def _probe(
    workload: Workload, session: Session, settings: ScanSettings, progress: Progress, world: World
) -> Evidence | None:
    """The two paths on the training data, and the eval path on the held-out data."""
    source, held_out = spread(workload.source, settings.seed, settings.batch_sizes), workload.held_out
    size, keep = source.batch_size, batches_to_keep(settings, source.batch_size, _can_try_remedies(workload, settings))
    # Micro-batches that are regrouped to larger batches are measured by one process.
    share = Share(world.rank, world.size, math.lcm(size, *settings.batch_sizes) // size)
    source = deal(source, share)
    reader, held_out_reader = Reader(source.batches, size, keep, share, source.dealt), None
    if held_out is not None:
        share = Share(world.rank, world.size)
        held_out = deal(spread(held_out, settings.seed, mixed=True), share)
        size, dealt, most = held_out.batch_size, held_out.dealt, held_out.most
        keep = batches_to_keep(settings, size, _can_try_remedies(workload, settings))
        held_out_reader = Reader(held_out.batches, size, keep, share, dealt, most, any_size=True)
    with session.installed():
        evidence = probe(session, reader, settings, progress, held_out_reader, world)
    if evidence is not None:
        evidence.population = data_set_size(source, evidence.batches * source.batch_size)
    return evidence


def _can_try_remedies(workload: Workload, settings: ScanSettings) -> bool:
    """Whether remedies can be compared, and may be: there is something to score by, and real data to score on."""
    scored = workload.loss is not None or workload.metric is not None
    return scored and not workload.source.synthetic and settings.what_if is not False


def _report(
    workload: Workload,
    settings: ScanSettings,
    session: Session,
    facts: Facts,
    evidence: Evidence,
    notes: Sequence[str],
    further: Further,
) -> Report:
    """Measure what goes beyond the two paths, apply the rules, and write the report."""
    findings = _with_mixed_batches(workload, session, settings, evidence, assemble(evidence, settings))
    evidence = _beyond(workload, session, settings, evidence, findings, facts, further)
    output = replace(findings.summary.output, batch_dependence=further.batch_dependence)
    summary = replace(findings.summary, output=output, gradient_angle=further.angle, chance=further.chance)
    notes = (*notes, *notes_on_goal(summary.gaps, further.remedies, summary.chance))
    scan = describe(workload, settings, evidence, further, session.device, notes)
    positions = {layer.name: layer.index for layer in session.layers.layers}
    places = {layer.name: layer.location for layer in facts.anatomy}
    layers = tuple(
        replace(further.added_to(layer, positions[layer.name]), location=places.get(layer.name))
        for layer in findings.layers
    )
    facts = replace(
        facts,
        anatomy=further.traced(facts.anatomy),
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
        frozen_lag=further.frozen_lag,
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
    further: Further,
) -> Evidence:
    """Measure what goes beyond the two paths, into ``further``; how it ended is in the evidence that is returned."""
    if evidence.partial:
        return evidence
    off = inconsistency(findings.summary.gaps).is_worse or any(
        layer.flagged or layer.undecided or layer.domains for layer in findings.layers
    )
    off = off or _has_frozen_and_off(findings, evidence)
    scored = _can_try_remedies(workload, settings)
    wanted = Wanted(off, scored and (off or _is_doubtful(findings, facts, settings)), scored, _stale(findings))
    try:
        measure_further(further, session, evidence, settings, wanted, workload.make_optimizer)
    except BnprobeError as error:
        evidence = replace(evidence, stopped="failed", failure=error)
    except KeyboardInterrupt:
        evidence = replace(evidence, stopped="interrupted")
    if evidence.partial and further.under_way:
        further.notes.append(f"The scan ended in a measurement beyond the two paths: {further.under_way}.")
    return evidence


def _has_frozen_and_off(findings: Findings, evidence: Evidence) -> bool:
    """Whether the statistics of a layer that training leaves in eval mode are not those of its data."""
    beyond = evidence.beyond_noise() if evidence.frozen else {}
    off = {evidence.layers.layers[index].name: beyond[index] for index in evidence.frozen & beyond.keys()}
    return any(off.get(layer.name, 0.0) > mismatch_limit(layer) for layer in findings.layers)


def _stale(findings: Findings) -> tuple[str, ...]:
    """Flagged layers whose running statistics are wrong, other than by dropout; none where staleness is no cause."""
    if not any(is_cause(layer, "lag") for layer in findings.layers):
        return ()
    return tuple(
        layer.name
        for layer in findings.layers
        if layer.flagged and layer.shares and max(layer.shares.lag, layer.shares.propagation) > 0
    )


def _is_doubtful(findings: Findings, facts: Facts, settings: ScanSettings) -> bool:
    """Whether something may be wrong though no layer is flagged: a rule fails, or a step of the gap is significant."""
    layers = {layer.name: layer for layer in findings.layers}
    output, gaps = findings.summary.output, findings.summary.gaps
    known = replace(facts, layers=layers, output=output, gaps=gaps)
    if any(verdict.outcome == "failed" for verdict in judge(known, settings.rules)):
        return True
    # Also where inference is the better side: then something is wrong with training.
    return any(
        excludes_zero(interval)
        for gap in gaps
        for interval in (gap.inconsistency_interval, gap.generalization_interval)
    )


def _check_requested(settings: ScanSettings, workload: Workload) -> None:
    """Refuse before anything is measured what could not be measured in the end.

    Raises:
        UsageError: Names every option and what it lacks.
    """
    lacks = lacking(settings, workload.loss, workload.metric, workload.held_out)
    if lacks:
        raise UsageError("\n".join(lacks))


def whole(report: Report) -> Report:
    """A scan that ran to its end: what was interrupted is nothing to repair by.

    Raises:
        KeyboardInterrupt: The scan was interrupted, and printed what it had measured.
    """
    if report.scan.stopped == "interrupted":
        raise KeyboardInterrupt
    return report
