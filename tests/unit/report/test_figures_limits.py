"""What a report says about a limit agrees with the numbers that it prints."""

from __future__ import annotations

import torch
from torch import nn

import bnprobe
from bnprobe.report import figures
from bnprobe.report.diagnoses import closing


def _scanned(size: int, batches: int = 64) -> bnprobe.Report:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(size, 6, generator=generator) for _ in range(batches)]
    return bnprobe.scan(nn.BatchNorm1d(6), data, size, num_batches=batches)


def test_noise_below_the_threshold_is_not_called_at_least_the_threshold() -> None:
    """Noise has a lower limit than the threshold: 24 values are fine, but they are not 32."""
    report = _scanned(24)
    assert report.summary.flagged == 0
    sizes = [path.equivalent_batch_size for layer in report.layers for path in (layer.train, layer.eval) if path]
    smallest = min(size for size in sizes if size is not None)
    assert 22 < smallest < 26
    headline = closing(report, "").headline
    assert headline.startswith("Every layer is within its limit")
    assert f"the smallest n_eq is {smallest:.1f}, in (root), whose limit is 14, between 14 for noise" in headline


def test_layers_that_reach_the_threshold_are_called_so() -> None:
    headline = closing(_scanned(256, 32), "").headline
    assert headline.startswith("Every layer behaves as if the batch were at least 32 values")


def test_an_undecided_layer_names_the_limit_that_decides() -> None:
    report = _scanned(14)
    assert report.summary.undecided == 1
    assert (
        "and its limit is 14, between 14 for noise of batches and 32 for all else." in closing(report, "").sentences[0]
    )


def test_a_number_below_a_limit_is_printed_below_it() -> None:
    assert figures.below(31.4, 32) == "31.4"
    assert figures.below(31.97, 32) == "31.97"
    assert figures.below(31.9999, 32) == "31.99"
    assert figures.below(32.04, 32) == "32.0"
    assert figures.below(None, 32) == figures.equivalent_batch_size(None)
