"""Batches as the user's loader collates them: join, slice, copy and move nested tensors."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnprobe.errors import DataError
from bnprobe.loading.model import attribute, kind_of, user_code
from bnprobe.loading.samples import count_samples, is_per_sample, is_record, named_leaves


class MicroBatch(NamedTuple):
    """A batch as the user's loader gave it, on the host, and how many samples it has."""

    data: Any
    samples: int


class CannotEmulateError(Exception):
    """Micro-batches that cannot run as one physical batch; the message says why."""


def in_float64(tree: Any) -> Any:
    """The same with all floating-point tensors in float64."""

    def widened(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return map_leaves(tree, widened)


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Apply ``function`` to every leaf of nested tuples, lists, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return _like_mapping(tree, {key: map_leaves(value, function) for key, value in tree.items()})
    if isinstance(tree, list | tuple):
        return _like_sequence(tree, [map_leaves(item, function) for item in tree])
    if is_record(tree):
        like = copy.copy(tree)
        for each in fields(tree):
            if hasattr(tree, each.name):
                object.__setattr__(like, each.name, map_leaves(getattr(tree, each.name), function))
        return like
    return function(tree)


def with_leaves(tree: Any, leaves: Iterable[Any]) -> Any:
    """The same with other leaves, in order."""
    rest = iter(leaves)
    return map_leaves(tree, lambda leaf: next(rest))


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors among the leaves, in order."""
    return [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]


def leaves_of(tree: Any) -> list[Any]:
    """The leaves of ``named_leaves`` without their places, which take longer to write down than to walk through."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree if isinstance(tree, list | tuple) else tree.values() if isinstance(tree, Mapping) else None
    if items is None:
        return [leaf for _, leaf in named_leaves(tree)]
    leaves = []
    for item in items:
        if isinstance(item, Tensor):  # most are, and a loss walks through a batch for every sample
            leaves.append(item)
        else:
            leaves += leaves_of(item)
    return leaves


def bytes_of(batch: Any) -> int | None:
    """What a batch takes in memory; None where that is not known, as of objects of other libraries."""
    size = 0
    for leaf in leaves_of(batch):
        if isinstance(leaf, Tensor | np.ndarray):
            size += leaf.nbytes
        elif isinstance(leaf, str | bytes | int | float | None):
            size += sys.getsizeof(leaf)
        else:
            return None
    return size


def as_plain(tensor: Tensor) -> Tensor:
    """The tensor without its subclass, whose operations may do more than compute (MONAI's MetaTensor, tv_tensors)."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def like_subclass(tensor: Tensor, like: Tensor) -> Tensor:
    """A plain tensor as one of the subclass of another, with what that one carries: the model goes on with its own."""
    found = tensor.as_subclass(type(like))
    found.__dict__.update(like.__dict__)
    return found


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all values of all floating-point tensors are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def join(batches: list[Any], samples: int | Sequence[int | None] | None = None) -> Any:
    """One physical batch from micro-batches of the same structure.

    Tensors whose first axis counts the samples are concatenated, strings and numbers per sample likewise; what is the
    same in all micro-batches is passed on once. Tensors of a subclass are joined as plain ones.

    Args:
        batches: The micro-batches.
        samples: In each of them: one number for all, or a list; None: as their structure says.

    Raises:
        CannotEmulateError: Something is neither, or the micro-batches differ in size.
    """
    if len(batches) == 1:
        return batches[0]
    if samples is None:
        samples = [count_samples(batch) for batch in batches]
    return _join(batches, [samples] * len(batches) if isinstance(samples, int) else list(samples))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move tensors to the device, and batch objects of other libraries that have a ``to`` method."""
    return map_leaves(batch, lambda leaf: _called(leaf, "to", device))


def copy_tensors(batch: Any) -> Any:
    """Copy the tensors and arrays of a batch, and batch objects of other libraries that have a ``clone`` method."""

    def copied(leaf: Any) -> Any:
        return leaf.copy() if isinstance(leaf, np.ndarray) else _called(leaf, "clone")

    return map_leaves(batch, copied)


def _called(leaf: Any, method: str, *arguments: Any) -> Any:
    """What a method of a tensor or of another library's batch object gives; the leaf itself where it has none."""
    if isinstance(leaf, Tensor):
        return getattr(leaf, method)(*arguments)
    call = attribute(leaf, method)
    if not callable(call) or isinstance(leaf, type):
        return leaf
    with user_code(f"calling {method}() of {kind_of(leaf)} in a batch"):
        return call(*arguments)


def check_finite(batch: Any, position: int, indices: Callable[[int], Sequence[Any]] | None = None) -> None:
    """Refuse NaN and Inf in the inputs.

    Args:
        position: Number of the micro-batch, from 1.
        indices: For that number the items of the data set, where known.

    Raises:
        DataError: Names the micro-batch, the tensor and the sample.
    """
    for path, tensor in named_leaves(batch):
        if not isinstance(tensor, Tensor):
            continue
        tensor = as_plain(tensor)
        # A finite sum means finite values, and needs no temporary of the tensor's size.
        if not tensor.is_floating_point() or math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all()):
            continue
        place = f"tensor {path} " if path else "tensor "
        sample = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0]) if tensor.dim() > 1 else 0
        items = [] if indices is None else indices(position)
        item = f", item {items[sample]} of the data set" if tensor.shape[:1] == (len(items),) else ""
        raise DataError(
            f"Micro-batch {position} (the first is 1) holds NaN or Inf in its {place}of shape {tuple(tensor.shape)},"
            f" first in its sample {sample} (the first is 0){item}. Clean the data set, or leave such samples out."
        )


