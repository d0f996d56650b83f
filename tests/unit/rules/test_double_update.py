"""BN301."""

from __future__ import annotations

from bnprobe.records import Updates
from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import failed, passed, skipped


def test_more_updates_than_calls_fail() -> None:
    layers = [
        make_layer("once", updates=Updates(1.0, 0.1, 0.1, 0.01)),
        make_layer("twice", updates=Updates(2.0, 0.19, 0.1, 0.01)),
        make_layer("off", make_shares(lag=0.3), updates=Updates(2.0, None, None, 0.01)),
        make_layer("called twice", calls_per_forward=2, updates=Updates(2.0, 0.19, 0.1, 0.01)),
        make_layer("fast", updates=Updates(1.0, 0.19, 0.1, 0.01)),
        make_layer("unseen"),
    ]
    assert run_rule("BN301", make_evidence(*layers)) == [
        passed(
            "BN301",
            "once",
            "Updates per training step: 1, expected 1; weight of a step: 0.1, expected from momentum 0.1.",
            1.0,
            1.0,
        ),
        failed(
            "BN301",
            "twice",
            "Updates per training step: 2, expected 1; weight of a step: 0.19, expected from momentum 0.1.",
            2.0,
            1.0,
        ),
        failed(
            "BN301",
            "off",
            "Updates per training step: 2, expected 1.",
            2.0,
            1.0,
            "error",
        ),
        passed(
            "BN301",
            "called twice",
            "Updates per training step: 2, expected 2; weight of a step: 0.19, expected from momentum 0.19.",
            2.0,
            2.0,
        ),
        failed(
            "BN301",
            "fast",
            "Updates per training step: 1, expected 1; weight of a step: 0.19, expected from momentum 0.1.",
            1.0,
            1.0,
        ),
        skipped("BN301", "unseen", "its updates were not recorded"),
    ]


def test_training_steps_are_asked_for() -> None:
    reason = "needs training steps: scan with --train-steps and a loss"
    assert run_rule("BN301", make_evidence(make_layer())) == [skipped("BN301", None, reason)]
