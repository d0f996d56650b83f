"""What PyTorch's ``test_modules.py`` and ``test_nn.py`` ask of ``nn.BatchNorm``, with the inputs that they give it."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import types
import unittest
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from benchmarks.peers.layers import CHANNELS, Subject
from benchmarks.peers.registry import NotApplicableError, asks

_MODULES, _NN = "torch test_modules", "torch test_nn"
_POSITIONAL = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_HALVES = (torch.bfloat16, torch.float16)


@cache
def _module_info(kind: type[nn.Module]) -> Any:
    """PyTorch's own record of how a module is tested."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:  # PyTorch's test utilities only derive a class from it
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase
            sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_modules import module_db

    return next(info for info in module_db if info.module_cls is kind)


def _cases(subject: Subject, dtype: torch.dtype, training: bool = True) -> Iterator[tuple[nn.Module, Tensor]]:
    """Layers and inputs, as PyTorch lists them for BN."""
    info = _module_info(subject.plain_kind)
    listed = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )  # fmt: skip
    for each in listed:
        named = dict(zip(_POSITIONAL, each.constructor_input.args, strict=False)) | each.constructor_input.kwargs
        tracks, channels = named.pop("track_running_stats", True), named.pop("num_features")
        if "momentum" in subject.settings:
            named.pop("momentum", None)
        layer = subject.new(channels, **named, dtype=dtype).train(training)
        layer.track_running_stats = tracks
        yield layer, each.forward_input.args[0]


@asks(_MODULES)
def forward(subject: Subject) -> None:
    """Every input of BN's tests gives a finite output of its shape and dtype."""
    for dtype in (torch.float32, torch.float64):
        for training in (True, False):
            for layer, x in _cases(subject, dtype, training):
                y = layer(x)
                assert y.shape == x.shape
                assert y.dtype == dtype
                assert torch.isfinite(y).all()


@asks(_MODULES)
def forward_in_half_precision(subject: Subject) -> None:
    """A half-precision layer on a half-precision input stays near the float32 one."""
    for dtype in _HALVES:
        for training in (True, False):
            layer, x = subject.layer(training), subject.batch().to(dtype)
            y = copy.deepcopy(layer).to(dtype)(x)
            assert y.dtype == dtype
            assert_close(y.float(), layer(x.float()), rtol=0.05, atol=0.05)


@asks(_MODULES)
def factory_kwargs(subject: Subject) -> None:
    """Parameters and buffers are made on the device and in the dtype that the constructor is given."""
    for device, dtype in (("cpu", torch.float64), ("meta", torch.float32), ("cpu", torch.bfloat16)):
        layer = subject.new(device=device, dtype=dtype)
        for values in (*layer.parameters(), *layer.buffers()):
            assert values.device.type == device
            assert values.dtype == dtype or not values.is_floating_point()


@asks(_MODULES)
def multiple_device_transfer(subject: Subject) -> None:
    """``to`` moves everything that a layer holds."""
    layer, x = subject.layer(), subject.batch()
    moved = copy.deepcopy(layer).to("meta")
    assert {values.device.type for values in (*moved.parameters(), *moved.buffers())} == {"meta"}
    assert moved(x.to("meta")).shape == x.shape
    if not torch.cuda.is_available():
        return
    assert_close(copy.deepcopy(layer).cuda()(x.cuda()).cpu(), layer(x), rtol=1e-4, atol=1e-5)


@asks(_MODULES)
def cpu_gpu_parity(subject: Subject) -> None:
    """CPU and CUDA give the same output and gradients."""
    if not torch.cuda.is_available():
        raise NotApplicableError("no CUDA device")
    layer, x = subject.layer(), subject.batch()
    moved, leaf, other = copy.deepcopy(layer).cuda(), x.clone().requires_grad_(), x.cuda().requires_grad_()
    layer(leaf).square().sum().backward()
    moved(other).square().sum().backward()
    assert_close(other.grad.cpu(), leaf.grad, rtol=1e-3, atol=1e-4)


