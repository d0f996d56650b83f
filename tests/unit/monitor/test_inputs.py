"""Batches that are not like those before, and those that are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnprobe
from bnprobe.monitor.inputs import InputShift, _moved, _Watched
from bnprobe.records import MonitorFinding

Draw = Callable[[int], Tensor]
"""Gives the inputs of a step."""


def watched(draw: Draw, steps: int, shift: InputShift | None = None, first: int = 0) -> tuple[InputShift, int | None]:
    """The step at which the evidence is beyond 1,000, read every ten steps as a monitor does."""
    shift = shift or InputShift()
    for step in range(first, steps):
        shift.take(step, ((draw(step),), {}))
        if step % 10 == 9:
            shift.update(torch.cat(shift.waiting()).tolist())
            if shift.e_value > 1_000:
                return shift, step
    return shift, None


def images(step: int, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 3, 8, 8, generator=generator) + torch.randn(size, 3, 1, 1, generator=generator)


def brighter(step: int) -> Tensor:
    return images(step) + (0.5 if step >= 150 else 0.0)


def one_channel(step: int) -> Tensor:
    found = images(step)
    if step >= 150:
        found[:, 1] = 3 * found[:, 1] - 1.0
    return found


def noisier(step: int) -> Tensor:
    return images(step) * (1.5 if step >= 150 else 1.0)


def of_one_kind(step: int) -> Tensor:
    found = images(step)
    return found + torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(-step)) if step >= 150 else found


@pytest.mark.parametrize("draw", [brighter, one_channel, noisier, of_one_kind])
def test_a_shift_is_found_within_a_few_samples(draw: Draw) -> None:
    shift, found = watched(draw, 300)
    assert found is not None
    assert 150 < found <= 190
    text = shift.message()
    assert text.startswith("Since about step 1")
    assert 140 <= int(text.split()[3]) <= 160


def test_a_message_says_what_moved_from_what_to_what() -> None:
    shift, end = watched(one_channel, 300)
    text = shift.message()
    assert end is not None
    since = int(text.split()[3])
    seen = [images_.movedim(1, 0).flatten(1)[1] for images_ in map(one_channel, range(max(0, end - 127), end + 1))]
    before, after = seen[: since - end - 1], seen[since - end - 1 :]
    means = [float(torch.stack([each.mean() for each in part]).mean()) for part in (before, after)]
    spreads = [float(torch.stack([each.std() for each in part]).mean()) for part in (before, after)]
    assert "Input 1: the mean went from " in text
    found = re.search(
        r"in channel 1, which went farthest, the mean by (\S+) standard .* deviation to (\S+) times", text
    )
    assert found is not None
    assert float(found[1]) == pytest.approx((means[1] - means[0]) / spreads[0], rel=0.03)
    assert float(found[2]) == pytest.approx(spreads[1] / spreads[0], rel=0.03)
    assert ": the mean stays at 0.3, the standard deviation went from 1.2 to 1.4." in _moved(
        _Watched("Input 1", 1), np.array([[0.301, 1.2, 0.301, 1.2]]), np.array([[0.299, 1.4, 0.299, 1.2]]), 1
    )
    shift, _ = watched(of_one_kind, 300)
    assert "From batch to batch the " in shift.message()
    assert "From batch to batch" not in watched(brighter, 300)[0].message()


def test_healthy_runs_seldom_alarm() -> None:
    """Augmented batches of 16 of 64 samples, epoch by epoch: 5% of 60 runs are 3."""
    alarms = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        data = torch.randn(64, 5, generator=generator)
        order = torch.cat([torch.randperm(64, generator=generator) for _ in range(100)]).view(-1, 16)

        def draw(
            step: int, data: Tensor = data, order: Tensor = order, generator: torch.Generator = generator
        ) -> Tensor:
            return data[order[step]] * (0.8 + 0.4 * torch.rand(16, 1, generator=generator))

        shift = InputShift()
        reached = 1.0
        for step in range(300):
            shift.take(step, ((draw(step),), {}))
            shift.update(torch.cat(shift.waiting()).tolist())
            reached = max(reached, shift.e_value)
        alarms += reached >= 20
    assert alarms <= 3


def test_what_cannot_be_compared_is_left_out() -> None:
    """Batches of another size or form, integers, and what a trained module computed."""
    shift = InputShift()
    shift.take(0, ((images(0),), {"mask": torch.ones(16, 4)}))
    for inputs in (
        ((images(1, 15),), {"mask": torch.ones(15, 4)}),
        ((images(1),), {}),
        ((images(1),), {"mask": torch.ones(16, 5)}),
        ((images(1).long(),), {"mask": torch.ones(16, 4)}),
        ((nn.Conv2d(3, 3, 1)(images(1)),), {"mask": torch.ones(16, 4)}),
    ):
        shift.take(1, inputs)
    assert len(shift.waiting()) == 1
    none = InputShift()
    none.take(0, ((torch.ones(4, 7, dtype=torch.long),), {}))
    assert none.waiting() == []
    assert none.e_value == 1.0


def test_where_the_size_of_batches_changes_for_good_the_test_goes_on_with_the_new_one() -> None:
    def smaller(step: int) -> Tensor:
        return images(step, 16 if step < 100 else 8) + (0.5 if step >= 250 else 0.0)

    shift, found = watched(smaller, 250)
    assert found is None
    shift, found = watched(smaller, 400, shift, 250)
    assert found is not None
    assert found <= 300
    short_last = watched(lambda step: images(step, 7 if step % 20 == 19 else 16), 100)[0]
    assert short_last.state()["samples"] == 16


def test_scores_are_what_a_reference_says() -> None:
    shift = InputShift()
    x = 1_000 + 0.01 * torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0))
    shift.take(0, ((), {"x": [x, torch.ones(4)]}))
    found = shift.waiting()[0].numpy()
    exact = x.double().numpy()
    chosen = [number * 49 // 31 for number in range(32)]
    expected = np.concatenate(
        [[exact.mean(), exact.std()], exact.mean((0, 2))[chosen], exact.std((0, 2))[chosen], [1, 0, 1, 0]]
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_restored_test_goes_on() -> None:
    shift, found = watched(brighter, 155)
    assert found is None
    shift.update(torch.cat(shift.waiting()).tolist())
    state = json.loads(json.dumps(shift.state()))
    again = InputShift()
    again.restore(state)
    (one, step), (other, its) = (watched(brighter, 300, each, 155) for each in (shift, again))
    assert step == its is not None
    assert one.message() == other.message()
    assert one.e_value == other.e_value


def test_a_finding_without_layers_is_a_warning() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    said = r"^bnprobe, step 2\d0: inputs: Since about step 200 batches .* Remedy: If this is not intended"
    monitor = bnprobe.Monitor(model, 10)

    def train() -> None:
        with monitor:
            for step in range(250):
                optimizer.zero_grad()
                model(torch.randn(32, 6) + (2.0 if step >= 200 else 0.0)).square().mean().backward()
                optimizer.step()

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=said):
        train()
    assert monitor.sample is not None
    assert monitor.sample.step == 240


def test_a_run_is_warned_once_and_what_is_new_becomes_usual() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    events: list[dict[str, Any]] = []
    said: list[MonitorFinding] = []
    with bnprobe.Monitor(model, 10, log=events.append, on_finding=lambda _, each: said.append(each)) as monitor:
        for step in range(600):
            x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step)) + (2.0 if 200 <= step < 400 else 0.0)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    found = [each for each in monitor.findings if each.rule == "inputs"]
    assert [each.rule for each in said].count("inputs") == 1
    assert len(found) == 2
    assert 200 < found[0].step <= 220
    assert 400 < found[1].step <= 420
    assert found[0].severity == "warning"
    assert found[0].layers == ()
    assert "bnprobe scan --eval-data" in found[0].remedy
    # The data itself is looked at: no batches are kept and scanned for it.
    assert monitor.report is None
    assert [each["series"] for each in events if each["event"] == "alarm"] == [["inputs"], ["inputs"]]