def _join(parts: list[Any], samples: list[int | None]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return _join_tensors(parts, samples)
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise CannotEmulateError("the micro-batches have different keys")
        return _like_mapping(first, {key: _join([part[key] for part in parts], samples) for key in first})
    if isinstance(first, list | tuple):
        return _join_sequences(parts, samples)
    if all(_equal(part, first) for part in parts):
        return first
    raise CannotEmulateError(f"batches hold objects of type {type(first).__name__}, which cannot be concatenated")


def _join_tensors(parts: list[Tensor], samples: list[int | None]) -> Tensor:
    if all(part.dim() > 0 and part.shape[0] == count for part, count in zip(parts, samples, strict=True)):
        if len({part.shape[1:] for part in parts}) > 1:
            raise CannotEmulateError("the samples of different micro-batches differ in size")
        return torch.cat([as_plain(part) for part in parts])
    if all(part.shape == parts[0].shape and torch.equal(part, parts[0]) for part in parts):
        return parts[0]
    if any(part.dim() > 0 and part.shape[0] == count for part, count in zip(parts, samples, strict=True)):
        raise CannotEmulateError("the micro-batches differ in size")
    raise CannotEmulateError("a tensor of the batch is not per sample and differs between micro-batches")


def _join_sequences(parts: list[Any], samples: list[int | None]) -> Any:
    first = parts[0]
    if all(is_per_sample(part, count) for part, count in zip(parts, samples, strict=True)):
        return _like_sequence(first, [item for part in parts for item in part])
    if any(len(part) != len(first) for part in parts):
        raise CannotEmulateError("the micro-batches have different lengths")
    return _like_sequence(first, [_join(list(items), samples) for items in zip(*parts, strict=True)])


def _equal(left: Any, right: Any) -> bool:
    try:
        return type(left) is type(right) and bool(left == right)
    except (TypeError, ValueError, RuntimeError):
        return False


def _like_mapping(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same class with other values, or a dict if the class cannot be rebuilt."""
    if type(tree) is dict:
        return items
    return _first_holding(items, (lambda: _updated(tree, items), lambda: type(tree)(items)))  # type: ignore[call-arg]


def _updated(tree: Any, items: dict[Any, Any]) -> Any:
    like = copy.copy(tree)
    like.update(items)
    return like


def _like_sequence(tree: Any, items: list[Any]) -> Any:
    """A list or tuple of the same class with other items, or a plain one if the class cannot be rebuilt."""
    plain = items if isinstance(tree, list) else tuple(items)
    if type(tree) is type(plain):
        return plain
    return _first_holding(plain, (lambda: type(tree)(*items), lambda: type(tree)(items)))


def _first_holding(plain: Any, makers: Iterable[Callable[[], Any]]) -> Any:
    """What the first maker gives that holds the same objects as ``plain``; else ``plain``."""
    for make in makers:
        try:
            made = make()
            if _holds(made, plain):
                return made
        except Exception:  # the user's class may refuse in any way; the next maker may do
            continue
    return plain


def _holds(made: Any, plain: Any) -> bool:
    if len(made) != len(plain):
        return False
    if not isinstance(plain, dict):
        return all(one is other for one, other in zip(made, plain, strict=True))
    # Values may be attributes as well, which a shallow copy leaves as they were.
    attributes = getattr(made, "__dict__", {})
    return all(made[key] is value and attributes.get(key, value) is value for key, value in plain.items())


def one_by_one(batch: Any, samples: int) -> list[Any]:
    """Every sample of a batch as ``pick`` selects it, copied: rows of one copy of each tensor."""
    if isinstance(batch, Tensor):
        own = batch.dim() > 0 and batch.shape[0] == samples
        return list(batch.clone().unsqueeze(1).unbind()) if own else [batch.clone() for _ in range(samples)]
    if type(batch) is dict:
        columns = [one_by_one(value, samples) for value in batch.values()]
        return [dict(zip(batch, (column[row] for column in columns), strict=True)) for row in range(samples)]
    if type(batch) in (list, tuple) and not is_per_sample(batch, samples):
        columns = [one_by_one(item, samples) for item in batch]
        return [type(batch)(column[row] for column in columns) for row in range(samples)]
    return [copy_tensors(pick(batch, [row], samples)) for row in range(samples)]


def pick(batch: Any, rows: list[int], samples: int) -> Any:
    """Select samples of a batch: rows of tensors and items of lists with one entry per sample; the rest is kept."""
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or batch.shape[0] != samples:
            return batch
        return batch[rows[0] : rows[0] + 1].clone() if len(rows) == 1 else batch[rows]
    if type(batch) is dict:
        return {key: pick(value, rows, samples) for key, value in batch.items()}
    if type(batch) in (list, tuple) and is_per_sample(batch, samples):
        return type(batch)(batch[row] for row in rows)
    if type(batch) in (list, tuple):
        return type(batch)(pick(item, rows, samples) for item in batch)
    if isinstance(batch, Mapping | list | tuple):
        return map_leaves(batch, lambda leaf: pick(leaf, rows, samples))
    return batch
