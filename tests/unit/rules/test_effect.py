"""What loss and metric mean."""

from __future__ import annotations

from bnprobe.records import Chance, ChanceValues, Estimate
from bnprobe.rules import effect
from unit.rules.effects import chance, metric, tried


def test_what_was_learned_is_what_the_better_mode_knows() -> None:
    in_training, at_inference = chance((2.3, 2.3), (0.1, 4.1)), chance((0.1, 4.1), (2.3, 2.3))
    for found in (in_training, at_inference):
        assert abs((effect.learned((found,), "loss") or 0) - 4.0) < 1e-9
        assert effect.learned((found,), "metric") is None
    half = Chance("loss", ChanceValues(0.5, 1.5, Estimate(-1.0, None)), None)
    assert effect.learned((half,), "loss") == 1.0


def test_no_gain_is_known_only_where_the_interval_excludes_one() -> None:
    gaps = (metric(0.9, 0.8),)
    for after, width, known in ((0.8, 0.01, True), (0.7, 0.01, True), (0.8, 0.2, False), (0.9, 0.01, False)):
        found = effect.of_remedy(tried(0.8, after, width=width), gaps)
        assert (after, width, found.is_no_gain) == (after, width, known)
    assert not effect.Effect(()).is_no_gain


def test_values_are_written_as_in_tables() -> None:
    [change] = effect.inconsistency((metric(0.966, 0.995),)).changes
    assert change.words("before", "after") == "the metric is 0.966 before and 0.995 after"
    [same] = effect.inconsistency((metric(0.9951, 0.9949),)).changes
    assert same.words("with this", "with that") == "the metric is 0.995 with this and with that"
