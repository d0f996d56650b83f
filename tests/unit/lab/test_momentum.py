"""``momentum``: running statistics follow as the formula says, and training does not feel them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from bnprobe.lab import momentum
from bnprobe.lab.data import Images, load
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import BatchNorm
from bnprobe.lab.networks import conv_net
from bnprobe.records import Trial

TINY = Budget(0.02, 1)


def trained(weight: float) -> tuple[nn.Sequential, dict[str, object]]:
    torch.manual_seed(0)
    images = load(None)
    model = conv_net(images.train.shape[1:], images.classes, partial(BatchNorm, momentum=weight))
    return model, dict(momentum._trained(model, images, momentum.LOW, 0, TINY))


def test_training_does_not_feel_the_momentum_and_scores_do() -> None:
    (first, fast), (second, slow) = trained(0.5), trained(0.003)
    assert fast["loss"] == slow["loss"]
    for here, there in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(here, there)
    assert slow["distance"] > 2 * fast["distance"]  # nine tenths of the slow statistics are still the initial ones
    found = momentum._shifted(first, load(None), momentum.BRIGHTNESS, 0, TINY)
    assert found["time constant"] == pytest.approx(momentum.time_constant(0.5), rel=0.1)
    assert found["brightness: accuracy at the end"] > found["brightness: accuracy as trained"] + 0.1
    nothing = momentum._shifted(second, load(None), momentum.BRIGHTNESS, 0, TINY)
    assert nothing["time constant"] is None  # 40 batches are too few
    assert nothing["batches, brightness"] is None


def test_what_statistics_are_to_come_to_is_not_taken_from_the_batches_that_they_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first 32 of them would be the population, image by image."""
    drawn: dict[int, list[int]] = {}

    def watched(images: Images, often: Tensor, size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        drawn.setdefault(seed, []).append(size)
        return original(images, often, size, steps, seed)

    original = momentum.drawn
    model, _ = trained(0.5)
    monkeypatch.setattr(momentum, "drawn", watched)
    momentum._shifted(model, load(None), momentum.BRIGHTNESS, 0, TINY)
    assert sorted(drawn.values()) == [[momentum.BATCH], [512]]


@pytest.mark.parametrize("weight", momentum.MOMENTA)
def test_a_time_constant_is_read_off_an_exponential(weight: float) -> None:
    constant = momentum.time_constant(weight)
    assert (1 - weight) ** constant == pytest.approx(1 / math.e)
    left = [(1 - weight) ** batch for batch in range(math.ceil(constant) + 2)]
    assert momentum.crossing(left) == pytest.approx(constant)
    assert momentum.crossing(left[:1]) is None


def test_accuracy_is_back_where_it_is_near_the_mean_of_the_last_scores() -> None:
    end = dict.fromkeys(range(20, 25), 0.9) | {24: 0.85}  # 0.89 on average
    assert momentum._back({0: 0.2, 1: 0.86, 2: 0.88, 5: 0.5} | end) == 2
    assert momentum._back({0: 0.9} | end) == 0
    assert momentum._back({0: 0.99, 4: 0.92} | end) == 20
    assert momentum._back({0: 0.1, 1: 0.4, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.4}) == 2  # none is near 0.44, but past it


def test_frequencies_weigh_draws_and_accuracies() -> None:
    labels = torch.arange(10)
    often, swapped = (momentum.frequencies(labels, 10, each) for each in (False, True))
    assert often.tolist() == [9.0] * 5 + [1.0] * 5
    assert swapped.tolist() == [1.0] * 5 + [9.0] * 5
    images = load(None)
    weights = momentum.frequencies(images.train_labels, images.classes)
    ((_, drawn),) = momentum.drawn(images, weights, 4000, 1, 0)
    assert (drawn < 5).float().mean().item() == pytest.approx(0.9, abs=0.03)

    class Low(nn.Module):
        """Right for the first five classes."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(x.long().clamp_max(4), 10).float()

    assert momentum.score(Low(), labels.float(), labels, often) == pytest.approx(0.9)
    assert momentum.score(Low(), labels.float(), labels, swapped) == pytest.approx(0.1)


def test_batches_in_proportion_to_the_time_constant_have_slope_one() -> None:
    def results(power: float) -> Results:
        return Results(
            Trial(
                {"momentum": each},
                0,
                {
                    f"batches, {shift}": 3 * momentum.time_constant(each) ** power
                    for shift in (momentum.BRIGHTNESS, momentum.DOMAIN)
                },
                0.0,
            )
            for each in momentum.MOMENTA
        )

    assert momentum._slope(results(1.0)) == pytest.approx(1.0)
    assert momentum._slope(results(0.5)) == pytest.approx(0.5)


@pytest.mark.parametrize("weight", momentum.MOMENTA)
@pytest.mark.parametrize("factor", [0.02, 1.0])
def test_scores_are_taken_at_growing_distances(weight: float, factor: float) -> None:
    grid = momentum._grid(weight, Budget(factor))
    assert grid == sorted(set(grid))
    assert momentum.EARLY in grid
    assert grid[-1] == max(20, min(math.ceil(5 * momentum.time_constant(weight)), round(2000 * factor)))
    assert max(after / before for before, after in pairwise(grid[5:])) < 1.35
