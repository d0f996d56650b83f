"""What PyTorch's tests of training tools ask: averaging, parametrization, autocast, checkpointing, determinism."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.layers import CHANNELS, Subject
from benchmarks.peers.registry import NotApplicableError, asks
from bnprobe.errors import UsageError

_SWA, _PARAMETRIZE, _AMP, _LAZY, _TRAINING = (
    "torch swa_utils", "torch parametrize", "torch autocast", "torch lazy modules", "torch training",
)  # fmt: skip
_MODES = (True, False)
_LARGE = 4096
"""Samples of a batch that is large enough for tensors of one value per channel not to count."""


def _step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient by the input, gradients of the parameters."""
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    y.float().square().mean().backward()
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]  # none of idle gates
    return [y.detach(), leaf.grad, *(gradient.clone() for gradient in gradients)]


@asks(_SWA)
def update_bn_renews(subject: Subject) -> None:
    """``update_bn`` gives the statistics that it gives BN."""
    batches = [subject.batch(seed=seed) for seed in range(3)]
    layer, plain = subject.net(), subject.net()
    plain[1] = subject.plain()
    before = copy.deepcopy(dict(layer[1].named_buffers()))
    update_bn(batches, layer)
    update_bn(batches, plain)
    if subject.family == "frozen":
        assert_close(dict(layer[1].named_buffers()), before)
        raise NotApplicableError("by design the statistics do not move")
    if subject.settings.get("running") == "std" or subject.has_ghosts:
        raise NotApplicableError("by design other averages than BN's")
    assert layer[1].momentum == subject.new().momentum
    for name in ("running_mean", "running_var"):
        assert_close(getattr(layer[1], name), getattr(plain[1], name), rtol=1e-4, atol=1e-5)


@asks(_SWA)
def averaged_models(subject: Subject) -> None:
    """``AveragedModel`` averages parameters and, on request, buffers."""
    for settings in ({}, {"use_buffers": True}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True}):
        net = subject.net()
        average = AveragedModel(net, **settings)
        for seed in range(2):
            _step(net, subject.batch(seed=seed))
            average.update_parameters(net)
        assert torch.isfinite(average.eval()(subject.batch())).all()
        other = AveragedModel(subject.net(), **settings)
        other.load_state_dict(average.state_dict())
        assert_close(other.eval()(subject.batch()), average(subject.batch()))