@asks(_MODULES)
def to_empty(subject: Subject) -> None:
    """A layer on the meta device becomes a new one with ``to_empty`` and ``reset_parameters``."""
    if subject.is_lazy:
        raise NotApplicableError("a lazy layer on the meta device waits for its first input, as BN does")
    layer = subject.new(device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    if subject.family == "frozen":  # keeps its statistics, which nothing would bring back: they are to be loaded
        layer.load_state_dict(subject.new().state_dict())
    assert_close(dict(layer.state_dict()), dict(subject.new().state_dict()))
    assert_close(layer(subject.batch()), subject.new()(subject.batch()))


@asks(_MODULES)
def check_repr(subject: Subject) -> None:
    """The text of a layer names its class and its arguments."""
    words = repr(subject.new(momentum=0.3, eps=1e-3))
    assert type(subject.new()).__name__ in words
    for part in (f"{CHANNELS}, eps=0.001", "momentum=0.3", "affine=True"):
        assert part in words, words


@asks(_MODULES)
def pickles(subject: Subject) -> None:
    """``pickle``, ``torch.save`` and ``deepcopy`` give the same layer back."""
    for training in (True, False):
        layer, x, file = subject.layer(training), subject.batch(), io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False), copy.deepcopy(layer)]
        expected = layer(x)
        for each in copies:
            assert_close(each(x), expected, rtol=0, atol=0)
            assert_close(dict(each.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


@asks(_MODULES)
def check_inplace(subject: Subject) -> None:
    """The input is not changed."""
    for training in (True, False):
        layer, x = subject.layer(training), subject.batch()
        before = x.clone()
        layer(x)
        assert torch.equal(x, before)


@asks(_MODULES)
def grad(subject: Subject) -> None:
    """Gradients agree with finite differences."""
    for training in (True, False):
        layer = subject.differentiable(training)
        _check_gradients(gradcheck, layer, subject.batch(dtype=torch.float64, count=3))


@asks(_MODULES)
def gradgrad(subject: Subject) -> None:
    """Gradients of gradients agree with finite differences."""
    for training in subject.modes:
        layer = subject.differentiable(training)
        _check_gradients(gradgradcheck, layer, subject.batch(dtype=torch.float64, count=3))


@asks(_MODULES)
def forward_ad_grad(subject: Subject) -> None:
    """Forward-mode gradients agree with finite differences, also over the backward pass."""
    for training in subject.modes:
        layer = subject.differentiable(training)
        x = subject.batch(dtype=torch.float64, count=3)
        _check_gradients(gradcheck, layer, x, check_forward_ad=True, check_backward_ad=False)
        _check_gradients(
            gradgradcheck, layer, x, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
        )


def _check_gradients(compare: Any, layer: nn.Module, x: Tensor, **settings: Any) -> None:
    names = [name for name, _ in layer.named_parameters()]
    values = [value.detach().clone().requires_grad_() for value in layer.parameters()]

    def call(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = x.flatten(2)[:, :2, :3].reshape(3, 2, *[3, 1, 1][: x.dim() - 2]).clone().requires_grad_()
    values = [value.detach()[:2].clone().requires_grad_() for value in values]
    for name, buffer in list(layer.named_buffers()):
        if buffer.dim():
            layer.register_buffer(name, buffer[..., :2].clone())
    assert compare(call, (x, *values), fast_mode=True, **settings)


@asks(_MODULES)
def non_contiguous_tensors(subject: Subject) -> None:
    """Strided, expanded and transposed inputs and gradients give what contiguous ones do."""
    for training in (True, False):
        x = subject.batch(6, dtype=torch.float64)
        views = [x[::2], x.transpose(0, 1).contiguous().transpose(0, 1), x[..., 1:], x[:1].expand(3, *x.shape[1:])]
        for view in views:
            results = []
            for chosen in (view, view.contiguous()):
                leaf, layer = chosen.detach().requires_grad_(), subject.layer(training).double()
                y = layer(leaf)
                y.sum().backward()  # an expanded gradient
                y = layer(leaf)
                y.transpose(0, 1).square().mul(torch.arange(1.0, 5).view(-1, *[1] * (x.dim() - 1))).sum().backward()
                results.append([y, leaf.grad, *(p.grad for p in _in_use(layer).values()), *layer.buffers()])
            assert_close(*results, rtol=1e-4, atol=1e-5)


@asks(_MODULES)
def memory_format(subject: Subject) -> None:
    """Output and gradient keep channels_last."""
    if subject.dimensions == 1:
        raise NotApplicableError("three dimensions have no such format")
    form = {2: torch.channels_last, 3: torch.channels_last_3d}[subject.dimensions]
    for training in (True, False):
        for net in (subject.layer(training), subject.layer(training).to(memory_format=form)):
            twin = copy.deepcopy(net)
            leaf = subject.batch().to(memory_format=form).requires_grad_()
            other = subject.batch().requires_grad_()
            y, expected = net(leaf), twin(other)
            y.square().sum().backward()
            expected.square().sum().backward()
            assert y.is_contiguous(memory_format=form), f"output, training={training}"
            assert leaf.grad.is_contiguous(memory_format=form), f"gradient, training={training}"
            assert_close([y, leaf.grad], [expected, other.grad], rtol=1e-4, atol=1e-4)


@asks(_MODULES)
def if_train_and_eval_modes_differ(subject: Subject) -> None:
    """Training mode gives another output than eval mode."""
    if subject.family in ("frozen", "instance"):
        raise NotApplicableError("by design the same output in both modes")
    layers = [subject.layer(training) for training in (True, False)]
    if subject.family == "renorm":  # r and d within their limits make up for the difference
        for layer in layers:
            layer.r_max, layer.d_max = 1.01, 0.01
    one, other = (layer(subject.batch()) for layer in layers)
    assert not torch.allclose(one, other)


@asks(_MODULES)
def save_load_state_dict(subject: Subject) -> None:
    """Weights load into a new layer, with ``weights_only`` and with ``assign``."""
    layer, file = subject.layer(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    for assign in (False, True):
        file.seek(0)
        other = subject.new()
        other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert_close(other.eval()(subject.batch()), copy.deepcopy(layer).eval()(subject.batch()))


@asks(_MODULES)
def errors(subject: Subject) -> None:
    """A wrong number of dimensions or of channels raises, and so does an eps out of range."""
    layer, x = subject.layer(), subject.batch()
    flat = x.flatten()
    for wrong in (flat, x[:, :2], *([] if type(layer).__name__ == "SyncBatchRenorm" else [x[..., None, None]])):
        try:
            layer(wrong)
        except (ValueError, RuntimeError):
            continue
        raise AssertionError(f"an input of shape {tuple(wrong.shape)} was taken")
    for eps in (-1.0, 0.0):
        try:
            subject.new(eps=eps)(x)
        except ValueError:
            continue
        if eps == 0 and subject.family == "frozen":
            continue  # BN takes it, too, where its running statistics normalize
        raise AssertionError(f"eps={eps} was taken")


@asks(_NN)
def state_of_bn_loads_strictly(subject: Subject) -> None:
    """Weights of BN load strictly."""
    layer, plain = subject.new(), _moved(subject.plain())
    own = [name for name in getattr(layer, "training_only", ()) if name in layer.state_dict()]
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=not own)
    assert (sorted(missing), unexpected) == (sorted(own), [])
    _as_bn_at_inference(layer, subject)
    assert_close(layer.eval()(subject.batch()), plain.eval()(subject.batch()))
    if own:
        raise NotApplicableError(f"BN does not have {', '.join(own)}; strict=False loads the rest")


@asks(_NN)
def state_loads_into_bn(subject: Subject) -> None:
    """Weights load strictly into BN, which gives the same output at inference."""
    from bnprobe import deployable_state

    layer, plain = subject.layer(training=False), subject.plain()
    _as_bn_at_inference(layer, subject)
    domain = 0 if subject.family == "domain" else None
    state = layer.state_dict() if subject.family == "bn" else deployable_state(layer, plain, domain=domain)
    plain.load_state_dict(state)
    assert_close(plain.eval()(subject.batch()), layer(subject.batch()))


@asks(_NN)
def state_of_old_checkpoints_loads(subject: Subject) -> None:
    """Weights from before PyTorch 0.4.1, which have no ``num_batches_tracked``, load."""
    layer = subject.layer()
    state = layer.state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    other = subject.new()
    other.load_state_dict(state)
    assert other.num_batches_tracked == 0


@asks(_NN)
def statistics_in_training(subject: Subject) -> None:
    """The running statistics move as those of BN, and the batches are counted."""
    if subject.family == "frozen":
        raise NotApplicableError("by design the statistics do not move")
    if subject.settings.get("running") == "std":
        raise NotApplicableError("by design it averages deviations, as the paper does")
    if subject.has_ghosts:
        raise NotApplicableError("by design each ghost batch moves them")
    for momentum in (None, 0.3, 1.0):
        if "momentum" in subject.settings and momentum is not None:
            continue
        layer = subject.new(**({} if "momentum" in subject.settings else {"momentum": momentum}))
        plain = subject.plain(momentum=momentum)
        for seed in range(3):
            layer(subject.batch(seed=seed))
            plain(subject.batch(seed=seed))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(getattr(layer, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@asks(_NN)
def statistics_at_inference(subject: Subject) -> None:
    """Inference changes no buffer."""
    layer = subject.layer(training=False)
    before = copy.deepcopy(dict(layer.named_buffers()))
    layer(subject.batch())
    assert_close(dict(layer.named_buffers()), before, rtol=0, atol=0)


@asks(_NN)
def one_value_per_channel(subject: Subject) -> None:
    """One value per channel raises in training or gives a finite output, and eval mode takes it."""
    x = subject.batch(1)
    x = x[(slice(None), slice(None), *[slice(0, 1)] * subject.dimensions)]
    assert torch.isfinite(subject.layer(training=False)(x)).all()
    layer, leaf = subject.layer(), x.clone().requires_grad_()
    try:
        y = layer(leaf)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return  # as BN does
        raise
    y.square().sum().backward()
    for values in (y, leaf.grad, *layer.buffers()):
        assert torch.isfinite(values).all()


@asks(_NN)
def empty_batches(subject: Subject) -> None:
    """A batch of no samples gives an empty output, finite gradients and leaves the statistics alone."""
    for training in (True, False):
        layer = subject.layer(training)
        before = copy.deepcopy({name: value for name, value in layer.named_buffers() if value.dim()})
        leaf = subject.batch()[:0].clone().requires_grad_()
        layer(leaf).sum().backward()
        assert leaf.grad.shape == leaf.shape
        for parameter in _in_use(layer).values():
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()
        assert_close({name: value for name, value in layer.named_buffers() if value.dim()}, before, rtol=0, atol=0)


@asks(_NN)
def rows_without_space(subject: Subject) -> None:
    """A 1d layer takes (N, C) as well, and normalizes it as (N, C, 1)."""
    if subject.dimensions != 1:
        raise NotApplicableError("only 1d layers take rows")
    for training in (True, False):
        x = subject.batch(6)[..., 0]
        one, other = subject.layer(training), subject.layer(training)
        assert_close(one(x), other(x[..., None])[..., 0])
        assert_close(dict(one.named_buffers()), dict(other.named_buffers()))


@asks(_NN)
def constant_channels(subject: Subject) -> None:
    """A channel without variance gives finite outputs and gradients."""
    layer, x = subject.layer(), subject.batch()
    x[:, 0] = 3.0
    leaf = x.requires_grad_()
    y = layer(leaf)
    y.square().sum().backward()
    for values in (y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()):
        assert torch.isfinite(values).all()


@asks(_NN)
def large_means(subject: Subject) -> None:
    """A mean of 1000 deviations costs no more than the digits that float32 lacks."""
    for training in (True, False):
        x = subject.batch(8) + 1000.0
        layer = subject.layer(training)
        with torch.no_grad():
            layer.running_mean.add_(1000.0)
        expected = copy.deepcopy(layer).double()(x.double())
        assert_close(layer(x).double(), expected, rtol=1e-3, atol=1e-3)


@asks(_NN)
def nan_stays_in_its_channel(subject: Subject) -> None:
    """NaN in one channel leaves the other channels finite."""
    for training in (True, False):
        layer, x = subject.layer(training), subject.batch()
        x[0, 1] = float("nan")
        y = layer(x)
        assert torch.isfinite(y[:, [0, 2, 3]]).all()
        assert torch.isnan(y[0, 1]).all()


@asks(_NN)
def complex_and_integer_inputs(subject: Subject) -> None:
    """Complex and integer inputs raise."""
    for dtype in (torch.complex64, torch.int64):
        for training in (True, False):
            try:
                subject.layer(training)(subject.batch().to(dtype))
            except (RuntimeError, ValueError, TypeError):
                continue
            raise AssertionError(f"{dtype} was taken")


@asks(_NN)
def mixed_half_precision(subject: Subject) -> None:
    """A half-precision input with float32 parameters gives a half-precision output near the float32 one."""
    for dtype in _HALVES:
        for training in (True, False):
            layer, twin, x = subject.layer(training), subject.layer(training), subject.batch().to(dtype)
            leaf, other = x.clone().requires_grad_(), x.float().requires_grad_()
            y, expected = layer(leaf), twin(other)
            assert y.dtype == dtype
            assert_close(y.float(), expected, rtol=0.02, atol=0.02)
            y.float().square().sum().backward()
            expected.square().sum().backward()
            assert leaf.grad.dtype == dtype
            assert_close(leaf.grad.float(), other.grad, rtol=0.1, atol=0.1)
            for one, two in zip(_in_use(layer).values(), _in_use(twin).values(), strict=True):
                assert one.grad.dtype == torch.float32
                assert_close(one.grad, two.grad, rtol=0.05, atol=0.5)
            assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()), rtol=1e-3, atol=1e-3)


@asks(_NN)
def wide_input_of_a_narrow_layer(subject: Subject) -> None:
    """A float64 input to a float32 layer does what it does to BN: an error, or an output in the input's dtype."""
    for training in (True, False):
        for dtype, other in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
            x = subject.batch().to(dtype)
            try:
                expected = subject.plain().train(training).to(other)(x).dtype
            except RuntimeError:
                expected = None
            try:
                found = subject.layer(training).to(other)(x).dtype
            except RuntimeError:
                found = None
            assert found in (expected, dtype), f"{dtype} to {other}, training={training}: {found}, BN: {expected}"


def _in_use(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that get a gradient in the layer's mode: inference uses no gate."""
    return {name: value for name, value in layer.named_parameters() if layer.training or name != "gate_logit"}


def _as_bn_at_inference(layer: nn.Module, subject: Subject) -> None:
    """Give a layer the settings with which it is BN at inference."""
    if subject.family in ("instance", "weighed"):
        layer.blend = 0.0
    if subject.family == "domain":
        layer.share()


def _moved(plain: nn.Module) -> nn.Module:
    with torch.no_grad():
        plain.running_mean.add_(0.3)
        plain.running_var.mul_(1.5)
        plain.weight.mul_(0.7)
    return plain
