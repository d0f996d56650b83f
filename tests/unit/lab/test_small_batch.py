"""``small-batch``: what positions that are alike are worth, and figures of batches against formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import BatchNorm, batch_moments
from bnprobe.lab.networks import Call
from bnprobe.lab.small_batch import LAYERS, NETWORK, SIZES, SmallBatch, _design_effect, _of_calls
from bnprobe.records import Trial


@pytest.mark.parametrize(
    ("second", "effect"),
    [(lambda x: x, 2.0), (lambda x: -x, 0.0), (torch.randn_like, 1.0)],
    ids=["alike", "opposite", "independent"],
)
def test_two_positions_are_worth_one_two_or_more_values(second: type[Tensor], effect: float) -> None:
    torch.manual_seed(0)
    first = torch.randn(20_000, 3, 1, 1)
    found, positions = _design_effect(nn.Sequential(layer := BatchNorm(3)), layer, torch.cat([first, second(first)], 3))
    assert positions == 2
    assert found == pytest.approx(effect, abs=0.03)


def test_of_independent_normal_values_figures_are_one() -> None:
    torch.manual_seed(0)
    mean, variance = 3.0, 4.0
    layer = BatchNorm(5)
    layer.running_mean.fill_(mean)
    layer.running_var.fill_(variance)
    batches = mean + variance**0.5 * torch.randn(4000, 8, 5, 2, 2)
    calls = [Call(*batch_moments(batch), 32) for batch in batches]
    found = _of_calls(layer, calls, effect=1.0, left=1.0)
    for name in ("error of the mean", "error of the deviation", "n_eq over n", "squared d over the formula's"):
        assert found[name] == pytest.approx(1, abs=0.03), name
    assert found["variance error"] == pytest.approx(2 / 31, rel=0.03)
    alike = _of_calls(layer, calls, effect=2.0, left=0.5)
    assert alike["squared d over the formula's"] == pytest.approx(found["squared d over the formula's"])


def test_each_layer_of_the_network_has_its_figures_and_its_claim() -> None:
    torch.manual_seed(0)
    budget = Budget(0.02, 2)
    trials = [
        Trial({"data": NETWORK, "batch": size}, seed, dict(values), 0.0)
        for size in (SIZES[0], SIZES[-1])
        for values in [SmallBatch().trial({"data": NETWORK, "batch": size}, 0, budget)]
        for seed in range(2)
    ]
    results = Results(trials)
    claims = [claim.text for claim in SmallBatch().claims(results, budget)]
    assert sum("are worth fewer independent ones" in text for text in claims) == len(LAYERS)
    mismatches, *_ = SmallBatch().charts(results, budget)
    of_first = next(each for each in mismatches.series if each.name == "layer 1 of the network")
    assert of_first.x[0] == SIZES[0] * 64  # 8 x 8 positions
    [table] = SmallBatch().tables(results, budget)
    assert [row[:2] for row in table.rows] == [("1", "64"), ("2", "16"), ("3", "16")]
    assert all(all(row) for row in table.rows)
