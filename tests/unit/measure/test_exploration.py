"""Norms that no class gives away, and state that passes move: exact against a loop over real micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnprobe
from bnprobe.commands.scan import scan
from bnprobe.measure.norms import FROZEN
from bnprobe.records import Report
from support import reference
from support.fingerprint import fingerprint
from support.networks import images, unsettled
from support.reference import OwnNorm

SIZE, BATCHES = 4, 12


def rows(channels: int = 6, count: int = BATCHES * SIZE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list((torch.randn(count, channels, generator=generator) * 2 + 1).split(SIZE))


def trained(model: nn.Module, batches: list[Any], forward: Callable[[nn.Module, Any], Any] | None = None) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for batch in batches:
            (forward or (lambda model, batch: model(batch)))(model.train(), batch)
    return model.eval()


def assert_exact(
    model: nn.Module,
    batches: list[Any],
    norms: dict[str, OwnNorm],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    **settings: Any,
) -> Report:
    """The model comes back as it was, and D, r and d of all layers and the outputs are those of the loop."""
    before = fingerprint(model)
    report = scan(model, batches, SIZE, num_batches=len(batches), forward=forward, **settings)
    assert fingerprint(model) == before
    for path in ("train", "eval"):
        expected = reference.measure(model, batches, path, forward, norms)
        measured = {layer.name: getattr(layer, path) for layer in report.layers}
        names = {name for name, _ in expected.calls}
        assert measured.keys() == names
        for name in names:
            (figures,) = expected.layer(name)
            assert measured[name].mismatch == pytest.approx(np.mean(figures.mismatch), rel=1e-4, abs=1e-9), (name, path)
            assert measured[name].r.mean == pytest.approx(np.mean(figures.r), rel=1e-4)
            assert measured[name].d.mean == pytest.approx(np.mean(figures.d), rel=1e-4, abs=1e-5)
    outputs = [torch.cat(reference.measure(model, batches, path, forward, norms).outputs) for path in ("train", "eval")]
    distance = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
    assert report.summary.output.relative_l2 == pytest.approx(distance, rel=1e-4)
    return report


class FunctionalBN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("rm", torch.zeros(channels))
        self.register_buffer("rv", torch.ones(channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return F.batch_norm(x, self.rm, self.rv, training=self.training, momentum=0.3, eps=1e-2)


@pytest.mark.parametrize("emulate", [True, False])
def test_batch_norm_called_as_a_function(emulate: bool) -> None:
    model = trained(nn.Sequential(FunctionalBN(6), nn.Linear(6, 5), nn.BatchNorm1d(5)), rows()[:3])
    norm = OwnNorm("0", model[0].rm.double(), model[0].rv.double(), 1e-2)
    report = assert_exact(model, rows(), {"0": norm}, emulate=emulate)
    first = report.layers[0]
    assert (first.kind, first.eps, first.momentum, first.batches_tracked) == ("FunctionalBN", 1e-2, 0.3, 3)
    assert report.scan.emulated is emulate
    assert report.skipped == ()


class DomainBN(nn.Module):
    """One row of statistics per domain, and gains from outside."""

    def __init__(self, domains: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(domains, channels))
        self.register_buffer("var", torch.ones(domains, channels))

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return F.batch_norm(x, self.mean[domain], self.var[domain], training=self.training)


class Domains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = DomainBN(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x, 0)) + self.head(self.norm(x * 2, 2))


def test_rows_of_one_buffer_are_layers_of_their_own() -> None:
    model = trained(Domains(), rows())
    norms = {
        f"norm[{row}]": OwnNorm(
            "norm",
            model.norm.mean[row].double(),
            model.norm.var[row].double(),
            1e-5,
            counts=lambda call, n=number: call == n,
        )
        for number, row in ((0, 0), (1, 2))
    }
    report = assert_exact(model, rows(), norms)
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("norm[1]", "never called by the forward pass")]


class ConditionalBN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))
        self.gain = nn.Linear(3, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-4)
        return x * (1 + self.gain(condition))


class Conditional(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(6, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.head(self.norm(x, condition))


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(x, torch.randn(SIZE, 3, generator=generator)) for x in rows()]


def both(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch)


def test_gains_from_outside() -> None:
    model = trained(Conditional(ConditionalBN(6)), pairs(), both)
    norm = OwnNorm("norm", model.norm.stored_mean.double(), model.norm.stored_var.double(), 1e-4)
    assert_exact(model, pairs(), {"norm": norm}, both)


class Flow(nn.Module):
    """A flow's batch norm: statistics for broadcasting, a log variance, the unbiased variance, a log determinant."""

    def __init__(self, channels: int, unbiased: bool, assigns: bool, dims: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        shape = [1, channels] + [1] * (len(dims) - 1)
        self.unbiased, self.assigns, self.dims = unbiased, assigns, dims
        self.register_buffer("average", torch.zeros(shape))
        self.register_buffer("log_var", torch.zeros(shape))
        self.log_gain = nn.Parameter(torch.full(shape, 0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            mean = x.mean(self.dims, keepdim=True)
            var = x.var(self.dims, keepdim=True, unbiased=self.unbiased)
            kept = 0.8 * self.average + 0.2 * mean.detach(), 0.8 * self.log_var + 0.2 * (var + 1e-3).log().detach()
            if self.assigns:
                self.average, self.log_var = kept
            else:
                self.average.data.copy_(kept[0])
                self.log_var.data.copy_(kept[1])
        else:
            mean, var = self.average, self.log_var.exp()
        scale = self.log_gain.exp() / (var + 1e-3).sqrt()
        return (x - mean) * scale, scale.log().sum()


class First(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)[0]


@pytest.mark.parametrize("assigns", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_arithmetic_of_its_own(unbiased: bool, assigns: bool) -> None:
    model = trained(nn.Sequential(First(Flow(6, unbiased, assigns)), nn.BatchNorm1d(6)), rows()[:5])
    flow = model[0].norm
    norm = OwnNorm("0.norm", flow.average.double().view(-1), flow.log_var.double().exp().view(-1), 1e-3, unbiased)
    report = assert_exact(model, rows(), {"0.norm": norm})
    assert report.layers[0].note == "normalizes by its own arithmetic, with average and log_var (log variance)"
    assert (report.layers[0].eps, report.layers[0].momentum) == (1e-3, 0.2)
    assert report.scan.emulated


def test_arithmetic_of_its_own_on_images() -> None:
    batches = images(BATCHES, SIZE, 3, 5, 5)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), First(Flow(4, False, True, (0, 2, 3)))), batches[:5])
    flow = model[1].norm
    norm = OwnNorm("1.norm", flow.average.double().view(-1), flow.log_var.double().exp().view(-1), 1e-3)
    assert_exact(model, batches, {"1.norm": norm})


class OnStd(nn.Module):
    """Adds eps to the standard deviation; keeps a variance, or a standard deviation."""

    def __init__(self, channels: int, eps: float, unbiased: bool, keeps_std: bool, limits: Any = None) -> None:
        super().__init__()
        self.eps, self.unbiased, self.keeps_std, self.limits = eps, unbiased, keeps_std, limits
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.register_buffer("average", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, std = self.average, self.spread if self.keeps_std else self.spread.sqrt()
        r, d = torch.ones(()), torch.zeros(())
        if self.training:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            kept, kept_std = mean, std + self.eps
            mean, std = x.mean(axes), x.var(axes, unbiased=self.unbiased).sqrt()
            if self.limits is not None:
                r = ((std + self.eps) / kept_std).clamp(1 / self.limits[0], self.limits[0]).view(shape)
                d = ((mean - kept) / kept_std).clamp(-self.limits[1], self.limits[1]).view(shape)
            with torch.no_grad():
                self.average.lerp_(mean, 0.1)
                self.spread.lerp_(std if self.keeps_std else std.square(), 0.1)
        z = (x - mean.view(shape)) / (std + self.eps).view(shape)
        return self.gain.view(shape) * (r * z + d)


@pytest.mark.parametrize(
    ("eps", "unbiased", "keeps_std"), [(0.3, True, False), (1e-5, False, False), (0.05, True, True)]
)
@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize("limits", [None, (1.2, 0.1)])
def test_eps_added_to_the_standard_deviation(
    eps: float, unbiased: bool, keeps_std: bool, emulate: bool, limits: Any
) -> None:
    batches = images(BATCHES, SIZE, 3, 5, 5)
    model = trained(
        nn.Sequential(nn.Conv2d(3, 4, 1), OnStd(4, eps, unbiased, keeps_std, limits), nn.BatchNorm2d(4)), batches[:5]
    )
    kept = model[1].spread.double()
    norm = OwnNorm(
        "1",
        model[1].average.double(),
        kept.square() if keeps_std else kept,
        eps,
        unbiased,
        limits=limits or (1.0, 0.0),
        on_std=True,
    )
    layer = assert_exact(model, batches, {"1": norm}, emulate=emulate).layers[0]
    assert layer.eps == pytest.approx(eps)
    assert layer.note is not None
    assert "eps added to the standard deviation" in layer.note


class Renorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("ra_mean", torch.zeros(channels))
        self.register_buffer("ra_var", torch.ones(channels))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.ra_mean, self.ra_var
        if self.training:
            batch_mean, batch_var = x.mean(0), x.var(0, unbiased=False)
            std, batch_std = (var + 1e-3).sqrt(), (batch_var + 1e-3).sqrt()
            r = (batch_std / std).clamp(1 / 1.2, 1.2)
            d = ((batch_mean - mean) / std).clamp(-0.1, 0.1)
            y = (x - batch_mean) / batch_std * r + d
            with torch.no_grad():
                mean += 0.01 * (batch_mean - mean)
                var += 0.01 * (batch_var - var)
                self.steps += 1
            return y
        return (x - mean) / (var + 1e-3).sqrt()


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.3])
def test_eps_added_to_the_variance_is_told_apart(eps: float) -> None:
    class OnVariance(Renorm):
        def forward(self, x: Tensor) -> Tensor:
            mean, var = self.ra_mean, self.ra_var
            if self.training:
                mean, var = x.mean(0), x.var(0, unbiased=False)
                self.ra_mean.lerp_(mean, 0.1)
                self.ra_var.lerp_(var, 0.1)
            return (x - mean) / (var + eps).sqrt()

    model = trained(nn.Sequential(OnVariance(6), nn.BatchNorm1d(6)), rows()[:5])
    layer = scan(model, rows(), SIZE, num_batches=4).layers[0]
    assert layer.eps == pytest.approx(eps)
    assert layer.note == "normalizes by its own arithmetic, with ra_mean and ra_var"


