"""BN206."""

from __future__ import annotations

from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import LIMIT, failed, passed, skipped


def test_held_out_data_must_differ_significantly() -> None:
    layers = [make_layer(name, make_shares(data_shift=shift)) for name, shift in [("far", 0.2), ("near", 0.05)]]
    assert run_rule("BN206", make_evidence(*layers, held_out=True)) == [
        failed(
            "BN206",
            "far",
            "The mismatch of held-out against training data is D = 0.2 (95%: at least 0.18); the limit is 0.047.",
            0.2,
            LIMIT,
        ),
        passed("BN206", "near", "The mismatch of held-out against training data is D = 0.05.", 0.05, LIMIT),
    ]


def test_held_out_data_is_required() -> None:
    reason = "needs held-out data: give eval_data in the spec or load_eval_data in the model file"
    assert run_rule("BN206", make_evidence(make_layer())) == [skipped("BN206", None, reason)]
