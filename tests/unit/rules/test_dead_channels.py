"""BN106."""

from __future__ import annotations

import torch
from torch import nn

from bnprobe import scan
from bnprobe.rules import RULES
from bnprobe.testing import make_anatomy, make_evidence, run_rule
from unit.rules.expect import failed, passed, skipped

BELOW = "have a running variance below eps = 1e-05"
ALIKE = "The layer scales such channels down, with batch statistics as with running statistics."


def test_channels_below_eps_are_a_remark() -> None:
    layers = [
        make_anatomy("alive"),
        make_anatomy("small", dead=16, median_variance=1e-7),
        make_anatomy("poisoned", dead=1, median_variance=None),
        make_anatomy("none kept", has_running_statistics=False),
    ]
    all_of_them = f"16 of 16 channels (100%) {BELOW} (the median over channels is 1e-07). {ALIKE}"
    assert run_rule("BN106", make_evidence(anatomy=layers)) == [
        passed("BN106", "alive", "Every running variance is at least eps.", 0.0, 0.0),
        failed("BN106", "small", all_of_them, 16.0, 0.0),
        failed("BN106", "poisoned", f"1 of 16 channels (6.2%) {BELOW}. {ALIKE}", 1.0, 0.0),
        skipped("BN106", "none kept", "the layer has no running statistics"),
    ]


def test_constant_channels_are_a_warning() -> None:
    [found] = run_rule("BN106", make_evidence(anatomy=[make_anatomy(dead=9, constant=2)]))
    assert found.severity == "warning"
    assert found.message.endswith(f"{ALIKE} Of 2 less than 1% of a standard deviation is left: they are constant.")
    assert "why channels are constant" in found.remedy
    assert found.remedy.endswith("Such channels do not make training and inference differ.")


def test_no_remedy_changes_the_network() -> None:
    found = run_rule("BN106", make_evidence(anatomy=[make_anatomy(dead=16), make_anatomy(dead=16, constant=16)]))
    for text in (RULES["BN106"].remedy, *(verdict.remedy for verdict in found)):
        assert "prune" not in text.lower()
        assert "lower eps" not in text


def test_data_of_small_scale_and_a_large_eps_fail_no_scan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(8, eps=1e-3), nn.Linear(8, 3))
    data = list(torch.randn(1024, 8).mul_(0.01).split(64))
    with torch.no_grad():
        for batch in data * 5:
            model(batch)
    report = scan(model, data, 64)
    assert [(found.cause, found.severity) for found in report.diagnoses] == [("dead_channels", "info")]
