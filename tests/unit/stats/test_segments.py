"""Figures of layers side by side against loops over the layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.stats.segments import Segments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 999))
def test_reductions_are_those_of_each_layer(sizes: list[int], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, sum(sizes), generator=generator, dtype=torch.float64)
    segments, parts = Segments(torch.tensor(sizes)), values.split(sizes, 1)
    torch.testing.assert_close(segments.mean(values), torch.stack([part.mean(1) for part in parts], 1))
    assert segments.least(values).equal(torch.stack([part.amin(1) for part in parts], 1))
    spread = segments.spread(segments.least(values))
    assert spread.equal(torch.cat([part.amin(1, keepdim=True).expand_as(part) for part in parts], 1))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_sums_of_blocks_of_channels_are_those_of_all(sizes: list[int], width: int) -> None:
    values = torch.randn(3, sum(sizes), dtype=torch.float64)
    segments, totals = Segments(torch.tensor(sizes)), torch.zeros(3, len(sizes), dtype=torch.float64)
    for position, block in enumerate(values.split(width, 1)):
        segments.add_sums(totals, block, position * width)
    torch.testing.assert_close(totals, torch.stack([part.sum(1) for part in values.split(sizes, 1)], 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_with_its_layer(bad: float) -> None:
    values = torch.tensor([1.0, bad, 3.0, 4.0], dtype=torch.float64)
    mean = Segments(torch.tensor([2, 2])).mean(values)
    assert not mean[0].isfinite()
    assert mean[1] == 3.5
