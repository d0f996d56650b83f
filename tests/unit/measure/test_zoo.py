"""Networks in the shapes of public code: every figure is that of a slow loop over real micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from bnprobe.commands.scan import scan
from bnprobe.records import PathMeasurement, Report
from support.networks import unsettled
from support.zoo import ZOO, Figures, Specimen, slow_loop

SIZE, BATCHES = 4, 6
EXACT = 2e-4


def scanned(specimen: Specimen) -> tuple[nn.Module, list[object], Report]:
    model, batches = unsettled(specimen.make()), specimen.batches(BATCHES, SIZE)
    return model, batches, scan(model, batches, SIZE, num_batches=BATCHES, forward=specimen.forward)


@pytest.mark.parametrize("name", ZOO)
def test_the_figures_are_those_of_the_slow_loop(name: str) -> None:
    specimen = ZOO[name]
    model, batches, report = scanned(specimen)
    train, eval_ = (slow_loop(specimen, model, batches, path) for path in ("train", "eval"))
    layers = {layer.name: layer for layer in report.layers}
    assert layers.keys() == train.keys() | eval_.keys()
    for layer in report.layers:
        assert_path(layer.train, train.get(layer.name))
        assert_path(layer.eval, eval_.get(layer.name))
        assert layer.values_per_channel == (train.get(layer.name) or eval_[layer.name]).values
    assert report.scan.emulated == specimen.emulated, report.scan.emulation
    assert {layer.name: layer.only_in for layer in report.layers if layer.only_in} == specimen.one_mode


def assert_path(measured: PathMeasurement | None, expected: Figures | None) -> None:
    assert (measured is None) == (expected is None)
    if measured is None or expected is None:
        return
    by_batch = [np.mean([call.mean() for call in calls]) for calls in expected.mismatch]
    assert measured.mismatch == pytest.approx(np.mean(by_batch), rel=EXACT)
    for found, calls in ((measured.r, expected.r), (measured.d, expected.d)):
        values = np.concatenate([call for batch in calls for call in batch])
        near = EXACT * np.abs(values).max()
        assert [found.mean, found.std, found.min, found.max] == pytest.approx(
            [values.mean(), values.std(), values.min(), values.max()], abs=near
        )


@pytest.mark.parametrize("name", [name for name, specimen in ZOO.items() if specimen.one_mode])
def test_a_layer_that_runs_in_one_mode_is_judged_there(name: str) -> None:
    specimen = ZOO[name]
    *_, report = scanned(specimen)
    for layer in report.layers:
        if layer.name in specimen.one_mode:
            assert layer.note is not None
            assert "in training only" in layer.note
            assert layer.shares is not None
    assert not [verdict for verdict in report.verdicts if "overflow" in verdict.message]
