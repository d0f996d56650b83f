"""BN209."""

from __future__ import annotations

from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.expect import failed, passed

MESSAGE = "Each batch is one image, which in training is normalized with its own mean and variance."
FINE = "In training it is no instance norm."


def test_batches_of_one_image_are_an_instance_norm() -> None:
    layers = [
        make_layer("steady"),
        make_layer("flagged", make_shares(small_batch=0.3)),
        make_layer("one value", values_per_channel=1),
        make_layer("frozen"),
    ]
    anatomy = [make_anatomy(layer.name, trains_statistics=layer.name != "frozen") for layer in layers]
    assert run_rule("BN209", make_evidence(*layers, anatomy=anatomy, batch_size=1)) == [
        failed("BN209", "steady", MESSAGE, 1.0, 1.0, "warning"),
        failed("BN209", "flagged", MESSAGE, 1.0, 1.0, "error"),
        passed("BN209", "one value", FINE, 1.0, 1.0),
        passed("BN209", "frozen", FINE, 1.0, 1.0),
    ]


def test_two_images_are_not() -> None:
    assert run_rule("BN209", make_evidence(make_layer(), batch_size=2)) == [passed("BN209", "bn", FINE, 2.0, 1.0)]
