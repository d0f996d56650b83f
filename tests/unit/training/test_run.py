"""Training against a plain loop written by hand, and what decides which weights are kept."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.config.spec import RenormSpec
from bnprobe.errors import DataError, UsageError, UserCodeError
from bnprobe.loading.data import as_batch_source, synthetic_source
from bnprobe.measure.restore import random_state, seed_everything
from bnprobe.nn.batch_renorm import BatchRenorm1d
from bnprobe.records import Score
from bnprobe.training.data import data_seed, model_seed
from bnprobe.training.job import weights_of
from support.finetuning import cross_entropy, held_out_score, job, network, same_bits, sgd, source, trained


def plain_loop(model: nn.Module, batches: list[Any], accumulate: int = 1, clip: float | None = None) -> list[float]:
    """The textbook: zero_grad, backward, clip, step, schedule; losses of the steps."""
    optimizer = sgd(list(model.parameters()))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)
    losses = []
    for start in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        group = batches[start : start + accumulate]
        loss = torch.stack([F.cross_entropy(model(images), labels) for images, labels in group]).mean()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def drawn(epochs: int, seed: int = 0) -> list[Any]:
    """The micro-batches of some epochs, without noise of the data's own, as a plain loop would draw them."""
    batches = []
    for epoch in range(epochs):
        seed_everything(data_seed(seed, epoch))
        batches += list(source(noise=0.0).batches)
    return batches


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)


@pytest.mark.parametrize(
    ("accumulate", "clip", "tolerance"), [(1, None, 0.0), (1, 0.5, 1e-6), (2, None, 1e-6), (5, 0.5, 1e-6)]
)
def test_a_short_run_is_a_plain_loop(accumulate: int, clip: float | None, tolerance: float) -> None:
    model, twin = network(), network()
    before = random_state()
    outcome, steps = trained(
        job(
            model,
            source=source(noise=0.0),
            steps=20 // accumulate,
            accumulate=accumulate,
            clip_norm=clip,
            make_schedule=halving,
        )
    )
    assert random_state() == before
    batches = drawn(epochs=2)
    seed_everything(model_seed(0))
    losses = plain_loop(twin, batches, accumulate, clip)
    expected = weights_of(twin)
    assert outcome.weights.keys() == expected.keys()
    for name, value in outcome.weights.items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)
    assert [step.loss for step in steps] == pytest.approx(losses, rel=1e-6)
    assert [step.rate for step in steps][:6] == [0.1 * 0.5 ** (number // 5) for number in range(min(6, len(steps)))]
    assert all((step.gradient_norm is None) == (clip is None) for step in steps)


def test_every_arm_sees_the_same_data() -> None:
    """However much its model draws, with whatever generator; and none of it disturbs the caller's."""

    def seen(draw: Callable[[], object], dropout: float) -> list[Tensor]:
        images = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            images.append(batch[0].clone())
            draw()
            return cross_entropy(model, batch)

        trained(job(network(dropout=dropout), loss=loss, source=source(), steps=25, score=held_out_score))
        return images

    plain = seen(lambda: None, 0.0)
    for draw in (lambda: torch.rand(7), lambda: np.random.rand(3), random.random):
        other = seen(draw, 0.5)
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))
    assert not torch.equal(plain[0], plain[10])  # the next epoch is in another order


def test_seeds_differ() -> None:
    one, two = (trained(job(seed=seed))[0].weights for seed in (0, 1))
    assert not same_bits(one, two)


