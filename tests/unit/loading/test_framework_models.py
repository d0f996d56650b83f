"""What frameworks offer as loss and metric is what their own training computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe.errors import DataError
from bnprobe.loading.frameworks.huggingface import HuggingFace
from bnprobe.loading.frameworks.vision import (
    class_accuracy,
    class_loss,
    detect,
    detection_loss,
    pixel_accuracy,
    pixel_loss,
)
from support.frameworks import framework

# ---- torchvision


class Heads(nn.Module):
    """Class scores and those of an auxiliary head, as Inception gives them in training."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1)[:, :3], images.flatten(1)[:, 3:6]


class Segmenter(nn.Module):
    """As torchvision's: a dictionary of the two heads."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"out": images[:, :3], "aux": images[:, 1:4]}


def test_classes() -> None:
    images, labels = torch.randn(5, 6, 1, 1), torch.tensor([0, 1, 2, 1, 0])
    scores = images.flatten(1)[:, :3]
    assert class_loss(Heads(), (images, labels)) == F.cross_entropy(scores, labels)
    assert class_accuracy(Heads(), [images, labels]) == (scores.argmax(1) == labels).float().mean()


def test_pixels() -> None:
    images, labels = torch.randn(2, 4, 3, 3), torch.randint(0, 3, (2, 3, 3))
    labels[0, 0] = 255
    reference = F.cross_entropy(images[:, :3], labels, ignore_index=255) + 0.5 * F.cross_entropy(
        images[:, 1:4], labels, ignore_index=255
    )
    assert pixel_loss(Segmenter(), (images, labels)) == reference
    hits = [
        bool(images[sample, :3, row, column].argmax() == labels[sample, row, column])
        for sample in range(2)
        for row in range(3)
        for column in range(3)
        if labels[sample, row, column] != 255
    ]
    assert pixel_accuracy(Segmenter(), (images, labels)) == pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("batch", [torch.zeros(2, 6), (torch.zeros(2, 6), torch.zeros(2)), (torch.zeros(2, 6), "a")])
def test_batches_without_classes(batch: Any) -> None:
    with pytest.raises(DataError, match="no pairs of images and labels with an index of a class for each sample"):
        class_loss(Heads(), batch)
    with pytest.raises(DataError, match="for each pixel"):
        pixel_accuracy(Segmenter(), batch)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    framework("torchvision")
    models = framework("torchvision.models")
    torch.manual_seed(0)
    made: nn.Module = models.get_model(
        "ssdlite320_mobilenet_v3_large", num_classes=3, weights=None, weights_backbone=None
    )
    return made


def pictures() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    targets = [{"boxes": torch.tensor([[2.0, 2.0, 20.0, 24.0]]), "labels": torch.tensor([label])} for label in (1, 2)]
    return [torch.rand(3, 32, 32), torch.rand(3, 28, 32)], targets


def test_the_loss_of_a_detector(detector: nn.Module) -> None:
    """In training that of the model itself; at inference with its norms as they are there."""
    images, targets = pictures()
    for parameter in detector.parameters():
        parameter.requires_grad_(False)
    detector.train()
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    expected = sum(detector(images, targets).values())
    detector.load_state_dict(state)
    assert detection_loss(detector, (images, targets)) == pytest.approx(float(expected))
    detector.load_state_dict(state)
    detector.eval()
    found = detection_loss(detector, (tuple(images), tuple(targets)))
    assert found != pytest.approx(float(expected))
    assert not any(module.training for module in detector.modules())
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())


def test_detections(detector: nn.Module) -> None:
    images, targets = pictures()
    detector.eval()
    assert [set(found) for found in detect(detector, (images, targets))] == [{"boxes", "scores", "labels"}] * 2
    assert len(detect(detector, torch.rand(2, 3, 32, 32))) == 2
    detector.train()
    assert set(detect(detector, torch.rand(2, 3, 32, 32))) == {"bbox_regression", "classification"}
    with pytest.raises(DataError, match="SSD takes a list of images and a list of targets"):
        detect(detector, (images, torch.zeros(2)))


# ---- Hugging Face

_SMALL: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]},
    "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "groups_width": 4},
    "MobileNetV2": {"depth_multiplier": 0.1, "min_depth": 4},
    "Cvt": {"embed_dim": [8, 8, 8], "num_heads": [1, 1, 1], "depth": [1, 2, 3]},
}


@pytest.mark.parametrize("family", _SMALL)
def test_the_loss_is_that_of_the_models_class(family: str) -> None:
    transformers = framework("transformers")
    framework(f"transformers.models.{family.lower().replace('mobilenetv2', 'mobilenet_v2')}")
    config = getattr(transformers, f"{family}Config")(num_labels=4, **_SMALL[family])
    model = getattr(transformers, f"{family}ForImageClassification")(config).eval()
    batch = {"pixel_values": torch.randn(6, 3, 32, 32), "labels": torch.tensor([0, 1, 2, 3, 0, 1]), "id": ["a"] * 6}
    project = _project_of(model)
    with torch.no_grad():
        expected = model(pixel_values=batch["pixel_values"], labels=batch["labels"])
        assert project.functions["loss"](model, batch) == pytest.approx(float(expected.loss), rel=1e-6)
        renamed = {"pixel_values": batch["pixel_values"], "label": batch["labels"]}
        assert project.functions["loss"](model, renamed) == pytest.approx(float(expected.loss), rel=1e-6)
        right = (expected.logits.argmax(1) == batch["labels"]).float().mean()
        assert project.functions["metric"](model, batch) == right
        output = project.functions["forward"](model, batch)
    assert set(output) == {"logits"}
    torch.testing.assert_close(output["logits"], expected.logits)


def test_several_labels_have_no_accuracy() -> None:
    transformers = framework("transformers")
    framework("transformers.models.resnet")
    config = transformers.ResNetConfig(num_labels=4, problem_type="multi_label_classification", **_SMALL["ResNet"])
    project = _project_of(transformers.ResNetForImageClassification(config))
    assert set(project.functions) == {"forward", "loss"}
    project = _project_of(transformers.ResNetModel(config))
    assert set(project.functions) == {"forward"}


def _project_of(model: Any) -> Any:
    from bnprobe.config.spec import Spec

    reader = HuggingFace()
    assert reader.claims(model)
    return reader.project(model, "net.py:net", Spec.model_validate({"model": {"target": "net.py:net"}}))
