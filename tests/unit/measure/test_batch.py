"""Batches of any nesting: count, join, move, and look for what is not finite."""

from __future__ import annotations

from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

from bnprobe.errors import DataError
from bnprobe.loading.samples import count_samples
from bnprobe.measure.batch import (
    CannotEmulateError,
    check_finite,
    join,
    map_leaves,
    tensors_of,
    to_device,
)

Pair = namedtuple("Pair", "x y")


def tensor(*shape: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape).float()


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        ([tensor(2, 3), tensor(2, 3, start=6)], tensor(4, 3)),
        ([(tensor(2), tensor(2, 1)), (tensor(2, start=2), tensor(2, 1, start=2))], (tensor(4), tensor(4, 1))),
        ([Pair(tensor(2), "a"), Pair(tensor(2, start=2), "a")], Pair(tensor(4), "a")),
        ([{"x": tensor(2), "n": 3}, {"x": tensor(2, start=2), "n": 3}], {"x": tensor(4), "n": 3}),
        ([OrderedDict(x=tensor(2)), OrderedDict(x=tensor(2, start=2))], OrderedDict(x=tensor(4))),
        ([[tensor(2), ["a", "b"]], [tensor(2, start=2), ["c", "d"]]], [tensor(4), ["a", "b", "c", "d"]]),
        # Images of several sizes, and what belongs to each of them.
        (
            [([tensor(1, 2), tensor(3)], [{"a": 1}, {"a": 2}]), ([tensor(4), tensor(5)], [{"a": 3}, {"a": 4}])],
            ([tensor(1, 2), tensor(3), tensor(4), tensor(5)], [{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}]),
        ),
        # The same constant in every micro-batch is passed on once.
        ([(tensor(2), tensor(3)), (tensor(2, start=2), tensor(3))], (tensor(4), tensor(3))),
        ([(tensor(2), None, tensor()), (tensor(2, start=2), None, tensor())], (tensor(4), None, tensor())),
    ],
)
def test_join(parts: list[Any], whole: Any) -> None:
    assert_same(join(parts), whole)


def test_a_single_batch_is_passed_on_as_it_is() -> None:
    batch = object()
    assert join([batch]) is batch


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([tensor(2, 3), tensor(2, 4)], "differ in size"),
        ([(tensor(2), tensor(3)), (tensor(2), tensor(3, start=1))], "not per sample"),
        ([{"x": tensor(2)}, {"y": tensor(2)}], "different keys"),
        ([(tensor(2),), (tensor(2), tensor(2))], "different lengths"),
        ([(tensor(2), "a"), (tensor(2), "b")], "type str"),
        ([object(), object()], "type object"),
    ],
)
def test_what_cannot_be_joined(parts: list[Any], words: str) -> None:
    with pytest.raises(CannotEmulateError, match=words):
        join(parts)


@pytest.mark.parametrize(
    ("batch", "images"),
    [
        (tensor(5, 2), 5),
        ((tensor(), tensor(4, 2)), 4),
        ({"id": "a", "x": [tensor(3)]}, 3),
        (("a", 1), None),
    ],
)
def test_count_samples(batch: Any, images: int | None) -> None:
    assert count_samples(batch) == images


def test_map_keeps_the_nest() -> None:
    batch = {"a": [tensor(2), (tensor(1), "s")], "p": Pair(tensor(1), 2)}
    assert_same(map_leaves(batch, lambda leaf: leaf), batch)
    assert len(tensors_of(batch)) == 3


class Attributed(dict):
    """Its values are attributes as well, as in many libraries for settings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Stamped(dict):
    """Cannot be made from its items alone."""

    def __init__(self, stamp: str, **items: Any) -> None:
        super().__init__(**items)
        self.stamp = stamp


class Sized(list):
    """Is made from a size, which no list of tensors is."""

    def __init__(self, size: int) -> None:
        super().__init__(range(size))


class Summed(tuple):
    """Takes whatever it is given, and holds something else."""

    def __new__(cls, *items: Any) -> Summed:
        return super().__new__(cls, (len(items),))


@pytest.mark.parametrize(
    ("tree", "kind"),
    [
        (defaultdict(list, x=tensor(2)), defaultdict),
        (Counter(x=1), Counter),
        (UserDict(x=tensor(2)), UserDict),
        (Attributed(x=tensor(2)), Attributed),
        (Stamped("now", x=tensor(2)), Stamped),
        (MappingProxyType({"x": tensor(2)}), MappingProxyType),
    ],
    ids=lambda value: type(value).__name__,
)
def test_mappings_of_any_class(tree: Mapping[str, Any], kind: type) -> None:
    mapped = map_leaves(tree, lambda leaf: leaf + 1)
    assert type(mapped) is kind
    assert torch.equal(torch.as_tensor(mapped["x"]), torch.as_tensor(tree["x"] + 1))
    assert getattr(mapped, "x", mapped["x"]) is mapped["x"]
    assert getattr(mapped, "stamp", None) == getattr(tree, "stamp", None)
    assert not torch.equal(torch.as_tensor(tree["x"]), torch.as_tensor(mapped["x"]))  # the user's own is as it was


def test_the_default_of_a_mapping_is_kept() -> None:
    joined = join([defaultdict(list, x=tensor(2)), defaultdict(list, x=tensor(2, start=2))])
    assert torch.equal(joined["x"], tensor(4))
    assert joined["missing"] == []


@pytest.mark.parametrize(("tree", "kind"), [(Sized(2), list), (Summed(1, 2), tuple), (torch.Size([1, 2]), tuple)])
def test_sequences_that_cannot_be_made_from_their_items(tree: Any, kind: type) -> None:
    mapped = map_leaves(tree, lambda leaf: tensor(2))
    assert type(mapped) is kind
    assert len(mapped) == len(tree)
    assert all(torch.equal(item, tensor(2)) for item in mapped)


def test_objects_with_a_to_method_are_moved() -> None:
    class Graph:
        moved = False

        def to(self, device: torch.device) -> Graph:
            other = Graph()
            other.moved = True
            return other

    graph, x = to_device((Graph(), tensor(2)), torch.device("cpu"))
    assert graph.moved
    assert torch.equal(x, tensor(2))


def test_non_finite_inputs_are_named() -> None:
    bad = torch.ones(4, 3)
    bad[2, 1] = float("inf")
    with pytest.raises(DataError, match=r"Micro-batch 7 .* \['x'\]\[0\] of shape \(4, 3\), first in its sample 2"):
        check_finite({"x": [bad]}, 7)
    with pytest.raises(DataError, match=r"its tensor of shape \(4, 3\)"):
        check_finite(bad, 1)


def test_the_row_of_a_ragged_batch_is_no_item_of_the_data_set() -> None:
    rows = torch.ones(9, 2)
    rows[7] = torch.nan
    with pytest.raises(DataError) as caught:
        check_finite({"x": rows}, 1, lambda position: [30, 31])
    assert "item" not in str(caught.value)


def test_large_finite_inputs_are_fine() -> None:
    check_finite((torch.full((4, 3), 3e38), torch.arange(3), "text"), 1)  # their sum overflows
