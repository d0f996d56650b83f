from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.config.targets import TARGETS, groups_for
from bnprobe.docstrings import docstring
from bnprobe.errors import RepairError, UsageError
from bnprobe.nn.batch_renorm import BatchRenorm2d
from support.networks import Residual, unsettled
from unit.repairs.models import BatchNormRelu


def test_public_names_are_imported_on_first_use() -> None:
    code = (
        "import sys, bnprobe; assert 'torch' not in sys.modules;"
        "assert bnprobe.nn.BatchRenorm2d and callable(bnprobe.convert); assert 'nn' in bnprobe.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_docstring_names_every_setting() -> None:
    named = docstring(bnprobe.convert).partition("**options:")[2].partition("Returns:")[0]
    assert all(re.search(rf"\b{setting}\b", named) for target in TARGETS for setting in target.settings)


def test_one_name_will_do_for_a_list() -> None:
    converted = bnprobe.convert(Residual(), "bn2")
    assert type(converted.bn1) is nn.BatchNorm2d
    assert type(converted.bn2) is BatchRenorm2d


def test_batch_renorm_takes_its_limits_and_momentum_from_the_spec() -> None:
    own = {"r_max": 2.0, "d_max": 1.5, "momentum": 0.2}
    layer = bnprobe.convert(nn.BatchNorm2d(3, momentum=0.3), renorm=own)
    assert (layer.r_max, layer.d_max, layer.momentum) == (2.0, 1.5, 0.2)
    assert bnprobe.convert(nn.BatchNorm2d(3, momentum=0.3)).momentum == 0.01
    assert bnprobe.convert(nn.BatchNorm2d(3, momentum=0.3), renorm={"momentum": None}).momentum == 0.3


def test_sync_is_batch_renorm_that_corrects_nothing() -> None:
    layer = bnprobe.convert(nn.BatchNorm2d(3, momentum=0.3), to="sync")
    assert (layer.r_max, layer.d_max, layer.momentum) == (1, 0, 0.3)
    x = 5 + torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x), rtol=1e-5, atol=1e-5)


def test_ghosts_are_parts_of_the_size_asked_for() -> None:
    layer = bnprobe.convert(nn.BatchNorm1d(3, momentum=0.3), to="ghost", virtual_batch_size=4)
    assert (type(layer).__name__, layer.virtual_batch_size, layer.momentum) == ("GhostBatchNorm1d", 4, 0.3)
    x = 5 + torch.randn(8, 3)
    torch.testing.assert_close(layer(x), torch.cat([nn.BatchNorm1d(3)(part) for part in x.split(4)]))
    with pytest.raises(UsageError, match="for virtual_batch_size, but got 0"):
        bnprobe.convert(nn.BatchNorm1d(3), to="ghost", virtual_batch_size=0)


def test_moving_averages_have_the_window_asked_for() -> None:
    layer = bnprobe.convert(nn.BatchNorm2d(3, momentum=0.3), to="mabn", window=4)
    assert (type(layer).__name__, layer.window, layer.momentum) == ("MovingAverageBatchNorm2d", 4, 0.3)


def test_domains_begin_with_the_statistics_of_all() -> None:
    bn = unsettled(nn.BatchNorm2d(3, momentum=0.3)).eval()
    layer = bnprobe.convert(bn, to="per-domain", domains=3)
    assert (type(layer).__name__, layer.domains, layer.momentum) == ("DomainBatchNorm2d", 3, 0.3)
    x = torch.randn(4, 3, 4, 4)
    with bnprobe.nn.domain(torch.tensor([0, 1, 2, 1])):
        torch.testing.assert_close(layer(x), bn(x))
    back = bnprobe.convert(layer, to="frozen")  # the common statistics are those of BN
    torch.testing.assert_close(dict(back.state_dict()), dict(bn.state_dict()))


@pytest.mark.parametrize("to", ["sync", "batch-renorm", "ghost", "mabn", "per-domain"])
def test_renorm_needs_a_positive_eps(to: str) -> None:
    with pytest.raises(RepairError, match=r"\(root\) \(BatchNorm2d\) has eps 0, and"):
        bnprobe.convert(nn.BatchNorm2d(3, eps=0.0), to=to)


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(64, 32, 32), (48, 32, 24), (32, 32, 16), (16, 32, 8), (16, 4, 4), (7, 32, 1), (2, 32, 1), (1, 32, 1)],
)
def test_groups_are_the_largest_divisor_that_leaves_two_channels(channels: int, most: int, groups: int) -> None:
    assert groups_for(channels, most) == groups


def test_group_norm_never_makes_a_vector_zero() -> None:
    layer = bnprobe.convert(nn.BatchNorm1d(16), to="group-norm")
    assert layer(torch.randn(4, 16)).abs().mean() > 0.5
    assert bnprobe.convert(nn.BatchNorm2d(16), to="group-norm", groups=4).num_groups == 4
    with pytest.raises(RepairError, match="has one channel"):
        bnprobe.convert(nn.BatchNorm1d(1), to="group-norm")
    assert bnprobe.convert(nn.BatchNorm2d(1), to="group-norm").num_groups == 1


def test_one_refusal_converts_nothing_and_names_all_of_them() -> None:
    model = nn.Sequential(BatchNormRelu(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(RepairError) as caught:
        bnprobe.convert(model, inplace=True)
    assert str(caught.value).splitlines() == [
        "Cannot be converted to batch-renorm:",
        "0 (BatchNormRelu) does more than normalize and apply its child modules; that would be lost.",
        "2 (BatchNorm2d) keeps no running statistics (track_running_stats=False): make it with"
        " track_running_stats=True and recalibrate first.",
        "Name the others (1) in layers=[...] to convert them alone.",
    ]
    assert type(model[1]) is nn.BatchNorm2d
    assert type(bnprobe.convert(model, ["1"])[1]) is BatchRenorm2d


def test_a_model_without_bn_is_refused() -> None:
    with pytest.raises(RepairError, match="Linear has no Batch Normalization layer"):
        bnprobe.convert(nn.Linear(2, 2))
    with pytest.raises(RepairError, match="No BN layer was named"):
        bnprobe.convert(Residual(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "renorm"}, r"the nearest is batch-renorm\) for to, but got the text 'renorm'"),
        ({"to": "CBN"}, r"the nearest is cross-iteration\) for to, but got the text 'CBN'"),
        ({"to": "gated", "blend": 2.0}, "for blend, but got 2.0"),
        ({"to": "frozen", "groups": 4}, r"groups=4 has no effect on frozen: it is a setting of group-norm\."),
        ({"to": "frozen", "renorm": {"r_max": 2.0}}, "has no effect on frozen: it is a setting of batch-renorm"),
        ({"blend": 0.5}, r"blend=0\.5 has no effect on batch-renorm: it is a setting of .*instance-renorm.* and gated"),
        ({"group": 4}, 'no option "group".*the nearest is "groups"'),
        ({"seeds": 5}, 'no option "seeds"'),
        ({"to": "auto"}, "trains every target to choose one"),
        ({"renorm": {"r_max": 0.5}}, "for renorm.r_max, but got 0.5"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bnprobe.convert(Residual(), **options)
