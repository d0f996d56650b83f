"""NaN and Inf: which tensor, which image, which layer first."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.errors import DataError, ModelError, NonFiniteError
from support.networks import Flat, Residual, images, unsettled


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 3])
def test_inputs(value: float, position: int) -> None:
    data = [(x, torch.zeros(4)) for x in images(5, 4, 6)]
    data[position][0][2, 1] = value
    words = rf"Micro-batch {position + 1} \(the first is 1\) holds NaN or Inf in its tensor \[0\] .* sample 2"
    with pytest.raises(DataError, match=words):
        scan(unsettled(Flat()), data, 4, emulate=False)


@pytest.mark.parametrize("emulate", [True, False])
def test_activations_name_the_first_layer_that_they_reach(emulate: bool) -> None:
    model = unsettled(Residual())
    model.conv.weight.data[1] = float("nan")
    words = (
        r"input of bn2 \(BatchNorm2d\).*in train mode.*first such layer in the order.*pass\. Before it, .*: bn1 \(D ="
    )
    with pytest.raises(NonFiniteError, match=words):
        scan(model, images(4, 2, 3, 5, 5), 2, num_batches=4, emulate=emulate)
    model.stem.weight.data[0] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"input of bn1 \(BatchNorm2d\).*first such layer.*, of 2\. No layer before"
    ):
        scan(model, images(4, 2, 3, 5, 5), 2, num_batches=4, emulate=emulate)


class SometimesBad(nn.Module):
    """The second layer overflows in one micro-batch, the first one in a later one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        # Marked images carry a large value: 50 upsets the second layer, 90 the first.
        first = torch.where(x.amax(1, keepdim=True) > 80, torch.inf, x)
        second = torch.where(x.amax(1, keepdim=True) > 40, torch.inf, self.first(first))
        return self.second(second)


@pytest.mark.parametrize("emulate", [True, False])
def test_the_earliest_step_decides(emulate: bool) -> None:
    data = images(12, 4, 6)
    data[5][1, 0], data[9][1, 0] = 50.0, 90.0
    with pytest.raises(NonFiniteError, match=r"input of second .*first such layer .*, of 2\."):
        scan(SometimesBad(), data, 4, num_batches=12, emulate=emulate, physical_batch=8)


def overflowing(layers: int = 14) -> nn.Module:
    """Running variances so small that the eval path grows by 300 from layer to layer."""
    model = nn.Sequential(*(nn.BatchNorm1d(6, eps=1e-5) for _ in range(layers)))
    for layer in model:
        layer.running_var.fill_(1e-12)
    return model


@pytest.mark.parametrize("emulate", [True, False])
def test_an_overflow_on_the_eval_path_is_a_symptom_to_report(emulate: bool) -> None:
    """300^16 is beyond float32: both paths are judged as far as they go."""
    report = scan(overflowing(20), images(6, 4, 6), 4, num_batches=6, emulate=emulate)
    assert report.scan.emulated == emulate
    assert all(layer.train is not None and layer.flagged for layer in report.layers)
    grown = [layer.eval is None for layer in report.layers]
    assert grown == sorted(grown)
    assert 5 < grown.index(True) < 20
    for layer in report.layers:
        assert (layer.eval is None) == (layer.note is not None and "at inference" in layer.note)
    assert report.summary.output.relative_l2 is None
    assert "NaN" in report.summary.output.note


def test_large_but_finite_is_measured() -> None:
    report = scan(overflowing(3), images(6, 4, 6), 4, num_batches=6)
    assert all(layer.eval is not None for layer in report.layers)
    assert report.layers[2].eval.mismatch > 1e6
    assert report.layers[2].eval.equivalent_batch_size == 1.0


class NothingLeft(nn.Module):
    """Normalizes the rows that a threshold leaves: none, in training or at inference."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.all, self.chosen, self.empty_in = nn.BatchNorm2d(3), nn.BatchNorm2d(3), training

    def forward(self, x: Tensor) -> Tensor:
        x = self.all(x)
        self.chosen(x[:0] if self.training == self.empty_in else x)
        return x


def test_an_input_without_rows_is_not_taken_for_one_with_nan() -> None:
    with pytest.raises(
        ModelError, match=r"^chosen \(BatchNorm2d\) takes the statistics of an input of shape \(0, 3, 4, 4\)"
    ):
        scan(NothingLeft(True), images(4, 2, 3, 4, 4), 2, num_batches=4)


@pytest.mark.parametrize("emulate", [True, False])
def test_a_layer_without_rows_at_inference_is_not_measured_there(emulate: bool) -> None:
    report = scan(NothingLeft(False), images(4, 2, 3, 4, 4), 2, num_batches=4, emulate=emulate)
    assert [layer.eval is None for layer in report.layers] == [False, True]
