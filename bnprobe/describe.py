"""What was run and where, in records."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from bnprobe.further import Further
from bnprobe.loading.workload import Workload
from bnprobe.probing.accumulators import SamplePool
from bnprobe.probing.evidence import Evidence
from bnprobe.probing.layers import unmatched_globs
from bnprobe.records import Environment, Pool, Scan
from bnprobe.spec import ScanSettings
from bnprobe.stats.composition import regrouped_batches


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


def describe(
    workload: Workload, settings: ScanSettings, evidence: Evidence, further: Further, device: torch.device
) -> Scan:
    """What was run, for the report."""
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
        notes=(*workload.notes, *source.notes, *_remarks(settings, evidence)),
        passes=tuple(further.passes),
        pool=_pool(evidence),
        unselected=tuple(layer.name for layer in evidence.layers.layers if not layer.selected),
    )


def _pool(evidence: Evidence) -> Pool | None:
    images = max((pool.mean.shape[0] for pool in evidence.eval.pool().values()), default=0)
    if not images:
        return None
    return Pool(images, evidence.eval[SamplePool].bytes, regrouped_batches(images, evidence.batch_size))


def _remarks(settings: ScanSettings, evidence: Evidence) -> Iterator[str]:
    """What the reader should know about the scan as a whole."""
    yield from unmatched_globs(settings, evidence.layers)
    if all(layer.info.batches_tracked == 0 for layer in evidence.layers.selected):
        yield (
            "No layer's running statistics were ever updated (num_batches_tracked is 0): the model is untrained."
            " Was a checkpoint forgotten?"
        )
    for size in evidence.batch_sizes:
        if evidence.samples < 2 * size:
            needed = f"Batch size {size} needs at least {2 * size} images"
            yield f"{needed}, and {evidence.samples} were measured: raise --batches."
