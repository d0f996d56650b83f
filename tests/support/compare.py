"""Compare a report with the reference, figure by figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from bnprobe.records import Distribution, Layer, PathMeasurement, Report
from support.reference import CallFigures, ReferencePath, measure


def assert_report_matches(
    report: Report, model: nn.Module, batches: Sequence[Any], rel: float, forward: Any = None
) -> None:
    """Every figure of every layer on both paths, and the output; ``rel`` is the relative tolerance."""
    train, eval_ = (measure(model, batches, path, forward) for path in ("train", "eval"))
    expected = list(dict.fromkeys(name for name, _ in train.calls))
    assert sorted(layer.name for layer in report.layers) == sorted(expected)
    for layer in report.layers:
        assert_layer_matches(layer, train.layer(layer.name), eval_.layer(layer.name), rel)
    assert_output_matches(report, train, eval_, rel)


def assert_layer_matches(layer: Layer, train: list[CallFigures], eval_: list[CallFigures], rel: float) -> None:
    assert layer.calls_per_forward == len(train)
    assert layer.values_per_channel == train[0].values_per_channel
    assert_path_matches(layer.train, train, rel)
    assert_path_matches(layer.eval, eval_, rel)
    for call in layer.calls:
        assert call.values_per_channel == train[call.index].values_per_channel
        assert_path_matches(call.train, [train[call.index]], rel)
        assert_path_matches(call.eval, [eval_[call.index]], rel)


def skewed_end(values: np.ndarray) -> float:
    """Upper end of a 95% interval of the mean by Hall's transformation (1992), which is a third of a cube."""
    skewness, half = stats.skew(values) / np.sqrt(len(values)), stats.t.ppf(0.975, len(values) - 1)
    if not skewness > 1e-3:
        return -np.inf
    root = np.cbrt(1 - skewness * (half + skewness / 6))
    return values.mean() + 3 * (1 - root) / skewness * stats.sem(values)


def assert_path_matches(measured: PathMeasurement | None, calls: list[CallFigures], rel: float) -> None:
    assert measured is not None
    # Calls of one micro-batch are averaged first: they are not independent.
    per_batch = np.mean([np.array(call.mismatch).mean(1) for call in calls], axis=0)
    assert measured.mismatch == pytest.approx(per_batch.mean(), rel=rel, abs=rel**2)
    if len(per_batch) == 1:
        assert measured.interval == (0.0, None)
    else:
        mean = per_batch.mean()
        relative_error = stats.sem(per_batch) / mean if mean else 0.0
        ends = (
            np.exp(stats.t.interval(0.95, len(per_batch) - 1, np.log(mean), relative_error)) if relative_error else mean
        )
        low, high = np.broadcast_to(ends, 2)
        high = max(high, skewed_end(per_batch))
        assert measured.interval[0] == pytest.approx(low, rel=2 * rel, abs=rel * mean)
        if measured.interval[1] is not None:  # None: tails too heavy, by what single samples add
            assert measured.interval[1] == pytest.approx(high, rel=10 * rel, abs=rel * mean)
    assert_distribution_matches(measured.r, np.concatenate([np.array(call.r).ravel() for call in calls]), rel, "r")
    assert_distribution_matches(measured.d, np.concatenate([np.array(call.d).ravel() for call in calls]), rel, "d")


def assert_distribution_matches(measured: Distribution, values: np.ndarray, rel: float, which: str) -> None:
    near = rel * np.abs(values).max()
    assert measured.mean == pytest.approx(values.mean(), abs=near)
    assert measured.std == pytest.approx(values.std(), abs=max(near, 1e-8))
    assert measured.min == pytest.approx(values.min(), abs=near)
    assert measured.max == pytest.approx(values.max(), abs=near)
    outside = (values > 3) | (values < 1 / 3) if which == "r" else np.abs(values) > 5
    # A value within rounding of the limit may fall on either side.
    slack = (np.abs(np.abs(values) - (5 if which == "d" else 3)) < near) | (np.abs(values - 1 / 3) < near)
    assert measured.clipped == pytest.approx(outside.mean(), abs=slack.mean() + 1e-12)
    assert sum(measured.histogram.counts) == values.size
    for probability, found in measured.quantiles.items():
        expected = np.quantile(values, float(probability), method="inverted_cdf")
        bin_width = 0.011 * abs(expected) if which == "r" else 0.02 * abs(expected) + 0.002
        assert found == pytest.approx(expected, abs=1.1 * bin_width + near)


def assert_output_matches(report: Report, train: ReferencePath, eval_: ReferencePath, rel: float) -> None:
    output = report.summary.output
    one, other = torch.cat(train.outputs), torch.cat(eval_.outputs)
    assert output.relative_l2 == pytest.approx(float((one - other).norm() / other.norm()), rel=rel)
    assert output.kl_divergence == pytest.approx(kl(one, other), rel=2 * rel, abs=rel**2)
    changed = float((one.argmax(1) != other.argmax(1)).double().mean())
    # Scores may lie so near each other that rounding decides.
    assert output.argmax_changed == pytest.approx(changed, abs=0.0 if rel < 1e-3 else 0.2)


def kl(train: Tensor, eval_: Tensor) -> float:
    """KL(eval || train) of the class distributions of logits, in nats."""
    p, q = eval_.softmax(1), train.softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def assert_same_figures(one: Report, other: Report, rel: float) -> None:
    """The same layers with the same figures, up to rounding."""
    assert [layer.name for layer in one.layers] == [layer.name for layer in other.layers]
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.values_per_channel == right.values_per_channel
        for first, second in zip(_paths(left), _paths(right), strict=True):
            assert (first is None) == (second is None)
            if first is not None:
                assert _figures(first) == pytest.approx(_figures(second), rel=rel, abs=1e-6)
    assert one.summary.output.relative_l2 == pytest.approx(other.summary.output.relative_l2, rel=rel, abs=1e-6)


def _paths(layer: Layer) -> list[PathMeasurement | None]:
    calls = [path for call in layer.calls for path in (call.train, call.eval)]
    return [layer.train, layer.eval, *calls]


def _figures(path: PathMeasurement) -> list[float]:
    parts = [path.r, path.d]
    return [path.mismatch, *(value for part in parts for value in (part.mean, part.std, part.min, part.max))]


def assert_same_json(one: Any, other: Any, rel: float = 1e-6, place: str = "") -> None:
    """The same structure with the same words, and numbers that differ by no more than this."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same_json(one[key], other[key], rel, f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same_json(left, right, rel, f"{place}[{index}]")
    else:
        assert one == (pytest.approx(other, rel=rel) if isinstance(one, float) else other), place
