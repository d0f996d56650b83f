"""Real training steps on a copy: how often and how fast the running statistics move, and what stays as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnprobe.errors import DataError, DeviceError, ModelError, NonFiniteError, UsageError, UserCodeError
from bnprobe.measure.restore import untouched
from bnprobe.measure.session import UserFunctions
from bnprobe.measure.train_steps import TrainSteps, train_steps
from bnprobe.records import Updates
from support.fingerprint import fingerprint
from support.networks import Residual, Siamese, images, unsettled
from support.running import session_of

DATA = images(4, 6, 3, 5, 5)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def twice(model: nn.Module, batch: Tensor) -> Tensor:
    return loss(model, batch) + model(batch).square().mean()


def run(model: nn.Module, data: Any = DATA, function: Any = loss, steps: int = 3, **options: Any) -> TrainSteps:
    session = session_of(model, UserFunctions(loss=function), options.pop("autocast", None))
    session.held = options.pop("held", session.held)
    return train_steps(session, data, options.pop("make", sgd), steps)


class Checkpointed(nn.Module):
    """The second of two blocks is recomputed in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.2))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.2), nn.Dropout(0.5), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(x), use_reentrant=self.use_reentrant).mean((2, 3))


def test_a_plain_network_updates_once_at_its_momentum() -> None:
    model = unsettled(Residual(momentum=0.3))
    result = run(model)
    assert result.updates.keys() == {0, 1}
    for index in (0, 1):
        updates = result.updates[index]
        assert (updates.per_step, updates.configured) == (1.0, 0.3)
        assert updates.rate == pytest.approx(0.3, rel=1e-5)
        assert result.repeated[index] == 0


def test_drift_is_the_distance_moved_in_running_deviations() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.5, eps=0.5), nn.Linear(2, 1))
    model[0].running_mean.copy_(torch.tensor([1.0, -1.0]))
    model[0].running_var.copy_(torch.tensor([3.5, 0.5]))
    batch = torch.tensor([[3.0, 1.0], [5.0, -1.0]])  # means 4 and 0: moved by 1.5 and 0.5, in units of 2 and 1
    updates = run(model, [batch], steps=1).updates[0]
    assert updates.drift == pytest.approx(((0.75**2 + 0.5**2) / 2) ** 0.5)
    assert updates.rate == pytest.approx(0.5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_updates_twice(use_reentrant: bool) -> None:
    result = run(Checkpointed(use_reentrant))
    plain, checkpointed = result.updates[0], result.updates[1]
    assert plain.per_step == 1.0
    assert plain.rate == pytest.approx(0.2, rel=1e-5)
    assert (checkpointed.per_step, checkpointed.configured) == (2.0, 0.2)
    assert checkpointed.rate == pytest.approx(1 - 0.8**2, rel=1e-4)
    assert result.repeated == {0: 0.0, 1: 1.0}


def test_a_loss_that_runs_the_model_twice() -> None:
    result = run(unsettled(Residual(momentum=0.1)), function=twice)
    for index in (0, 1):
        assert result.updates[index].per_step == 2.0
        assert result.updates[index].rate == pytest.approx(1 - 0.9**2, rel=1e-4)
        assert result.repeated[index] == 1.0


def test_a_shared_layer_updates_twice_with_different_data() -> None:
    result = run(Siamese(together=False), images(3, 8, 2, 3, 6, 6), steps=3)
    assert [updates.per_step for updates in result.updates.values()] == [2.0, 2.0]
    assert result.repeated == {0: 0.0, 1: 0.0}


class Uncounted(nn.BatchNorm2d):
    """Updates its statistics by the usual kernel, but does not count."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.4)


def test_a_layer_that_forgets_to_count() -> None:
    updates = run(unsettled(Residual(norm=Uncounted))).updates[1]
    assert (updates.per_step, updates.configured) == (1.0, 0.1)
    assert updates.rate == pytest.approx(0.4, rel=1e-5)


class Nested(nn.BatchNorm2d):
    """A layer with another one inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner(x))


def test_a_layer_within_a_layer() -> None:
    model = Residual(norm=Nested)
    for layer in (model.bn1, model.bn1.inner):
        layer.num_batches_tracked = None
    assert [updates.per_step for updates in run(model).updates.values()] == [1.0] * 4


