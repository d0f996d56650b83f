"""Draw micro-batches from the user's loader, and say clearly what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bnprobe.errors import DataError
from bnprobe.probing.batches import check_finite, count_images

_END = object()


class Feed:
    """Micro-batches of exactly ``batch_size`` images, in the loader's order.

    Attributes:
        drawn: Micro-batches given out so far.
        left_out: Images of a partial last batch, which is not given out.
        exhausted: The loader has no more.
        kept: The first ``keep`` micro-batches, for what is measured after the two paths.
    """

    def __init__(self, batches: Iterable[Any], batch_size: int, keep: int = 0) -> None:
        self.batch_size = batch_size
        self.kept: list[Any] = []
        self._keep = keep
        self.drawn = 0
        self.left_out = 0
        self.exhausted = False
        self._indices = getattr(batches, "indices", None)
        self._iterator: Iterator[Any] = iter(batches)
        self._returned: list[Any] = []

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` micro-batches; fewer only at the end of the data.

        Raises:
            DataError: The loader is empty, its batches have another size, or hold NaN or Inf.
            UserCodeError: The loader raised.
        """
        taken: list[Any] = []
        while len(taken) < count:
            batch = self._returned.pop(0) if self._returned else self._next()
            if batch is _END:
                break
            taken.append(batch)
        return taken

    def fill(self) -> None:
        """Draw until as many micro-batches are kept as were asked for, or the data ends."""
        while len(self.kept) < self._keep and self._next() is not _END:
            pass

    def give_back(self, batches: list[Any]) -> None:
        """Batches that were looked at before they are measured: the next ``take`` gives them again."""
        self._returned = batches + self._returned

    def _next(self) -> Any:
        if self.exhausted:
            return _END
        batch = next(self._iterator, _END)
        if batch is _END:
            return self._end()
        images = count_images(batch)
        if images is not None and images != self.batch_size:
            return self._odd_size(images)
        check_finite(batch, self.drawn + 1, self._indices)
        self.drawn += 1
        if len(self.kept) < self._keep:
            self.kept.append(batch)
        return batch

    def _end(self) -> Any:
        self.exhausted = True
        if self.drawn == 0 and self.left_out == 0:
            raise DataError("The data gave no batch at all: the loader or data set is empty.")
        return _END

    def _odd_size(self, images: int) -> Any:
        """A smaller batch is fine as the last one; everything else would falsify the diagnosis."""
        if images > self.batch_size or next(self._iterator, _END) is not _END:
            raise DataError(
                f"Micro-batch {self.drawn + 1} has {images} images, but the batch size is {self.batch_size}. All"
                " batches but the last must have the same size: let load_data(batch_size) give such a loader, or pass"
                f" --batch-size {images}."
            )
        if self.drawn == 0:
            raise DataError(
                f"The data gave a single batch, of size {images}, which is below the batch size of {self.batch_size}."
                " Use a smaller --batch-size or more data."
            )
        self.left_out = images
        return self._end()
