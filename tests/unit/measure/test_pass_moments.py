"""Moments of all calls are computed at the end of a pass; where digits were lost, the pass runs again."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnprobe.measure import forward_pass
from bnprobe.measure.forward_pass import Grouping, Pass
from bnprobe.measure.norms import BatchNormFamily, NormCall
from bnprobe.measure.pass_moments import _by_column, moments_of_sums
from bnprobe.stats.moments import group_sums, row_sums
from support.networks import images, unsettled
from support.operators import WAIT, Operators, reads
from support.running import session_of

SHAPES = [(8, 5), (8, 5, 1), (8, 5, 7), (8, 5, 2, 2), (8, 5, 9, 8), (8, 5, 3, 4, 2)]


def by_hand(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every ``size`` rows, in float64."""
    groups = x.double().unflatten(0, (-1, size)).transpose(1, 2).flatten(2)
    return groups.mean(2), groups.var(2, correction=0)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_moments_are_those_of_each_input(size: int, pooled: bool, dtype: torch.dtype) -> None:
    inputs = [3 * torch.randn(shape).to(dtype) + 1 for shape in SHAPES]
    found, uncertain = moments_of_sums([row_sums(x) for x in inputs], size, pooled, 1e-5)
    assert uncertain == []
    for x, (mean, variance) in zip(inputs, found, strict=True):
        expected = by_hand(x, size if pooled else 1)
        assert mean.dtype == variance.dtype == torch.float64
        torch.testing.assert_close(mean, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_groups_in_one_operator(shape: tuple[int, ...], last: bool) -> None:
    """As on a GPU."""
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if last and x.dim() == 4 else x
    with Operators() as measured, reads() as looks:
        [(mean, variance)], uncertain = moments_of_sums([group_sums(x, 4)], 1, True, 1e-5)
    assert uncertain == looks == []  # nothing is looked at, which would wait for the device
    assert measured.found[WAIT] == 0
    torch.testing.assert_close((mean, variance), by_hand(x, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [10.0, 1e4])
def test_lost_digits_are_noticed_where_they_matter(shift: float) -> None:
    """Beside the variance of a micro-batch, not that of each of its rows, which may be constant."""
    [near, far] = images(2, 8, 5, 9, 9)
    steps = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 5, 9, 9) + 1e-3 * near
    parts = [row_sums(near), row_sums(steps), row_sums(far + shift)]
    assert moments_of_sums(parts, 8, True, 1e-5)[1] == [2]
    assert moments_of_sums(parts, 1, True, 1e-5)[1] == [1, 2]


def test_large_values_of_one_position_are_exact_beside_sums_of_squares() -> None:
    x, other = 1e15 * torch.randn(8, 5), torch.randn(8, 5, 9, 9)
    assert moments_of_sums([row_sums(x), row_sums(other)], 2, True, 1e-5)[1] == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_values_that_are_not_finite_or_overflow_are_noticed(bad: float) -> None:
    [x, other] = images(2, 8, 5, 9, 9)
    x[3, 1, 0, 0] = bad
    assert moments_of_sums([row_sums(other), row_sums(x)], 2, True, 1e-5)[1] == [1]


def _call(x: Tensor, affine: bool, dtype: torch.dtype | None = None) -> NormCall:
    channels = x.shape[1]
    weight, bias = (torch.randn(channels, dtype=dtype), torch.randn(channels, dtype=dtype)) if affine else (None, None)
    return NormCall(x, torch.zeros(channels), torch.ones(channels), weight, bias, training=True, eps=1e-3)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 5, 7), (8, 5, 2, 2), (8, 5, 9, 8), (8, 5, 3, 4, 2)])
def test_plain_bn_of_each_micro_batch(affine: bool, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (2 * torch.randn(shape) + 1).to(dtype)
    call = _call(x, affine, dtype)
    weight, bias = (None if each is None else each.double() for each in (call.weight, call.bias))
    expected = torch.cat(
        [nn.functional.batch_norm(part.double(), None, None, weight, bias, True, eps=1e-3) for part in x.split(size)]
    )
    grouping = Grouping(8, size, 8)
    by_rows = forward_pass._normalize_by_sums(call, row_sums(x), grouping)
    by_groups = forward_pass._normalize_by_sums(call, group_sums(x, size), grouping)
    close = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for found in (by_rows, by_groups):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=close if dtype != torch.float64 else 1e-5, atol=close)


def test_constants_are_where_the_input_is() -> None:
    """Whatever the user's default device: they are kept for the scans that follow."""
    forward_pass._members.cache_clear()
    _by_column.cache_clear()
    x = torch.randn(8, 5, 4, 4)
    call = _call(x, affine=True)
    with torch.device("meta"):
        output = forward_pass._normalize_by_sums(call, row_sums(x), Grouping(8, 2, 8))
        [(mean, _)], uncertain = moments_of_sums([row_sums(x)], 2, True, 1e-5)
    assert uncertain == []
    assert output.device == mean.device == x.device
    torch.testing.assert_close(mean, by_hand(x, 2)[0], rtol=1e-5, atol=1e-6)


