"""Whether micro-batches that differ in size still run together as they do apart.

A model may look at the largest sample of a batch: it pads images to it, or cuts sequences at it. Micro-batches whose
largest samples are alike then run together as they do apart, and the self-check on the first two of them sees nothing.
So it is repeated on the smallest and the largest micro-batch whenever one comes that is smaller or larger than all
before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from bnprobe.errors import UserCodeError
from bnprobe.loading.samples import is_per_sample, named_leaves
from bnprobe.measure.batch import MicroBatch, as_plain, pick
from bnprobe.measure.physical_batch import Emulation, check_samples, checked, not_emulated
from bnprobe.measure.restore import preserved_random_state
from bnprobe.measure.session import Session

DIFFERS = "The model depends on the largest sample of a batch."
"""Why micro-batches run one by one."""


class Extremes:
    """The smallest and the largest micro-batch so far, in each of the sizes that a batch shows.

    They are kept on the host, as the reader gave them.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[tuple[int, MicroBatch], tuple[int, MicroBatch]]] = {}

    def widened_by(self, session: Session, micro_batches: Iterable[MicroBatch]) -> list[tuple[MicroBatch, MicroBatch]]:
        """Take in further micro-batches; the pairs of extremes that are new, smaller one first."""
        widened: set[str] = set()
        for batch in micro_batches:
            for place, size in largest_sizes(session.inputs_in(batch.data), batch.samples).items():
                low, high = self._found.get(place, ((size, batch), (size, batch)))
                if place not in self._found:
                    self._found[place] = low, high
                elif size < low[0] or size > high[0]:
                    self._found[place] = ((size, batch), high) if size < low[0] else (low, (size, batch))
                    widened.add(place)
        found = [self._found[place] for place in sorted(widened)]
        return list({(id(low.data), id(high.data)): (low, high) for (_, low), (_, high) in found}.values())


def checked_further(
    session: Session, extremes: Extremes, emulation: Emulation, micro_batches: Iterable[MicroBatch]
) -> Emulation:
    """The emulation, refused where the smallest and the largest micro-batch so far differ together from apart.

    Args:
        session: Installed.
        extremes: Of all that was checked before; takes in the new ones.
        emulation: The verdict so far.
        micro_batches: Which are to run next, on the host.

    Raises:
        UserCodeError: The model raised on a micro-batch by itself.
    """
    if not emulation.trusted:
        return emulation
    for pair in extremes.widened_by(session, micro_batches):
        with preserved_random_state():
            found = _compared(session, *pair)
        if not found.trusted:
            shown = found.check is not None and found.check.tolerance < found.check.statistic_error
            return replace(found, reason=DIFFERS if shown else found.reason)
    return emulation


def _compared(session: Session, one: MicroBatch, other: MicroBatch) -> Emulation:
    """The check on the eval path, where nothing is drawn at random, on as many samples of each as both have."""
    size = min(one.samples, other.samples)
    parts = [
        batch.data if batch.samples == size else pick(batch.data, list(range(size)), batch.samples)
        for batch in (one, other)
    ]
    try:
        return checked(session, parts, size, check_samples)[0]
    except UserCodeError:
        if one.samples == other.samples:
            raise
        return not_emulated("Micro-batches of different sizes could not be compared.")


def largest_sizes(batch: Any, samples: int) -> dict[str, int]:
    """The largest sample of a batch, in each way that its structure shows sizes.

    Of lists with one entry per sample, tensors by each axis and whole numbers by value; of integer tensors with one
    entry per sample the value, as it may be a length; of those with one row per sample the entries that are not 0, as
    it may be a mask, or padded with 0.

    Returns:
        The largest size by its place in the batch; empty where all samples are of one size by their structure.
    """
    found: dict[str, int] = {}
    for place, size in _sizes(batch, samples, ""):
        found[place] = max(size, found.get(place, size))
    return found


def is_ragged(batch: Any, samples: int) -> bool:
    """Whether a batch holds a list with one entry per sample whose tensors differ in size."""
    seen: dict[str, int] = {}
    entries = (each for each in _sizes(batch, samples, "") if "[*]" in each[0])
    return any(seen.setdefault(place, size) != size for place, size in entries)


def _sizes(tree: Any, samples: int, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(tree, Tensor):
        yield from _of_tensor(as_plain(tree), samples, path)
    elif isinstance(tree, Mapping):
        yield from chain(*(_sizes(value, samples, f"{path}[{key!r}]") for key, value in tree.items()))
    elif isinstance(tree, list | tuple) and is_per_sample(tree, samples):
        for item in tree:
            for place, leaf in named_leaves(item):
                if isinstance(leaf, Tensor):
                    yield from ((f"{path}[*]{place}.shape[{axis}]", length) for axis, length in enumerate(leaf.shape))
                elif isinstance(leaf, int):
                    yield f"{path}[*]{place}", leaf
    elif isinstance(tree, list | tuple):
        yield from chain(*(_sizes(item, samples, f"{path}[{index}]") for index, item in enumerate(tree)))


def _of_tensor(tensor: Tensor, samples: int, path: str) -> Iterator[tuple[str, int]]:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.shape[:1] != (samples,) or tensor.numel() == 0:
        return
    if tensor.dim() == 1:
        yield path, int(tensor.max())
    elif tensor.dim() == 2:
        yield path, int((tensor != 0).sum(1).max())
