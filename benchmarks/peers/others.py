"""Other packages beside the layers, where they are installed: their numbers, or what they do to a model."""

from __future__ import annotations

import copy
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.testing import assert_close

from benchmarks.peers.layers import CHANNELS, Subject
from benchmarks.peers.registry import NotApplicableError, asks
from bnprobe.errors import UsageError
from bnprobe.nn import BatchRenorm1d

_STEPS = 4


def _installed(name: str) -> ModuleType:
    """A module of a package, which is not fetched."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is None or name.split(".")[0] == error.name.split(".")[0]:
            raise NotApplicableError(f"{name.split('.')[0]} is not installed") from error
        raise NotApplicableError(f"{name.split('.')[0]} cannot be imported without {error.name}") from error
    except (OSError, RuntimeError) as error:  # built for another PyTorch
        raise NotApplicableError(f"{name.split('.')[0]} cannot be imported: {error}") from error


def _only(subject: Subject, *names: str) -> None:
    if subject.name not in names:
        raise NotApplicableError("the package has no counterpart of this layer")


@asks("Keras", "renorm")
def keras_renorm(subject: Subject) -> None:
    """``BatchNormalization(renorm=True)`` gives the same outputs and statistics over four steps.

    Keras averages deviations, as the paper does, and keeps averages of their own for r and d. Its momentum is the
    weight of the old average.
    """
    keras, tensorflow = _installed("tf_keras"), _installed("tensorflow")
    _only(subject, "BatchRenorm2d, as in Keras")
    limits = {"rmax": 2.0, "rmin": 0.5, "dmax": 1.0}
    theirs = keras.layers.BatchNormalization(
        axis=1, momentum=0.9, epsilon=1e-5, renorm=True, renorm_clipping=limits, renorm_momentum=0.8
    )
    ours = subject.kind(CHANNELS, momentum=0.1, renorm_momentum=0.2, r_min=0.5, r_max=2.0, d_max=1.0, running="std")
    for training in (*[True] * _STEPS, False):
        batch = subject.batch(seed=3)
        expected = theirs(tensorflow.constant(batch.numpy()), training=training).numpy()
        assert_close(ours.train(training)(batch), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
    for found, other in ((ours.running_mean, theirs.moving_mean), (ours.running_var, theirs.moving_variance)):
        assert_close(found, torch.from_numpy(other.numpy()), rtol=1e-3, atol=1e-3)


def _rl_layer(subject: Subject, name: str) -> Any:
    kind = _installed(name).BatchRenorm1d
    _only(subject, "BatchRenorm1d")
    return kind


@asks("TorchRL", "renorm")
def torchrl_renorm(subject: Subject) -> None:
    """``torchrl.modules.BatchRenorm1d`` gives the same output from the same statistics."""
    kind = _rl_layer(subject, "torchrl.modules")
    _same_first_output(kind(CHANNELS, momentum=0.01, eps=1e-5, max_r=3.0, max_d=5.0, warmup_steps=0))


@asks("sb3-contrib", "renorm")
def sb3_renorm(subject: Subject) -> None:
    """``sb3_contrib``'s ``BatchRenorm1d`` gives the same output from the same statistics."""
    kind = _rl_layer(subject, "sb3_contrib.common.torch_layers")
    _same_first_output(kind(CHANNELS, momentum=0.01, eps=1e-5, warmup_steps=0))


def _same_first_output(theirs: nn.Module) -> None:
    ours = BatchRenorm1d(CHANNELS)
    rows = 0.5 + 1.5 * torch.randn(64, CHANNELS, generator=torch.Generator().manual_seed(0))
    assert_close(ours.train()(rows), theirs.train()(rows), rtol=1e-2, atol=1e-2)


@asks("fvcore")
def precise_bn(subject: Subject) -> None:
    """``update_bn_stats`` gives the statistics that it gives BN."""
    precise = _installed("fvcore.nn.precise_bn")
    if subject.family == "frozen":
        raise NotApplicableError("by design the statistics do not move")
    if subject.settings.get("running") == "std" or "virtual_batch_size" in subject.settings:
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
    net, plain = subject.net(training=False), subject.net(training=False)
    plain[1] = subject.plain().eval()
    counts = [analysis.FlopCountAnalysis(each, subject.batch()).total() for each in (net, plain)]
    if subject.family == "instance":
        raise NotApplicableError("by design other operations than BN's")
    assert counts[0] == counts[1], counts


@asks("Opacus")
def opacus_validator(subject: Subject) -> None:
    """``ModuleValidator`` reports the layer, which mixes samples, as it does BN."""
    validators = _installed("opacus.validators")
    errors = validators.ModuleValidator.validate(subject.net())
    if subject.family in ("frozen", "instance"):
        raise NotApplicableError("the layer does not mix samples")
    assert errors, "no error: the validator looks types up exactly, and misses every subclass of BN"


@asks("Composer")
def composer_surgery(subject: Subject) -> None:
    """``replace_module_classes`` finds the layer by its class and by BN's."""
    surgery = _installed("composer.utils.module_surgery")
    net = subject.net()
    replaced = surgery.replace_module_classes(net, {type(net[1]): lambda *_, **__: nn.Identity()})
    assert len(replaced) == 1
    assert isinstance(net[1], nn.Identity)


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