class Far(nn.Module):
    """Input whose mean is a thousand standard deviations away; beside it, after a convolution, ordinary input."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near, self.drop = nn.BatchNorm2d(3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.drop(self.near(self.conv(self.far(x + 1000))))


@pytest.mark.parametrize("path", ["train", "eval"])
def test_a_pass_that_lost_digits_runs_once_more(path: Any) -> None:
    model, calls = unsettled(Far()), Counter[str]()
    model.register_forward_pre_hook(lambda *_: calls.update(["model"]))
    [x] = images(1, 4, 3, 6, 6)
    session = session_of(model)
    with session.installed():
        first = Pass(4, 2, per_sample=path == "eval")
        torch.manual_seed(0)
        output, _ = session.forward(path, x, first)
        assert calls["model"] == 2
        again = Pass(4, 2, per_sample=path == "eval")
        torch.manual_seed(0)
        repeated, _ = session.forward(path, x, again)
        assert calls["model"] == 3
    # As if the pass had been careful at once: the same random draws, and each call recorded once.
    assert torch.equal(output, repeated)
    assert list(first.records) == list(again.records) == [(0, 0), (1, 0)]
    mean, variance = by_hand(x + 1000, 1 if path == "eval" else 2)
    for found in (first, again):
        torch.testing.assert_close(found.records[0, 0].variance, variance, rtol=1e-4, atol=0)
        torch.testing.assert_close(found.records[0, 0].mean, mean, rtol=1e-6, atol=0)


class FarTwice(nn.Module):
    """The mean of a second layer is far from zero only where the first one normalizes as it should."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        off = (self.first(x + 1e4).std() - 1).abs() - 0.1
        output: Tensor = self.second(x * (1 + 1000 * off.relu()) + 100)
        return output


def test_digits_that_a_layer_loses_only_once_another_has_its_own() -> None:
    [x] = images(1, 4, 3, 6, 6)
    session = session_of(FarTwice())
    with session.installed():
        pass_ = Pass(4, 2)
        session.forward("train", x, pass_)
    mean, variance = by_hand(x + 100, 2)
    torch.testing.assert_close(pass_.records[1, 0].mean, mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(pass_.records[1, 0].variance, variance, rtol=1e-5, atol=0)


class FarWithNoise(Far):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + torch.rand(1, generator=self.own)


def test_generators_of_the_model_itself_do_not_go_on_when_a_pass_runs_once_more() -> None:
    model = unsettled(FarWithNoise())
    [x] = images(1, 4, 3, 6, 6)
    session = session_of(model)
    with session.installed():
        session.forward("eval", x, Pass(4, 2, per_sample=True))
        drawn = torch.rand(1, generator=model.own)
    fresh = torch.Generator().manual_seed(3)
    torch.rand(1, generator=fresh)
    assert torch.equal(drawn, torch.rand(1, generator=fresh))


def test_what_the_first_pass_gave_is_freed_before_the_second() -> None:
    """A graph keeps all activations."""
    model = unsettled(Far())
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    model.register_forward_pre_hook(lambda *_: alive.append(sum(each() is not None for each in outputs)))
    model.register_forward_hook(lambda *found: outputs.append(weakref.ref(found[2])))
    [x] = images(1, 4, 3, 6, 6)
    session = session_of(model)
    with session.installed(), torch.enable_grad():
        session.forward("eval", x, Pass(4, 2, leaves={}))
    assert alive == [0, 0]


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_values_that_are_not_finite_stay_so(bad: float) -> None:
    model = unsettled(Far())
    [x] = images(1, 4, 3, 6, 6)
    x[1, 2, 0, 0] = bad
    session = session_of(model)
    with session.installed():
        pass_ = Pass(4, 2)
        session.forward("eval", x, pass_)
    finite = torch.isfinite(pass_.records[0, 0].mean)
    assert finite.tolist() == [[True, True, False], [True, True, True]]


class Overwriting(nn.Module):
    """Writes into what its layer was given, once the layer has run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        output = self.norm(x)
        x.zero_()
        return output


def test_an_input_that_is_written_into_afterwards() -> None:
    [x] = images(1, 4, 3)
    session = session_of(unsettled(Overwriting()))
    with session.installed():
        pass_ = Pass(4, 2)
        session.forward("eval", x, pass_)
    record = pass_.records[0, 0]
    torch.testing.assert_close((record.mean, record.variance), by_hand(2 * x, 2), rtol=1e-6, atol=1e-6)


class _OnCuda(Tensor):
    """Takes the way of a tensor on a GPU, on any machine."""

    is_cuda = True


@pytest.mark.parametrize("kind", [Tensor, _OnCuda])
@pytest.mark.parametrize("own", [{"r_max": 3.0, "d_max": 5.0}, {"on_std": True}, {"unbiased": True}], ids=str)
def test_a_layer_of_another_family_is_not_taken_for_plain_bn(kind: type[Tensor], own: dict[str, Any]) -> None:
    """Batch Renorm corrects; others normalize with another variance. Their statistics do not wait."""
    call = _call(torch.randn(8, 5, 3, 3).as_subclass(kind), affine=True)
    grouping = Grouping(8, 2, 8)
    assert forward_pass._sums(call, grouping, normalizes=True, per_sample=False) is not None
    assert forward_pass._sums(replace(call, **own), grouping, normalizes=True, per_sample=False) is None
    assert forward_pass._sums(replace(call, **own), grouping, normalizes=False, per_sample=False) is not None


def test_the_family_knows_plain_bn() -> None:
    layer = nn.BatchNorm2d(5)
    x = torch.randn(8, 5, 3, 3)
    call = BatchNormFamily().parse(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1, 1e-5)
    assert forward_pass._sums(call, Grouping(8, 2, 8), normalizes=True, per_sample=False) is not None
