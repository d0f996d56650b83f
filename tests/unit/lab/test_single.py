"""Batches of one image: what theory fixes, and that a run has its figures."""

from __future__ import annotations

import torch

from bnprobe.lab.data import batches, load
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import BatchNorm, instance_norm
from bnprobe.lab.networks import conv_net, train
from bnprobe.lab.single import BATCH_NORM, DEFAULT, GATED, INSTANCE_NORM, Single
from bnprobe.records import Trial


def test_batch_norm_trains_on_single_images_as_instance_norm() -> None:
    images = load(None)
    outputs = []
    for norm in (BatchNorm, instance_norm):
        torch.manual_seed(0)
        model = conv_net((1, 8, 8), 10, norm).double()
        draws = torch.Generator().manual_seed(0)
        train(model, ((x.double(), y) for x, y in batches(images.train, images.train_labels, 1, 20, draws)), 0.01)
        outputs.append(torch.cat([model(image[None].double()) for image in images.test[:20]]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)


def test_all_see_the_same_images_and_the_default_build_learns() -> None:
    torch.manual_seed(0)
    found = Single().trial({"layer": DEFAULT}, 0, Budget(0.5))
    accuracy = found["accuracy"]
    assert isinstance(accuracy, float)
    assert accuracy > 0.5
    assert accuracy == found["accuracy after 2048 images"]


def test_the_criterion_is_relative_to_the_default_build() -> None:
    accuracies = {DEFAULT: 0.8, BATCH_NORM: 0.6, INSTANCE_NORM: 0.76}
    trials = [
        Trial({"layer": name}, seed, {"accuracy": found + seed / 1000, "accuracy in train mode": 0.76 + seed / 1000}, 0)
        for name, found in accuracies.items()
        for seed in range(3)
    ]
    claims = list(Single().claims(Results(trials), Budget()))
    assert [claim.verdict for claim in claims[:3]] == ["refuted", "open", "shown"]
    assert claims[5].verdict == "shown"


def test_gates_and_accuracies_are_measured_while_learning() -> None:
    found = Single().trial({"layer": GATED}, 0, Budget(0.01))
    assert {f"gate of layer {layer} after {32 * point} images" for layer in (1, 2, 3) for point in range(1, 9)} <= set(
        found
    )
    assert found["gate"] != 0.5
