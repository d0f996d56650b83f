from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bnprobe.config.spec import RepairSpec
from bnprobe.config.targets import TARGETS
from bnprobe.errors import RepairError
from bnprobe.nn.gated import GatedBatchNorm2d
from bnprobe.records import LayerChange, Plan, Refusal
from bnprobe.repairs import apply, plan
from support.fingerprint import fingerprint
from support.networks import Residual
from unit.repairs.models import EVERY, Activated, BatchNormRelu, Branches, prepared


def test_a_plan_says_what_changes_and_what_stays() -> None:
    model = Branches()
    model.odd = BatchNormRelu(4)
    model.norm = nn.GroupNorm(2, 4)
    wanted = {"again": "the reason", "odd": "wanted too", "norm": "and this"}
    relu = "does more than normalize and apply its child modules; that would be lost"
    assert plan(model, wanted, "frozen", "--layers") == Plan(
        to="frozen",
        source="--layers",
        changes=(
            LayerChange(
                name="bn",
                aliases=("again", "path.1", "listed.1"),
                kind="BatchNorm2d",
                to="FrozenBatchNorm2d",
                reason="the reason",
                note="running statistics stay as they are, in training too",
            ),
        ),
        refused=(
            Refusal("odd", "BatchNormRelu", relu),
            Refusal("norm", "GroupNorm", "is not a Batch Normalization layer"),
        ),
        untouched=2,
        deploys=True,
    )


@pytest.mark.parametrize("to", EVERY)
def test_a_plan_changes_nothing_and_names_what_apply_makes(to: str) -> None:
    model = prepared(Activated(0.5)).train()
    before = fingerprint(model)
    made = plan(model, {"bn": "a", "last": "b"}, to, "test")
    assert fingerprint(model) == before
    assert [change.name for change in made.changes] == ["bn", "last"]
    assert made.deploys == TARGETS[to].deploys
    converted = apply(model, made, RepairSpec())
    assert [type(layer).__name__ for layer in (converted.bn, converted.last)] == [c.to for c in made.changes]
    assert fingerprint(model) == before


def test_the_root_is_called_root() -> None:
    made = plan(nn.BatchNorm2d(3), {"(root)": "all"}, "gated", "test")
    assert [(change.name, change.to) for change in made.changes] == [("(root)", "GatedBatchNorm2d")]
    assert isinstance(apply(nn.BatchNorm2d(3), made, RepairSpec()), GatedBatchNorm2d)


def test_only_the_layers_of_the_plan_are_converted() -> None:
    model = Residual()
    converted = apply(model, plan(model, {"bn2": "flagged"}, "gated", "test"), RepairSpec(blend=0.25))
    assert type(converted.bn1) is nn.BatchNorm2d
    torch.testing.assert_close(converted.bn2.gate.detach(), torch.full((4,), 0.25))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(RepairError, match=r'No layer is called or matches "bn3"; the nearest name is "bn[12]"\.'):
        plan(Residual(), {"bn3": "flagged"}, "frozen", "test")
    with pytest.raises(RepairError, match=r'no repair target named "gate" .*did you mean gated\?'):
        plan(Residual(), {"bn1": "flagged"}, "gate", "test")


def test_a_plan_of_another_model_is_refused_and_nothing_is_changed() -> None:
    made = plan(Residual(), {"bn1": "a", "bn2": "b"}, "frozen", "test")
    other = Residual()
    other.bn2 = nn.BatchNorm3d(4)
    with pytest.raises(RepairError, match="bn2 is BatchNorm3d here and BatchNorm2d there"):
        apply(other, made, RepairSpec(), inplace=True)
    assert type(other.bn1) is nn.BatchNorm2d
    with pytest.raises(RepairError, match='"bn1"'):
        apply(nn.Sequential(nn.BatchNorm2d(3)), made, RepairSpec())
    untracked = Residual(track_running_stats=False)
    with pytest.raises(RepairError, match=r"bn1 \(BatchNorm2d\) cannot be converted to frozen: it keeps no running"):
        apply(untracked, made, RepairSpec())


def test_a_plan_applies_to_copies_of_its_model() -> None:
    model = prepared(Branches())
    made = plan(model, {"bn": "a"}, "frozen", "test")
    assert apply(copy.deepcopy(model), made, RepairSpec()).bn.weight is not model.bn.weight


def test_an_empty_plan_gives_a_copy() -> None:
    model = Residual()
    made = plan(model, {}, "frozen", "test")
    assert (made.changes, made.untouched) == ((), 2)
    copied = apply(model, made, RepairSpec())
    assert copied is not model
    assert type(copied.bn1) is nn.BatchNorm2d


def test_nothing_changes_where_a_replacement_cannot_be_made() -> None:
    model = Residual()
    made = plan(model, {"bn1": "a", "bn2": "b"}, "batch-renorm", "test")
    model.bn2.eps = 0.0
    with pytest.raises(RepairError, match=r"bn2 .* has eps 0, and Batch Renorm needs a positive one"):
        apply(model, made, RepairSpec(), inplace=True)
    assert type(model.bn1) is nn.BatchNorm2d
