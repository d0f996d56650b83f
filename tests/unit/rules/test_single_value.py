"""BN208."""

from __future__ import annotations

from bnprobe.records import CallMeasurement
from bnprobe.testing import make_anatomy, make_evidence, make_layer, run_rule
from unit.rules.expect import failed, passed


def test_one_value_stops_training_unless_the_layer_is_frozen() -> None:
    calls = (CallMeasurement(0, 8, None, None), CallMeasurement(1, 1, None, None))
    layers = [
        make_layer("two", values_per_channel=2),
        make_layer("one", values_per_channel=1),
        make_layer("second call", values_per_channel=8, calls_per_forward=2, calls=calls),
        make_layer("frozen", values_per_channel=1),
    ]
    anatomy = [make_anatomy(layer.name, trains_statistics=layer.name != "frozen") for layer in layers]
    message = "A batch gives one value per channel, which is always normalized to 0: PyTorch raises an error."
    assert run_rule("BN208", make_evidence(*layers, anatomy=anatomy)) == [
        passed("BN208", "two", "A batch gives 2 values per channel.", 2.0, 1.0),
        failed("BN208", "one", message, 1.0, 1.0),
        failed("BN208", "second call", message, 1.0, 1.0),
        passed("BN208", "frozen", "The layer uses its running statistics in training.", 1.0, 1.0),
    ]
