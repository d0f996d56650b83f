from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn import domain
from bnprobe.nn.per_domain import DomainBatchNorm, DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d
from support.networks import unsettled

SHAPES = [
    (DomainBatchNorm1d, (8, 3)),
    (DomainBatchNorm1d, (8, 3, 5)),
    (DomainBatchNorm2d, (8, 3, 4, 5)),
    (DomainBatchNorm3d, (8, 3, 3, 2, 2)),
]
MIXED = torch.tensor([1, 0, 3, 1, 1, 0, 3, 1])


def made(kind: type[DomainBatchNorm], **options: object) -> DomainBatchNorm:
    """A layer of four domains, each with statistics of its own."""
    layer = unsettled(kind(3, dtype=torch.float64, domains=4, **options))
    layer.domain_mean.normal_()
    layer.domain_var.uniform_(0.5, 2)
    return layer.train()


def definition(layer: DomainBatchNorm, x: Tensor, domains: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample by sample: the output, and the running statistics of the domains after it."""
    shape = (-1, *[1] * (x.dim() - 2))
    out = [torch.empty(0)] * len(x)
    means, variances = layer.domain_mean.clone(), layer.domain_var.clone()
    for k in range(layer.domains):
        chosen = [i for i in range(len(x)) if int(domains[i]) == k]
        if not chosen:
            continue
        values = torch.cat([x[i].reshape(3, -1) for i in chosen], dim=1)
        n = values.shape[1]
        mean = values.sum(1) / n
        variance = ((values - mean[:, None]) ** 2).sum(1) / n
        m, v = (mean, variance) if n > 1 else (layer.domain_mean[k].clone(), layer.domain_var[k].clone())
        for i in chosen:
            z = (x[i] - m.view(shape)) / (v.view(shape) + layer.eps) ** 0.5
            out[i] = z if layer.weight is None else layer.weight.view(shape) * z + layer.bias.view(shape)
        means[k] += layer.momentum * (mean.detach() - means[k])
        if n > 1:
            variances[k] += layer.momentum * (variance.detach() * n / (n - 1) - variances[k])
    return torch.stack(out), means, variances


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("domains", [MIXED, torch.full((8,), 2), 2], ids=["mixed", "of one", "one"])
@pytest.mark.parametrize("affine", [True, False])
def test_output_gradients_and_statistics_are_those_of_the_definition(
    kind: type[DomainBatchNorm], shape: tuple[int, ...], domains: Tensor | int, affine: bool
) -> None:
    layer = made(kind, momentum=0.3, affine=affine)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    named = torch.full((8,), domains) if isinstance(domains, int) else domains
    expected, means, variances = definition(layer, x, named)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(expected, leaves, upstream)
    with domain(domains):
        out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.domain_mean, means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.domain_var, variances, rtol=1e-12, atol=1e-12)
    assert layer.domain_batches.tolist() == [int(k in named) for k in range(4)]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("mixed", [True, False])
def test_each_domain_is_a_bn_of_its_own(momentum: float | None, mixed: bool) -> None:
    layer = DomainBatchNorm2d(3, momentum=momentum, domains=2)
    own = [nn.BatchNorm2d(3, momentum=momentum) for _ in range(2)]
    for _ in range(3):
        parts = [k + torch.randn(4, 3, 5, 5) for k in range(2)]
        expected = [bn(part) for bn, part in zip(own, parts, strict=True)]
        if mixed:
            with domain(torch.arange(2).repeat_interleave(4)):
                found = layer(torch.cat(parts)).split(4)
        else:
            found = []
            for k, part in enumerate(parts):
                with domain(k):
                    found.append(layer(part))
        torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)
    for k, bn in enumerate(own):
        torch.testing.assert_close(layer.domain_mean[k], bn.running_mean)
        torch.testing.assert_close(layer.domain_var[k], bn.running_var)
        x = torch.randn(2, 3, 5, 5)
        expected = bn.eval()(x)
        for given in (k, torch.full((2,), k)):
            with domain(given):
                torch.testing.assert_close(layer.eval()(x), expected)
        layer.train()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_common_statistics_move_as_in_bn(momentum: float | None) -> None:
    layer, bn = DomainBatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for given in (0, 1, torch.tensor([0, 1, 1, 0])):
        x = 1 + torch.randn(4, 3, 5, 5)
        with domain(given):
            layer(x), bn(x)
    torch.testing.assert_close(layer.running_mean, bn.running_mean)
    torch.testing.assert_close(layer.running_var, bn.running_var)
    assert layer.num_batches_tracked == bn.num_batches_tracked == 3


def test_one_value_of_a_domain_is_normalized_by_its_running_statistics() -> None:
    layer = made(DomainBatchNorm1d)
    before = layer.domain_mean[2].clone(), layer.domain_var[2].clone()
    x = torch.randn(4, 3, dtype=torch.float64)
    with domain(torch.tensor([0, 2, 0, 0])):
        out = layer(x)
    torch.testing.assert_close(out[1:2], F.batch_norm(x[1:2], *before, layer.weight, layer.bias))
    assert torch.equal(layer.domain_var[2], before[1])
    torch.testing.assert_close(layer.domain_mean[2], 0.9 * before[0] + 0.1 * x[1])


@pytest.mark.parametrize("given", [2, torch.tensor([2, 2, 0, 1, 2, 0])], ids=["one", "mixed"])
def test_padding_does_not_count(given: Tensor | int) -> None:
    layer = made(DomainBatchNorm1d)
    twin = copy.deepcopy(layer)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    padded = torch.cat([x, torch.full_like(x, torch.nan)], dim=2).requires_grad_()
    with domain(given):
        output = layer(padded, mask=(torch.arange(10) < 5).expand(6, 10))[..., :5]
        torch.testing.assert_close(output, twin(x))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))
    output.square().sum().backward()
    assert torch.isfinite(padded.grad).all()


def test_without_a_domain_the_layer_says_what_to_do() -> None:
    layer, x = DomainBatchNorm2d(3), torch.randn(4, 3, 5, 5)
    for training in (True, False):
        with pytest.raises(UsageError, match=r"nothing says which one.*with bnprobe\.nn\.domain\(index\)"):
            layer.train(training)(x)
    layer.default_domain = 1
    own, twin = layer(x), copy.deepcopy(layer)
    with domain(1):
        torch.testing.assert_close(twin(x), own)


def test_wrong_domains_are_refused() -> None:
    layer, x = DomainBatchNorm2d(3, domains=2), torch.randn(4, 3, 5, 5)
    for given in (2, torch.tensor([0, 2, 0, 0])):
        with domain(given), pytest.raises(UsageError, match="has 2 domains, counted from 0, but was asked for 2"):
            layer(x)
    with domain(torch.tensor([0, 1])), pytest.raises(ValueError, match="a domain for each of 4 samples, but got 2"):
        layer(x)
    for wrong in (-1, torch.tensor([0, -1])):
        with pytest.raises(UsageError, match="counted from 0, but got -1"), domain(wrong):
            pass
    for odd in (torch.ones(4), torch.ones(4, 1).long(), torch.ones(4).bool()):
        with pytest.raises(UsageError, match=r"a tensor of whole numbers of shape \(samples,\)"), domain(odd):
            pass
    with pytest.raises(UsageError, match="domains is 0"):
        DomainBatchNorm2d(3, domains=0)
    with pytest.raises(UsageError, match="asked for 5"):
        layer.statistics_of(5)


def test_blocks_nest_and_end_also_with_an_error() -> None:
    layer, x = made(DomainBatchNorm2d).eval(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with domain(1):
        outer = layer(x)
        with domain(0):
            assert not torch.equal(layer(x), outer)
        with pytest.raises(ZeroDivisionError), domain(0):
            1 / 0  # noqa: B018
        assert torch.equal(layer(x), outer)
        found: list[BaseException] = []

        def elsewhere() -> None:
            try:
                layer(x)
            except UsageError as error:
                found.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert len(found) == 1  # a domain belongs to its thread
    with pytest.raises(UsageError):
        layer(x)


def test_a_compiled_layer_follows_the_domain() -> None:
    layer = made(DomainBatchNorm2d).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64)
    for given in (0, 3, MIXED, 1, 1 - (MIXED > 0).long()):
        with domain(given):
            torch.testing.assert_close(compiled(x), layer(x))


def test_fresh_statistics_copies_and_pickles() -> None:
    layer = made(DomainBatchNorm2d)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).domain_mean, layer.domain_mean)
    layer.share()
    assert torch.equal(layer.domain_var[3], layer.running_var)
    layer.reset_running_stats()
    assert torch.equal(layer.domain_var, torch.ones(4, 3, dtype=torch.float64))
    assert "domains=4" in repr(layer)


def test_an_empty_batch_is_counted_and_changes_nothing_else() -> None:
    for given in (1, torch.empty(0, dtype=torch.long)):
        layer = DomainBatchNorm2d(3)
        with domain(given):
            assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
        assert layer.num_batches_tracked == 1  # as in BN
        assert torch.equal(layer.domain_mean, torch.zeros(2, 3))


def test_half_precision_and_large_means_keep_their_digits() -> None:
    x = 1e3 + torch.randn(8, 3, 6, 6, dtype=torch.float64)
    layer = DomainBatchNorm2d(3, dtype=torch.float64)
    narrow = copy.deepcopy(layer).float()
    for given in (0, MIXED.clamp(max=1)):
        with domain(given):
            torch.testing.assert_close(narrow(x.float()).double(), layer(x.float().double()), rtol=0, atol=1e-3)
            assert narrow(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(DomainBatchNorm1d, (2, 3, 4, 4)), (DomainBatchNorm2d, (2, 3)), (DomainBatchNorm, (3,))],
)
def test_refuses_inputs_of_other_dimensions(layer: type[DomainBatchNorm], shape: tuple[int, ...]) -> None:
    with domain(0), pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))
