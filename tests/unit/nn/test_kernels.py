from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bnprobe.nn import kernels
from bnprobe.nn.kernels import batch_moments


def _exact(x: Tensor) -> tuple[Tensor, Tensor]:
    axes = (0, *range(2, x.dim()))
    return x.double().mean(axes), x.double().var(axes, correction=0)


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 40), st.floats(-1e4, 1e4), st.floats(1e-3, 1e3), st.booleans()
)
def test_any_mean_and_spread(n: int, c: int, s: int, mean: float, spread: float, fast: bool) -> None:
    x = (mean + spread * torch.randn(n, c, s, generator=torch.Generator().manual_seed(n * 100 + s))).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_LARGE", 1 if fast else 2**40)
        found = batch_moments(x, 1e-5)
    means, variances = _exact(x)
    assert_close(found.mean.double(), means, rtol=1e-6, atol=1e-6 * spread)
    rounding = (abs(mean) * 2**-24) ** 2  # PyTorch's own BN centres by a float32 mean too
    assert_close(found.variance.double(), variances, rtol=3e-5, atol=1e-10 + 1.1 * rounding)
    assert found.count == n * s


@pytest.mark.parametrize("shape", [(2, 3, 300, 300), (40, 3, 50, 50), (64, 1024), (3, 40, 30, 30, 2)])
def test_large_batches(shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape) + 2
    found = batch_moments(x, 1e-5)
    means, variances = _exact(x)
    assert_close(found.mean.double(), means, rtol=1e-5, atol=1e-6)
    assert_close(found.variance.double(), variances, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_wide(dtype: torch.dtype) -> None:
    x = (100 + torch.randn(16, 3, 40, 40)).to(dtype)
    found = batch_moments(x, 1e-5)
    assert found.mean.dtype == found.variance.dtype == torch.float32
    assert_close(found.mean.double(), _exact(x)[0], rtol=1e-6, atol=0)
    assert_close(found.variance.double(), _exact(x)[1], rtol=1e-4, atol=0)
