"""What loss and metric mean."""

from __future__ import annotations

from bnprobe.records import Chance, ChanceValues, Estimate
from bnprobe.rules import effect
from bnprobe.testing import make_evidence, make_layer
from unit.rules.effects import chance, metric, tried


def test_statistics_that_gain_on_held_out_data_cost_something_at_inference() -> None:
    layer, same = make_layer(), metric(0.9, 0.9)
    for gaps, remedies, standing in (
        ((same,), (), "same"),
        ((same,), (tried(0.9, 0.9),), "same"),
        ((same,), (tried(0.8, 0.9),), "worse"),
        ((same,), (tried(0.8, 0.9, "evaluation statistics"),), "same"),  # that is the data
        ((metric(0.9, 0.8),), (tried(0.8, 0.8),), "worse"),
        ((), (), "not measured"),
    ):
        assert effect.at_inference(make_evidence(layer, gaps=gaps, remedies=remedies)) == standing


def test_what_was_learned_is_what_the_better_mode_knows() -> None:
    in_training, at_inference = chance((2.3, 2.3), (0.1, 4.1)), chance((0.1, 4.1), (2.3, 2.3))
    for found in (in_training, at_inference):
        assert abs((effect.learned((found,), "loss") or 0) - 4.0) < 1e-9
        assert effect.learned((found,), "metric") is None
    half = Chance("loss", ChanceValues(0.5, 1.5, Estimate(-1.0, None)), None)
    assert effect.learned((half,), "loss") == 1.0
