"""The stages of a scan are named after functions that there are."""

from __future__ import annotations

import torch

from benchmarks import stages
from benchmarks.contenders import whole_scan
from benchmarks.setting import Setting


def test_the_time_of_a_scan_is_that_of_its_stages() -> None:
    """A renamed function is an AttributeError; where one moved, its stage takes no time."""
    setting = Setting(torch.device("cpu"), ("resnet18",), images=8, image_size=32, rounds=1)
    with stages.timed(setting.device) as spent:
        report = whole_scan(setting.network("resnet18"), setting.micro_batches())
    assert any(layer.flagged for layer in report.layers)
    without = {stage for stage in stages.STAGES if spent[stage] == 0}
    assert without <= {"remedies"}  # there is no loss to score them by
