"""Networks in the shapes of public code, written small, and the slow loop that says what a scan of each must measure.

Each takes care of batch norm in a way of its own: rows that are not samples, layers that run in one mode only, norms
without a layer, state that training moves, samples that meet each other on the way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from support.networks import images, unsettled

# --- Rows that are not samples ----------------------------------------------------------------------------------------


class SkeletonGraph(nn.Module):
    """(N, C, T, V, M): the people M of a clip are rows, its joints V are channels of the first norm (ST-GCN)."""

    def __init__(self, channels: int = 2, joints: int = 3) -> None:
        super().__init__()
        self.data_bn = nn.BatchNorm1d(channels * joints)
        self.gcn = nn.Conv2d(channels, 4, 1)
        self.tcn = nn.Sequential(
            nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.BatchNorm2d(4)
        )
        self.register_buffer("edges", torch.rand(joints, joints, generator=torch.Generator().manual_seed(3)))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, v, m = x.shape
        x = self.data_bn(x.permute(0, 4, 3, 1, 2).reshape(n * m, v * c, t))
        x = x.view(n * m, v, c, t).permute(0, 2, 3, 1)
        x = self.tcn(torch.einsum("nctv,vw->nctw", self.gcn(x), self.edges))
        return self.head(x.mean((2, 3)).view(n, m, -1).mean(1))


class FrameFolded(nn.Module):
    """(N, T, C, H, W) with frames folded into the rows: clip by clip, or all first frames in front (TSN, TSM)."""

    def __init__(self, frames_first: bool) -> None:
        super().__init__()
        self.frames_first = frames_first
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        if self.frames_first:
            return self.body(x.transpose(0, 1).flatten(0, 1)).mean((2, 3)).view(t, n, -1).mean(0)
        return self.body(_shifted(x).flatten(0, 1)).mean((2, 3)).view(n, t, -1).mean(1)


def _shifted(x: Tensor) -> Tensor:
    """The first channel comes from the next frame."""
    return torch.cat([x[:, :, :1].roll(-1, 1), x[:, :, 1:]], 2)


class GraphNodes(nn.Module):
    """(N, V, C): nodes of all graphs are rows, messages go along the edges of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(3, 5), nn.Linear(5, 2)
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        n, v, _ = x.shape
        x = self.lift(x)
        for norm in self.norms:
            x = edges @ norm(x.reshape(n * v, -1)).relu().view(n, v, -1)
        return self.out(x.sum(1))


class PerStep(nn.Module):
    """Recurrent batch norm: one cell called for every step, with statistics of its own for the first few steps."""

    def __init__(self, steps: int = 3) -> None:
        super().__init__()
        self.inputs, self.hidden = nn.Linear(4, 6), nn.Linear(6, 6)
        self.shared = nn.BatchNorm1d(6)
        self.by_step = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            norm = self.by_step[min(step, len(self.by_step) - 1)]
            h = torch.tanh(
                self.shared(self.inputs(x[:, step])) + norm(self.hidden(h) + x[:, step].sum(1, keepdim=True))
            )
        return h


