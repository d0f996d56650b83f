"""r, d and D from statistics alone, against their definitions on the values themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.stats.moments import corrections, statistics_distance


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.sampled_from([1e-5, 1e-3, 0.5]), st.integers(0, 2**16)
)
def test_the_identity_and_the_mismatch_hold_exactly(
    batches: int, channels: int, values: int, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(batches, channels, values, generator=generator, dtype=torch.float64) + 1
    mean, variance = (
        torch.randn(channels, generator=generator).double(),
        torch.rand(channels, generator=generator).double(),
    )
    batch_mean, batch_variance = x.mean(2), x.var(2, correction=0)
    found = corrections(batch_mean, batch_variance, mean, variance, torch.full((channels,), eps).double())
    eps = torch.tensor(eps).double()  # as float32 gave it
    z_train = (x - batch_mean[..., None]) / (batch_variance + eps).sqrt()[..., None]
    z_test = (x - mean[:, None]) / (variance + eps).sqrt()[:, None]
    torch.testing.assert_close(found.r[..., None] * z_train + found.d[..., None], z_test, rtol=1e-6, atol=1e-6)
    expected = (z_train - z_test).square().mean(2)
    torch.testing.assert_close(found.mismatch, expected, rtol=1e-6, atol=1e-9)


def test_exact_statistics_give_no_correction() -> None:
    mean, variance, eps = torch.randn(1, 3).double(), torch.rand(1, 3).double(), torch.full((3,), 1e-5).double()
    found = corrections(mean, variance, mean[0], variance[0], eps)
    assert torch.equal(found.r, torch.ones_like(mean))
    assert torch.equal(found.d, torch.zeros_like(mean))
    assert torch.equal(found.mismatch, torch.zeros_like(mean))


def test_a_constant_channel_has_a_mismatch_of_its_shift_alone() -> None:
    """rho = 0: z_train is 0 everywhere, whatever r is."""
    found = corrections(
        torch.tensor([[2.0]]), torch.zeros(1, 1), torch.zeros(1), torch.full((1,), 4.0), torch.zeros(1) + 1e-5
    )
    assert found.mismatch.item() == pytest.approx(found.d.item() ** 2, rel=1e-6)
    assert found.r.item() < 0.01


def test_distance_is_in_standard_deviations_of_the_reference() -> None:
    mean, variance = torch.zeros(2, 3).double(), torch.full((2, 3), 4.0).double()
    assert statistics_distance(mean, variance, mean, variance, 0.0) == 0
    assert abs(statistics_distance(mean + 1, variance, mean, variance, 0.0) - 0.5) < 1e-12
    assert abs(statistics_distance(mean, variance * 4, mean, variance, 0.0) - 1.0) < 1e-12
