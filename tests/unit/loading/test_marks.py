"""Tensors by which checkpoints of converted layers are known."""

from __future__ import annotations

from torch import nn

import bnprobe
from bnprobe.config.targets import TARGETS


def test_every_target_says_which_tensors_its_layers_have_beside_those_of_bn() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    of_bn = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for target in TARGETS:
        converted = bnprobe.convert(plain, to=target.name)
        own = {name.partition(".")[2] for name in converted.state_dict() if name.startswith("1.")}
        assert set(target.marks) <= own
        assert bool(own - of_bn) == bool(target.marks), target.name
    marks = [mark for target in TARGETS for mark in target.marks]
    assert len(marks) == len(set(marks))