def test_batch_renorm_of_its_own() -> None:
    model = trained(nn.Sequential(Renorm(6), nn.Linear(6, 4), nn.BatchNorm1d(4)), rows() * 5)
    norm = OwnNorm("0", model[0].ra_mean.double(), model[0].ra_var.double(), 1e-3, limits=(1.2, 0.1))
    report = assert_exact(model, rows(), {"0": norm})
    assert report.layers[0].note.endswith("Batch Renorm, so D is what its correction leaves")
    assert report.layers[0].momentum == 0.01


class Deviation(nn.Module):
    """Keeps the standard deviation away from 0 in another way: no formula that is known."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("spread", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.centre.lerp_(mean, 0.1)
            self.spread.lerp_(var, 0.1)
        else:
            mean, var = self.centre, self.spread
        return (x - mean) / var.clamp(min=0.9).sqrt()


def test_what_is_not_recognised_is_listed_and_its_state_put_back() -> None:
    model = trained(nn.Sequential(Deviation(6), nn.BatchNorm1d(6)), rows()[:3])
    report = assert_exact(model, rows(), {})
    (skipped,) = report.skipped
    assert (skipped.name, skipped.kind) == ("0", "Deviation")
    assert skipped.reason.startswith("it writes centre and spread in train mode as a norm does, but its scale")
    assert 'norm_classes = {"Deviation": {"mean": "...", "variance": "...", "eps": 1e-5}}' in skipped.reason


class Power(nn.Module):
    """One running statistic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("power", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.power.lerp_(x.detach().square().mean(0), 0.1)
        return x / (self.power + 1e-5).sqrt()


class Whitened(nn.Module):
    """A running mean, and a running matrix."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.register_buffer("turn", torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
            self.turn.lerp_(torch.linalg.inv(torch.linalg.cholesky(x.detach().T.cov() + self.turn)), 0.1)
        return (x - self.centre) @ self.turn.T


@pytest.mark.parametrize(("made", "buffer"), [(Power, "power"), (Whitened, "centre")])
def test_statistics_of_another_kind_are_listed(made: Callable[[int], nn.Module], buffer: str) -> None:
    report = assert_exact(nn.Sequential(made(6), nn.BatchNorm1d(6)), rows(), {})
    (skipped,) = report.skipped
    assert (skipped.name, skipped.kind) == ("0", made.__name__)
    assert skipped.reason == (
        f"training changes its {buffer}, as it does running statistics of one value per channel, but it does not do"
        " what a known norm does"
    )


def test_what_torchs_own_modules_keep_is_not_listed() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6))
    assert scan(model, rows(), SIZE, num_batches=4).skipped == ()


def test_where_calls_on_the_batch_alone_are_all_that_there_is_their_line_is_named() -> None:
    class OnlyCalls(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.batch_norm(x, None, None, training=True))

    said = r"The first is .*test_exploration.py:\d+ \(batch_norm\): batch_norm called as a function without running"
    with pytest.raises(bnprobe.errors.NothingToProbeError, match=said):
        scan(OnlyCalls(6, 2), rows(), SIZE, num_batches=4)


class ThreeBuffers(Renorm):
    """More buffers than a norm needs, of which any two might be meant."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("copy", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.copy.lerp_(x.detach().abs().mean(0), 0.1)
        return super().forward(x)


def test_the_user_may_name_the_buffers() -> None:
    model = trained(nn.Sequential(ThreeBuffers(6), nn.BatchNorm1d(6)), rows())
    free = scan(model, rows(), SIZE, num_batches=4)
    said = {"ThreeBuffers": {"mean": "ra_mean", "variance": "ra_var", "eps": 1e-3}}
    named = scan(model, rows(), SIZE, num_batches=4, norms=said)
    assert named.layers == free.layers
    wrong = {"ThreeBuffers": {"mean": "ra_mean", "variance": "ra_vra"}}
    (skipped,) = scan(model, rows(), SIZE, num_batches=4, norms=wrong).skipped
    assert "it has no buffer ra_vra (it has ra_mean, ra_var, steps, copy)" in skipped.reason
    with pytest.raises(bnprobe.errors.UsageError, match='the nearest known key is "variance"'):
        scan(model, rows(), SIZE, norms={"ThreeBuffers": {"mean": "ra_mean", "varianc": "ra_var"}})


def test_calls_without_buffers_are_listed_as_what_they_are() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(6)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(self.bn(x), self.mean + 0, self.mean + 1, training=self.training)
            x = F.batch_norm(x, None, None, training=True)
            return F.batch_norm(x.reshape(1, -1, 3), None, None, training=True).reshape(x.shape)

    report = scan(Loose(), rows(), SIZE, num_batches=4)
    reasons = sorted(layer.reason.split(":")[0] for layer in report.skipped)
    assert reasons == [
        "batch_norm called as a function with running statistics that are no buffers of a module, but copies or"
        " computed",
        "batch_norm called as a function without running statistics",
        "instance norm by batch_norm called as a function",
    ]


class FrozenBatchNorm(FunctionalBN):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.rm, self.rv, training=False)