@asks(_PARAMETRIZE)
def parametrized(subject: Subject) -> None:
    """A parametrized or pruned weight normalizes as its value does, and trains."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    for training in _MODES:
        layer, twin = subject.layer(training), subject.layer(training)
        with torch.no_grad():
            twin.weight.mul_(2)
        parametrize.register_parametrization(layer, "weight", Doubled())
        assert_close(layer(subject.batch()), twin(subject.batch()))
        layer(subject.batch()).square().sum().backward()
        assert layer.parametrizations.weight.original.grad is not None
        copy.deepcopy(layer)(subject.batch())
        parametrize.remove_parametrizations(layer, "weight")
        layer = subject.layer(training)
        prune.l1_unstructured(layer, "weight", 2)
        assert (layer(subject.batch()).flatten(2).std(dim=(0, 2)) == 0).sum() == 2
        prune.remove(layer, "weight")


@asks(_PARAMETRIZE)
def neighbours_parametrized(subject: Subject) -> None:
    """Weight normalization of the convolution before leaves the layer working."""
    net = subject.net()
    parametrizations.weight_norm(net[0])
    _step(net, subject.batch())


@asks(_AMP)
def autocast(subject: Subject) -> None:
    """Under autocast the output has the dtype that BN gives, in both modes, with float32 gradients."""
    for dtype in (torch.bfloat16, torch.float16):
        for training in _MODES:
            net, plain = subject.net(training), subject.net(training)
            plain[1] = subject.plain().train(training)
            with torch.autocast("cpu", dtype):
                found, expected = net[1](net[0](subject.batch())), plain[1](plain[0](subject.batch()))
                alone, beside = net[1](subject.batch()), plain[1](subject.batch())
            assert (found.dtype, alone.dtype) == (expected.dtype, beside.dtype)
            found.float().square().sum().backward()
            assert {parameter.grad.dtype for parameter in net.parameters() if parameter.grad is not None} == {
                torch.float32
            }
            assert torch.isfinite(net[0].weight.grad).all()


@asks(_AMP)
def autocast_values(subject: Subject) -> None:
    """Under autocast values and statistics stay near those in float32."""
    net, twin = subject.net(), subject.net()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(subject.batch(16))
    assert_close(found.float(), twin(subject.batch(16)), rtol=0.05, atol=0.08)
    assert_close(dict(net.named_buffers()), dict(twin.named_buffers()), rtol=0.02, atol=0.02)


@asks(_AMP)
def half_precision_model(subject: Subject) -> None:
    """A model cast to bfloat16, buffers included, trains without NaN and keeps its dtype."""
    net = subject.net().bfloat16()
    for seed in range(3):
        _step(net, subject.batch(seed=seed).bfloat16())
    assert {value.dtype for value in net.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())


@asks(_LAZY)
def lazy_state(subject: Subject) -> None:
    """A lazy layer is cast, saved and loaded before it knows its channels."""
    if not subject.is_lazy:
        raise NotApplicableError("the layer is not lazy")
    made = subject.kind()
    known, file = subject.layer(), io.BytesIO()
    for lazy in (subject.kind().double().float(), subject.kind()):
        lazy(subject.batch())
        assert type(lazy) is lazy.cls_to_become if hasattr(lazy, "cls_to_become") else True
        assert not hasattr(lazy, "_infer_parameters")
    torch.save(made.state_dict(), file)
    file.seek(0)
    subject.kind().load_state_dict(torch.load(file, weights_only=False))
    made.load_state_dict(known.state_dict())
    assert_close(made.eval()(subject.batch()), known.eval()(subject.batch()))
    assert "num_features" not in repr(subject.kind())


@asks(_LAZY)
def lazy_first_call_counts(subject: Subject) -> None:
    """The first input of a lazy layer is normalized as by one that knows its channels, and moves the statistics."""
    if not subject.is_lazy:
        raise NotApplicableError("the layer is not lazy")
    for dtype in (torch.float32, torch.float64):
        lazy = subject.kind(dtype=dtype)
        known = lazy.cls_to_become(CHANNELS, dtype=dtype)
        assert_close(lazy(subject.batch(dtype=dtype)), known(subject.batch(dtype=dtype)))
        assert_close(dict(lazy.state_dict()), dict(known.state_dict()))
        assert type(lazy) is type(known)


@asks(_LAZY)
def lazy_under_compile(subject: Subject) -> None:
    """A lazy layer can be compiled before its first input."""
    if not subject.is_lazy:
        raise NotApplicableError("the layer is not lazy")
    lazy = subject.kind()
    known = lazy.cls_to_become(CHANNELS)
    compiled = torch.compile(lazy, backend="eager")
    for seed in range(2):
        assert_close(compiled(subject.batch(seed=seed)), known(subject.batch(seed=seed)), rtol=1e-4, atol=1e-4)


@asks(_TRAINING)
def channels_last_training(subject: Subject) -> None:
    """A step in channels_last gives the gradients of the usual format."""
    if subject.dimensions == 1:
        raise NotApplicableError("three dimensions have no such format")
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[subject.dimensions]
    for training in _MODES:
        one, other = subject.net(training).to(memory_format=form), subject.net(training)
        found, expected = _step(one, subject.batch().to(memory_format=form)), _step(other, subject.batch())
        assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert found[0].is_contiguous(memory_format=form)


@asks(_TRAINING)
def activation_checkpointing(subject: Subject) -> None:
    """Checkpointing, reentrant and not, gives the gradients of a step without it."""
    if subject.family == "gated":
        raise NotApplicableError("the recomputation sees the running statistics after their update, as documented")
    for reentrant in (True, False):
        net, twin = subject.net(), subject.net()
        for layer in (net[1], twin[1]):  # r and d of a second pass refer to the statistics that the first has moved
            layer.track_running_stats = False
        one, other = (subject.batch().requires_grad_() for _ in range(2))
        checkpoint(net, one, use_reentrant=reentrant).square().mean().backward()
        twin(other).square().mean().backward()
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@asks(_TRAINING)
def deterministic(subject: Subject) -> None:
    """Deterministic mode takes the layer, and two runs are bit-identical."""
    torch.use_deterministic_algorithms(True)
    results = [_step(subject.net(), subject.batch()) for _ in range(2)]
    assert_close(*results, rtol=0, atol=0)


@asks(_TRAINING)
def anomaly_mode(subject: Subject) -> None:
    """Anomaly mode finds nothing."""
    with torch.autograd.detect_anomaly(check_nan=True):
        _step(subject.net(), subject.batch())


@asks(_TRAINING)
def inference_mode(subject: Subject) -> None:
    """Inference mode and no_grad run in both modes; afterwards training goes on."""
    for training in _MODES:
        net = subject.net(training)
        with torch.inference_mode():
            net(subject.batch())
        with torch.no_grad():
            net(subject.batch())
        _step(net, subject.batch())


@asks(_TRAINING)
def frozen_parameters(subject: Subject) -> None:
    """Without gradients for weight, bias or input the others are the same."""
    full = subject.net()
    expected = _step(full, subject.batch())
    for names in (("weight",), ("bias",), ("weight", "bias")):
        net = subject.net()
        for name in names:
            getattr(net[1], name).requires_grad_(False)
        leaf = subject.batch().requires_grad_()
        net(leaf).float().square().mean().backward()
        assert_close(leaf.grad, expected[1], rtol=1e-4, atol=1e-5)
        for (name, one), (_, other) in zip(net[1].named_parameters(), full[1].named_parameters(), strict=True):
            assert (one.grad is None) if name in names else torch.allclose(one.grad, other.grad, atol=1e-5)


@asks(_TRAINING)
def two_passes_before_one_backward(subject: Subject) -> None:
    """Two passes through one layer, as in siamese networks, then one backward pass over both."""
    net = subject.net()
    (net(subject.batch()) + net(subject.batch(seed=2))).square().mean().backward()
    assert torch.isfinite(net[0].weight.grad).all()


@asks(_TRAINING)
def graph_kept(subject: Subject) -> None:
    """A second backward pass over a kept graph gives the same gradient."""
    net, leaf = subject.net(), subject.batch().requires_grad_()
    loss = net(leaf).square().mean()
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
    assert_close(*gradients, rtol=0, atol=0)


@asks(_TRAINING)
def gradient_penalty(subject: Subject) -> None:
    """A penalty on the gradient's norm, as in WGAN-GP, reaches the parameters."""
    for training in subject.modes:
        net, leaf = subject.net(training), subject.batch().requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf).sigmoid().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters() if parameter.grad is not None)
        assert net[1].weight.grad is not None


