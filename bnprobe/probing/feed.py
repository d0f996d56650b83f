"""Draw micro-batches from the user's loader, and say clearly what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bnprobe.distributed import EVERYTHING, Share
from bnprobe.errors import DataError
from bnprobe.probing.batches import check_finite, count_images

_END = object()


class Feed:
    """Micro-batches of exactly ``batch_size`` images, in the loader's order: in several processes, this one's own.

    Args:
        batches: The same in all processes, or where ``dealt`` only those that this one reads.
        batch_size: Images in a micro-batch.
        keep: Keep this process's own among the first so many.
        share: Which micro-batches are its own.

    Attributes:
        left_out: Images of a partial last batch, which is not given out.
        exhausted: The loader has no more.
        kept: By position, for what is measured after the two paths.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        batch_size: int,
        keep: int = 0,
        share: Share = EVERYTHING,
        dealt: bool = False,
    ) -> None:
        self.batch_size, self.share = batch_size, share
        self.kept: dict[int, Any] = {}
        self.left_out = 0
        self.exhausted = False
        self._keep, self._dealt = keep, dealt
        self._next_position = 0
        self._indices = getattr(batches, "indices", None)
        self._iterator: Iterator[Any] = iter(batches)
        self._ahead: list[tuple[int, Any]] = []

    def take(self, count: int) -> list[Any]:
        """Up to ``count`` micro-batches of this process; fewer only at the end of the data.

        Raises:
            DataError: The loader is empty, its batches have another size, or hold NaN or Inf.
            UserCodeError: The loader raised.
        """
        taken: list[Any] = []
        while len(taken) < count:
            batch = self._own()
            if batch is _END:
                break
            taken.append(batch)
        return taken

    def look_ahead(self, count: int) -> list[Any]:
        """The first micro-batches of the data, whose ever they are; ``take`` gives those of this process again."""
        while len(self._ahead) < count:
            read = self._read()
            if read is None:
                break
            self._ahead.append(read)
        return [batch for _, batch in self._ahead[:count]]

    def fill(self) -> None:
        """Draw until as many micro-batches are kept as were asked for, or the data ends."""
        while len(self.kept) < self.share.count(self._keep) and self._own() is not _END:
            pass

    def _own(self) -> Any:
        """The next micro-batch of this process, or the end."""
        while (read := self._ahead.pop(0) if self._ahead else self._read()) is not None:
            position, batch = read
            if self.share.owns(position):
                if position < self._keep:
                    self.kept[position] = batch
                return batch
        return _END

    def _read(self) -> tuple[int, Any] | None:
        """The next micro-batch that there is, and its position; None at the end."""
        if self.exhausted:
            return None
        batch = next(self._iterator, _END)
        if batch is _END:
            self._end()
            return None
        position = self._next_position
        images = count_images(batch)
        if images is not None and images != self.batch_size:
            self._odd_size(position, images)
            return None
        if self.share.reads(position):
            check_finite(batch, position + 1, self._indices)
        self._next_position = self._after(position)
        return position, batch

    def _after(self, position: int) -> int:
        """Position of the batch that the loader gives next."""
        position += 1
        while self._dealt and not self.share.reads(position):
            position += 1
        return position

    def _end(self) -> None:
        self.exhausted = True
        if self._next_position == 0 and self.left_out == 0:
            raise DataError("The data gave no batch at all: the loader or data set is empty.")

    def _odd_size(self, position: int, images: int) -> None:
        """A smaller batch is fine as the last one; everything else would falsify the diagnosis."""
        if images > self.batch_size or next(self._iterator, _END) is not _END:
            raise DataError(
                f"Micro-batch {position + 1} has {images} images, but the batch size is {self.batch_size}. All"
                " batches but the last must have the same size: let load_data(batch_size) give such a loader, or pass"
                f" --batch-size {images}."
            )
        if position == 0:
            raise DataError(
                f"The data gave a single batch, of size {images}, which is below the batch size of {self.batch_size}."
                " Use a smaller --batch-size or more data."
            )
        self.left_out = images
        self._end()