def test_constants_in_both_modes_are_no_layer() -> None:
    report = scan(nn.Sequential(FrozenBatchNorm(6), nn.BatchNorm1d(6)), rows(), SIZE, num_batches=4)
    assert [layer.name for layer in report.layers] == ["1"]
    (skipped,) = report.skipped
    assert (skipped.name, skipped.reason) == ("0", FROZEN)


class HalfManual(FunctionalBN):
    """The function at inference only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.rm, self.rv, eps=1e-3)
        mean, var = x.mean(0), x.var(0, unbiased=False)
        self.rm.lerp_(mean, 0.1)
        self.rv.lerp_(var, 0.1)
        return (x - mean) / (var + 1e-3).sqrt()


def test_the_function_at_inference_only() -> None:
    model = trained(nn.Sequential(HalfManual(6), nn.BatchNorm1d(6)), rows()[:3])
    report = assert_exact(model, rows(), {"0": OwnNorm("0", model[0].rm.double(), model[0].rv.double(), 1e-3)})
    assert report.layers[0].note.startswith("normalizes by its own arithmetic")
    assert report.skipped == ()


def test_one_value_per_channel_does_not_end_the_search() -> None:
    model = trained(nn.Sequential(nn.BatchNorm1d(6), FunctionalBN(6)), rows())
    layers = scan(model, list(torch.cat(rows()).split(1)), 1, num_batches=8).layers
    assert [layer.name for layer in layers] == ["0", "1"]


class Subclass(nn.BatchNorm1d):
    """Its calls say otherwise than its attributes, and nothing counts them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, None, None, self.training, 0.5, 0.1)


