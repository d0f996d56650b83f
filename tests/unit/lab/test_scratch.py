"""``scratch``: what is exact is shown exactly, and what a wrong layer would show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnprobe import lab
from bnprobe.lab import scratch
from bnprobe.lab.experiment import Results
from bnprobe.lab.layers import BatchNormByHand
from bnprobe.records import Trial


def test_the_layer_is_torchs_and_the_network_learns_sooner_with_it() -> None:
    found = lab.run("scratch", budget=0.02, seeds=1, jobs=1)
    exact = [claim for claim in found.claims if "to rounding" in claim.text or "From the same seed" in claim.text]
    assert len(exact) == 8
    assert {claim.verdict for claim in exact} == {"shown"}
    training = Results(found.trials).where(part=scratch.TRAINING)
    losses = [
        training.where(normalization=name).along("loss", range(scratch.EPOCHS), "").y
        for name in training.levels("normalization")
    ]
    ours, torchs, none = (each[-1] for each in losses)
    assert ours == pytest.approx(torchs, rel=0.05)
    assert ours < 0.5 * none
    assert len(found.charts[0].series[0].x) == scratch.EPOCHS


def test_steps_are_held_against_those_to_the_best_accuracy_without() -> None:
    def arm(*accuracies: float) -> Results:
        return Results([Trial({}, 0, {"accuracies": accuracies}, 0.0)])

    none = arm(0.2, 0.5, 0.6, 0.9, 0.8)
    assert scratch._shares(arm(0.3, 0.9, 0.9, 0.9, 0.9), none) == [0.5]
    assert scratch._shares(none, none) == [1]
    assert scratch._shares(arm(0.1, 0.1, 0.1, 0.1, 0.1), none) == [1.25]  # never
    assert scratch._shares(arm(0.1), Results([])) == []


class Biased(BatchNormByHand):
    """Averages the biased variance."""

    def track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        super().track(mean, variance, 10**12)


@pytest.mark.parametrize("precision", scratch.PRECISIONS)
def test_a_wrong_layer_is_found(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(scratch, "BatchNormByHand", Biased)
    dtype = scratch.PRECISIONS[precision]
    found = scratch._layer(dtype)
    limit = scratch.rounding(32 * 7 * 7, dtype)
    assert {name for name, value in found.items() if value > limit} == {"running variance", "output at inference"}


def test_epochs_are_those_of_the_digits() -> None:
    images = scratch.load(None)
    budget = scratch.Budget()
    assert scratch._epochs(images, budget) == list(range(1, scratch.EPOCHS + 1))
    assert torch.finfo(torch.float64).eps < scratch.rounding(100, torch.float64) < 1e-14
