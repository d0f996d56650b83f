"""Rebuild a DataLoader at another batch size, where that is possible."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from bnprobe.errors import DataError


def own_batch_size(loader: DataLoader[Any]) -> int | None:
    """The loader's batch size; a custom batch sampler leaves ``loader.batch_size`` None but may state its own."""
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def refuse_rebuild(loader: DataLoader[Any], own: int | None, size: int, origin: str) -> None:
    """Raise a DataError if the loader's batch size cannot be changed, and say what to do."""
    reason = why_fixed(loader)
    if reason is None:
        return
    has = f"its batch size is {own}" if own else "its batch size is unknown"
    keep = f"give --batch-size {own}, or " if own else ""
    raise DataError(
        f"{origin} cannot be rebuilt at batch size {size}, because {reason}; {has}. Measuring at another "
        f"batch size would give a wrong diagnosis. To go on, {keep}write a function load_data(batch_size) "
        "that makes the loader at the requested size."
    )


def why_fixed(loader: DataLoader[Any]) -> str | None:
    """Why a loader cannot be rebuilt with other batches, as a clause; None if it can."""
    if isinstance(loader.dataset, IterableDataset):
        return "its data set is iterable (IterableDataset)"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{type(loader).__name__} has its own __iter__"
    if loader.batch_sampler is None:
        return "it has batch_size=None, so its data set makes the batches"
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return f"it has a custom batch sampler ({type(loader.batch_sampler).__name__})"
    return None


def rebuilt(loader: DataLoader[Any], size: int, batch_sampler: Any = None) -> DataLoader[Any]:
    """The same loader at another batch size, or with other batches; the last partial batch is kept."""
    how: dict[str, Any] = {"batch_size": size, "sampler": loader.sampler, "drop_last": False}
    return DataLoader(
        loader.dataset,
        **({"batch_sampler": batch_sampler} if batch_sampler is not None else how),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
    )
