"""The head of a report: what was run, on what, and notes on the scan as a whole."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from bnprobe.config.spec import ScanSettings
from bnprobe.loading.samples import kind_of_sample
from bnprobe.loading.workload import Workload
from bnprobe.measure.accumulators import SamplePool
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.further import Further
from bnprobe.measure.layers import unmatched_globs
from bnprobe.measure.rank_agreement import Agreement
from bnprobe.numbers import listed
from bnprobe.records import Chance, Environment, Gap, Pool, Remedy, Scan
from bnprobe.rules import effect
from bnprobe.rules.composition import FEWEST_GROUPS
from bnprobe.rules.facts import Facts
from bnprobe.stats.composition import regrouped_batches
from bnprobe.wording import either, option


def describe(
    workload: Workload,
    settings: ScanSettings,
    evidence: Evidence,
    further: Further,
    device: torch.device,
    notes: Sequence[str] = (),
) -> Scan:
    """What was run; ``notes`` come after those on loading, data and trials."""
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
        emulation=evidence.batching.reason,
        self_check=evidence.batching.emulation.check,
        seed=settings.seed,
        device=str(device),
        dtype="none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        autocast=settings.autocast,
        stopped=evidence.stopped,
        partial=evidence.partial,
        seconds=evidence.seconds,
        notes=(*workload.notes, *source.notes, *_remarks(settings, evidence), *further.notes, *notes),
        passes=tuple(further.passes),
        pool=_pool(evidence),
        unselected=tuple(layer.name for layer in evidence.layers.layers if not layer.selected),
        size_range=(min(sizes), max(sizes)) if len(set(sizes)) > 1 else None,
        held_out=None if workload.held_out is None else workload.held_out.description,
        held_out_images=None if evidence.held_out is None else evidence.held_out.samples,
        sample=kind_of_sample(*evidence.counted[0]) if evidence.counted else "sample",
        taken=dict(workload.taken),
        missing=dict(workload.missing),
    )


def notes_on(model: nn.Module, evidence: Evidence, facts: Facts, agreement: Agreement) -> Iterator[str]:
    """What a reader should know of processes and model, as it is before anything else runs: sentences."""
    if facts.processes > 1:
        yield f"{facts.processes} processes each measured part of the micro-batches; the results were merged."
    if agreement.note:
        yield agreement.note
    yield from _on_hidden(model, evidence)
    if facts.is_new:
        yield "All BN layers are as in a new model: statistics, weights and biases. Was a checkpoint forgotten?"


def notes_on_goal(gaps: Sequence[Gap], remedies: Sequence[Remedy], chance: Sequence[Chance]) -> Iterator[str]:
    """What was made of a metric of which nobody said whether a larger or a smaller one is better: a sentence."""
    why = effect.doubt_of_goal(gaps, remedies, chance)
    if why == "contradicted":
        yield effect.loss_decides()
    if why == "no loss":
        yield (
            "Whether a larger or a smaller metric is better was not said, and there is no loss to tell: a larger one is"
            " taken to be. If a smaller one is better, give "
            + either("--goal min (repair: {goal: min} in a spec).", 'goal="min".')
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


def _pool(evidence: Evidence) -> Pool | None:
    """The pool; None where it suffices for no layer. The calls of one layer share their samples."""
    pool = evidence.eval[SamplePool]
    calls = max(Counter(index for index, _ in pool.slots).values(), default=0)
    if calls * pool.held < FEWEST_GROUPS * evidence.batch_size or not evidence.batching.emulation.trusted:
        return None
    return Pool(pool.held, pool.bytes, regrouped_batches(pool.held, evidence.batch_size))


def _remarks(settings: ScanSettings, evidence: Evidence) -> Iterator[str]:
    """What the reader should know about the scan as a whole."""
    yield from unmatched_globs(settings, evidence.layers)
    if evidence.unscored:
        yield evidence.unscored
    if evidence.held_out is not None and evidence.held_out.unscored:
        yield f"{evidence.held_out.unscored} Its shift is judged by mean and variance alone."
    if evidence.sizes and len(set(evidence.sizes.values())) == 1:
        yield (
            f"The batches have {round(evidence.samples / evidence.batches)} samples, not {evidence.batch_size} as asked"
            " for: all figures are for batches as they are."
        )
    for size in evidence.batch_sizes:
        if evidence.samples < 2 * size:
            needed = f"Batch size {size} needs at least {2 * size} samples"
            yield f"{needed}, and {evidence.samples} were measured: raise {option('--batches')}."


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