@asks(_TRAINING)
def hooks(subject: Subject) -> None:
    """Forward, backward and full backward hooks fire once with tensors of the right shape."""
    net, seen = subject.net(), []
    net[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    net[1].register_forward_hook(lambda _, __, output: seen.append(output.shape))
    net[1].register_full_backward_hook(lambda _, into, outof: seen.extend([into[0].shape, outof[0].shape]))
    _step(net, subject.batch())
    assert seen == [subject.batch().shape] * 4, seen


@asks(_TRAINING)
def data_parallel(subject: Subject) -> None:
    """``DataParallel`` runs the layer, on a machine without CUDA as the module itself."""
    net, twin = subject.net(), subject.net()
    if torch.cuda.is_available():
        net = net.cuda()
    assert_close(nn.DataParallel(net)(subject.batch()).cpu(), twin(subject.batch()), rtol=1e-4, atol=1e-4)


@asks(_TRAINING)
def converted_to_sync_bn(subject: Subject) -> None:
    """``convert_sync_batchnorm`` converts BN, and refuses layers that it would undo."""
    try:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(subject.net())
    except UsageError:
        if subject.family == "bn":
            raise
        return
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert subject.family == "bn", "the layer has become plain BN without a word"


@asks(_TRAINING)
def saved_tensors(subject: Subject) -> None:
    """A step keeps no more tensors of the input's size for the backward pass than BN does."""
    sizes = []
    for layer in (subject.layer(), subject.plain()):
        x = subject.batch(_LARGE // 4).requires_grad_() * 1.0
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: Any = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x)
        sizes.append(sum(kept.values()) / (x.numel() * x.element_size()))
        y.sum().backward()
    assert sizes[0] < sizes[1] + 0.2, f"{sizes[0]:.1f} times the input, BN {sizes[1]:.1f}"


@asks(_TRAINING)
def saved_tensors_in_half_precision(subject: Subject) -> None:
    """The same for a bfloat16 input."""
    sizes = []
    for layer in (subject.layer(), subject.plain()):
        x = subject.batch(_LARGE // 4).bfloat16().requires_grad_() * 1.0
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: Any = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(x)
        sizes.append(sum(kept.values()) / (x.numel() * x.element_size()))
        y.sum().backward()
    assert sizes[0] < sizes[1] + 0.2, f"{sizes[0]:.1f} times the input, BN {sizes[1]:.1f}"
