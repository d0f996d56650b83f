"""The learning rate schedule that the spec names: found, made, or refused with the key to mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bnprobe.config.spec import OptimizerSpec, ScheduleSpec
from bnprobe.errors import ModelError, UsageError, UserCodeError
from bnprobe.loading.model import UserModule, resolve
from bnprobe.loading.optimizer import load_optimizer, load_schedule

SOURCE = """
import torch

def make_schedule(optimizer, warm=5):
    if warm < 0:
        raise ValueError("warm below 0")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm))

def make_nothing(optimizer):
    return 3

class NeedsLoss:
    def __init__(self, optimizer):
        pass
    def step(self, loss, *rest, epoch=None):
        pass

constant = 3
"""


@pytest.fixture
def near(tmp_path: Path) -> UserModule:
    (tmp_path / "model.py").write_text(SOURCE)
    return resolve(str(tmp_path / "model.py"))[0]


def spec(target: str, **args: Any) -> ScheduleSpec:
    return ScheduleSpec(target=target, args=args)


def optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)


@pytest.mark.parametrize("target", ["StepLR", "lr_scheduler.StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_class_of_torch(target: str) -> None:
    factory, driven = load_schedule(spec(target, step_size=1, gamma=0.5)), optimizer()
    made = factory(driven)
    assert type(made) is torch.optim.lr_scheduler.StepLR
    assert factory.name == "torch.optim.lr_scheduler.StepLR"
    driven.step()
    made.step()
    assert driven.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("CosineAnnealingLR", {"T_max": 100}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 100}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2}),
        ("LinearLR", {"total_iters": 10}),
        ("PolynomialLR", {"total_iters": 10, "power": 2.0}),
    ],
)
def test_other_classes_of_torch(target: str, args: dict[str, Any]) -> None:
    assert (
        type(load_schedule(spec(target, **args))(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))).__name__ == target
    )


def test_the_users_own(near: UserModule, tmp_path: Path) -> None:
    for target in ("make_schedule", f"{tmp_path / 'model.py'}:make_schedule"):
        driven = optimizer()
        load_schedule(spec(target, warm=4), near)(driven)
        assert driven.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        (
            "StepLr",
            {},
            r"target: there is no schedule \"StepLr\" .*nearest name in torch\.optim\.lr_scheduler is StepLR\.",
        ),
        ("LRScheduler", {}, r"target: there is no schedule"),
        ("StepLR", {}, r"args: .*StepLR\(optimizer, step_size, .*missing a required argument: 'step_size'"),
        ("StepLR", {"step_size": 2, "rate": 1}, r"args: .*unexpected keyword argument 'rate'"),
        ("StepLR", {"step_size": "few"}, r"args: torch\.optim\.lr_scheduler\.StepLR rejects these arguments: "),
        ("ExponentialLR", {"gamma": "1e-3"}, r"args: .*YAML reads gamma: 1e-3 as text, .*; write 0\.001\.$"),
        ("LambdaLR", {"lr_lambda": "x"}, r"args: .*LambdaLR rejects these arguments: 'str' object is not callable"),
        ("ReduceLROnPlateau", {}, r"target: step\(\) of .*needs metrics, .*Use CosineAnnealingLR .*--patience"),
    ],
)
def test_what_torch_refuses(target: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_schedule(spec(target, **args))
    assert str(caught.value).startswith("train.schedule.")


def test_an_optimizer_that_the_schedule_refuses() -> None:
    plain = load_optimizer(OptimizerSpec(target="Adagrad", args={"lr": 0.1}))
    with pytest.raises(UsageError, match=r"train\.schedule\.args: .*CyclicLR rejects these arguments: .*momentum"):
        load_schedule(spec("CyclicLR", base_lr=0.1, max_lr=0.2), None, plain)


def test_what_the_users_code_gives(near: UserModule) -> None:
    with pytest.raises(UsageError, match=r"make_nothing returned an int, not a schedule with step\(\)"):
        load_schedule(spec("make_nothing"), near)(optimizer())
    with pytest.raises(UsageError, match=r"step\(\) of .*NeedsLoss needs loss, but"):
        load_schedule(spec("NeedsLoss"), near)(optimizer())
    with pytest.raises(UsageError, match=r"constant of .* is an int, not a class or function"):
        load_schedule(spec("constant"), near)
    with pytest.raises(UsageError, match=r"train\.schedule\.args: .*make_schedule\(optimizer, warm\) .*'cold'"):
        load_schedule(spec("make_schedule", cold=1), near)
    with pytest.raises(UserCodeError, match=r"calling .*make_schedule\(optimizer, warm\): warm below 0"):
        load_schedule(spec("make_schedule", warm=-1), near)(optimizer())
    with pytest.raises(ModelError, match=r'Did you mean "make_schedule"'):
        load_schedule(spec(f"{near.name}:make_schedul"), near)
    with pytest.raises(UsageError, match=r"name a class or function of .*:make_schedule"):
        load_schedule(spec(near.name), near)
