from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.errors import RepairError, UsageError
from bnprobe.repairs import deployable_state
from support.networks import Residual
from unit.repairs.models import DEPLOYING, Activated, Branches, prepared


def trained(model: nn.Module) -> nn.Module:
    """A few steps further, in eval mode."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for seed in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("to", DEPLOYING)
@pytest.mark.parametrize("make", [Residual, Branches, Activated])
def test_trained_weights_load_strictly_and_infer_the_same(to: str, make: type[nn.Module]) -> None:
    original = prepared(make()).eval()
    before = copy.deepcopy(original.state_dict())
    converted = trained(bnprobe.convert(original, to=to))
    state = deployable_state(converted, original)
    assert list(state) == list(original.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    x = torch.randn(5, 3, 6, 6)
    untrained = original(x)
    original.load_state_dict(state, strict=True)
    torch.testing.assert_close(original(x), converted(x), rtol=0, atol=1e-6)
    assert not torch.allclose(original(x), untrained, atol=1e-3)


@pytest.mark.parametrize(
    ("to", "kind"), [("instance-renorm", "InstanceRenorm2d"), ("example-weighing", "ExampleWeighedBatchNorm2d")]
)
def test_what_blends_in_the_sample_deploys_at_blend_0_alone(to: str, kind: str) -> None:
    original = prepared(Residual()).eval()
    converted = trained(bnprobe.convert(original, to=to, blend=0.5))
    with pytest.raises(RepairError, match=rf"bn1 is {kind} with blend 0\.5: only at 0"):
        deployable_state(converted, original)
    converted.bn1.blend = converted.bn2.blend = 0
    original.load_state_dict(deployable_state(converted, original), strict=True)
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(original(x), converted(x), rtol=0, atol=1e-6)


def test_group_norm_does_not_deploy() -> None:
    original = Residual()
    with pytest.raises(RepairError, match="bn1 is GroupNorm, which does not normalize like BN"):
        deployable_state(bnprobe.convert(original, to="group-norm"), original)


@pytest.mark.parametrize("make", [Residual, Branches, Activated])
def test_statistics_of_one_domain_deploy(make: type[nn.Module]) -> None:
    original = prepared(make()).eval()
    converted = bnprobe.convert(original, to="per-domain", domains=3)
    for k in range(3):
        with bnprobe.nn.domain(k):
            trained(converted)
    for layer in converted.modules():
        if isinstance(layer, bnprobe.nn.DomainBatchNorm):
            layer.domain_mean.add_(torch.arange(3)[:, None])
    with pytest.raises(RepairError, match="keeps statistics for each of 3 domains") as refused:
        deployable_state(converted, original)
    assert str(refused.value).endswith("Say of which to take them, as in deployable_state(..., domain=0).")
    with pytest.raises(UsageError, match="has 3 domains, counted from 0, but was asked for 3"):
        deployable_state(converted, original, domain=3)
    x = torch.randn(5, 3, 6, 6)
    outputs = []
    for k in range(3):
        state = deployable_state(converted, original, domain=k)
        assert list(state) == list(original.state_dict())
        original.load_state_dict(state, strict=True)
        with bnprobe.nn.domain(k):
            torch.testing.assert_close(original(x), converted(x), rtol=0, atol=1e-5)
        outputs.append(original(x))
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


def test_a_domain_changes_nothing_for_other_layers() -> None:
    original = prepared(Residual()).eval()
    converted = bnprobe.convert(original, to="frozen")
    torch.testing.assert_close(deployable_state(converted, original, domain=1), deployable_state(converted, original))


def test_the_root_is_named_in_words() -> None:
    with pytest.raises(RepairError, match="The model is GroupNorm"):
        deployable_state(bnprobe.convert(nn.BatchNorm2d(4), to="group-norm"), nn.BatchNorm2d(4))
    state = deployable_state(bnprobe.convert(nn.BatchNorm2d(4), to="gated"), nn.BatchNorm2d(4))
    assert list(state) == list(nn.BatchNorm2d(4).state_dict())


def test_another_original_is_refused() -> None:
    converted = bnprobe.convert(Residual())
    deeper = Residual()
    deeper.extra = nn.Linear(2, 2)
    with pytest.raises(RepairError, match=r"only the original has extra\.weight"):
        deployable_state(converted, deeper)
    with pytest.raises(RepairError, match=r"only the converted model has extra\.weight"):
        deployable_state(bnprobe.convert(deeper), Residual())
    wider = Residual()
    wider.head = nn.Linear(4, 7)
    with pytest.raises(RepairError, match=r"head\.weight has the shape \(3, 4\) there and \(7, 4\) in the original"):
        deployable_state(converted, wider)
    with pytest.raises(RepairError, match=r"bn1 has eps 1e-05, and 0\.001 in the original"):
        deployable_state(converted, Residual(eps=1e-3))
