"""Training that diverges: where it stops, what it says, and which weights are left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnprobe.records import Score
from bnprobe.training.job import DivergenceGuard, weights_of
from support.finetuning import cross_entropy, held_out_score, job, network, same_bits, trained


class Overflowing(nn.Module):
    """Gives Inf from its n-th training step on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.calls = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x * torch.inf if self.training and self.calls > self.after else x


def broken(after: int) -> nn.Sequential:
    model = network()
    return nn.Sequential(*model[:5], Overflowing(after), *model[5:])


def test_a_loss_that_is_nan_names_step_and_layer() -> None:
    outcome, steps = trained(job(broken(5), score=held_out_score, evaluate_every=2))
    assert (outcome.ending, outcome.steps) == ("diverged", 5)
    assert outcome.note.startswith(
        "Diverged in step 6: the loss is nan. The first norm layer with NaN or Inf in its input is 6."
        f" The weights of step {outcome.best_step} are kept."
    )
    assert len(steps) == 6
    assert steps[-1].loss != steps[-1].loss
    expected, _ = trained(job(broken(99), score=held_out_score, evaluate_every=2, steps=4))
    assert outcome.best_step == expected.best_step
    assert same_bits(outcome.weights, expected.weights)


def test_without_evaluations_the_last_finite_weights_are_left() -> None:
    outcome, _ = trained(job(broken(5), evaluate_every=2))
    assert outcome.best_step == 4
    assert same_bits(outcome.weights, trained(job(broken(99), steps=4))[0].weights)


def test_at_the_first_step_the_start_is_left() -> None:
    model = broken(0)
    start = weights_of(model)
    outcome, _ = trained(job(model))
    assert (outcome.ending, outcome.steps, outcome.best_step) == ("diverged", 0, 0)
    assert same_bits(outcome.weights, start)


def test_a_loss_that_is_inf_by_itself() -> None:
    outcome, _ = trained(job(loss=lambda model, batch: cross_entropy(model, batch) + torch.inf))
    assert "the loss is inf. The inputs of all norm layers are finite" in outcome.note


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_nan(clip_norm: float | None) -> None:
    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * torch.nan

    def loss(model: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model[5:](Root.apply(model[:5](batch[0]))), batch[1])

    model = network()
    outcome, _ = trained(job(model, loss=loss, clip_norm=clip_norm))
    assert outcome.ending == "diverged"
    assert "in the backward pass NaN or Inf first appears in 4.bias" in outcome.note
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())  # no step was taken


def test_a_gradient_that_is_nan_in_a_large_parameter_alone_shows_in_the_next_loss() -> None:
    model = network()
    wide = nn.Sequential(nn.Linear(8, 2**12), nn.Linear(2**12, 8))
    wide[0].weight.register_hook(lambda gradient: gradient * torch.nan)
    outcome, _ = trained(job(nn.Sequential(*model[:7], wide, *model[7:]), steps=5, evaluate_every=1))
    assert outcome.ending == "diverged"
    assert "Diverged in step 2: the loss is nan" in outcome.note
    assert outcome.best_step == 0
    assert all(bool(torch.isfinite(value).all()) for value in outcome.weights.values())


def test_a_loss_that_explodes() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * (1e5 if len(seen) > 20 else 1.0) + 0 * len(seen)

    seen: list[int] = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        return loss(model, batch)

    outcome, steps = trained(
        job(loss=counted, steps=40, make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    )
    assert outcome.ending == "diverged"
    assert outcome.note.startswith("Diverged in step 25: the loss has exploded")
    assert len(steps) == 25


def test_one_bad_batch_is_no_divergence() -> None:
    guard = DivergenceGuard()
    usual = [guard.of_loss(2.0) for _ in range(10)]
    spikes = [guard.of_loss(value) for value in [1e9] * 4 + [2.0] + [1e9] * 4]
    assert usual + spikes == [None] * 19
    assert "exploded: 1e+09, up from 2" in str(guard.of_loss(1e9))


def test_a_loss_near_zero_may_rise() -> None:
    guard = DivergenceGuard()
    assert [guard.of_loss(1e-6) for _ in range(10)] + [guard.of_loss(3.0) for _ in range(50)] == [None] * 60


def test_skipped_steps_of_float16() -> None:
    guard = DivergenceGuard()
    assert [guard.of_step(True) for _ in range(49)] == [None] * 49
    assert guard.of_step(False) is None
    assert [guard.of_step(True) for _ in range(49)] == [None] * 49
    assert "50 steps in a row" in str(guard.of_step(True))


def test_scores_that_are_not_finite_choose_nothing() -> None:
    scores = iter([Score(0.5, None), Score(None, None), Score(0.7, None)])
    outcome, _ = trained(job(score=lambda model: next(scores), evaluate_every=6))
    assert outcome.best_step == 0