def test_what_a_call_says_beats_attributes() -> None:
    model = trained(nn.Sequential(Subclass(6)), rows()[:3])
    (layer,) = scan(model, rows(), SIZE, num_batches=4).layers
    assert (layer.eps, layer.momentum, layer.batches_tracked) == (0.1, 0.5, None)
    mean, var, total = model[0].running_mean.double(), model[0].running_var.double(), []
    for x in (batch.double() for batch in rows()[:4]):
        z_train = (x - x.mean(0)) / (x.var(0, unbiased=False) + 0.1).sqrt()
        total.append(float((z_train - (x - mean) / (var + 0.1).sqrt()).square().mean()))
    assert layer.train.mismatch == pytest.approx(np.mean(total), rel=1e-5)


def test_recalibration_reaches_them() -> None:
    """The eval path then has the population's statistics."""
    batches, whole = rows(), torch.cat(rows())
    model = nn.Sequential(FunctionalBN(6), First(Flow(6, False, True)), Renorm(6))
    bnprobe.recalibrate(model, batches, path="eval")
    torch.testing.assert_close(model[0].rm, whole.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].rv, whole.var(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model[1].norm.log_var.exp().view(-1), model[0].eval()(whole).var(0), rtol=1e-4, atol=1e-5
    )
    output = model.eval()(whole)
    torch.testing.assert_close(output.mean(0), torch.zeros(6), rtol=0, atol=1e-4)


