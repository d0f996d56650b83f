"""Batches of any nesting: count, join, move, and look for what is not finite."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from bnprobe.errors import DataError
from bnprobe.probing.batches import (
    CannotEmulateError,
    check_finite,
    count_images,
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
        ([(tensor(2), tensor(3)), (tensor(2), tensor(3, start=1))], "not per image"),
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
def test_count_images(batch: Any, images: int | None) -> None:
    assert count_images(batch) == images


def test_map_keeps_the_nest() -> None:
    batch = {"a": [tensor(2), (tensor(1), "s")], "p": Pair(tensor(1), 2)}
    assert_same(map_leaves(batch, lambda leaf: leaf), batch)
    assert len(tensors_of(batch)) == 3


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
    with pytest.raises(DataError, match=r"Micro-batch 7 .* \['x'\]\[0\] of shape \(4, 3\), first in its image 2"):
        check_finite({"x": [bad]}, 7)
    with pytest.raises(DataError, match=r"its tensor of shape \(4, 3\)"):
        check_finite(bad, 1)


def test_large_finite_inputs_are_fine() -> None:
    check_finite((torch.full((4, 3), 3e38), torch.arange(3), "text"), 1)  # their sum overflows
