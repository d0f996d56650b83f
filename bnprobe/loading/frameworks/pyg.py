"""Graphs of PyTorch Geometric: data sets, lists and single graphs, which its own collater puts together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Subset

from bnprobe.loading.frameworks import Reader, imported
from bnprobe.loading.frameworks.libraries import library
from bnprobe.loading.model import attribute


class Graphs(Reader):
    """Graphs of PyTorch Geometric."""

    def claims_data(self, value: Any) -> bool:
        """See the base class."""
        listed = isinstance(value, list | tuple) and bool(value)
        return _is_graph(value) or (listed and all(map(_is_graph, value)))

    def data(self, value: Any, name: str, args: Mapping[str, Any]) -> Any:
        """See the base class."""
        if not _is_graph(value):
            return Subset(value, range(len(value)))  # which makes a data set of a list
        # One graph, of which every pass sees all nodes: the whole data set in one batch.
        return [library("torch_geometric.data", "pyg").Batch.from_data_list([value])]

    def collate(self, sample: Any) -> Callable[[list[Any]], Any] | None:
        """See the base class."""
        inside = sample if isinstance(sample, list | tuple) else [sample]
        if not any(map(_is_graph, inside)):
            return None
        collater: Callable[[list[Any]], Any] = library("torch_geometric.loader.dataloader", "pyg").Collater(None)
        return collater


def _is_graph(value: Any) -> bool:
    """Whether this is one graph, not a batch of several."""
    base = imported("torch_geometric.data.data", "BaseData")
    return base is not None and isinstance(value, base) and attribute(value, "num_graphs") is None
