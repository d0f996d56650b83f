"""Other packages beside the layers, where they are installed: their numbers, or what they do to a model."""

from __future__ import annotations

import copy
import importlib
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.peers.layers import CHANNELS, Subject
from benchmarks.peers.registry import NotApplicableError, asks
from bnprobe.errors import UsageError

_STEPS = 4

_OPERATORS_OF_TORCHVISION = (
    *("nms", "qnms", "deform_conv2d", "_deform_conv2d_backward", "roi_align", "_roi_align_backward", "qroi_align"),
    *("roi_pool", "_roi_pool_backward", "ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool"),
    "_ps_roi_pool_backward",
)
"""What torchvision gives shapes to when it is imported; its wheels for CUDA do not load them beside a CPU build."""


def _installed(name: str) -> ModuleType:
    """A module of a package, which is not fetched."""
    _declare_operators()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is None or name.split(".")[0] == error.name.split(".")[0]:
            raise NotApplicableError(f"{name.split('.')[0]} is not installed") from error
        raise NotApplicableError(f"{name.split('.')[0]} cannot be imported without {error.name}") from error
    except (OSError, RuntimeError) as error:  # built for another PyTorch
        raise NotApplicableError(f"{name.split('.')[0]} cannot be imported: {error}") from error


@cache
def _declare_operators() -> torch.library.Library | None:
    """Let torchvision be imported without its compiled operators, which nothing here calls."""
    try:
        importlib.import_module("torchvision")
        return None
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in _OPERATORS_OF_TORCHVISION:
            library.define(f"{name}(Tensor input) -> Tensor")
        return library


def _only(subject: Subject, *names: str) -> None:
    if subject.name not in names:
        raise NotApplicableError("the package has no counterpart of this layer")


@asks("Keras", "renorm")
def keras_renorm(subject: Subject) -> None:
    """``BatchNormalization(renorm=True)`` gives the same outputs, gradients and statistics over four steps.

    Keras averages deviations, as the paper does, and keeps averages of their own for r and d. Its momentum is the
    weight of the old average. Its deviations begin at 1, ours at sqrt(1 + eps).
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = _installed("keras")
    _only(subject, "BatchRenorm2d, as in Keras")
    limits = {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}
    theirs = keras.layers.BatchNormalization(
        axis=1, momentum=0.9, epsilon=1e-5, renorm=True, renorm_clipping=limits, renorm_momentum=0.8
    )
    ours = subject.kind(CHANNELS, momentum=0.1, renorm_momentum=0.2, r_min=0.5, r_max=2.0, d_max=1.0, running="std")
    for variance in (ours.running_var, ours.renorm_var):
        variance.sub_(1e-5)
    for step in range(_STEPS + 1):
        one, other = (((1 + step) * subject.batch(seed=step)).requires_grad_() for _ in range(2))
        training = step < _STEPS
        found, expected = ours.train(training)(one), theirs(other, training=training)
        assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for output in (found, expected):
            output.backward(subject.batch(seed=9))
        assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    variables = {variable.name: variable.value for variable in theirs.variables}
    for name, its in (("running_mean", "moving_mean"), ("running_var", "moving_variance"), ("renorm_mean",) * 2):
        assert_close(getattr(ours, name), variables[its], rtol=1e-4, atol=1e-5)
    assert_close(ours.renorm_var + 1e-5, variables["renorm_stddev"].square(), rtol=1e-4, atol=1e-5)


@asks("Keras", "renorm")
def keras_mask(subject: Subject) -> None:
    """The same with a mask; Keras normalizes the masked values, too."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = _installed("keras")
    _only(subject, "BatchRenorm2d")
    theirs = keras.layers.BatchNormalization(
        axis=-1, momentum=0.8, epsilon=1e-5, renorm=True, renorm_clipping={"rmax": 2, "rmin": 0.5, "dmax": 1},
        renorm_momentum=0.8,
    )  # fmt: skip
    ours = subject.kind(CHANNELS, momentum=0.2, r_max=2.0, d_max=1.0, running="std")
    ours.running_var.sub_(1e-5)
    for step in range(_STEPS):
        batch = subject.batch(seed=step)
        mask = batch[:, 0] > 0
        expected = theirs(batch.movedim(1, -1), training=True, mask=mask).movedim(-1, 1)
        assert_close(ours(batch, mask), expected * mask.unsqueeze(1), rtol=1e-4, atol=1e-5)


@asks("TorchRL", "renorm")
def torchrl_renorm(subject: Subject) -> None:
    """``torchrl.modules.BatchRenorm1d`` gives the same outputs, gradients and statistics."""
    kind = _installed("torchrl.modules").BatchRenorm1d
    _only(subject, "BatchRenorm1d")
    theirs = kind(CHANNELS, momentum=0.01, eps=1e-5, max_r=3.0, max_d=5.0, warmup_steps=0)
    _train_alike(theirs, subject.kind(CHANNELS), theirs.running_mean, theirs.running_var, 1e-4)


@asks("sb3-contrib", "renorm")
def sb3_renorm(subject: Subject) -> None:
    """``sb3_contrib``'s ``BatchRenorm1d`` does, too, but for what Bessel's correction and its second eps make out."""
    kind = _installed("sb3_contrib.common.torch_layers").BatchRenorm1d
    _only(subject, "BatchRenorm1d")
    theirs = kind(CHANNELS, momentum=0.01, eps=1e-5, warmup_steps=-1)
    _train_alike(theirs, subject.kind(CHANNELS), theirs.ra_mean, theirs.ra_var, 1e-2)


