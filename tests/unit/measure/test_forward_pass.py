"""Rows, images and micro-batches: which row belongs where, and what follows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnprobe.measure.forward_pass import Grouping, RowLayout, normalize_groups
from bnprobe.measure.norms import NormCall
from bnprobe.stats.moments import pool_moments

counts = st.integers(1, 3)


def rows_of(images: Tensor, layout: RowLayout) -> Tensor:
    """(images, k, channels, *space) as a layer sees it."""
    return (images if layout is RowLayout.CONSECUTIVE else images.transpose(0, 1)).flatten(0, 1)


@given(counts, counts, counts, st.lists(st.integers(1, 3), max_size=2), st.sampled_from(RowLayout), st.integers(0, 999))
def test_moments_are_each_images_own(
    groups: int, size: int, k: int, space: list[int], layout: RowLayout, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(groups * size, k, 2, *space, generator=generator, dtype=torch.float64)
    grouping = Grouping(groups * size, size, groups * size * k, layout)
    assert (grouping.rows_per_sample, grouping.groups) == (k, groups)
    mean, variance = grouping.sample_moments(rows_of(images, layout), 1e-5)
    values = images.transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean, values.mean(2))
    torch.testing.assert_close(variance, values.var(2, correction=0))


@given(st.integers(2, 3), counts, counts, st.sampled_from(RowLayout))
def test_every_row_knows_its_micro_batch(groups: int, size: int, k: int, layout: RowLayout) -> None:
    grouping = Grouping(groups * size, size, groups * size * k, layout)
    owner = torch.arange(groups).repeat_interleave(size)[:, None, None].expand(-1, k, 1)
    found = grouping.group_of_row(torch.device("cpu"))
    assert torch.equal(found, rows_of(owner, layout).squeeze(1))


def test_one_micro_batch_needs_no_index() -> None:
    assert Grouping(4, 4, 8).group_of_row(torch.device("cpu")) is None


@pytest.mark.parametrize("layout", RowLayout)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_normalizing_equals_torchs_own_layer_per_micro_batch(
    layout: RowLayout, affine: bool, shape: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    groups, size, k = 3, 2, 2
    images = (2 + 3 * torch.randn(groups * size, k, 4, *shape)).to(dtype)
    weight, bias = (torch.rand(4).to(dtype), torch.randn(4).to(dtype)) if affine else (None, None)
    x = rows_of(images, layout)
    if last and shape:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    grouping = Grouping(groups * size, size, groups * size * k, layout)
    moments = pool_moments(*grouping.sample_moments(x, 1e-5), size)
    call = NormCall(x, None, None, weight, bias, True, 1e-5)
    found = normalize_groups(call, *moments, grouping.group_of_row(x.device))
    expected = torch.cat(
        [
            F.batch_norm(part.flatten(0, 1), None, None, weight, bias, True, 0.0, 1e-5).unflatten(0, (size, k))
            for part in images.split(size)
        ]
    )
    assert found.dtype == dtype
    assert found.stride() == x.stride()
    torch.testing.assert_close(
        found,
        rows_of(expected, layout),
        rtol=3e-2 if dtype is torch.bfloat16 else 1e-4,
        atol=3e-2 if dtype is torch.bfloat16 else 1e-4,
    )
