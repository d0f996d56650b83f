"""Data sets of MONAI, whose samples its own function puts together: tensors with what is known of them, and patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bnprobe.loading.frameworks import Reader, imported
from bnprobe.loading.frameworks.libraries import library


class Monai(Reader):
    """Data sets of MONAI."""

    def collate(self, sample: Any) -> Callable[[list[Any]], Any] | None:
        """See the base class."""
        kind = imported("monai.data.meta_tensor", "MetaTensor")
        if kind is None or not _holds(sample, kind):
            return None
        collate: Callable[[list[Any]], Any] = library("monai.data").list_data_collate
        return collate


def _holds(sample: Any, kind: type) -> bool:
    """Whether a sample, or one of its patches, has a tensor of this class."""
    if isinstance(sample, Mapping):
        return any(_holds(value, kind) for value in sample.values())
    if isinstance(sample, list | tuple):
        return any(_holds(value, kind) for value in sample)
    return isinstance(sample, kind)
