"""How many samples a batch has: what the user's ``batch_size_of`` says, else the loader, else the batch itself."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from bnprobe.errors import DataError
from bnprobe.loading.model import attribute
from bnprobe.wording import either

_PER_SAMPLE = (Tensor, Mapping, str, bytes, int, float)
"""What a list with one entry per sample holds: images of different sizes, targets of a detector, file names."""


MOST_COLUMNS = 4096
"""A longer vector is hardly a row of a table: a recording, or pixels."""


def named_leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists, mappings and dataclasses in order, each with its place: ``[1]['boxes']``."""
    if isinstance(tree, Tensor):  # first: most often it is one, and the other questions take longer
        yield path, tree
    elif isinstance(tree, Mapping):
        yield from itertools.chain(*(named_leaves(value, f"{path}[{key_name(key)}]") for key, value in tree.items()))
    elif isinstance(tree, list | tuple):
        yield from itertools.chain(*(named_leaves(item, f"{path}[{index}]") for index, item in enumerate(tree)))
    elif is_record(tree):
        parts = ((each.name, getattr(tree, each.name, None)) for each in fields(tree))
        yield from itertools.chain(*(named_leaves(value, f"{path}.{name}") for name, value in parts))
    else:
        yield path, tree


def is_record(value: Any) -> bool:
    """Whether a value is an object of a dataclass that only holds other values: it cannot move or copy itself."""
    return is_dataclass(value) and not isinstance(value, type) and not (hasattr(value, "to") or hasattr(value, "clone"))


DEEPEST = 64
"""Levels of nesting of a batch or an output; what is deeper contains itself, or was never meant to be read."""


def require_readable(tree: Any, what: str) -> None:
    """Refuse a batch or an output that cannot be taken apart: tensors without values, or nesting without an end.

    Args:
        tree: As a loader or a model gave it.
        what: What it is, for the message, as the beginning of a sentence: ``"Batch 3 of load_data"``.

    Raises:
        DataError: Says what is in it, and where.
    """
    for path, leaf in _leaves(tree, "", 0):
        problem = leaf if isinstance(leaf, str) else why_unreadable(leaf)
        if problem:
            raise DataError(f"{what} holds {problem}{f' at {path}' if path else ''}.{_REMEDIES.get(problem, '')}")


_TOO_DEEP = f"more than {DEEPEST} levels of lists or mappings (does it contain itself?)"


