"""Loops that do more than call a model once per step: what a monitor samples of them, and that it changes nothing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.checkpoint import checkpoint

import bnprobe
from bnprobe.errors import UsageError
from unit.monitor.loops import assert_nothing_is_left
from unit.monitor.test_monitor import CLASSES, FEATURES, Net, _batch, _net, _step, _train, assert_bit_identical

Watch = Callable[[nn.Module], Any]
Loop = Callable[[Watch], list[nn.Module]]


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)


def _still() -> Net:
    """Without dropout, so that a reference is easy."""
    model = _net()
    model.drop.p = 0.0
    return model


class Cell(nn.Module):
    """One step of a recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(FEATURES + 8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.mix(torch.cat([x, state], 1))))


@dataclass
class Found:
    logits: Tensor


class Telling(Net):
    """Returns its logits in a dictionary, in a dataclass, or not at all."""

    kind = "nothing"

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        if self.kind == "nothing":
            self.kept = logits
            return None
        return Found(logits) if self.kind == "dataclass" else {"logits": logits, "size": len(x)}


# --- Loops; each trains what it makes, and gives what it trained ------------------------------------------------------


def _whose_hooks_write(watch: Watch) -> list[nn.Module]:
    """Into a list that the loss reads, into an object, and into a tensor; one changes the inputs."""
    model, seen, total = _net(), list[Tensor](), torch.zeros(())

    class Counter:
        calls = 0

    counter = Counter()

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        counter.calls += 1
        total.add_(output.detach().mean())

    model.second.register_forward_hook(lambda module, args, output: seen.append(output))
    model.head.register_forward_hook(count)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x, y = _batch(step)
            seen.clear()
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + 0.1 * seen[0].square().mean()).backward()
            optimizer.step()
    model.register_buffer("calls", torch.tensor(counter.calls))
    model.register_buffer("total", total)
    return [model]


def _returning(kind: str) -> Loop:
    def loop(watch: Watch) -> list[nn.Module]:
        torch.manual_seed(3)
        model = Telling()
        model.kind = kind
        optimizer = _sgd(model)
        with watch(model):
            for step in range(8):
                x, y = _batch(step)
                optimizer.zero_grad()
                found = model(x)
                logits = model.kept if found is None else found["logits"] if kind == "mapping" else found.logits
                F.cross_entropy(logits, y).backward()
                optimizer.step()
        return [model]

    loop.__name__ = f"returning_{kind}"
    return loop


def _evaluating_within_a_step(watch: Watch) -> list[nn.Module]:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x, y = _batch(step)
            optimizer.zero_grad()
            logits = model(x)
            with torch.inference_mode():
                model(x)
            model.eval()
            model(x).sum()
            model.train()
            F.cross_entropy(logits, y).backward()
            optimizer.step()
    return [model]


def _with_optimizers_made_anew(watch: Watch) -> list[nn.Module]:
    model = _net()
    with watch(model):
        for step in range(12):
            if step % 4 == 0:
                optimizer = torch.optim.Adam(model.parameters(), 0.01)
            _step(model, optimizer, step)
    return [model]


def _with_an_optimizer_for_each_part(watch: Watch) -> list[nn.Module]:
    model = _net()
    optimizers = [_sgd(part) for part in (model.first, model.second, model.head)]
    with watch(model):
        for step in range(8):
            x, y = _batch(step)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
    return [model]


def _copying_and_saving(watch: Watch) -> list[nn.Module]:
    """Also where the coming step is looked at: copies of a model have no monitor, and run."""
    model = _net()
    optimizer, average = _sgd(model), torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    x = _batch(100)[0]
    with watch(model):
        for step in range(8):
            _step(model, optimizer, step)
            average.update_parameters(model)
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copies = [copy.deepcopy(model), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))]
            for each in copies:
                each(x).sum().backward()
            assert b"bnprobe" not in file.getvalue()
    return [model, average]