class Packed(nn.Module):
    """Sequences of one batch, sorted by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.rnn, self.after = nn.BatchNorm1d(4), nn.GRU(4, 6, batch_first=True), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.before(x.transpose(1, 2)).transpose(1, 2)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True)
        states = self.rnn(packed)[0]
        rows = self.after(states.data)  # one row for every element of every sequence
        return pad_packed_sequence(states, batch_first=True)[0].mean(1) + rows.mean()


# --- Which layer a batch goes through ---------------------------------------------------------------------------------


class Ghost(nn.Module):
    """A batch goes through the norm in pieces of two (ghost batch norm, large-batch training, TabNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.bn, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.lift(x).split(2 if self.training else x.shape[0])
        return self.out(torch.cat([self.bn(piece) for piece in pieces]).relu())


class ByDomain(nn.Module):
    """A norm for each domain, chosen by the name that comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bns = nn.ModuleDict({"photo": nn.BatchNorm2d(4), "sketch": nn.BatchNorm2d(4)})
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, domain: str) -> Tensor:
        return self.out(self.bns[domain](self.conv(x)).relu().mean((2, 3)))


class BySample(nn.Module):
    """A norm for each domain; every sample of a batch has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.bns = nn.Linear(6, 5), nn.ModuleList(nn.BatchNorm1d(5) for _ in range(2))

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        x = self.lift(x)
        out = torch.empty_like(x)
        for index, bn in enumerate(self.bns):
            out[domain == index] = bn(x[domain == index])
        return out


class Switchable(nn.Module):
    """Norms for every width; training runs all widths, inference the whole network (slimmable networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for width in (2, 4, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self._at(x, bn) for bn in (self.bns if self.training else self.bns[-1:]))

    def _at(self, x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
        width = bn.num_features
        x = F.conv2d(x, self.conv.weight[:width], self.conv.bias[:width])
        return F.linear(bn(x).relu().mean((2, 3)), self.out.weight[:, :width], self.out.bias)


class AuxiliaryHead(nn.Module):
    """A second head that runs in training only (GoogLeNet, Inception, PSPNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.aux = nn.Sequential(
            nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 16, 4), nn.BatchNorm1d(4)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


class Adversarial(nn.Module):
    """Clean inputs through the main norms, changed ones through the auxiliary norms, in training (AdvProp)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.main_bn, self.aux_bn = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        clean = self._through(x, self.main_bn)
        return torch.cat([clean, self._through(x + 0.3 * x.sign(), self.aux_bn)], 1) if self.training else clean

    def _through(self, x: Tensor, bn: nn.Module) -> Tensor:
        return self.out(bn(self.conv(x)).relu().mean((2, 3)))


class SplitNorm(nn.BatchNorm2d):
    """In training the first half of a batch is normalized by this layer, the second one by another."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.aux_bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        first, second = x.chunk(2)
        return torch.cat([super().forward(first), self.aux_bn(second)])


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.out = nn.Conv2d(3, 4, 3), SplitNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bn(self.conv(x)).relu().mean((2, 3)))


class TwoCalls(nn.Module):
    """A pair through one encoder, one after the other (Siamese networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
        self.bn = nn.BatchNorm1d(5)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.bn(self.encoder(one)) - self.bn(self.encoder(other))


# --- Norms without a layer --------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """Batch norm by arithmetic, momentum as the weight of the old value."""

    def __init__(self, channels: int, eps: float = 1e-4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.eps = eps
        self.gamma, self.beta = (
            nn.Parameter(torch.rand(channels, generator=generator) + 0.5),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("moving_mean", 0.3 * torch.randn(channels, generator=generator))
        self.register_buffer("moving_var", torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.moving_mean.mul_(0.9).add_(0.1 * mean.detach())
            self.moving_var.mul_(0.9).add_(0.1 * var.detach())
        return (x - mean) / torch.sqrt(var + self.eps) * self.gamma + self.beta


class OwnNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.first, self.b, self.second = nn.Linear(6, 5), OwnNorm(5), nn.Linear(5, 4), OwnNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.b(self.first(self.a(x)).relu()))


class FlowNorm(nn.Module):
    """Batch norm of a flow: returns the log-determinant too."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.log_gamma, self.beta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", 0.3 * torch.randn(channels, generator=generator))
        self.register_buffer("running_var", torch.rand(channels, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            self.running_mean.mul_(0.9).add_(mean.detach() * 0.1)
            self.running_var.mul_(0.9).add_(var.detach() * 0.1)
        else:
            mean, var = self.running_mean, self.running_var
        y = (x - mean) / (var + 1e-5).sqrt() * self.log_gamma.exp() + self.beta
        return y, (self.log_gamma - 0.5 * (var + 1e-5).log()).sum().expand(x.shape[0])


class RealNvp(nn.Module):
    """Couplings with norms between them; the output is the latent and the log-likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3))
        self.norms = nn.ModuleList(FlowNorm(4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for net, norm in zip(self.nets, self.norms, strict=True):
            one, two = x.chunk(2, 1)
            scale, shift = net(one).chunk(2, 1)
            x, log_det = norm(torch.cat([two * scale.tanh().exp() + shift, one], 1))
            total = total + scale.tanh().sum(1) + log_det
        return x, total


class Conditional(nn.Module):
    """Plain statistics by ``F.batch_norm`` on own buffers, gain and bias from the class (BigGAN)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.conv, self.gain, self.shift = nn.Conv2d(3, 4, 3), nn.Embedding(3, 4), nn.Embedding(3, 4)
        self.register_buffer("stored_mean", 0.3 * torch.randn(4, generator=generator))
        self.register_buffer("stored_var", torch.rand(4, generator=generator) + 0.5)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.stored_mean, self.stored_var, None, None, self.training, 0.1, 1e-4)
        return self.last((x * (1 + self.gain(label)[..., None, None]) + self.shift(label)[..., None, None]).relu())


class FastWeights(nn.Module):
    """A forward of given weights: norms by ``F.batch_norm``, first with the batch always, then with kept statistics."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = nn.ParameterDict(
            {
                "conv": torch.randn(4, 3, 3, 3, generator=generator) / 5,
                "gamma": torch.rand(4, generator=generator) + 0.5,
                "beta": torch.zeros(4),
                "out": torch.randn(3, 4, generator=generator) / 2,
            }
        )
        self.register_buffer("mean", 0.3 * torch.randn(4, generator=generator))
        self.register_buffer("var", torch.rand(4, generator=generator) + 0.5)

    def forward(self, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        w = weights or dict(self.weights.items())
        x = F.batch_norm(x, None, None, training=True)
        x = F.conv2d(x, w["conv"], padding=1)
        x = F.batch_norm(x, self.mean, self.var, w["gamma"], w["beta"], training=self.training)
        return F.linear(x.relu().mean((2, 3)), w["out"])


class ParameterNorms(nn.Module):
    """Running statistics kept as parameters that need no gradient, in a list (a MAML code base)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(12)
        self.lift = nn.Linear(6, 5)
        self.vars_bn = nn.ParameterList(
            nn.Parameter(torch.rand(5, generator=generator) + offset, requires_grad=False) for offset in (0.0, 0.5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.lift(x), self.vars_bn[0], self.vars_bn[1], training=self.training)


class RowsOfStatistics(nn.Module):
    """One buffer holds the statistics of all domains, a row each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(13)
        self.lift = nn.Linear(6, 5)
        self.register_buffer("means", 0.3 * torch.randn(2, 5, generator=generator))
        self.register_buffer("variances", torch.rand(2, 5, generator=generator) + 0.5)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return F.batch_norm(self.lift(x), self.means[domain], self.variances[domain], training=self.training)


class InnerLoop(nn.Module):
    """An adapted copy of the weights goes through the network by ``functional_call`` (MAML)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        adapted = {name: weight * 0.9 for name, weight in self.net.named_parameters()}
        return functional_call(self.net, {**adapted, **dict(self.net.named_buffers())}, (x,))


class Synced(nn.BatchNorm2d):
    """A synchronized norm as written before torch had one: by arithmetic in several processes, which these are not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


# --- State that moves, samples that meet ------------------------------------------------------------------------------


def _encoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


class MomentumContrast(nn.Module):
    """A momentum encoder on a shuffled batch, and a queue (MoCo); inference takes the query encoder alone."""

    def __init__(self, size: int = 48) -> None:
        super().__init__()
        self.query = unsettled(_encoder(), seed=6)
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer(
            "queue", F.normalize(torch.randn(4, size, generator=torch.Generator().manual_seed(7)), dim=0)
        )
        self.register_buffer("position", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.query(x), dim=1)
        if not self.training:
            return q
        with torch.no_grad():
            for slow, fast in zip(self.key.parameters(), self.query.parameters(), strict=True):
                slow.mul_(0.9).add_(0.1 * fast)
            order = torch.randperm(x.shape[0])
            k = F.normalize(self.key(x[order] * 1.1), dim=1)[order.argsort()]
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1)
        start = int(self.position)
        assert self.queue.shape[1] % x.shape[0] == 0  # as the original asks for
        self.queue[:, start : start + x.shape[0]] = k.T
        self.position[0] = (start + x.shape[0]) % self.queue.shape[1]
        return logits


class Teacher(nn.Module):
    """A teacher that averages the student's weights runs in training, with statistics of its own (mean teacher)."""

    def __init__(self) -> None:
        super().__init__()
        self.student = unsettled(_encoder(), seed=8)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        out = self.student(x)
        if not self.training:
            return out
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.mul_(0.5).add_(0.5 * fast)
            told = self.teacher(x * 0.9)
        return out - told


class Manifold(nn.Module):
    """Hidden states of two samples of the batch are mixed in training (manifold mixup)."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.bn = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        if self.training:
            x = 0.6 * x + 0.4 * x[torch.randperm(len(x))]
        return self.bn(x)


class Cheap(nn.Module):
    """Dense layers whose norms are computed again in the backward pass (memory-efficient DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ReLU(), nn.Conv2d(3 + 2 * i, 2, 3, padding=1)) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(
                checkpoint(lambda *parts, layer=layer: layer(torch.cat(parts, 1)), *features, use_reentrant=False)
            )
        return torch.cat(features, 1).mean((2, 3))


class TNet(nn.Module):
    """Points are aligned by a matrix that a small network computes, with norms over one row per sample (PointNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 9))
        self.body = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        found = self.matrix(self.points(x).amax(2)).view(-1, 3, 3) + torch.eye(3, dtype=x.dtype)
        return self.body(found @ x).amax(2)


# --- The zoo ----------------------------------------------------------------------------------------------------------

Statistics = tuple[Tensor, Tensor]
"""Running mean and variance of a norm, as it gives them to ``F.batch_norm``."""


def _buffers(model: nn.Module) -> dict[str, Statistics]:
    return {
        name: (module.running_mean, module.running_var)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


@dataclass(frozen=True)
class Specimen:
    """A network, its data, and what is to be known of it.

    Attributes:
        make: Makes the network.
        batches: Micro-batches, given their number and size.
        emulated: Whether micro-batches may run together.
        forward: As in a model file.
        statistics: Of the norms that end in ``F.batch_norm``, by the name that a report gives them.
        own: Of the norms by arithmetic: names of the buffers, and eps.
        one_mode: The layers that run in one mode only.
    """

    make: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Any]]
    emulated: bool
    forward: Callable[[nn.Module, Any], Any] | None = None
    statistics: Callable[[nn.Module], dict[str, Statistics]] = _buffers
    own: tuple[str, str, float] | None = None
    one_mode: dict[str, str] = field(default_factory=dict)


def call_with_all(model: nn.Module, batch: Any) -> Any:
    """``forward(model, batch)`` of model files whose batches are the arguments."""
    return model(*batch)


def _flat(count: int, size: int) -> list[Tensor]:
    return images(count, size, 6)


def _pictures(count: int, size: int) -> list[Tensor]:
    return images(count, size, 3, 6, 6)


def _labelled(count: int, size: int, labels: int) -> list[Any]:
    return [(x, torch.arange(len(x)) % labels) for x in _pictures(count, size)]


def _graphs(count: int, size: int) -> list[Any]:
    edges = [each.softmax(-1) for each in images(count, size, 4, 4, seed=9)]
    return list(zip(images(count, size, 4, 3), edges, strict=True))


def _sorted_sequences(count: int, size: int) -> list[Any]:
    return [(x, torch.tensor([7, 6, 4, 2, 1][:size])) for x in images(count, size, 7, 4)]


ZOO: dict[str, Specimen] = {
    "skeleton rows": Specimen(SkeletonGraph, lambda k, n: images(k, n, 2, 4, 3, 2), True),
    "frames of a clip": Specimen(lambda: FrameFolded(False), lambda k, n: images(k, n, 3, 3, 5, 5), True),
    "first frames first": Specimen(lambda: FrameFolded(True), lambda k, n: images(k, n, 3, 3, 5, 5), True),
    "graph nodes": Specimen(GraphNodes, _graphs, True, call_with_all),
    "recurrent": Specimen(PerStep, lambda k, n: images(k, n, 5, 4), True),
    "packed sequences": Specimen(Packed, _sorted_sequences, False, call_with_all),
    "ghost batches": Specimen(Ghost, _flat, False),
    "domain of a batch": Specimen(
        ByDomain,
        lambda k, n: [(x, ("photo", "sketch")[i % 2]) for i, x in enumerate(_pictures(k, n))],
        False,
        call_with_all,
    ),
    "domain of a sample": Specimen(
        BySample, lambda k, n: [(x, torch.arange(n) % 2) for x in _flat(k, n)], False, call_with_all
    ),
    "switchable": Specimen(Switchable, _pictures, True, one_mode={"bns.0": "train", "bns.1": "train"}),
    "auxiliary head": Specimen(AuxiliaryHead, _pictures, True, one_mode={"aux.1": "train", "aux.4": "train"}),
    "adversarial": Specimen(Adversarial, _pictures, True, one_mode={"aux_bn": "train"}),
    "split": Specimen(Split, _pictures, False, one_mode={"bn.aux_bn": "train"}),
    "siamese": Specimen(
        TwoCalls,
        lambda k, n: list(zip(_pictures(k, n), images(k, n, 3, 6, 6, seed=11), strict=True)),
        True,
        call_with_all,
    ),
    "own norms": Specimen(OwnNorms, _flat, True, own=("moving_mean", "moving_var", 1e-4)),
    "flow": Specimen(RealNvp, lambda k, n: images(k, n, 4), True, own=("running_mean", "running_var", 1e-5)),
    "conditional": Specimen(
        Conditional,
        lambda k, n: _labelled(k, n, 3),
        True,
        call_with_all,
        lambda model: {"(root)": (model.stored_mean, model.stored_var), **_buffers(model)},
    ),
    "fast weights": Specimen(FastWeights, _pictures, False, None, lambda model: {"(root)": (model.mean, model.var)}),
    "statistics as parameters": Specimen(
        ParameterNorms, _flat, True, None, lambda model: {"vars_bn": (model.vars_bn[0], model.vars_bn[1])}
    ),
    "rows of statistics": Specimen(
        RowsOfStatistics,
        lambda k, n: [(x, i % 2) for i, x in enumerate(_flat(k, n))],
        False,
        call_with_all,
        lambda model: {f"(root)[{row}]": (model.means[row], model.variances[row]) for row in range(2)},
    ),
    "functional call": Specimen(InnerLoop, _flat, True),
    "synchronized": Specimen(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), Synced(4), nn.Flatten()), _pictures, True),
    "momentum contrast": Specimen(MomentumContrast, _flat, False, one_mode={"key.1": "train"}),
    "mean teacher": Specimen(Teacher, _flat, True, one_mode={"teacher.1": "train"}),
    "checkpointed": Specimen(Cheap, _pictures, True),
    "alignment network": Specimen(TNet, lambda k, n: images(k, n, 3, 12), True),
}


# --- The slow loop ----------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """A norm on one path: a list of micro-batches, each a list of its calls, each of values per channel."""

    r: list[list[np.ndarray]] = field(default_factory=list)
    d: list[list[np.ndarray]] = field(default_factory=list)
    mismatch: list[list[np.ndarray]] = field(default_factory=list)
    values: int = 0

    def add(self, x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> None:
        columns = x.detach().transpose(0, 1).reshape(x.shape[1], -1)
        batch_mean = columns.mean(1)
        batch_std = ((columns - batch_mean[:, None]).square().mean(1) + eps).sqrt()
        std = (variance + eps).sqrt()
        z_train = (columns - batch_mean[:, None]) / batch_std[:, None]
        z_test = (columns - mean[:, None]) / std[:, None]
        self.r[-1].append((batch_std / std).numpy())
        self.d[-1].append(((batch_mean - mean) / std).numpy())
        self.mismatch[-1].append((z_train - z_test).square().mean(1).numpy())
        self.values = self.values or columns.shape[1]


def slow_loop(specimen: Specimen, model: nn.Module, batches: list[Any], path: str) -> dict[str, Figures]:
    """What each norm sees on one path, one micro-batch at a time, each with a new float64 copy of the model."""
    found: dict[str, Figures] = {}
    original = F.batch_norm
    for batch in batches:
        twin = copy.deepcopy(model).double().train(path == "train")
        places = {
            mean.data_ptr(): (name, mean.clone(), variance.clone())
            for name, (mean, variance) in specimen.statistics(twin).items()
        }
        seen: set[str] = set()

        def note(name: str, x: Tensor, mean: Tensor, variance: Tensor, eps: float, seen: set[str] = seen) -> None:
            figures = found.setdefault(name, Figures())
            if name not in seen:
                seen.add(name)
                for rows in (figures.r, figures.d, figures.mismatch):
                    rows.append([])
            figures.add(x, mean, variance, eps)

        def batch_norm(
            x: Tensor,
            running_mean: Any,
            running_var: Any,
            weight: Any = None,
            bias: Any = None,
            training: bool = False,
            momentum: float = 0.1,
            eps: float = 1e-5,
            places: dict[int, Any] = places,
            note: Any = note,
        ) -> Tensor:
            if running_mean is not None and training == (path == "train") and running_mean.data_ptr() in places:
                name, mean, variance = places[running_mean.data_ptr()]
                note(name, x, mean, variance, eps)
            return original(x, running_mean, running_var, weight, bias, training, momentum, eps)

        if specimen.own is not None:
            for name, module in twin.named_modules():
                if specimen.own[0] in module._buffers:
                    mean, variance = (getattr(module, each).clone() for each in specimen.own[:2])
                    module.register_forward_pre_hook(
                        lambda _, x, name=name, mean=mean, variance=variance, note=note: note(
                            name, x[0], mean, variance, specimen.own[2]
                        )
                    )
        with torch.no_grad(), mock.patch.object(F, "batch_norm", batch_norm):
            (specimen.forward or _call)(twin, _double(batch))
    return found


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    return tuple(map(_double, batch)) if isinstance(batch, tuple) else batch