def test_flags_come_back_and_held_modules_stay_in_eval() -> None:
    model = network()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    statistics = model[1].running_mean.clone(), model[5].running_mean.clone()
    trained(job(model, score=held_out_score))
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model[1].running_mean, statistics[0])
    assert not torch.equal(model[5].running_mean, statistics[1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_limits_follow_the_schedule() -> None:
    _, steps = trained(
        job(network(BatchRenorm1d), steps=10, renorm=RenormSpec(warmup=0.2, r_ramp=0.6, d_ramp=0.4, r_max=3, d_max=5))
    )
    assert [step.r_max for step in steps] == pytest.approx([1, 1, 1, 1.5, 2, 2.5, 3, 3, 3, 3])
    assert [step.d_max for step in steps] == pytest.approx([0, 0, 0, 2.5, 5, 5, 5, 5, 5, 5])
    assert steps[0].clipped_r == 1.0  # at r_max = 1 every r is
    assert all(step.clipped_d is not None for step in steps)


def test_clipping_of_the_last_tenth() -> None:
    outcome, steps = trained(job(network(BatchRenorm1d), steps=20, renorm=RenormSpec(r_max=1.2, d_max=0.5)))
    r = [step.clipped_r for step in steps]
    assert outcome.clipped_r == pytest.approx((r[-2] + r[-1]) / 2)
    assert trained(job())[0].clipped_r is None


def scripted(values: list[float | None]) -> Callable[[nn.Module], Score]:
    """Scores in turn."""
    turn = iter(values)
    return lambda model: Score(None, next(turn))


@pytest.mark.parametrize(
    ("values", "goal", "best"),
    [
        ([0.1, 0.5, 0.4, 0.5], "max", 4),  # of equals the earlier
        ([0.1, 0.5, 0.4, 0.05], "min", 12),
        ([0.9, 0.5, 0.4, 0.6], "max", 0),  # the start counts
        ([None, None, 0.4, None], "max", 8),
    ],
)
def test_the_best_weights_are_kept(values: list[float | None], goal: str, best: int) -> None:
    model = network()
    start = weights_of(model)
    outcome, steps = trained(job(model, score=scripted(values), measure="metric", goal=goal, evaluate_every=4))
    assert (outcome.best_step, outcome.steps, outcome.ending) == (best, 12, "finished")
    assert [step.score is not None for step in steps] == [number % 4 == 0 for number in range(1, 13)]
    shorter = start if best == 0 else trained(job(steps=best))[0].weights
    assert same_bits(outcome.weights, shorter)


def test_without_a_score_the_last_weights_are_kept() -> None:
    model = network()
    outcome, _ = trained(job(model))
    assert (outcome.best_step, outcome.ending) == (12, "finished")
    assert same_bits(outcome.weights, weights_of(model))


def test_scores_that_are_never_there() -> None:
    outcome, _ = trained(job(score=lambda model: Score(None, None)))
    assert (outcome.best_step, outcome.ending) == (12, "finished")


@pytest.mark.parametrize(("steps", "every"), [(7, 1), (50, 1), (120, 3)])
def test_a_curve_has_means_over_as_many_steps_as_leave_fifty_points(steps: int, every: int) -> None:
    outcome, taken = trained(job(steps=steps, score=held_out_score, evaluate_every=max(1, steps // 5)))
    losses = [step.loss for step in taken]
    ends = [min(start + every, steps) for start in range(0, steps, every)]
    means = [sum(losses[end - every if end % every == 0 else end - end % every : end]) / every for end in ends]
    curve = outcome.curve
    assert curve is not None
    assert curve.steps == tuple(ends)
    assert curve.losses == pytest.approx(means)
    evaluated = [step for step in taken if step.score is not None]
    assert curve.evaluated_at == (0, *(step.step for step in evaluated))
    assert curve.evaluation_losses[1:] == tuple(step.score.loss for step in evaluated if step.score)


def test_a_curve_of_many_evaluations_keeps_some_and_the_last() -> None:
    outcome, _ = trained(job(steps=130, score=held_out_score, evaluate_every=1))
    assert outcome.curve is not None
    assert outcome.curve.evaluated_at == (*range(0, 130, 3), 130)


def test_a_curve_of_a_run_that_diverges_ends_with_a_gap() -> None:
    def exploding(model: nn.Module, batch: Any) -> Tensor:
        exploding.steps += 1
        return cross_entropy(model, batch) * (math.nan if exploding.steps == 5 else 1.0)

    exploding.steps = 0  # type: ignore[attr-defined]
    outcome, _ = trained(job(loss=exploding))
    assert outcome.ending == "diverged"
    assert outcome.curve is not None
    assert [loss is None for loss in outcome.curve.losses] == [False] * 4 + [True]
    assert outcome.curve.evaluated_at == ()


def test_patience() -> None:
    values = [0.5, 0.6, 0.6, 0.3, 0.9]
    outcome, steps = trained(job(score=scripted(values), measure="metric", goal="max", evaluate_every=2, patience=2))
    assert (outcome.steps, outcome.best_step, outcome.ending, len(steps)) == (6, 2, "early_stop", 6)


def test_evaluation_ten_times_where_nobody_says() -> None:
    _, steps = trained(job(score=held_out_score, steps=25))
    assert [step.step for step in steps if step.score] == [*range(2, 25, 2), 25]


@pytest.mark.parametrize(
    ("epochs", "accumulate", "images", "size", "steps"),
    [(3, 1, 40, 4, 30), (2, 3, 40, 4, 8), (1, 1, 41, 4, 10), (1, 1, 42, 4, 11), (2, 1, 3, 1, 6)],
)
def test_epochs(epochs: int, accumulate: int, images: int, size: int, steps: int) -> None:
    """A last micro-batch of one image is left out; a partial one of more is trained on."""
    used: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        used.append(len(batch[0]))
        return cross_entropy(model, batch)

    model = network(nn.Identity) if size == 1 else network()
    outcome, _ = trained(
        job(model, loss=loss, source=source(size, images), steps=None, epochs=epochs, accumulate=accumulate)
    )
    assert outcome.steps == steps
    assert sum(used) == epochs * (images - (images % size == 1 and size > 1))


def test_a_loader_that_drops_its_last_batch() -> None:
    used: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        used.append(len(batch[0]))
        return cross_entropy(model, batch)

    trained(job(loss=loss, source=source(4, 42, drop_last=True), steps=None, epochs=2))
    assert used == [4] * 20
    again = as_batch_source(torch.utils.data.DataLoader(source(4, 42).batches.wrapped.dataset, 8, drop_last=True), 4)
    used.clear()
    trained(job(loss=loss, source=again, steps=None, epochs=1))
    assert used == [4] * 10


def test_500_steps_where_nobody_says() -> None:
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    assert trained(job(nn.Linear(6, 3), source=as_batch_source([batch], 4), steps=None))[0].steps == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3, "epochs": 2}, r"--steps 3 and --epochs 2 exclude each other .*give one"),
        (
            {"steps": None, "epochs": 2, "source": synthetic_source([(6,)], 4, 0)},
            r"--epochs .* length .*--steps",
        ),
        ({"patience": 2}, r"--patience .* no such score"),
        ({"loss": lambda model, batch: 1.0}, r"returned a float, but it must return the training loss as a tensor"),
        ({"loss": lambda model, batch: model(batch[0])}, r"returned a tensor of shape \(4, 3\)"),
        ({"loss": lambda model, batch: cross_entropy(model, batch).detach()}, r"has no gradient to train with"),
        ({"loss": lambda model, batch: torch.zeros((), requires_grad=True)}, r"No parameter received a gradient"),
    ],
)
def test_jobs_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trained(job(**changes))


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="every parameter has requires_grad=False"):
        trained(job(network().requires_grad_(False)))