def _scaling(watch: Watch) -> list[nn.Module]:
    """By a GradScaler that skips two steps."""
    model = _net()
    optimizer, scaler = _sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model):
        for step in range(10):
            x, y = _batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (float("inf") if step in (3, 6) else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    return [model]


def _moving(watch: Watch) -> list[nn.Module]:
    """To another dtype, with other parameters in the place of its own."""
    model = _net()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with watch(model):
            model.to(torch.float64).to(torch.float32)
            _train(model, range(8))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    return [model]


def _of_tied_weights(watch: Watch) -> list[nn.Module]:
    model = _net()
    model.second[0], model.second[1] = nn.Linear(24, 24), nn.BatchNorm1d(24)
    model.second[1].weight, model.head = model.first[1].weight, nn.Linear(24, CLASSES)
    with watch(model):
        _train(model, range(8))
    return [model]


def _in_a_thread(watch: Watch) -> list[nn.Module]:
    """And a copy in another thread meanwhile, as a server of weights has."""
    model = _net()

    def train() -> None:
        optimizer = _sgd(model)
        for step in range(8):
            other = copy.deepcopy(model).eval()
            beside = threading.Thread(target=lambda other=other: other(_batch(100)[0]))
            beside.start()
            _step(model, optimizer, step)
            beside.join()

    with watch(model):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    return [model]


def _watched_twice(watch: Watch) -> list[nn.Module]:
    model = _net()
    with watch(model), watch(model), watch(model.second):
        _train(model, range(8))
    return [model]


def _of_two_views(watch: Watch) -> list[nn.Module]:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x, _ = _batch(step)
            optimizer.zero_grad()
            one, other = model(x), model(x + 0.1)
            (F.mse_loss(one, other.detach()) + F.mse_loss(other, one.detach())).backward()
            optimizer.step()
    return [model]


def _recurrent(watch: Watch) -> list[nn.Module]:
    torch.manual_seed(1)
    model = Cell()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            state = torch.zeros(32, 8)
            optimizer.zero_grad()
            for part in range(4):
                state = model(_batch(4 * step + part)[0], state)
            state.square().mean().backward()
            optimizer.step()
    return [model]


def _penalizing_gradients(watch: Watch) -> list[nn.Module]:
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x = _batch(step)[0].requires_grad_()
            optimizer.zero_grad()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (model(x).mean() + (slope.norm(dim=1) - 1).square().mean()).backward()
            optimizer.step()
    return [model]


def _with_a_function_of_its_own(watch: Watch) -> list[nn.Module]:
    """Which no mode sees, as one in C++: the rest of the loss is not the loss."""
    model = _net()
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x, y = _batch(step)
            optimizer.zero_grad()
            logits = model(x)
            with torch._C.DisableTorchFunction():
                square = logits.square().mean()
            (F.cross_entropy(logits, y) + square).backward()
            optimizer.step()
    return [model]


def _compiled_with_its_loss(watch: Watch) -> list[nn.Module]:
    torch.compiler.reset()
    model: Any = torch.compile(_net(), backend="aot_eager")
    criterion = torch.compile(F.cross_entropy, backend="aot_eager", fullgraph=True)
    optimizer = _sgd(model)
    with watch(model):
        for step in range(8):
            x, y = _batch(step)
            optimizer.zero_grad()
            one, other = model(x), model(x + 0.1)
            (criterion(one, y) + F.cross_entropy(other, y)).backward()
            optimizer.step()
    return [model._orig_mod]


def _checkpointed_whole(reentrant: bool) -> Loop:
    def loop(watch: Watch) -> list[nn.Module]:
        model = _net()
        optimizer = _sgd(model)
        with watch(model):
            for step in range(8):
                x, y = _batch(step)
                optimizer.zero_grad()
                F.cross_entropy(checkpoint(model, x.requires_grad_(), use_reentrant=reentrant), y).backward()
                optimizer.step()
        return [model]

    loop.__name__ = f"checkpointed_whole_{reentrant}"
    return loop


def _on_a_default_device(watch: Watch) -> list[nn.Module]:
    torch.set_default_device("cpu")
    try:
        model = _net()
        with watch(model):
            _train(model, range(8))
    finally:
        torch.set_default_device(None)
    return [model]


WITHOUT_LOSS = [
    _returning("nothing"),
    _penalizing_gradients,
    _checkpointed_whole(reentrant=True),
    _with_a_function_of_its_own,
]
LOOPS = [
    _whose_hooks_write,
    _returning("mapping"),
    _returning("dataclass"),
    _evaluating_within_a_step,
    _with_optimizers_made_anew,
    _with_an_optimizer_for_each_part,
    _copying_and_saving,
    _scaling,
    _moving,
    _of_tied_weights,
    _in_a_thread,
    _watched_twice,
    _of_two_views,
    _recurrent,
    _compiled_with_its_loss,
    _checkpointed_whole(reentrant=False),
    _on_a_default_device,
    *WITHOUT_LOSS,
]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile, of a loss
@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_is_watched_is_bit_identical(loop: Loop) -> None:
    for events in assert_bit_identical(loop):
        samples = [event for event in events if event["event"] == "sample"]
        assert samples
        assert all(sample["samples"] == 32 and sample["layers"] for sample in samples)
        assert all((sample["loss"] is None) == (loop in WITHOUT_LOSS) for sample in samples)


# --- What is sampled --------------------------------------------------------------------------------------------------


def _train_and_reference(model: nn.Module, loss: Callable[[nn.Module, int], Tensor]) -> tuple[Any, float, float]:
    """The last sample, and its step's loss in train and in eval mode, each call with the statistics that it finds."""
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with bnprobe.Monitor(model, every=3) as monitor:
        for step in range(4):
            before = copy.deepcopy(model)
            optimizer.zero_grad()
            trained = loss(model, step)
            trained.backward()
            optimizer.step()
    follower = copy.deepcopy(before)

    def both(*args: Tensor) -> Tensor:
        found = follower.eval()(*args)
        follower.train()(*others.pop(0))
        return found

    others: list[tuple[Tensor, ...]] = []
    hook = before.register_forward_pre_hook(lambda module, args: others.append(args))
    loss(before, 3)
    hook.remove()

    class Both(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return both(*args)

    return monitor.sample, float(trained.detach()), float(loss(Both(), 3).detach())


def test_the_loss_of_two_calls_is_that_of_both() -> None:
    def loss(model: nn.Module, step: int) -> Tensor:
        x, _ = _batch(step)
        one, other = F.normalize(model(x)), F.normalize(model(2 * x + 0.5))
        return F.cross_entropy(one @ other.T / 0.5, torch.arange(32))

    sample, trained, evaluated = _train_and_reference(_still(), loss)
    assert (sample.loss.train, sample.loss.eval) == pytest.approx((trained, evaluated), rel=1e-5)
    assert abs(trained - evaluated) > 1e-3


def test_the_state_of_a_recurrent_network_is_that_of_eval_mode() -> None:
    def loss(model: nn.Module, step: int) -> Tensor:
        state = torch.zeros(32, 8)
        for part in range(4):
            state = model(_batch(4 * step + part)[0], 0.9 * state)
        return (state - 0.3).square().mean()

    torch.manual_seed(1)
    sample, trained, evaluated = _train_and_reference(Cell(), loss)
    assert (sample.loss.train, sample.loss.eval) == pytest.approx((trained, evaluated), rel=1e-5)
    assert abs(trained - evaluated) > 1e-3


def test_a_discriminator_is_sampled_on_what_is_real_and_on_what_is_not() -> None:
    """D is the mean over the calls; the loss is that of its own step, not that of the generator, which is zeroed."""
    maker, judge = nn.Linear(FEATURES, FEATURES), _still()
    of_maker, of_judge = _sgd(maker), _sgd(judge)
    with bnprobe.Monitor(judge, every=3) as monitor:
        for step in range(4):
            x, made = _batch(step)[0], maker(torch.randn(32, FEATURES))
            judge.zero_grad()
            models, inputs, losses = [], (x, made.detach()), []
            for sign, each in zip((-1, 1), inputs, strict=True):
                models.append(copy.deepcopy(judge))
                loss = F.softplus(sign * judge(each).mean(1)).mean()
                loss.backward()
                losses.append(float(loss.detach()))
            of_judge.step()
            maker.zero_grad()
            F.softplus(-judge(made).mean(1)).mean().backward()
            of_maker.step()
    assert monitor.sample is not None
    assert monitor.sample.loss is not None
    evaluated = [
        float(F.softplus(sign * model.eval()(each).mean(1)).mean().detach())
        for sign, model, each in zip((-1, 1), models, inputs, strict=True)
    ]
    assert (monitor.sample.loss.train, monitor.sample.loss.eval) == pytest.approx(
        (sum(losses), sum(evaluated)), rel=1e-5
    )


def test_outputs_of_many_calls_are_not_kept() -> None:
    """As where gradients are accumulated: once ``backward()`` was called, nothing of a call is there any more."""
    model = _net()
    model.head = nn.Linear(16, 77)
    optimizer = _sgd(model)
    with bnprobe.Monitor(model, every=3) as monitor:
        for step in range(4):
            for part in range(6):
                F.cross_entropy(model(_batch(6 * step + part)[0]), torch.arange(32)).backward()
            if step == 3:  # which is sampled
                gc.collect()
                held = [each for each in gc.get_objects() if type(each) is Tensor and each.shape == (32, 77)]
                assert len(held) <= 2
                del held
            optimizer.step()
    assert monitor.sample is not None
    assert monitor.sample.loss is not None


def test_the_factor_of_a_grad_scaler_is_none_of_the_loss() -> None:
    model = _net()
    optimizer, scaler = _sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with bnprobe.Monitor(model, every=3) as monitor:
        for step in range(4):
            x, y = _batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert monitor.sample is not None
    assert monitor.sample.loss is not None
    assert monitor.sample.loss.train == pytest.approx(float(loss.detach()))


def test_losses_of_one_step_are_added_up_and_those_that_are_zeroed_are_not() -> None:
    """Also where gradients are set to zero and not away; and where one loss keeps the graph for the other."""
    model = _still()
    optimizer = _sgd(model)
    with bnprobe.Monitor(model, every=3) as monitor:
        for step in range(4):
            x, y = _batch(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.zero_grad(set_to_none=False)
            logits = model(x)
            losses = F.cross_entropy(logits, y), logits.square().mean()
            losses[0].backward(retain_graph=True)
            losses[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.sample is not None
    assert monitor.sample.loss is not None
    assert monitor.sample.loss.train == pytest.approx(float(sum(losses).detach()))


def test_a_monitor_is_entered_once_and_layers_are_changed_by_one() -> None:
    model = _net()
    with bnprobe.Monitor(model, every=3) as watching:
        with pytest.raises(UsageError, match="This monitor is watching already"), watching:
            pass
        for other in (model, model.first):
            with (
                pytest.raises(
                    UsageError, match=r"Another monitor watches .*1 already, and on_finding of one of the two"
                ),
                bnprobe.Monitor(other, every=3, on_finding={"BN203": "freeze"}),
            ):
                pass
        with bnprobe.Monitor(model, every=3, include=["second.1"]) as second:
            _train(model, range(5))
    assert (watching.step, second.step) == (5, 5)
    with bnprobe.Monitor(model.first, every=3, on_finding="freeze"), bnprobe.Monitor(model.second, on_finding="renorm"):
        _train(model, range(2))


def test_layers_that_are_replaced_are_followed_and_those_that_are_gone_are_named() -> None:
    model = _net()
    with bnprobe.Monitor(model, every=3) as monitor:
        _train(model, range(5))
        model.first[1], model.second[1] = nn.BatchNorm1d(24), nn.Identity()
        with pytest.warns(UserWarning, match=r"step 6: watched no more, since not there any more: second\.1$"):
            _train(model, range(5, 8))
    assert monitor.sample is not None
    assert list(monitor.sample.layers) == ["first.1"]


def test_layers_that_no_module_holds_by_name_stay_watched() -> None:
    """The root itself, and those in a plain list."""

    class Listing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norms, self.norm = nn.Linear(FEATURES, CLASSES), [nn.BatchNorm1d(4)], nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norms[0](self.first(x)))

    for model, names in ((Listing(), {"norm", "norms[0]"}), (nn.BatchNorm1d(FEATURES), {"(root)"})):
        with bnprobe.Monitor(model, every=3) as monitor:
            optimizer = _sgd(model)
            for step in range(5):
                model(_batch(step)[0]).square().mean().backward()
                optimizer.step()
        assert monitor.sample is not None
        assert monitor.sample.layers.keys() == names


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("loss", RuntimeError),
        ("loss", KeyboardInterrupt),
        ("model", RuntimeError),
        ("model", KeyboardInterrupt),
        ("sample", KeyboardInterrupt),
    ],
)
def test_an_exception_in_the_loop_leaves_nothing(place: str, error: type[BaseException]) -> None:
    class Failing(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += torch.is_grad_enabled()
            if place == ("model" if torch.is_grad_enabled() else "sample") and self.calls >= 3:
                raise error
            return super().forward(x)

    torch.manual_seed(3)
    model = Failing()
    optimizer = _sgd(model)

    def train() -> None:
        with bnprobe.Monitor(model, every=3):
            for step in range(5):
                _step(model, optimizer, step)
                if step == 2 and place == "loss":
                    model(_batch(3)[0]).sum()
                    raise error

    with pytest.raises(error):
        train()
    assert_nothing_is_left(model)
    _train(Net(), range(2))


def test_an_optimizer_that_steps_within_backward_is_refused_by_name() -> None:
    model = _net()
    optimizers = {parameter: torch.optim.SGD([parameter], 0.01) for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: optimizers[each].step())
    x, y = _batch(0)
    with bnprobe.Monitor(model, every=3):
        with pytest.warns(UserWarning, match=r"training goes on: UsageError: The optimizer steps within backward\(\)"):
            F.cross_entropy(model(x), y).backward()
        for _ in range(5):
            F.cross_entropy(model(x), y).backward()
    assert not model._forward_pre_hooks


def test_warnings_name_the_line_of_the_loop() -> None:
    def fails(event: dict[str, Any]) -> None:
        if event["event"] == "sample":
            raise OSError("no space")

    model = _net()
    optimizer = _sgd(model)
    with warnings.catch_warnings(record=True) as caught, bnprobe.Monitor(model, every=2, log=fails):
        warnings.simplefilter("always")
        for step in range(4):
            x, y = _batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()  # the line
    (warning,) = caught
    assert warning.filename == __file__
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    assert lines[warning.lineno - 1].strip() == "optimizer.step()  # the line"
