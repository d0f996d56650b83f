"""The same batches again and again, whatever size the data has."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from bnprobe.errors import DataError
from bnprobe.probing.batches import check_finite, count_images, tensors_of
from bnprobe.randomness import seed_everything

KEPT_BYTES = 2**30
"""Data up to this size stays in host memory from one pass to the next; larger data is read anew."""


class Reread:
    """Batches of any size that can be read several times; those of no image are left out.

    Data that is read anew is read from the same seed: a loader that shuffles or augments by the global random state
    gives the same batches again. The random state is the caller's to preserve.

    Args:
        batches: The user's, on the host.
        most: Draw at most so many; None: all.
        seed: Seed of torch, numpy and random at the start of every reading.

    Attributes:
        batches: Drawn in the last complete reading.
        images: Images in them; a batch without tensors counts as one.
    """

    def __init__(self, batches: Iterable[Any], most: int | None, seed: int) -> None:
        self._source = batches
        self._most = most
        self._seed = seed
        self._kept: list[Any] | None = None
        self.batches = 0
        self.images = 0

    def __iter__(self) -> Iterator[Any]:
        """The batches, in their order.

        Raises:
            DataError: There are none, they hold NaN or Inf, or another reading gave others.
            UserCodeError: The loader raised.
        """
        if self._kept is not None:
            yield from self._kept
            return
        seed_everything(self._seed)
        keeping: list[Any] | None = []
        kept_bytes = batches = images = 0
        indices = getattr(self._source, "indices", None)
        for position, batch in itertools.islice(self._filled(), self._most):
            batches += 1
            images += count_images(batch) or 1
            check_finite(batch, position, indices)
            kept_bytes += sum(tensor.nbytes for tensor in tensors_of(batch))
            if kept_bytes > KEPT_BYTES:
                keeping = None
            elif keeping is not None:
                keeping.append(batch)
            yield batch
        self._finish(batches, images)
        self._kept = keeping

    def _filled(self) -> Iterator[tuple[int, Any]]:
        """Batches with their numbers from 1; those of no image are left out, as no layer has a say in them."""
        return ((number, batch) for number, batch in enumerate(self._source, 1) if count_images(batch) != 0)

    def _finish(self, batches: int, images: int) -> None:
        """A reading is complete: it must be like the one before."""
        if batches == 0 and not self.batches:
            raise DataError("The data gave no batch with an image: the loader or data set is empty.")
        if self.batches and (batches, images) != (self.batches, self.images):
            raise DataError(
                f"The data gave {self.images} images in {self.batches} batches, and when it was read again {images} in"
                f" {batches}. The eval path reads it once for every layer: give a DataLoader or a list, fewer batches"
                " (they are then kept), or take the train path, which reads it once."
            )
        self.batches, self.images = batches, images
