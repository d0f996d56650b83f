"""What bnprobe does, as a table of contents."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import bnprobe
from bnprobe.assemble import assemble
from bnprobe.diagnosis import diagnose, judge, model_rules
from bnprobe.errors import DeviceError
from bnprobe.facts import Facts
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.model import unwrapped
from bnprobe.loading.workload import Workload, load_model_only, load_workload
from bnprobe.probing.anatomy import anatomy
from bnprobe.probing.drive import Progress, Source, probe
from bnprobe.probing.evidence import Evidence
from bnprobe.probing.forward import forward_all
from bnprobe.probing.layers import check_buffers, find_layers, unmatched_globs
from bnprobe.probing.preserve import untouched
from bnprobe.probing.runner import Runner, UserFunctions
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.records import SCHEMA_VERSION, Environment, Report, Scan, Tool
from bnprobe.reports.lint import LintReport
from bnprobe.spec import ScanSettings, Spec
from bnprobe.specfile import settings_from


def no_progress(done: int, planned: int) -> None:
    """Report progress to nobody."""


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
        progress: Called with the micro-batches done, and those planned so far.
        **settings: Any field of ``bnprobe.spec.ScanSettings`` but ``batches``: max_batches, seed, device, ...

    Returns:
        The report; ``bnprobe.reports.FORMATS`` renders it.

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
        workload = Workload(inner, type(inner).__name__, None, source, held_out, forward, loss, metric, notes)
        return _scan(workload, given, progress)


def scan_spec(spec: Spec, progress: Progress = no_progress) -> Report:
    """Load what a spec names, and scan it.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        return _scan(load_workload(spec), spec.settings(), progress)


def _scan(workload: Workload, settings: ScanSettings, progress: Progress) -> Report:
    model, source = workload.model, workload.source
    with untouched(model):
        seed_everything(settings.seed)
        device = _device(settings.device, model)
        model.to(device)
        layers = find_layers(model, settings.is_selected)
        check_buffers(layers.layers)
        forward = workload.forward or (forward_all if source.synthetic else None)
        functions = UserFunctions(forward, workload.loss, workload.metric)
        autocast = getattr(torch, settings.autocast) if settings.autocast else None
        runner = Runner(model, layers, functions, device, autocast)
        with runner.installed():
            data = Source(source.batches, source.batch_size)
            held_out = None
            if workload.evaluation is not None:
                held_out = Source(workload.evaluation.batches, workload.evaluation.batch_size)
            evidence = probe(runner, data, settings, progress, held_out)
        findings = assemble(evidence, settings)
        report = Report(
            schema_version=SCHEMA_VERSION,
            tool=Tool("bnprobe", bnprobe.__version__),
            environment=_environment(device),
            scan=_describe(workload, settings, evidence, device),
            summary=findings.summary,
            layers=findings.layers,
            skipped=findings.skipped,
        )
    if evidence.failure is not None:
        evidence.failure.report = report
        raise evidence.failure
    return report


def _device(name: str, model: nn.Module) -> torch.device:
    """The device asked for; "auto" is the model's own, or CUDA where the model is on the CPU and CUDA is there.

    Raises:
        DeviceError: It is not there.
    """
    own = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if name == "auto":
        return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        have = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no CUDA device"
        raise DeviceError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. This machine has cpu and {have};"
            " use --device cpu."
        ) from None
    return device


def _environment(device: torch.device) -> Environment:
    on_cuda = device.type == "cuda"
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        platform=platform.platform(terse=True),
        device_name=torch.cuda.get_device_name(device) if on_cuda else platform.machine(),
        threads=torch.get_num_threads(),
    )


def _describe(workload: Workload, settings: ScanSettings, evidence: Evidence, device: torch.device) -> Scan:
    source = workload.source
    parameter = next(workload.model.parameters(), None)
    return Scan(
        model=workload.model_name,
        data=source.description,
        synthetic=source.synthetic,
        checkpoint=workload.checkpoint,
        batch_size=evidence.batch_size,
        batches=evidence.batches,
        batches_requested=settings.batches,
        images=evidence.batches * evidence.batch_size,
        left_out=evidence.left_out,
        emulated=evidence.emulated,
        physical_batch=evidence.physical_batch,
        emulation=evidence.emulation,
        self_check=evidence.self_check,
        seed=settings.seed,
        device=str(device),
        dtype="none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        autocast=settings.autocast,
        stopped=evidence.stopped,
        partial=evidence.stopped in ("interrupted", "failed"),
        seconds=evidence.seconds,
        notes=(*workload.notes, *source.notes, *_remarks(settings, evidence)),
    )


def _remarks(settings: ScanSettings, evidence: Evidence) -> Iterator[str]:
    """What the reader should know about the scan as a whole."""
    yield from unmatched_globs(settings, evidence.layers)
    if all(layer.info.batches_tracked == 0 for layer in evidence.layers.selected):
        yield (
            "No layer's running statistics were ever updated (num_batches_tracked is 0): the model is untrained."
            " Was a checkpoint forgotten?"
        )
    images = evidence.batches * evidence.batch_size
    for size in evidence.batch_sizes:
        if images < 2 * size:
            yield f"Batch size {size} needs at least {2 * size} images, and {images} were measured: raise --batches."


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
        diagnoses=diagnose(verdicts, facts, lambda layers: None),
        skipped=found.skipped,
    )