def test_errors_of_the_loss_name_the_step() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("label")
        return cross_entropy(model, batch)

    with pytest.raises(UserCodeError, match=r"KeyError while calling loss\(model, batch\) in training step 3"):
        trained(job(loss=loss))


def test_a_schedule_that_ends_too_early() -> None:
    with pytest.raises(UserCodeError, match=r"calling step\(\) of OneCycleLR in training step 5"):
        trained(job(make_schedule=lambda made: torch.optim.lr_scheduler.OneCycleLR(made, 0.1, total_steps=4)))


def test_data_that_can_be_read_only_once() -> None:
    once = iter(list(source().batches))
    with pytest.raises(DataError, match=r"training reads the data once per epoch"):
        trained(job(source=as_batch_source(once, 4), steps=11))


def test_data_without_a_usable_batch() -> None:
    with pytest.raises(DataError, match=r"no micro-batch of 4 samples"):
        trained(
            job(
                source=source(4, 5, drop_last=True).__class__(
                    batches=[(torch.zeros(1, 6), 0)], batch_size=4, description="one image", images=1
                )
            )
        )


def test_a_model_that_writes_into_its_input() -> None:
    batches = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    kept = copy.deepcopy(batches)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        batch[0].zero_()
        return cross_entropy(model, batch)

    trained(job(loss=loss, source=as_batch_source(batches, 4)))
    assert all(torch.equal(one[0], two[0]) for one, two in zip(batches, kept, strict=True))


def test_bfloat16() -> None:
    seen: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), batch[1])

    outcome, _ = trained(job(loss=loss, autocast=torch.bfloat16))
    assert set(seen) == {torch.bfloat16}
    assert all(math.isfinite(float(value.sum())) for value in outcome.weights.values())