# ---- state that passes move


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.spectral_norm(nn.Linear(6, 6))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))


class Codebook(nn.Module):
    """Moves a parameter by its data, a large buffer in place, an attribute, and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 6))
        self.register_buffer("queue", torch.zeros(2**20 + 6))
        self.scale, self.log, self.bn = 1.0, [], nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.centres[torch.cdist(x, self.centres).argmin(1)] + self.queue[-6:]
        if self.training:
            self.centres.data += 0.1
            self.queue[-6:] += x.detach().mean(0)
            self.scale *= 1.1
            self.log.append(x.detach())
        return self.bn(x) * (1 + len(self.log))


@pytest.mark.parametrize("make", [Spectral, Codebook])
@pytest.mark.parametrize("emulate", [True, False])
def test_state_that_train_mode_moves_is_put_back(make: type[nn.Module], emulate: bool) -> None:
    torch.manual_seed(0)
    assert_exact(unsettled(make()), rows(), {}, emulate=emulate)


def test_loss_and_metric_see_the_model_as_it_is() -> None:
    """Also where they call the model on inputs of their own, which nothing can be replayed for."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch + 0).square().mean()

    torch.manual_seed(0)
    model = unsettled(Codebook())
    report = scan(model, rows(), SIZE, num_batches=BATCHES, loss=loss)
    for path in ("train", "eval"):
        values = [float(loss(copy.deepcopy(model).train(path == "train"), batch).detach()) for batch in rows()]
        assert getattr(report.summary.output.loss, path) == pytest.approx(np.mean(values), rel=1e-5)


