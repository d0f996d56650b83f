"""timm and torchvision by name, with the checkpoints of their training scripts."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from functional.command import CLEAN, COMMAND, ERROR, FINDINGS, NOTHING, Workspace
from support.frameworks import framework

timm, torchvision = framework("timm"), framework("torchvision")
models = framework("torchvision.models")

DATA = """\
import torch

def loader_of(samples, size=2, **more):
    return torch.utils.data.DataLoader(samples, batch_size=size, **more)

random = torch.Generator().manual_seed(0)

def images(count, *shape):
    return torch.randn(count, *shape, generator=random)

classes = loader_of([(image, index % 7) for index, image in enumerate(images(16, 3, 32, 32))])
clips = loader_of([(clip, index % 7) for index, clip in enumerate(images(8, 3, 4, 16, 16))])
masks = loader_of([(image, torch.randint(0, 5, (32, 32), generator=random)) for image in images(8, 3, 32, 32)])
alone = loader_of(images(16, 3, 32, 32))

def pictured(count):
    for index, image in enumerate(images(count, 3, 64, 72)):
        boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0]])
        yield image[:, : 64 - 8 * (index % 2)], {"boxes": boxes, "labels": torch.tensor([index % 2 + 1])}

pictures = loader_of(list(pictured(8)), collate_fn=lambda samples: tuple(zip(*samples)))
"""

SMALL = {"min_size": 32, "max_size": 64}


@pytest.fixture
def here(workspace: Workspace) -> Workspace:
    workspace.write("data.py", DATA)
    return workspace


def scan(here: Workspace, target: str, data: str | None, *more: str, **args: Any) -> dict[str, Any]:
    """The JSON report of a scan of four batches."""
    result = here.run("scan", *command(target, data, *more, **args))
    assert result.code in (CLEAN, FINDINGS), result
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def command(target: str, data: str | None, *more: str, **args: Any) -> list[str]:
    given = [target, "--batches", "3", "--format", "json", *more]
    given += ["--data", f"data.py:{data}"] if data else []
    return [*given, *(f"--model-arg={name}={value}" for name, value in args.items())]


def moved(model: nn.Module) -> nn.Module:
    """A model whose running statistics are no longer those of a new one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.num_batches_tracked.fill_(100)
    return model


def namespace(**args: Any) -> argparse.Namespace:
    return argparse.Namespace(workers=4, device="cuda", **args)


# ---- timm


def checkpoint_of_timm(folder: Path, **args: Any) -> Path:
    """As train.py of timm saves it, with an average of the weights beside them."""
    model = moved(timm.create_model("mobilenetv3_small_050", num_classes=7, bn_momentum=0.03))
    state = model.state_dict()
    average = {f"module.{name}": value.clone() for name, value in state.items()}
    given = namespace(model="mobilenetv3_small_050", num_classes=7, bn_momentum=0.03, drop=0.0, model_kwargs={}, **args)
    saved = {"epoch": 3, "arch": "mobilenetv3_small_050", "state_dict": state, "state_dict_ema": average, "args": given}
    torch.save(saved, folder / "last.pth.tar")
    return folder / "last.pth.tar"


def test_a_checkpoint_of_timm_says_how_its_model_was_made(here: Workspace) -> None:
    checkpoint_of_timm(here.folder)
    report = scan(here, "timm:mobilenetv3_small_050", "classes", "--checkpoint", "last.pth.tar")
    assert report["layers"][0]["momentum"] == 0.03
    notes = " ".join(report["scan"]["notes"])
    assert "argparse.Namespace" in notes
    assert "--key state_dict_ema" in notes
    assert "num_classes=7, bn_momentum=0.03 as in its checkpoint" in report["scan"]["taken"]["model"]
    assert report["scan"]["taken"]["loss"] == "cross-entropy"
    assert report["summary"]["output"]["loss"]["eval"] > 0
    averaged = scan(
        here, "timm:mobilenetv3_small_050", "classes", "--checkpoint", "last.pth.tar", "--key", "state_dict_ema"
    )
    assert averaged["layers"][0]["eval"] == report["layers"][0]["eval"]


def test_classes_are_counted_where_the_file_does_not_say(here: Workspace) -> None:
    torch.save(moved(timm.create_model("resnet10t", num_classes=7)).state_dict(), here.folder / "weights.pth")
    report = scan(here, "timm:resnet10t", "classes", "--checkpoint", "weights.pth")
    assert "num_classes=7 as in its checkpoint" in report["scan"]["taken"]["model"]


def test_the_weights_of_another_model(here: Workspace) -> None:
    checkpoint_of_timm(here.folder)
    message = here.run("scan", *command("timm:resnet18", "classes", "--checkpoint", "last.pth.tar")).error(ERROR)
    assert "last.pth.tar holds mobilenetv3_small_050, by what its training script was told, not resnet18" in message
    assert "Scan timm:mobilenetv3_small_050." in message


def test_a_name_that_is_not_there(here: Workspace) -> None:
    message = here.run("scan", *command("timm:resnet19", "classes")).error(ERROR)
    assert 'timm has no model "resnet19". The nearest names are ' in message