@pytest.mark.parametrize("function", [loss, twice])
def test_a_layer_that_does_not_count_is_counted_by_its_calls(function: Callable[..., Tensor]) -> None:
    model = unsettled(Residual(momentum=0.3))
    model.bn1.num_batches_tracked = None
    first, second = (run(model, function=function).updates[index] for index in (0, 1))
    assert first.per_step == second.per_step
    assert first.rate == pytest.approx(second.rate, rel=1e-4)


def test_a_cumulative_average_has_no_configured_rate() -> None:
    updates = run(nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(75, 1)), steps=2).updates[0]
    assert (updates.per_step, updates.configured) == (1.0, None)
    assert updates.rate is not None
    assert 0.5 < updates.rate <= 1.0  # 1/1, then 1/2


def test_a_rate_that_rounding_hides_is_not_told() -> None:
    batch = DATA[0]
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(75, 1))
    model[0].running_mean.copy_(batch.mean((0, 2, 3)))
    updates = run(model, [batch], steps=2).updates[0]
    assert updates.rate is None
    assert updates.drift < 1e-6


class Frozen(Residual):
    """Its own train() keeps the first layer in eval mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn1.eval()
        return self


def test_frozen_layers_do_not_move() -> None:
    by_train = run(unsettled(Frozen()))
    by_flag = unsettled(Residual())
    by_flag.train()
    by_flag.bn1.eval()
    by_caller = unsettled(Residual())
    by_caller.eval()
    for result in (by_train, run(by_flag), run(by_caller, held=[by_caller.bn1])):
        assert result.updates[0] == Updates(per_step=0.0, rate=None, configured=0.1, drift=0.0)
        assert result.updates[1].per_step == 1.0


def test_what_cannot_be_watched_is_left_out() -> None:
    model = Residual(track_running_stats=False)
    model.unused = nn.BatchNorm2d(2)
    result = run(model)
    assert result.updates == {}
    assert result.repeated == {}


def test_sync_batch_norm_in_one_process() -> None:
    assert run(unsettled(Residual(norm=nn.SyncBatchNorm))).updates[0].rate == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_model_and_random_state_come_back(use_reentrant: bool, training: bool) -> None:
    model = Checkpointed(use_reentrant).train(training)
    model.first[0].weight.grad = torch.ones_like(model.first[0].weight)
    data = [batch.clone() for batch in DATA]
    before = fingerprint(model)
    run(model, data)
    assert fingerprint(model) == before
    assert all(torch.equal(one, other) for one, other in zip(data, DATA, strict=True))


def test_they_come_back_after_an_error() -> None:
    def broken(model: nn.Module, batch: Tensor) -> Tensor:
        model.bn1.running_mean.fill_(7.0)
        torch.rand(3)
        raise RuntimeError("broken on purpose")

    model = unsettled(Residual())
    before = fingerprint(model)
    with pytest.raises(UserCodeError, match=r"broken on purpose"):
        run(model, function=broken)
    assert fingerprint(model) == before


def test_under_no_grad_and_with_a_loss_that_writes_into_the_batch() -> None:
    def writing(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch.mul_(2)).square().mean()

    data = [batch.clone() for batch in DATA]
    with torch.no_grad():
        assert run(unsettled(Residual()), data, writing).updates[0].per_step == 1.0
    assert torch.equal(data[0], DATA[0])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_trains_the_copy(kind: type[torch.optim.Optimizer]) -> None:
    losses: list[float] = []

    def recorded(model: nn.Module, batch: Tensor) -> Tensor:
        value = loss(model, batch)
        losses.append(value.item())
        return value

    run(unsettled(Residual()), DATA[:1], recorded, 20, make=lambda parameters: kind(parameters, lr=0.02))
    assert losses[-1] < 0.7 * losses[0]


def test_an_optimizer_of_the_users() -> None:
    class Still:
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.parameters, self.steps = parameters, 0
            made.append(self)

        def step(self) -> None:
            self.steps += 1

    made: list[Still] = []
    model = unsettled(Residual())
    model.stem.requires_grad_(False)
    run(model, make=Still)
    assert made[0].steps == 3
    assert len(made[0].parameters) == len(list(model.parameters())) - 2


def test_data_that_end_are_begun_again() -> None:
    def steps_on(data: Any) -> int:
        seen: list[Tensor] = []

        def watched(model: nn.Module, batch: Tensor) -> Tensor:
            seen.append(batch)
            return loss(model, batch)

        run(unsettled(Residual()), data, watched, steps=5)
        return len(seen)

    assert steps_on(DATA[:2]) == 5
    assert steps_on(iter(DATA[:2])) == 2
    drawn: list[int] = []

    def counting() -> Iterator[Tensor]:
        for number, batch in enumerate(DATA):
            drawn.append(number)
            yield batch

    run(unsettled(Residual()), counting(), steps=2)
    assert drawn == [0, 1]
    with pytest.raises(DataError, match=r"nothing to train on"):
        run(unsettled(Residual()), [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    updates = run(unsettled(Residual()), autocast=str(dtype).removeprefix("torch.")).updates[1]
    assert updates.rate == pytest.approx(0.1, rel=1e-2)


def test_ctrl_c_leaves_nothing_behind() -> None:
    def interrupted(module: nn.Module, inputs: Any, output: Tensor) -> None:
        raise KeyboardInterrupt

    model = unsettled(Residual())
    model.bn1.register_forward_hook(interrupted)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert fingerprint(model) == before
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_cuda(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant)
    before = fingerprint(model)
    with untouched(model):
        result = train_steps(session_of(model, UserFunctions(loss=loss), device="cuda"), DATA, sgd, 3)
    assert fingerprint(model) == before
    assert result.repeated == {0: 0.0, 1: 1.0}
    assert [updates.per_step for updates in result.updates.values()] == [1.0, 2.0]
    assert result.updates[1].rate == pytest.approx(1 - 0.8**2, rel=1e-2)


def test_a_loss_that_explodes_names_step_and_layer() -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(unsettled(Residual()), steps=30, make=lambda parameters: torch.optim.SGD(parameters, lr=1e30))
    message = str(caught.value)
    assert "in training step 2 (the first is 1)" in message or "in training step 3 (the first is 1)" in message
    assert "The first BN layer with NaN or Inf in its input is bn" in message
    assert "learning rate" in message


def test_a_loss_that_is_not_finite_from_the_start() -> None:
    model = unsettled(Residual())
    model.conv.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"training step 1 .* in its input is bn2\. This is before the first step"):
        run(model)
    with pytest.raises(NonFiniteError, match=r"inputs of all BN layers are finite"):
        run(unsettled(Residual()), function=lambda model, batch: loss(model, batch) * float("nan"))


def test_no_loss() -> None:
    with pytest.raises(UsageError, match=r"--train-steps needs a loss .* loss\(model, batch\)"):
        run(Residual(), function=None)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, batch: loss(model, batch).item(), "returned a float"),
        (lambda model, batch: model(batch), r"tensor of shape \(6, 3\)"),
        (lambda model, batch: loss(model, batch).detach(), "no gradient to train with"),
        (lambda model, batch: torch.ones((), requires_grad=True) * 2, "must call the model that it is given"),
    ],
)
def test_losses_that_cannot_be_trained_with(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(Residual(), function=function)


def test_nothing_to_train() -> None:
    with pytest.raises(UsageError, match=r"requires_grad=False"):
        run(Residual().requires_grad_(False))


def test_a_model_that_cannot_be_copied() -> None:
    model = Residual()
    model.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"Residual cannot be copied: lock, a lock \(TypeError: .*lock.*__deepcopy__"):
        run(model)


class Large(Residual):
    """There is no memory for a copy of it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise torch.OutOfMemoryError("out of memory on purpose")


def test_out_of_memory() -> None:
    def large(model: nn.Module, batch: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory on purpose")

    for model, function in ((Large(), loss), (Residual(), large)):
        with pytest.raises(DeviceError, match=r"does not fit into the memory of cpu\. Use a smaller --batch-size"):
            run(model, function=function)


class Same(Residual):
    """A copy of it is itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self


def test_a_copy_that_is_none_is_not_trained() -> None:
    model = Same()
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"did not copy layer bn1"):
        run(model)
    assert fingerprint(model) == before


def test_an_optimizer_whose_step_fails() -> None:
    def sparse(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SparseAdam(parameters)

    with pytest.raises(UserCodeError, match=r"calling step\(\) of SparseAdam"):
        run(Residual(), make=sparse)