def _train_alike(theirs: nn.Module, ours: nn.Module, mean: Tensor, variance: Tensor, tolerance: float) -> None:
    """Steps on rows that are within the limits of r and d first, and outside of them later; then inference."""
    for step in range(_STEPS + 1):
        training = step < _STEPS
        rows = (1 + step) * (1 + 1.5 * torch.randn(256, CHANNELS, generator=torch.Generator().manual_seed(step)))
        one, other = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        found, expected = ours.train(training)(one), theirs.train(training)(other)
        assert_close(found, expected, rtol=tolerance, atol=tolerance)
        for output in (found, expected):
            output.backward(rows.cos())
        assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)
    assert_close(ours.running_mean, mean, rtol=tolerance, atol=tolerance)
    assert_close(ours.running_var, variance, rtol=tolerance, atol=tolerance)


@asks("fvcore")
def precise_bn(subject: Subject) -> None:
    """``update_bn_stats`` gives the statistics that it gives BN."""
    precise = _installed("fvcore.nn.precise_bn")
    if subject.family == "frozen":
        raise NotApplicableError("by design the statistics do not move")
    if subject.settings.get("running") == "std" or subject.has_ghosts:
        raise NotApplicableError("by design other averages than BN's")
    net, plain = subject.net(), subject.net()
    plain[1] = subject.plain(momentum=net[1].momentum)
    batches = [subject.batch(seed=seed) for seed in range(3)]
    for each in (net, plain):
        precise.update_bn_stats(each, batches, len(batches), progress=None)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(net[1], name), getattr(plain[1], name), rtol=1e-3, atol=1e-4)


@asks("fvcore")
def counted_operations(subject: Subject) -> None:
    """``FlopCountAnalysis`` counts a model with the layer as one with BN."""
    analysis = _installed("fvcore.nn")
    if subject.family in ("instance", "weighed"):
        raise NotApplicableError("by design other operations than BN's")
    net, plain = subject.net(training=False), subject.net(training=False)
    plain[1] = subject.plain().eval()
    counts = [analysis.FlopCountAnalysis(each, subject.batch()).total() for each in (net, plain)]
    assert counts[0] == counts[1], counts


@asks("Opacus")
def opacus_refuses(subject: Subject) -> None:
    """Opacus takes no model with the layer, which mixes samples or keeps statistics, as it takes none with BN.

    Its validator looks types up exactly and sees BN only; what computes the gradients per sample refuses buffers.
    """
    validators, samples = _installed("opacus.validators"), _installed("opacus.grad_sample")
    errors = validators.ModuleValidator.validate(subject.net())
    assert errors or samples.GradSampleModule.validate(subject.net())


@asks("Composer")
def composer_surgery(subject: Subject) -> None:
    """``replace_module_classes`` finds the layer by its class."""
    surgery = _installed("composer.utils.module_surgery")
    net = subject.net()
    replaced = surgery.replace_module_classes(net, {type(net[1]): lambda *_, **__: nn.Identity()})
    assert len(replaced) == 1
    assert isinstance(net[1], nn.Identity)


@asks("AIMET")
def aimet_folding(subject: Subject) -> None:
    """``fold_all_batch_norms`` leaves the output as it is."""
    folding = _installed("aimet_torch.batch_norm_fold")
    net, x = subject.net(training=False), subject.batch()
    expected = net(x)
    folding.fold_all_batch_norms(net, tuple(x.shape), dummy_input=x)
    assert_close(net(x), expected, rtol=1e-4, atol=1e-4)


@asks("torchvision")
def feature_extraction(subject: Subject) -> None:
    """``create_feature_extractor`` takes the layer's output by its name, in both modes."""
    extraction = _installed("torchvision.models.feature_extraction")
    for training in (True, False):
        net, twin = subject.net(training), subject.net(training)
        before = copy.deepcopy(dict(net.state_dict()))
        train, _ = extraction.get_graph_node_names(net)
        assert "1" in train, train
        extractor = extraction.create_feature_extractor(net, ["1"]).train(training)
        assert_close(dict(net.state_dict()), before)
        assert_close(extractor(subject.batch())["1"], twin[1](twin[0](subject.batch())), rtol=1e-4, atol=1e-4)


@asks("torchvision")
def norm_layer(subject: Subject) -> None:
    """A ResNet is built with the layer as its ``norm_layer``, trains, and scripts."""
    models = _installed("torchvision.models")
    if subject.dimensions != 2:
        raise NotApplicableError("torchvision's networks want 2d layers")

    def make(channels: int) -> nn.Module:
        return subject.kind(channels, **subject.settings)

    network = models.resnet18(norm_layer=make, num_classes=3)
    x = torch.randn(2, 3, 32, 32)
    network(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    torch.jit.script(network.eval())(x)


@asks("torchvision", "frozen")
def frozen_of_torchvision(subject: Subject) -> None:
    """``FrozenBatchNorm2d`` gives the same output with the same weights."""
    operations = _installed("torchvision.ops")
    _only(subject, "FrozenBatchNorm2d")
    theirs, ours = operations.FrozenBatchNorm2d(CHANNELS), subject.layer()
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(subject.batch()), theirs(subject.batch()))


@asks("Detectron2")
def frozen_by_detectron2(subject: Subject) -> None:
    """``convert_frozen_batchnorm`` freezes the layer rightly, leaves it alone, or is refused."""
    norms = _installed("detectron2.layers.batch_norm")
    if subject.dimensions != 2:
        raise NotApplicableError("the package freezes 2d layers")
    net = subject.net(training=False)
    expected = net(subject.batch())
    try:
        frozen = norms.FrozenBatchNorm2d.convert_frozen_batchnorm(net)
    except UsageError:
        return
    assert_close(frozen.eval()(subject.batch()), expected, rtol=1e-4, atol=1e-4)