def test_without_labels_there_is_no_loss(here: Workspace) -> None:
    report = scan(here, "timm:resnet10t", "alone")
    assert report["summary"]["output"]["loss"] is None
    assert "loss" not in report["scan"]["taken"]
    assert any(note.startswith("Loss cannot be computed on the training data") for note in report["scan"]["notes"])


# ---- torchvision


def test_a_checkpoint_of_torchvision(here: Workspace) -> None:
    model = moved(models.mobilenet_v3_small(num_classes=7))
    given = namespace(model="mobilenet_v3_small", weights=None)
    torch.save({"model": model.state_dict(), "epoch": 2, "args": given}, here.folder / "checkpoint.pth")
    report = scan(here, "torchvision:mobilenet_v3_small", "classes", "--checkpoint", "checkpoint.pth")
    assert "num_classes=7 as in its checkpoint" in report["scan"]["taken"]["model"]
    assert report["layers"][0]["batches_tracked"] == 100


def test_segmentation(here: Workspace) -> None:
    model = moved(models.get_model("lraspp_mobilenet_v3_large", num_classes=5, weights=None, weights_backbone=None))
    torch.save({"model": model.state_dict()}, here.folder / "model_9.pth")
    report = scan(here, "torchvision:lraspp_mobilenet_v3_large", "masks", "--checkpoint", "model_9.pth")
    output = report["summary"]["output"]
    assert output["relative_l2"] > 0
    assert output["loss"]["eval"] > 0
    assert 0 <= output["metric"]["eval"] < 0.5
    assert report["scan"]["taken"]["metric"] == "accuracy of pixels"


def test_auxiliary_heads_are_those_of_the_training_run(here: Workspace) -> None:
    name = "deeplabv3_mobilenet_v3_large"
    model = moved(models.get_model(name, num_classes=5, weights=None, weights_backbone=None, aux_loss=True))
    saved = {"model": model.state_dict(), "args": namespace(model=name, aux_loss=True)}
    torch.save(saved, here.folder / "model_9.pth")
    report = scan(here, f"torchvision:{name}", "masks", "--checkpoint", "model_9.pth")
    assert any(layer["name"].startswith("aux_classifier") for layer in report["layers"])


def test_video(here: Workspace) -> None:
    report = scan(here, "torchvision:r3d_18", "clips", num_classes=7)
    assert {layer["kind"] for layer in report["layers"]} == {"BatchNorm3d"}
    assert report["summary"]["output"]["metric"] is not None


@pytest.mark.parametrize("data", ["pictures", None])
def test_detection(here: Workspace, data: str | None) -> None:
    """Losses in training, detections at inference, which cannot be compared: the loss is taken of both."""
    shape = [] if data else ["--input-shape", "3,32,32", "--batch-size", "2"]
    report = scan(here, "torchvision:fcos_resnet50_fpn", data, *shape, num_classes=3, **SMALL)
    assert len(report["layers"]) == 53
    output = report["summary"]["output"]
    assert "different shapes and cannot be compared" in output["note"]
    if data:
        assert output["loss"]["train"] != output["loss"]["eval"] > 0


def test_detectors_are_frozen_as_in_their_training_run(here: Workspace) -> None:
    """torchvision freezes the norms of a backbone that it has weights for: such a checkpoint has no counters."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    model = models.get_model(name, num_classes=3, weights=None, weights_backbone=None)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({"model": state}, here.folder / "model_9.pth")
    result = here.run("scan", *command(f"torchvision:{name}", "pictures", "--checkpoint", "model_9.pth", **SMALL))
    assert "(FrozenBatchNorm2d): frozen batch norm: the same constants" in result.error(NOTHING)


def test_batches_that_a_detector_does_not_take(here: Workspace) -> None:
    message = here.run("scan", *command("torchvision:fcos_resnet50_fpn", "classes", **SMALL)).error(ERROR)
    assert "FCOS takes a list of images and a list of targets" in message
    assert "collate_fn=lambda samples: tuple(zip(*samples))" in message


def test_models_without_batch_norm(here: Workspace) -> None:
    result = here.run("scan", *command("timm:vit_tiny_patch16_224", None, "--input-shape=3,224,224", "--batch-size=2"))
    assert "no Batch Normalization layer" in result.error(NOTHING)


def test_a_torchvision_for_another_torch(here: Workspace) -> None:
    """In a process of its own, in which nothing stands in for the operators."""
    if _loads_operators() or not COMMAND.exists():
        pytest.skip("torchvision belongs to this PyTorch")
    result = here.run_installed("scan", "torchvision:resnet18", "--input-shape", "3,32,32", "--batch-size", "2")
    assert "operator torchvision::nms does not exist" in result.stderr
    assert f"torchvision was built for another PyTorch than {torch.__version__}" in result.stderr
    assert "pip install --force-reinstall torch torchvision" in result.stderr


def _loads_operators() -> bool:
    extension = importlib.import_module("torchvision.extension")
    return bool(extension._has_ops())
