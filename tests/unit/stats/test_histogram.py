"""Bins that take anything, quantiles read from them, and the coarse picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.stats.histogram import D_AXIS, PROBABILITIES, R_AXIS, Axis


def fill(axis: Axis, values: np.ndarray) -> np.ndarray:
    return np.bincount(axis.index(torch.from_numpy(values)).numpy(), minlength=axis.bins)


def fine_edges(axis: Axis) -> np.ndarray:
    reach = axis.half_width * axis.reach
    return axis.unscale(np.linspace(-reach, reach, axis.bins + 1))


@pytest.mark.parametrize("axis", [R_AXIS, D_AXIS], ids=["r", "d"])
@given(st.integers(0, 2**16), st.integers(1, 300), st.floats(0.01, 3.0))
def test_quantiles_are_within_a_bin_of_the_order_statistics(axis: Axis, seed: int, count: int, spread: float) -> None:
    values = np.random.default_rng(seed).normal(0.0, spread, count)
    values = np.exp(values) if axis is R_AXIS else values
    found = axis.quantiles(fill(axis, values), values.min(), values.max())
    edges = fine_edges(axis)
    for probability in PROBABILITIES:
        expected = np.quantile(values, probability, method="inverted_cdf")
        bin_ = np.searchsorted(edges, expected, side="right") - 1
        below, above = edges[max(bin_ - 1, 0)], edges[min(bin_ + 2, axis.bins)]
        assert below <= found[f"{probability:g}"] <= above


@pytest.mark.parametrize("axis", [R_AXIS, D_AXIS], ids=["r", "d"])
@given(st.lists(st.floats(-1e30, 1e30, allow_nan=False), min_size=1, max_size=60))
def test_coarse_counts_are_numpys_and_nothing_is_lost(axis: Axis, values: list[float]) -> None:
    given_values = np.abs(values) if axis is R_AXIS else np.array(values)
    counts = axis.coarsen(fill(axis, given_values))
    assert sum(counts) == len(values)
    edges = np.array(axis.edges)
    inside = np.clip(given_values, edges[0], np.nextafter(edges[-1], 0))
    on_an_edge = np.isclose(inside[:, None], edges, rtol=1e-9, atol=1e-12).any()
    if not on_an_edge:
        assert list(counts) == np.histogram(inside, edges)[0].tolist()


def test_the_edges_are_as_documented() -> None:
    assert len(R_AXIS.edges) == len(D_AXIS.edges) == 33
    assert R_AXIS.edges[0] == pytest.approx(0.25)
    assert R_AXIS.edges[16] == 1.0
    assert R_AXIS.edges[-1] == pytest.approx(4.0)
    assert D_AXIS.edges[0] == pytest.approx(-10.0)
    assert D_AXIS.edges[16] == 0.0
    assert D_AXIS.edges[-1] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("axis", "value", "bin_"),
    [
        (R_AXIS, 0.0, 0),
        (R_AXIS, 1e300, R_AXIS.bins - 1),
        (R_AXIS, float("inf"), R_AXIS.bins - 1),
        (R_AXIS, 1.0, R_AXIS.bins // 2),
        (D_AXIS, -1e300, 0),
        (D_AXIS, float("-inf"), 0),
        (D_AXIS, 1e300, D_AXIS.bins - 1),
        (D_AXIS, 0.0, D_AXIS.bins // 2),
        (D_AXIS, -0.0, D_AXIS.bins // 2),
    ],
)
def test_extremes_go_to_the_outer_bins(axis: Axis, value: float, bin_: int) -> None:
    assert axis.index(torch.tensor([value], dtype=torch.float64)).tolist() == [bin_]


def test_nan_has_a_place() -> None:
    index = R_AXIS.index(torch.tensor([float("nan"), 1.0], dtype=torch.float64))
    assert 0 <= int(index[0]) < R_AXIS.bins
    assert int(index[1]) == R_AXIS.bins // 2


def test_quantiles_never_pass_the_extremes() -> None:
    values = np.full(10, 1.003)
    assert set(R_AXIS.quantiles(fill(R_AXIS, values), 1.003, 1.003).values()) == {1.003}
    values = np.array([1e-40, 1e40])
    found = R_AXIS.quantiles(fill(R_AXIS, values), 1e-40, 1e40)
    assert min(found.values()) >= 1e-40
    assert max(found.values()) <= 1e40
