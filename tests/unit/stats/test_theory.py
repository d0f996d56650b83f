"""The table of i.i.d. Gaussian data, and its recovery from real layers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnprobe.commands.scan import scan
from bnprobe.rules.shares import NOISE_THRESHOLD
from bnprobe.stats.theory import clipped_d_iid, clipped_r_iid, equivalent_batch_size, mismatch_iid

TABLE = {
    2: (0.5642, 0.8716, 0.363),
    3: (0.7236, 0.5528, 0.154),
    4: (0.7979, 0.4042, 0.069),
    8: (0.9027, 0.1946, 0.0036),
    16: (0.9523, 0.0955, 1e-5),
    32: (0.9764, 0.0473, 3e-10),
}
"""n: (E[r], D, P(r < 1/3)), Ioffe 2017 read as in the design."""


@pytest.mark.parametrize("n", TABLE)
def test_the_table(n: int) -> None:
    r, mismatch, clipped = TABLE[n]
    assert 1 - mismatch_iid(n) / 2 == pytest.approx(r, abs=6e-5)
    assert mismatch_iid(n) == pytest.approx(mismatch, abs=6e-5)
    assert clipped_r_iid(n) == pytest.approx(clipped, rel=0.4 if n >= 16 else 0.02)
    assert equivalent_batch_size(mismatch) == pytest.approx(n, rel=2e-3)


def test_clipping_of_d_never_happens_by_chance() -> None:
    assert clipped_d_iid(2) == pytest.approx(1.5e-12, rel=0.05)


@given(st.floats(1.001, 1e9))
def test_inversion(n: float) -> None:
    found = equivalent_batch_size(mismatch_iid(n))
    assert found == pytest.approx(n, rel=1e-6)


@given(st.floats(1.01, 1e7), st.floats(1.0001, 3.0))
def test_more_values_never_make_it_worse(n: float, factor: float) -> None:
    assert mismatch_iid(n * factor) < mismatch_iid(n)


def test_the_series_meets_the_exact_form() -> None:
    below, above = mismatch_iid(999.999), mismatch_iid(1000.001)
    assert below > above
    assert below == pytest.approx(above, rel=1e-5)
    for n in (50, 500):
        assert mismatch_iid(n) == pytest.approx(1.5 / n + 0.4375 / n**2, rel=2 / n**2)


def test_the_ends() -> None:
    assert equivalent_batch_size(0.0) is None
    assert equivalent_batch_size(2.0) == equivalent_batch_size(1e9) == 1.0
    assert mismatch_iid(1.0) == 2.0
    for n in (1e6, 1e12, math.inf):
        assert clipped_r_iid(n) == clipped_d_iid(n) == 0.0


@pytest.mark.parametrize(("n", "batches"), [(2, 1200), (3, 1200), (4, 1000), (8, 600), (16, 400), (32, 300)])
def test_a_real_layer_recovers_theory(n: int, batches: int) -> None:
    """Exact running statistics, i.i.d. Gaussian values: D, E[r], n_eq and clipped fractions within 4 sigma."""
    channels = 32
    model = nn.BatchNorm1d(channels, eps=1e-12)
    model.running_mean.fill_(1.5)
    model.running_var.fill_(4.0)
    data = list(1.5 + 2 * torch.randn(batches, n, channels, generator=torch.Generator().manual_seed(n)))
    (layer,) = scan(model, data, n, num_batches=batches).layers
    for path in (layer.train, layer.eval):
        count = batches * channels
        assert path.r.mean == pytest.approx(1 - mismatch_iid(n) / 2, abs=4 * path.r.std / math.sqrt(count))
        assert path.d.mean == pytest.approx(0.0, abs=4 / math.sqrt(n * count))
        assert path.d.std == pytest.approx(1 / math.sqrt(n), rel=4 / math.sqrt(2 * count))
        low, high = path.interval
        half = (high - low) / 2
        assert path.mismatch == pytest.approx(mismatch_iid(n), abs=2 * half)
        assert path.equivalent_batch_size == pytest.approx(n, rel=2.5 * half / path.mismatch)
        share = clipped_r_iid(n)
        assert path.r.clipped == pytest.approx(share, abs=4 * math.sqrt(share / count) + 2 / count)
        assert path.r.clipped_iid == pytest.approx(share, rel=0.1, abs=1e-4)
        assert path.d.clipped == 0.0
    assert layer.flagged == (n < NOISE_THRESHOLD)
