"""BN203."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bnprobe.rules.lag import likeliest_reason
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_path, make_shares, run_rule
from unit.rules.expect import HALF, failed, passed


def test_the_message_says_which_way_and_why() -> None:
    stale = make_layer("bn", make_shares(lag=0.6), eval=make_path(0.605, r=2.0, d=1.5))
    anatomy = [make_anatomy("bn", momentum=0.001, batches_tracked=100)]
    assert run_rule("BN203", make_evidence(stale, anatomy=anatomy)) == [
        failed(
            "BN203",
            "bn",
            "The running statistics are not those of the training data: at inference the standard deviation of a"
            " typical batch is 2 times theirs, and its mean is 1.5 of their standard deviations away. Most likely"
            " reason: too few updates: after 100 with momentum=0.001, 90% of their weight is still on the initial mean"
            " 0 and variance 1. (It accounts for D = 0.6 of 0.6, 99%; the limit is 0.047.)",
            0.6,
            HALF,
        )
    ]


def test_a_share_that_another_offsets_means_that_nothing_is_wrong() -> None:
    recalibrated = make_layer("bn", make_shares(small_batch=0.2, lag=-0.3, dropout=0.3))
    facts = make_evidence(recalibrated)
    assert [verdict.outcome for verdict in run_rule("BN204", facts)] == ["passed"]
    assert [verdict.outcome for verdict in run_rule("BN201", facts)] == ["failed"]


def test_an_unsure_share_passes_unless_it_is_the_largest() -> None:
    unsure = make_layer("bn", make_shares(small_batch=0.03, lag=0.025))
    largest = make_layer("bn", make_shares(small_batch=0.025, lag=0.03))
    message = "This cause accounts for D = 0.025, which is not significantly above the limit (95%)."
    told = passed("BN203", "bn", message, 0.025, HALF)
    assert run_rule("BN203", make_evidence(unsure)) == [told]
    assert [verdict.outcome for verdict in run_rule("BN203", make_evidence(largest))] == ["failed"]


def test_values_that_overflow_at_inference_only() -> None:
    layer = replace(make_layer("bn", train=make_path(0.01), eval=None, flagged=True), shares=None)
    message = (
        "The layer's values overflow at inference but not in training: its running statistics, or those of an earlier"
        " layer, are far from those of the training data."
    )
    assert run_rule("BN203", make_evidence(layer)) == [failed("BN203", "bn", message)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trains_statistics": False}, "training does not update them (eval mode)"),
        ({"momentum": 0.0}, "momentum=0, with which they are never updated"),
        ({"batches_tracked": 0}, "num_batches_tracked is 0"),
        ({"batches_tracked": 20}, "too few updates: after 20 with momentum=0.1, 12% of their weight"),
        ({"momentum": 1e-3, "batches_tracked": 9000}, "momentum=0.001 averages over about the last 1,000 batches"),
        ({"momentum": 0.9}, "momentum=0.9 averages over the last few batches only"),
        ({}, "the weights changed faster than the average follows"),
        ({"momentum": None}, "the weights changed faster than the average follows"),
        ({"batches_tracked": None}, "the weights changed faster than the average follows"),
    ],
)
def test_the_likeliest_reason(changes: dict[str, object], reason: str) -> None:
    assert likeliest_reason(make_anatomy(**changes)).startswith(reason)
