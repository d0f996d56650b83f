from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnprobe.errors import StateError, UsageError
from bnprobe.nn import BatchRenorm2d, RenormSchedule, SyncBatchRenorm


def test_the_shape_is_that_of_the_paper() -> None:
    """Ioffe 2017, section 4: BN for 5k steps, r_max = 3 at 40k, d_max = 5 at 25k."""
    schedule, figures = RenormSchedule(130), {}
    for step in range(131):
        figures[step] = (schedule.r_max, schedule.d_max)
        schedule.advance()
    assert figures[0] == figures[5] == (1.0, 0.0)
    assert figures[15] == pytest.approx((1 + 2 * 10 / 35, 5 * 10 / 20))
    assert figures[24][1] < 5.0 == figures[25][1]
    assert figures[39][0] < 3.0 == figures[40][0]
    assert figures[130] == (3.0, 5.0)


@given(
    st.integers(1, 300),
    st.floats(1, 50),
    st.floats(0, 50),
    st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted),
)
def test_limits_rise_to_their_ends_and_no_further(steps: int, r: float, d: float, marks: list[float]) -> None:
    """torchrl's counter is not held at its end, and its limits grow for ever."""
    schedule = RenormSchedule(steps, r, d, marks[0], marks[2], marks[1])
    before = (1.0, 0.0)
    for _ in range(steps + 5):
        now = (schedule.r_max, schedule.d_max)
        assert before <= now
        assert now[0] <= r
        assert now[1] <= d
        before = now
        schedule.advance()
    assert schedule.step == schedule.steps == steps
    assert (schedule.r_max, schedule.d_max) == (pytest.approx(r), pytest.approx(d))


def test_without_warm_up_and_ramps_the_limits_are_the_ends() -> None:
    schedule = RenormSchedule(3, 2.0, 4.0, 0.0, 0.0, 0.0)
    assert (schedule.r_max, schedule.d_max) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0, but"),
        ({"steps": 9, "r_max": 0.5}, r"r_max is 0\.5"),
        ({"steps": 9, "d_max": -1}, "d_max is -1"),
        ({"steps": 9, "warmup": 0.5, "r_ramp": 0.4}, r"warmup is 0\.5 and r_ramp is 0\.4"),
        ({"steps": 9, "warmup": 0.5, "r_ramp": 0.6, "d_ramp": 0.4}, r"0 <= warmup <= d_ramp <= 1"),
        ({"steps": 9, "warmup": -0.1}, "warmup is -0.1"),
        ({"steps": 9, "r_ramp": 1.1}, "r_ramp is 1.1"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RenormSchedule(**arguments)


def test_layers_read_it_at_every_forward() -> None:
    net = nn.Sequential(BatchRenorm2d(2), nn.Sequential(SyncBatchRenorm(2), nn.BatchNorm2d(2)))
    schedule = RenormSchedule(4, warmup=0.25, r_ramp=0.5, d_ramp=0.5)
    assert schedule.attach(net) == 2
    with pytest.warns(UserWarning, match=r"BatchNorm2d has no Batch Renorm layer.*bnprobe\.convert"):
        assert schedule.attach(nn.BatchNorm2d(2)) == 0
    x = 9 * torch.randn(4, 2, 3, 3) + 5
    plain = nn.BatchNorm2d(2)(x)
    assert torch.allclose(net[0](x), plain, atol=1e-5)
    for _ in range(2):
        schedule.advance()
    assert not torch.allclose(net[0](x), plain, atol=0.1)
    assert net[1][0].r_max == 3.0


def test_a_saved_state_goes_on_where_it_stood() -> None:
    schedule = RenormSchedule(50)
    for _ in range(9):
        schedule.advance()
    state = json.loads(json.dumps(schedule.state_dict()))
    resumed = RenormSchedule(50)
    resumed.load_state_dict(state)
    assert (resumed.step, resumed.r_max, resumed.d_max) == (9, schedule.r_max, schedule.d_max)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 60}, "steps = 60, but this run has 50"),
        ({"d_max": 2.0}, r"d_max = 2\.0, but this run has 5\.0"),
        ({"step": 51}, "at step 51 of 50"),
        ({"step": None}, "at step None of 50"),
        ({"r_ramp": None}, "r_ramp = None"),
    ],
)
def test_the_state_of_another_run_is_refused(change: dict[str, float], message: str) -> None:
    schedule = RenormSchedule(50)
    with pytest.raises(StateError, match=message):
        schedule.load_state_dict(schedule.state_dict() | change)
    assert schedule.step == 0
