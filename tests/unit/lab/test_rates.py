"""``rates``: what theory fixes about the scale of weights and along a gradient, and how a sweep is read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bnprobe.lab import rates
from bnprobe.lab.data import load
from bnprobe.lab.experiment import Budget, MissingFigureError, Results
from bnprobe.lab.layers import BatchNorm
from bnprobe.lab.networks import conv_net, no_norm
from bnprobe.records import Trial

TINY = Budget(0.02, 1)
INVARIANT = (
    "change of the loss, eps = 0",
    "deviation of the gradient, eps = 0",
    "cosine, eps = 0",
    "deviation of the growth",
    "deviation from another eps",
    "effect of the bias",
)


def scale() -> dict[str, object]:
    torch.manual_seed(0)
    return dict(rates._scale(load(None), 0, TINY))


def test_the_scale_of_weights_has_no_effect_but_through_eps() -> None:
    found = scale()
    assert {name for name in INVARIANT if not found[name] < rates.EXACT} == set()
    changes = found["change of the loss with eps"]
    assert changes == pytest.approx(found["change by another eps"], rel=1e-6)
    small, large = changes[rates.FACTORS.index(0.1)], changes[rates.FACTORS.index(10.0)]
    assert small > 10 * large > 1e-8
    assert found["cosine with eps"] > 1e-8


def test_without_batch_norm_the_scale_has_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    class Layer(rates.BatchNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.affine(x)

    monkeypatch.setattr(rates, "BatchNorm", Layer)
    found = scale()
    assert {name for name in INVARIANT if not found[name] < rates.EXACT} >= set(INVARIANT) - {
        "deviation from another eps"
    }


def test_the_gradient_of_a_quadratic_changes_as_fast_as_its_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    """L(x) = 3/2 x^2 at x = 2: L falls to 3/2 (2 - 6 s)^2 and the gradient by 18 s, where s is the step."""
    monkeypatch.setattr(rates.F, "cross_entropy", lambda given, _: given)

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return 1.5 * self.x**2

    model = Quadratic()
    nothing = torch.zeros(1)
    losses = [1.5 * (2 - 6 * reach * rates.RATE) ** 2 for reach in rates.REACHES]
    assert rates._follow(model, (nothing, nothing)) == pytest.approx(
        {
            "range of the loss": max(losses) - min(losses),
            "change of the gradient": 18 * rates.REACHES[-1] * rates.RATE,
            "effective smoothness": 3,
            "loss": 6,
            "length of the gradient": 6,
        }
    )
    assert model.x.item() == 2


def test_a_spike_without_batch_norm_decides_nothing_and_when_a_claim_holds_is_said() -> None:
    """More with batch norm at three of four measured steps, where the mean of the other is larger a hundred times."""
    names = [name for name, *_ in rates.ALONG]
    trials = [
        Trial(
            {"part": rates.SMOOTHNESS, "normalization": arm},
            seed,
            {name: tuple((1 + 0.1 * seed) * value for value in values) for name in names},
            0.0,
        )
        for seed in range(3)
        for arm, values in ((rates.NORM, (5.0, 2.0, 1.0, 2.0)), (rates.NONE, (1.0, 1.0, 900.0, 1.0 + seed)))
    ]
    found = list(rates._claims_along_gradients(Results(trials), [10, 20, 30, 40]))
    whole, *_ = found
    assert whole.verdict == "open"  # at the last step by one seed less, by one more, by one the same
    assert whole.evidence.endswith("is above 1 at steps 10 to 20 (up to 5) and below 1 at step 30.")
    assert [claim.verdict for claim in found if "beginning" in claim.text] == ["refuted"]


def test_following_the_gradient_leaves_the_network_alone() -> None:
    model = conv_net((1, 8, 8), 10, BatchNorm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = load(None)
    rates._follow(model, (images.train[:16], images.train_labels[:16]))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_rate_beyond_measure_explodes_and_a_small_one_does_not() -> None:
    images = load(None)
    explodes = {}
    for rate in (0.01, 1e6):
        torch.manual_seed(0)
        explodes[rate] = rates._trained(images, no_norm, rate, 0, TINY)["explodes"]
    assert explodes == {0.01: 0.0, 1e6: 1.0}


def test_the_reach_is_that_of_the_highest_rates_at_which_networks_learn() -> None:
    def reach(norm: float, none: float) -> float:
        return rates._reach(
            Results(
                Trial({"rate": rate, "normalization": name}, 0, {"learns": float(rate <= most and rate != 0.03)}, 0.0)
                for name, most in ((rates.NORM, norm), (rates.NONE, none))
                for rate in rates.RATES
            )
        )

    assert reach(3.0, 0.3) == pytest.approx(1)
    assert reach(1.0, 0.3) == pytest.approx(math.log10(1 / 0.3))
    with pytest.raises(MissingFigureError):
        reach(1.0, 0.001)


def test_thirty_times_a_rate_that_the_sweep_does_not_hold_decides_nothing() -> None:
    def verdict(best: float) -> str:
        accuracies = {
            (name, rate): 0.9 if name == rates.NORM else 0.5 + 0.1 * (rate == best)
            for name in (rates.NORM, rates.NONE)
            for rate in rates.RATES
        }
        trials = [
            Trial({"part": rates.SWEEP, "rate": rate, "normalization": name}, seed, {"accuracy": found}, 0.0)
            for (name, rate), found in accuracies.items()
            for seed in range(3)
        ]
        _, thirty, *_ = rates.Rates().claims(Results(trials), Budget())
        return thirty.verdict

    assert verdict(0.1) == "shown"
    assert verdict(10.0) == "open"
