"""What loss and metric mean."""

from __future__ import annotations

from bnprobe.records import Chance, ChanceValues, Estimate
from bnprobe.rules import effect
from unit.rules.effects import chance


def test_what_was_learned_is_what_the_better_mode_knows() -> None:
    in_training, at_inference = chance((2.3, 2.3), (0.1, 4.1)), chance((0.1, 4.1), (2.3, 2.3))
    for found in (in_training, at_inference):
        assert abs((effect.learned((found,), "loss") or 0) - 4.0) < 1e-9
        assert effect.learned((found,), "metric") is None
    half = Chance("loss", ChanceValues(0.5, 1.5, Estimate(-1.0, None)), None)
    assert effect.learned((half,), "loss") == 1.0
