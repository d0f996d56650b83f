"""What bnprobe does, as a table of contents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

import bnprobe
from bnprobe.analysis.diagnosis import diagnose, groups_of, judge
from bnprobe.analysis.findings import Findings, assemble
from bnprobe.describe import describe, environment
from bnprobe.distributed import ALONE, Share, World
from bnprobe.errors import BnprobeError
from bnprobe.further import Further, check_wishes, joint_impacts, measure_further, wanted_batches, with_further
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.model import unwrapped
from bnprobe.loading.shard import deal
from bnprobe.loading.spread import spread
from bnprobe.loading.workload import Workload, load_model_only, load_workload
from bnprobe.probing.evidence import Evidence
from bnprobe.probing.layers import anatomy, find_layers
from bnprobe.probing.rank_agreement import Agreement, agree
from bnprobe.probing.reader import Reader
from bnprobe.probing.restore import deferred_interrupts, untouched
from bnprobe.probing.scan_loop import Progress, probe
from bnprobe.probing.scan_loop import no_progress as no_progress  # those who scan take it from here
from bnprobe.probing.session import Session, UserFunctions
from bnprobe.probing.train_steps import OptimizerFactory
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import SCHEMA_VERSION, LintReport, Report, Tool
from bnprobe.rules.evidence import Facts
from bnprobe.rules.selection import model_rules
from bnprobe.spec import ScanSettings, Spec
from bnprobe.specfile import settings_from


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
    optimizer: OptimizerFactory | None = None,
    progress: Progress = no_progress,
    **settings: Any,
) -> Report:
    """Measure every BN layer of ``model`` on ``batches``, in training and at inference.

    The model comes back bit-identical, also after an exception; so does the random state.

    Args:
        model: Any module, on any device.
        batches: A DataLoader or Dataset, or an iterable of micro-batches of ``batch_size`` images.
        batch_size: Images per micro-batch; a DataLoader is rebuilt with it. None: the loader's own.
        num_batches: Measure exactly so many micro-batches; None: until every layer is decided.
        evaluation: Evaluation data, as ``batches``; read at the same batch size.
        forward, loss, metric: ``f(model, batch)``, as in a model file.
        optimizer: ``f(parameters)`` that gives the optimizer of ``train_steps``; None: SGD with lr 0.01.
        progress: Called with the micro-batches done, and those planned so far.
        **settings: Any field of ``bnprobe.spec.ScanSettings`` but ``batches``: max_batches, seed, device, ...

    Returns:
        The report; ``bnprobe.report.render`` writes it as text.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree; its ``report`` holds what was measured before.
    """
    given = settings_from({"batch_size": batch_size, "batches": num_batches, **settings})
    with preserved_random_state():
        seed_everything(given.seed)
        source = as_batch_source(batches, batch_size)
        held_out = None
        if evaluation is not None:
            held_out = as_batch_source(evaluation, source.batch_size, "the evaluation data given")
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
            micro-batches, process 0 puts them together, and all return its report.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    check_wishes(settings, workload)
    with untouched(workload.model):
        seed_everything(settings.seed)
        session = session_of(workload, settings)
        agreement = agree(workload.model, session.layers.selected, world)
        facts = replace(_facts(workload, session), processes=world.size, rank_mismatch=agreement.mismatch)
        evidence = _probe(workload, session, settings, progress, world)
        report = None
        if evidence is not None:
            report = _report(workload, settings, session, facts, evidence, tuple(_on_processes(world, agreement)))
    # A Ctrl-C that reaches the others while they wait has reached process 0 too, which answers it.
    with suppress(KeyboardInterrupt), deferred_interrupts():
        report = world.share(report)
    assert report is not None  # process 0 has one, or has raised
    return report


def whole(report: Report) -> Report:
    """A scan that ran to its end: what was interrupted is nothing to repair by.

    Raises:
        KeyboardInterrupt: The scan was interrupted, and took that for a wish to see what there is.
    """
    if report.scan.stopped == "interrupted":
        raise KeyboardInterrupt
    return report


def _report(
    workload: Workload, settings: ScanSettings, session: Session, facts: Facts, evidence: Evidence, notes: Sequence[str]
) -> Report:
    """From what was measured to what is said, with what is measured beyond the two paths."""
    findings = assemble(evidence, settings)
    evidence, further = _beyond(workload, session, settings, evidence, findings)
    scan = describe(workload, settings, evidence, further, session.device)
    scan = replace(scan, notes=(*scan.notes, *notes))
    layers = with_further(findings.layers, facts.anatomy, further, session.layers)
    facts = replace(facts, layers={layer.name: layer for layer in layers}, scan=scan)
    verdicts = judge(facts, settings.rules)
    impacts = joint_impacts(session, evidence, further, groups_of(verdicts, facts))
    report = Report(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", bnprobe.__version__),
        environment=environment(session.device),
        scan=scan,
        summary=replace(findings.summary, gradient_angle=further.angle),
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


def _facts(workload: Workload, session: Session) -> Facts:
    """What rules may know before anything is measured."""
    return Facts(
        anatomy(session.layers, workload.model),
        images=workload.source.images,
        drop_last=workload.source.drop_last,
        evaluation=workload.evaluation is not None,
    )


def _on_processes(world: World, agreement: Agreement) -> Iterator[str]:
    """What the reader should know of a scan on several processes."""
    if world.size > 1:
        yield f"{world.size} processes measured a share of the micro-batches each; their sums were put together."
    if agreement.note:
        yield agreement.note


def _probe(
    workload: Workload, session: Session, settings: ScanSettings, progress: Progress, world: World
) -> Evidence | None:
    """The two paths on the training data, and the eval path on the held-out data."""
    source, held_out = spread(workload.source, settings.seed, settings.batch_sizes), workload.evaluation
    size, keep = source.batch_size, wanted_batches(settings, source.batch_size)
    # Micro-batches that are regrouped to larger batches are measured by one process.
    share = Share(world.rank, world.size, math.lcm(size, *settings.batch_sizes) // size)
    source = deal(source, share)
    reader, held_out_reader = Reader(source.batches, size, keep, share, source.dealt), None
    if held_out is not None:
        share = Share(world.rank, world.size)
        held_out = deal(spread(held_out, settings.seed, mixed=True), share)
        size, dealt, most = held_out.batch_size, held_out.dealt, held_out.most
        held_out_reader = Reader(held_out.batches, size, keep, share, dealt, most)
    with session.installed():
        return probe(session, reader, settings, progress, held_out_reader, world)


def _beyond(
    workload: Workload, session: Session, settings: ScanSettings, evidence: Evidence, findings: Findings
) -> tuple[Evidence, Further]:
    """What is measured beyond the two paths; they are worth a report even if it fails or is interrupted."""
    further = Further()
    if evidence.partial:
        return evidence, further
    off = any(layer.flagged or layer.undecided for layer in findings.layers)
    try:
        measure_further(further, session, evidence, settings, workload.make_optimizer, impact=off)
    except BnprobeError as error:
        evidence = replace(evidence, stopped="failed", failure=error)
    except KeyboardInterrupt:
        evidence = replace(evidence, stopped="interrupted")
    return evidence, further


def session_of(workload: Workload, settings: ScanSettings) -> Session:
    """The workload's model on its device, with its layers found and the user's functions at hand."""
    functions = UserFunctions(workload.forward, workload.loss, workload.metric)
    return Session.open(workload.model, settings, functions, synthetic=workload.source.synthetic)


def lint_spec(spec: Spec) -> LintReport:
    """Judge the model that a spec names, as it is written and saved: no data, no forward pass.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    rules, settings = model_rules(spec.rules), spec.settings()
    with preserved_random_state():
        seed_everything(spec.data.seed)
        loaded = load_model_only(spec)
        found = find_layers(loaded.model, settings.is_selected)
        facts = Facts(anatomy(found, loaded.model))
    verdicts = judge(facts, spec.rules, rules)
    return LintReport(
        tool=Tool("bnprobe", bnprobe.__version__),
        model=loaded.name,
        layers=len(found.selected),
        verdicts=verdicts,
        diagnoses=diagnose(verdicts, facts),
        skipped=found.skipped,
    )