def test_gradients_see_the_model_as_it_is() -> None:
    seen = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append((model.scale, float(model.centres.detach().sum()), float(model.queue[-6:].sum()), len(model.log)))
        return model(batch).square().mean()

    torch.manual_seed(0)
    model = unsettled(Codebook())
    scan(model, rows(), SIZE, num_batches=BATCHES, loss=loss, gradients=True)
    last = seen[-2 * BATCHES :]
    assert set(last) == {(1.0, float(model.centres.detach().sum()), 0.0, 0)}


class Holder:
    """A plain object, which torch does not look into."""

    def __init__(self) -> None:
        self.bn = nn.BatchNorm1d(6)
        self.average = torch.zeros(6)


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.holder, self.bn = Holder(), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        self.holder.average = 0.9 * self.holder.average + 0.1 * x.mean(0)
        return self.bn(self.holder.bn(x) - self.holder.average)


def test_state_of_a_plain_object_is_put_back() -> None:
    model = unsettled(Outside())
    model.holder.average = torch.ones(6)
    before = [model.holder.average, *(tensor.clone() for tensor in model.holder.bn.buffers())]
    report = scan(model, rows(), SIZE, num_batches=BATCHES)
    after = [model.holder.average, *model.holder.bn.buffers()]
    assert after[0] is before[0]
    assert all(map(torch.equal, before, after))
    assert [layer.name for layer in report.layers] == ["bn", "holder.bn"]
    expected = []
    for x in rows():
        twin = copy.deepcopy(model).double().train()
        twin.holder.bn.double()
        outer, mean, var = twin.bn, twin.bn.running_mean.clone(), twin.bn.running_var.clone()
        seen: list[Tensor] = []
        outer.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].detach()))
        twin(x.double())
        z = (seen[0] - seen[0].mean(0)) / (seen[0].var(0, unbiased=False) + outer.eps).sqrt()
        expected.append(float((z - (seen[0] - mean) / (var + outer.eps).sqrt()).square().mean()))
    assert report.layers[0].train.mismatch == pytest.approx(np.mean(expected), rel=1e-4)


class Functional(nn.Module):
    """As in meta-learning code: weights and statistics in lists of parameters, everything called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.vars = nn.ParameterList([nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.ones(6))])
        statistics = (torch.zeros(6), torch.ones(6), torch.zeros(6), torch.ones(6))
        self.vars_bn = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in statistics])

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x @ self.vars[0], self.vars_bn[0], self.vars_bn[1], self.vars[1], training=self.training)
        return F.batch_norm(x.relu(), self.vars_bn[2], self.vars_bn[3], training=self.training)


def test_statistics_in_a_list_of_parameters() -> None:
    model = trained(Functional(), rows())
    before = fingerprint(model)
    report = scan(model, rows(), SIZE, num_batches=BATCHES)
    assert fingerprint(model) == before
    assert [layer.name for layer in report.layers] == ["vars_bn.0", "vars_bn.2"]
    mean, var = (model.vars_bn[index].double() for index in (0, 1))
    total = []
    for x in (batch.double() @ model.vars[0].detach().double() for batch in rows()):
        z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        total.append(float((z - (x - mean) / (var + 1e-5).sqrt()).square().mean()))
    assert report.layers[0].train.mismatch == pytest.approx(np.mean(total), rel=1e-4)
    assert report.skipped == ()