def _leaves(tree: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """The tensors among the leaves with their places, and a text in place of what is nested too deeply."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping | list | tuple):
        if depth == DEEPEST:
            yield "", _TOO_DEEP
            return
        items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, value in items:
            yield from _leaves(value, f"{path}[{key_name(key)}]", depth + 1)


def key_name(key: object) -> str:
    """A key as it is written, or its class where that cannot be."""
    return repr(key) if isinstance(key, str | int | float | bytes | None) else type(key).__name__


_META, _NESTED, _SPARSE = "a tensor without values (device meta)", "a nested tensor", "a sparse tensor"

_REMEDIES = {
    _META: " Make it on a real device.",
    _NESTED: " Give a padded tensor, or a list with one tensor per sample.",
    _SPARSE: " Give a dense one (.to_dense()), or one tensor per sample.",
}


def why_unreadable(tensor: Tensor) -> str | None:
    """Why the values of a tensor cannot be read, a noun; None if they can."""
    if tensor.is_meta:
        return _META
    if tensor.is_nested:
        return _NESTED
    return _SPARSE if tensor.layout is not torch.strided and not getattr(tensor, "is_mkldnn", False) else None


def kind_of_sample(batch: Any, samples: int | None = None) -> str:
    """What a sample of a batch is, a noun in the singular: an image, row, graph or sequence; else a sample.

    Graphs and packed sequences are known by their class, rows and images by the first tensor: rows are vectors of
    floats, images have one or three channels and no side twice as long as the other (a spectrogram, or the joints of a
    skeleton over time, has). All else is a sample, and so are ``samples`` that have several rows of the first tensor.
    """
    is_graph = isinstance(batch, Mapping) and "edge_index" in batch and _graphs_in_vector(batch) is not None
    if isinstance(attribute(batch, "num_graphs"), int) or is_graph:
        return "graph"
    parts = batch if isinstance(batch, list | tuple) else [batch]
    if isinstance(batch, PackedSequence) or any(isinstance(part, PackedSequence) for part in parts):
        return "sequence"
    # A value for each sample, as a label, may stand before what it is the label of.
    first = next((leaf for _, leaf in named_leaves(batch) if not isinstance(leaf, Tensor) or leaf.ndim > 1), None)
    if not isinstance(first, Tensor) or not (first.is_floating_point() or first.dtype == torch.uint8):
        return "sample"
    if samples is not None and first.shape[:1] != (samples,):
        return "sample"
    if first.ndim == 2 and first.is_floating_point() and first.shape[1] <= MOST_COLUMNS:
        return "row"
    sides = sorted(first.shape[2:])
    return "image" if first.ndim == 4 and first.shape[1] in (1, 3) and sides[1] < 2 * sides[0] else "sample"


def count_samples(batch: Any) -> int | None:
    """Samples in a batch of which nothing else is known; where its parts disagree, as its first part says.

    Returns:
        None if there is nothing to count.
    """
    return SampleCount(strict=False)(batch)


def count_samples_of_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Samples that a model is called on: two arguments are no batch of two samples."""
    return count_samples({**{str(position): each for position, each in enumerate(args)}, **kwargs})


@dataclass
class SampleCount:
    """Counts the samples of one source's batches. What counted the samples of one batch counts those of the next.

    Args:
        stated: The batch size that the loader states.
        asked: The batch size that was asked for, where the loader states none.
        told: The user's ``batch_size_of(batch)``.
        origin: Name of the data in messages.
        strict: Refuse a batch whose parts have different lengths if nothing says which of them counts; else the first
            part does, for what needs the number as a weight only.
    """

    stated: int | None = None
    asked: int | None = None
    told: Callable[[Any], int] | None = None
    origin: str = "the data"
    strict: bool = True
    _place: str | None = field(default=None, init=False)

    def __call__(self, batch: Any) -> int | None:
        """Samples in a batch; None if there is nothing to count.

        Raises:
            DataError: It cannot be told; says which function to write.
            UserCodeError: The user's function raised.
        """
        if self.told is not None:
            return self.told(batch)
        known = _known_kind(batch)
        if known is not None:
            return known
        lengths = _lengths(batch)
        if self._place is not None and self._place in lengths:
            return lengths[self._place]
        wanted = self.stated or self.asked
        self._place = next((place for place, length in lengths.items() if length == wanted), None)
        if self._place is not None:
            return wanted
        return self._undecided(batch, lengths)

    def _undecided(self, batch: Any, lengths: Mapping[str, int]) -> int | None:
        """No length is the expected one: a ragged batch, one that is not full, or one of another size."""
        found = _graphs_in_vector(batch)
        if found is not None and (self.stated is None or found <= self.stated):
            return found
        agreed = _agreed(batch)
        if self.stated is not None:
            return agreed if agreed is not None and agreed < self.stated else self.stated
        if agreed is None and lengths:
            if self.strict:
                raise DataError(self._advice(batch, lengths))
            return next(iter(lengths.values()))
        return agreed

    def _advice(self, batch: Any, lengths: Mapping[str, int]) -> str:
        listed = ", ".join(f"batch{place}: {length}" for place, length in itertools.islice(lengths.items(), 6))
        flat = [f"{place}" for place, leaf in named_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() == 1]
        place = min(flat or lengths, key=lambda place: lengths[place])
        return (
            f"How many samples a batch of {self.origin} has cannot be told from the lengths of its parts"
            f" ({listed})."
            f" {either('Add this line to the model file', 'Pass this function as batch_size_of')}, with what"
            " has one entry per sample:"
            f" def batch_size_of(batch): return len(batch{place})"
        )


def _known_kind(tree: Any) -> int | None:
    """Samples of a batch object of a library: graphs (num_graphs, or batch_size as in DGL), packed sequences."""
    if isinstance(tree, PackedSequence):
        return int(tree.batch_sizes[0])
    if isinstance(tree, Mapping | list | tuple):
        parts = tree.values() if isinstance(tree, Mapping) else tree
        return next((found for found in map(_known_kind, parts) if found is not None), None)
    for name in ("num_graphs", "batch_size"):
        size = None if isinstance(tree, Tensor) else attribute(tree, name)
        size = size[0] if isinstance(size, tuple) and size else size
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _graphs_in_vector(batch: Any) -> int | None:
    """Graphs of a ragged batch that says to which graph each row belongs: ``ptr``, or a sorted vector ``batch``."""

    def part(name: str) -> Any:
        return batch.get(name) if isinstance(batch, Mapping) else attribute(batch, name)

    ptr, vector = part("ptr"), part("batch")
    if isinstance(ptr, Tensor) and ptr.dim() == 1:
        return len(ptr) - 1
    if not isinstance(vector, Tensor) or vector.dim() != 1 or vector.is_floating_point() or not len(vector):
        return None
    return int(vector[-1]) + 1 if int(vector[0]) == 0 and bool((vector.diff() >= 0).all()) else None


def _may_be_samples(items: Any, top: bool = False) -> bool:
    """Whether items are of one kind that a list with one entry per sample holds."""
    kinds = (Tensor, Mapping) if top else _PER_SAMPLE
    return bool(items) and any(all(isinstance(item, kind) for item in items) for kind in kinds)


def is_per_sample(items: list[Any] | tuple[Any, ...], samples: int | None) -> bool:
    """Whether a list or tuple has one entry per sample, rather than one per field or view of the batch."""
    return (
        len(items) == samples
        and _may_be_samples(items)
        and not any(_first_axis(leaf) == samples for _, leaf in named_leaves(items))
    )


def _lengths(batch: Any) -> dict[str, int]:
    """Length of the first axis of each tensor, and of each list with one entry per sample; likeliest places first."""
    found: list[tuple[tuple[int, bool], str, int]] = []

    def visit(tree: Any, path: str, depth: int) -> None:
        length = _first_axis(tree)
        if length is not None:
            found.append(((depth, False), path, length))
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                visit(value, f"{path}[{key_name(key)}]", depth + 1)
        elif isinstance(tree, list | tuple):
            if _may_be_samples(tree, top=depth == 0):
                # At the top, tensors are rather the fields of a batch: the last place to look at.
                last = depth == 0 and isinstance(tree[0], Tensor)
                found.append(((sys.maxsize if last else depth, True), path, len(tree)))
            for index, item in enumerate(tree):
                visit(item, f"{path}[{index}]", depth + 1)

    visit(batch, "", 0)
    return {path: length for _, path, length in sorted(found, key=lambda each: each[0])}


def _first_axis(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.dim() > 0 else None
    shape = attribute(leaf, "shape")  # arrays of other libraries
    return int(shape[0]) if isinstance(shape, tuple) and shape else None


def _agreed(batch: Any) -> int | None:
    """The first axis of all tensors where it is the same, else the length of all fields where that is."""
    if isinstance(batch, list | tuple) and _are_records(batch):
        return len(batch)
    leaves = [leaf for _, leaf in named_leaves(batch)]
    axes = {length for length in map(_first_axis, leaves) if length is not None}
    if len(axes) == 1 and not _is_ragged(batch):
        return axes.pop()
    fields = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(fields, list | tuple):
        return None
    lengths = {_field_length(item) for item in fields} - {None}
    return lengths.pop() if len(lengths) == 1 else None


def _are_records(items: Any) -> bool:
    """Whether items are mappings with the same keys: one for each sample."""
    return bool(items) and all(isinstance(item, Mapping) and item.keys() == items[0].keys() for item in items)


def _is_ragged(batch: Any) -> bool:
    """Whether a list among the fields holds tensors of different sizes, which are then those of single samples."""
    fields = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else []
    return any(
        isinstance(item, list | tuple) and len({part.shape for part in item if isinstance(part, Tensor)}) > 1
        for item in fields
    )


def _field_length(item: Any) -> int | None:
    length = _first_axis(item)
    if length is None and isinstance(item, list | tuple) and _may_be_samples(item):
        return len(item)
    return length
