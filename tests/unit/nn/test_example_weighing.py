from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn.example_weighing import (
    ExampleWeighedBatchNorm,
    ExampleWeighedBatchNorm1d,
    ExampleWeighedBatchNorm2d,
    ExampleWeighedBatchNorm3d,
)
from support.networks import unsettled

SHAPES = [
    (ExampleWeighedBatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (ExampleWeighedBatchNorm2d, nn.BatchNorm2d, (1, 3, 5, 6)),
    (ExampleWeighedBatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 6)),
    (ExampleWeighedBatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 2)),
]


def definition(layer: ExampleWeighedBatchNorm, x: Tensor) -> Tensor:
    """The paper's formula, sample by sample: both moments are mixed, and the variance is their difference."""
    mean, square = layer.running_mean, layer.running_var + layer.running_mean**2
    samples = []
    for sample in x:
        columns = sample.flatten(1)
        own_mean, own_square = columns.mean(1), (columns**2).mean(1)
        mixed = layer.blend * own_mean + (1 - layer.blend) * mean
        variance = layer.blend * own_square + (1 - layer.blend) * square - mixed**2
        z = (columns - mixed[:, None]) / (variance[:, None] + layer.eps).sqrt()
        if layer.weight is not None:
            z = layer.weight[:, None] * z + layer.bias[:, None]
        samples.append(z.reshape(sample.shape))
    return torch.stack(samples)


@pytest.mark.parametrize(("kind", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_inference_and_its_gradients_are_those_of_the_definition(
    kind: type[ExampleWeighedBatchNorm], plain: type[nn.Module], shape: tuple[int, ...], affine: bool, blend: float
) -> None:
    layer = unsettled(kind(3, affine=affine, blend=blend, dtype=torch.float64)).eval()
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    expected, out = definition(layer, x), layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    pairs = (torch.autograd.grad(each, leaves, upstream) for each in (out, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    """E[x^2] - E[x]^2 would lose all digits of the variance here."""
    layer = unsettled(ExampleWeighedBatchNorm2d(3, blend=0.3)).eval()
    layer.running_mean += 1e4
    x = 1e4 + torch.randn(4, 3, 8, 8)
    exact = definition(copy.deepcopy(layer).double(), x.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("kind", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_is_that_of_bn(
    kind: type[ExampleWeighedBatchNorm], plain: type[nn.Module], shape: tuple[int, ...], momentum: float | None
) -> None:
    layer, bn = kind(3, momentum=momentum), plain(3, momentum=momentum)
    for _ in range(3):
        x = 5 + torch.randn(shape)
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = layer(own), bn(other)
        torch.testing.assert_close(out, expected)
        gradients = [torch.autograd.grad((each**3).sum(), leaf) for each, leaf in ((out, own), (expected, other))]
        torch.testing.assert_close(*gradients)
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_one_value_per_channel_is_refused_in_training_in_the_words_of_torch() -> None:
    for layer in (ExampleWeighedBatchNorm1d(3), nn.BatchNorm1d(3)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size"):
            layer(torch.randn(1, 3))


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (2, 3, 1)])
def test_one_position_per_sample_is_normalized_by_the_running_statistics_alone(shape: tuple[int, ...]) -> None:
    layer = unsettled(ExampleWeighedBatchNorm1d(3)).eval()
    x = torch.randn(shape)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_blend_goes_from_bn_at_inference_to_instance_norm() -> None:
    x = 2 + torch.randn(4, 3, 5, 5)
    layer = unsettled(ExampleWeighedBatchNorm2d(3, blend=1.0)).eval()
    torch.testing.assert_close(layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias))
    layer.blend = 0
    bn = nn.BatchNorm2d(3).eval()
    bn.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), bn(x))
    assert layer.deployment_obstacle is None


def test_a_sample_does_not_depend_on_the_others_of_its_batch() -> None:
    x = torch.randn(4, 3, 5, 5)
    layer = unsettled(ExampleWeighedBatchNorm2d(3)).eval()
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
def test_a_blend_out_of_range_is_refused(blend: float) -> None:
    layer = ExampleWeighedBatchNorm2d(3)
    with pytest.raises(UsageError, match="blend is"):
        layer.blend = blend
    assert layer.blend == 0.5
    assert "blend=0.5" in repr(layer)
    with pytest.raises(UsageError, match="blend is"):
        ExampleWeighedBatchNorm2d(3, blend=blend)


def test_memory_format_and_dtype_are_those_of_the_input() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    layer = unsettled(ExampleWeighedBatchNorm2d(3)).eval()
    out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x.contiguous()), rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = layer(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), layer(x.to(dtype).float()), rtol=2e-2, atol=2e-2)


def test_constant_samples_and_empty_batches() -> None:
    layer = ExampleWeighedBatchNorm2d(3).eval()
    x = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_copies_and_pickles_and_compiles() -> None:
    layer = unsettled(ExampleWeighedBatchNorm2d(3, blend=0.25)).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = layer(x)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    for twin in (compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_masked_values_do_not_count(blend: float) -> None:
    """At inference every sample gives what it gives without its padding; in training the batch does."""
    layer = unsettled(ExampleWeighedBatchNorm1d(3, blend=blend, dtype=torch.float64))
    twin = copy.deepcopy(layer)
    lengths = [5, 2, 1, 0]
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = torch.where(mask[:, None], x, float("nan"))
    out = layer.eval()(padded, mask=mask)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(out[i : i + 1, :, :length], twin.eval()(x[i : i + 1, :, :length]))
    assert (out * ~mask[:, None] == 0).all()
    values = x.transpose(0, 1)[:, mask].T
    trained, expected = layer.train()(padded, mask=mask), twin.train()(values)
    torch.testing.assert_close(trained.transpose(0, 1)[:, mask].T, expected)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_a_mask_that_leaves_one_value_leaves_it_to_the_running_statistics() -> None:
    layer = unsettled(ExampleWeighedBatchNorm1d(3))
    x, mask = torch.randn(2, 3, 4), torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = True
    settings = (layer.running_mean.clone(), layer.running_var.clone(), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, mask=mask)[:1, :, :1], F.batch_norm(x, *settings)[:1, :, :1])


def test_its_keys_are_those_of_bn() -> None:
    assert list(ExampleWeighedBatchNorm2d(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ExampleWeighedBatchNorm1d, (2, 3, 4, 4)),
        (ExampleWeighedBatchNorm2d, (2, 3)),
        (ExampleWeighedBatchNorm3d, (2, 3, 4, 4)),
        (ExampleWeighedBatchNorm, (3,)),
    ],
)
def test_refuses_inputs_of_other_dimensions(layer: type[ExampleWeighedBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives() -> None:
    layer = unsettled(ExampleWeighedBatchNorm2d(3)).eval()
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(copy.deepcopy(layer).cuda()(x.cuda()).cpu(), layer(x), rtol=1e-5, atol=1e-5)
