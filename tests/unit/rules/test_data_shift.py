"""BN206."""

from __future__ import annotations

from bnprobe.testing import make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import LIMIT, failed, passed, skipped


def test_evaluation_data_must_be_surely_far_away() -> None:
    layers = [make_layer(name, make_shares(data_shift=shift)) for name, shift in [("far", 0.2), ("near", 0.05)]]
    assert run_rule("BN206", make_evidence(*layers, evaluation=True)) == [
        failed(
            "BN206",
            "far",
            "Evaluation data as a whole lies D = 0.2 from the training data (at least 0.18, 95%; the limit is 0.047).",
            0.2,
            LIMIT,
        ),
        passed("BN206", "near", "Evaluation data is D = 0.05 away.", 0.05, LIMIT),
    ]


def test_evaluation_data_is_asked_for() -> None:
    reason = "needs evaluation data: give eval_data in the spec or load_eval_data in the model file"
    assert run_rule("BN206", make_evidence(make_layer())) == [skipped("BN206", None, reason)]
