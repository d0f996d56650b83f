"""What was run and where, in records."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch import nn

from bnprobe.errors import DeviceError
from bnprobe.further import Further
from bnprobe.loading.workload import Workload
from bnprobe.probing.evidence import Evidence
from bnprobe.probing.layers import unmatched_globs
from bnprobe.records import Environment, Pool, Scan
from bnprobe.spec import ScanSettings
from bnprobe.stats.composition import regrouped_batches


def device_named(name: str, model: nn.Module) -> torch.device:
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
        passes=tuple(further.passes),
        pool=_pool(evidence),
        unselected=tuple(layer.name for layer in evidence.layers.layers if not layer.selected),
    )


def _pool(evidence: Evidence) -> Pool | None:
    images = max((pool.mean.shape[0] for pool in evidence.pool.values()), default=0)
    if not images:
        return None
    return Pool(images, evidence.pool_bytes, regrouped_batches(images, evidence.batch_size))


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
