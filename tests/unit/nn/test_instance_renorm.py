from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn.instance_renorm import InstanceRenorm, InstanceRenorm1d, InstanceRenorm2d, InstanceRenorm3d
from support.networks import unsettled

SHAPES = [
    (InstanceRenorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (InstanceRenorm2d, nn.BatchNorm2d, (1, 3, 5, 6)),
    (InstanceRenorm2d, nn.BatchNorm2d, (4, 3, 5, 6)),
    (InstanceRenorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 2)),
]


def definition(layer: InstanceRenorm, x: Tensor, constants: bool) -> Tensor:
    """The docstring's formula, image by image; r and d are constants for the gradient where asked for."""
    mean, deviation = layer.running_mean.clone(), (layer.running_var.clone() + layer.eps).sqrt()
    images = []
    for image in x:
        columns = image.flatten(1)
        own_mean = columns.mean(1, keepdim=True)
        own_deviation = (((columns - own_mean) ** 2).mean(1, keepdim=True) + layer.eps).sqrt()
        z = (columns - own_mean) / own_deviation
        r, d = own_deviation / deviation[:, None], (own_mean - mean[:, None]) / deviation[:, None]
        if constants:
            r, d = r.detach(), d.detach()
        z = layer.blend * z + (1 - layer.blend) * (r * z + d)
        if layer.weight is not None:
            z = layer.weight[:, None] * z + layer.bias[:, None]
        images.append(z.reshape(image.shape))
    return torch.stack(images)


@pytest.mark.parametrize(("kind", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_those_of_the_definition(
    kind: type[InstanceRenorm],
    plain: type[nn.Module],
    shape: tuple[int, ...],
    affine: bool,
    blend: float,
    training: bool,
) -> None:
    layer = unsettled(kind(3, affine=affine, blend=blend, dtype=torch.float64)).train(training)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    expected = definition(layer, x, constants=training)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    out = layer(x)
    found = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("kind", "shape"), [(InstanceRenorm2d, (4, 3, 5, 5)), (InstanceRenorm1d, (4, 3))])
def test_training_is_inference_with_the_statistics_before_the_update(
    kind: type[InstanceRenorm], shape: tuple[int, ...], blend: float
) -> None:
    layer = unsettled(kind(3, blend=blend))
    x = torch.randn(shape)
    inference = layer.eval()(x)
    before = layer.running_mean.clone()
    assert torch.equal(layer.train()(x), inference)
    assert not torch.equal(layer.running_mean, before)


def test_blend_goes_from_instance_norm_to_bn_at_inference() -> None:
    x = 2 + torch.randn(4, 3, 5, 5)
    layer = unsettled(InstanceRenorm2d(3, blend=1.0)).eval()
    torch.testing.assert_close(layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias))
    layer.blend = 0
    bn = nn.BatchNorm2d(3).eval()
    bn.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(layer(x), bn(x), rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    x = torch.randn(4, 3, 5, 5)
    layer = unsettled(InstanceRenorm2d(3))
    alone = copy.deepcopy(layer)
    torch.testing.assert_close(layer(x)[:1], alone(x[:1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "plain", "shape"), [*SHAPES, (InstanceRenorm1d, nn.BatchNorm1d, (4, 3))])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_in_bn(
    kind: type[InstanceRenorm], plain: type[nn.Module], shape: tuple[int, ...], momentum: float | None
) -> None:
    layer, bn = kind(3, momentum=momentum), plain(3, momentum=momentum)
    for _ in range(3):
        x = 5 + torch.randn(shape) + 3 * torch.randn(shape[0], *[1] * (len(shape) - 1))
        layer(x), bn(x)
    torch.testing.assert_close(layer.running_mean, bn.running_mean)
    torch.testing.assert_close(layer.running_var, bn.running_var)
    assert layer.num_batches_tracked == bn.num_batches_tracked == 3


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (2, 3, 1)])
def test_one_position_per_image_is_normalized_by_the_running_statistics(shape: tuple[int, ...]) -> None:
    layer = unsettled(InstanceRenorm1d(3, dtype=torch.float64))
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), F.batch_norm(x, mean, variance, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (out, expected)]
    torch.testing.assert_close(*gradients)
    assert torch.isfinite(layer.running_var).all()


def test_training_passes_no_gradient_to_the_mean_of_an_image() -> None:
    layer = unsettled(InstanceRenorm2d(3, blend=0.0, dtype=torch.float64))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    (layer(x) ** 3).sum().backward()
    torch.testing.assert_close(x.grad.sum((2, 3)), torch.zeros(4, 3, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_constant_images_have_finite_gradients(training: bool) -> None:
    layer = InstanceRenorm2d(3).train(training)
    x = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
def test_a_blend_out_of_range_is_refused(blend: float) -> None:
    layer = InstanceRenorm2d(3)
    with pytest.raises(UsageError, match="blend is"):
        layer.blend = blend
    assert layer.blend == 0.5
    assert "blend=0.5" in repr(layer)
    with pytest.raises(UsageError, match="blend is"):
        InstanceRenorm2d(3, blend=blend)


def test_its_keys_are_those_of_bn() -> None:
    assert list(InstanceRenorm2d(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())


def test_memory_format_and_dtype_are_those_of_the_input() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    layer = InstanceRenorm2d(3).eval()
    out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x.contiguous()), rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = layer(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), layer(x.to(dtype).float()), rtol=2e-2, atol=2e-2)


def test_autocast_keeps_statistics_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), InstanceRenorm2d(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(100 + torch.randn(4, 3, 5, 5))
    assert out.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32
    out.float().square().sum().backward()
    assert torch.isfinite(model[1].weight.grad).all()


def test_an_empty_batch_is_counted_and_changes_nothing_else() -> None:
    layer = InstanceRenorm2d(3)
    assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert layer.num_batches_tracked == 1  # as in BN


def test_twice_per_forward_back_propagates() -> None:
    layer = InstanceRenorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_compiles_copies_and_pickles() -> None:
    layer = unsettled(InstanceRenorm2d(3, blend=0.25))
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    twins = [compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (InstanceRenorm1d, (2, 3, 4, 4)),
        (InstanceRenorm2d, (2, 3)),
        (InstanceRenorm3d, (2, 3, 4, 4)),
        (InstanceRenorm, (3,)),
    ],
)
def test_refuses_inputs_of_other_dimensions(layer: type[InstanceRenorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 1, 1)])
def test_cuda_gives_what_the_cpu_gives(shape: tuple[int, ...]) -> None:
    layer = unsettled(InstanceRenorm2d(3))
    twin = copy.deepcopy(layer).cuda()
    x = torch.randn(shape)
    own, other = x.clone().requires_grad_(), x.cuda().requires_grad_()
    out, on_device = layer(own), twin(other)
    out.square().sum().backward()
    on_device.square().sum().backward()
    torch.testing.assert_close(on_device.cpu(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.running_var.cpu(), layer.running_var)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own, when the backend is imported
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5)])
def test_a_compiler_that_recomputes_sees_the_statistics_before_the_update(shape: tuple[int, ...]) -> None:
    torch.compiler.reset()
    layer = unsettled(InstanceRenorm1d(3))
    twin, x = copy.deepcopy(layer), torch.randn(shape)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    compiled(one).sin().sum().backward()
    twin(other).sin().sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert torch.allclose(layer.weight.grad, twin.weight.grad, atol=1e-5)
