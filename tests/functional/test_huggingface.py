"""Folders of Hugging Face, models of transformers and data sets of datasets are scanned as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from functional.command import CLEAN, ERROR, FINDINGS, NOTHING, Workspace
from support.compare import assert_same_json
from support.frameworks import framework

transformers = framework("transformers")
framework("transformers.models.resnet.modeling_resnet")
framework("datasets")

SIZE, CLASSES = 16, 4

DATA = """\
import datasets
import numpy as np
import torch
from PIL import Image

def rows(count, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    return {
        "pixel_values": [(random.normal(size=(3, 16, 16)) + label).astype("float32") for label in labels],
        "label": labels.tolist(),
        "id": [str(index) for index in range(count)],
    }

dataset = datasets.Dataset.from_dict(rows(64, 0))
splits = datasets.DatasetDict({"train": dataset, "validation": datasets.Dataset.from_dict(rows(32, 1))})
stream = dataset.to_iterable_dataset()

def make():
    return dataset

def pictures(*names):
    random = np.random.default_rng(2)
    found = [Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(32)]
    labels = {"label": [index % 4 for index in range(32)]}
    return datasets.Dataset.from_dict(dict.fromkeys(names, found) | labels)

images, two = pictures("image"), pictures("image", "photo")
modes = ("L", "RGBA", "P", "1", "CMYK", "RGB")
mixed = [{**images[index], "image": images[index]["image"].convert(modes[index % 6])} for index in range(32)]
misnamed = dataset.rename_column("pixel_values", "pixel_value")
unlabelled = dataset.remove_columns("label")

class Pairs(torch.utils.data.Dataset):  # as torchvision's folders of images without a transform
    def __len__(self):
        return 32
    def __getitem__(self, index):
        return images[index]["image"], images[index]["label"]

pairs = Pairs()

def collate(samples):
    return {"pixel_values": torch.stack([torch.tensor(s["pixel_values"]) for s in samples]),
            "labels": torch.tensor([s["label"] for s in samples])}

loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate)

def misspelt(samples):
    batch = collate(samples)
    return {"pixel_values": batch["pixel_values"], "label_s": batch["labels"]}

wrong_keys = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=misspelt)
"""

HAND_WRITTEN = """\
import torch
from transformers import ResNetForImageClassification
from data import collate, dataset

def load_model():
    return ResNetForImageClassification.from_pretrained("resnet")

loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate)

def forward(model, batch):
    return model(pixel_values=batch["pixel_values"]).logits

def loss(model, batch):
    logits = model(pixel_values=batch["pixel_values"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"])

def metric(model, batch):
    logits = model(pixel_values=batch["pixel_values"]).logits
    return (logits.argmax(1) == batch["labels"]).float().mean()
"""


def resnet(**changes: Any) -> Any:
    """A small ResNet, with running statistics as after some training."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": CLASSES}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, **changes))
    model.train()
    for _ in range(30):
        model(torch.randn(16, 3, SIZE, SIZE) + 1.5 * torch.rand(16, 1, 1, 1))
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as save_pretrained() leaves them: a whole one, one with a processor, one in several files."""
    folder = tmp_path_factory.mktemp("saved")
    model = resnet()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "resnet")
    model.save_pretrained(folder / "sharded", max_shard_size="4KB")
    model.save_pretrained(folder / "prepared")
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": SIZE}, crop_pct=1.0)
    processor.save_pretrained(folder / "prepared")
    model.half().save_pretrained(folder / "half")
    return folder


@pytest.fixture
def here(workspace: Workspace, saved: Path) -> Workspace:
    for folder in saved.iterdir():
        (workspace.folder / folder.name).symlink_to(folder)
    workspace.write("data.py", DATA)
    return workspace


def scan(here: Workspace, target: str, data: str | None = "dataset", *more: str, **sections: Any) -> dict[str, Any]:
    """The JSON report of a scan at batch size 8."""
    result = here.run("scan", spec(here, target, data, **sections), "--batches", "6", "--format", "json", *more)
    assert result.code in (CLEAN, FINDINGS), result
    return result.report(result.code)


def spec(here: Workspace, target: str, data: str | None = "dataset", **sections: Any) -> str:
    given = {"model": {"target": target}, "data": {"batch_size": 8}, "scan": {"what_if": False}, **sections}
    if data:
        given["data"]["target"] = f"data.py:{data}"
    here.write("spec.yaml", json.dumps(given))
    return "spec.yaml"


def error(here: Workspace, target: str, data: str | None = "dataset", **sections: Any) -> str:
    return here.run("scan", spec(here, target, data, **sections)).error(ERROR)


def figures(report: dict[str, Any]) -> Any:
    return {"layers": report["layers"], "output": report["summary"]["output"], "gaps": report["summary"]["gaps"]}


def test_the_figures_are_those_of_a_model_file(here: Workspace) -> None:
    here.write("model.py", HAND_WRITTEN)
    found = scan(here, "hf:resnet", "loader")
    here.write(
        "by_hand.yaml",
        json.dumps({"model": {"target": "model.py"}, "data": {"batch_size": 8}, "scan": {"what_if": False}}),
    )
    result = here.run("scan", "by_hand.yaml", "--batches", "6", "--format", "json")
    by_hand = result.report(result.code)
    assert found["scan"]["model"] == "hf:resnet"
    for report in (found, by_hand):
        for layer in report["layers"]:
            del layer["location"]
    assert_same_json(figures(found), figures(by_hand))


@pytest.mark.parametrize("data", ["dataset", "splits", "stream", "make", "loader"])
def test_data_sets_of_datasets(here: Workspace, data: str) -> None:
    report = scan(here, "hf:resnet", data)
    output = report["summary"]["output"]
    assert output["loss"]["eval"] > 0
    assert 0 <= output["metric"]["eval"] <= 1
    assert (report["summary"]["gaps"][0]["held_out"] is not None) == (data == "splits")


@pytest.mark.parametrize("folder", ["sharded", "half"])
def test_other_ways_to_save(here: Workspace, folder: str) -> None:
    report, whole = scan(here, f"hf:{folder}"), scan(here, "hf:resnet")
    said = [note for note in report["scan"]["notes"] if "float16" in note]
    assert len(said) == (folder == "half")
    assert report["scan"]["dtype"] == "float32"
    near = abs(report["layers"][0]["eval"]["mismatch"] / whole["layers"][0]["eval"]["mismatch"] - 1)
    assert near < (1e-2 if folder == "half" else 1e-6)


@pytest.mark.parametrize("data", ["images", "pairs"])
def test_images_are_prepared_as_the_folder_says(here: Workspace, data: str) -> None:
    report = scan(here, "hf:prepared", data)
    assert any("prepared/preprocessor_config.json says" in note for note in report["scan"]["notes"])
    assert report["summary"]["output"]["metric"] is not None


def test_photos_of_any_mode_are_in_the_colours_that_the_model_takes(here: Workspace) -> None:
    here.write("data.py", f"{DATA}\nmixed = datasets.Dataset.from_list(mixed)\n")
    assert scan(here, "hf:prepared", "mixed")["scan"]["images"] == 32


MODEL_FILES = {
    "an instance": "model = ResNetForImageClassification.from_pretrained('resnet')\n",
    "a function": "def load_model():\n    return ResNetForImageClassification.from_pretrained('resnet')\n",
    "a class": "class NetForImageClassification(ResNetForImageClassification):\n    pass\n",
}


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_models_of_transformers_in_a_model_file(here: Workspace, kind: str) -> None:
    start = "from transformers import ResNetConfig, ResNetForImageClassification\nfrom data import loader\n"
    here.write("model.py", start + MODEL_FILES[kind])
    sections: dict[str, Any] = {}
    if kind == "a class":
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": CLASSES}
        sections = {
            "model": {"target": "model.py:NetForImageClassification", "args": sizes},
            "checkpoint": {"path": "resnet"},
        }
    found, named = scan(here, "model.py", None, **sections), scan(here, "hf:resnet", "loader")
    for report in (found, named):
        for layer in report["layers"]:
            del layer["location"]
    assert_same_json(figures(found), figures(named))


def test_functions_of_the_model_file_come_first(here: Workspace) -> None:
    here.write("model.py", HAND_WRITTEN + "\ndef loss(model, batch):\n    return torch.tensor(2.5)\n")
    assert scan(here, "model.py", None)["summary"]["output"]["loss"]["eval"] == 2.5


def test_without_labels_there_is_no_loss(here: Workspace) -> None:
    report = scan(here, "hf:resnet", "unlabelled")
    assert report["summary"]["output"]["loss"] is None
    said = [note for note in report["scan"]["notes"] if note.startswith("Loss cannot be computed on the training data")]
    assert len(said) == 1
    assert "takes its loss from labels, but the batches have pixel_values" in said[0]


def test_init_says_that_the_batch_size_is_to_be_filled_in(here: Workspace) -> None:
    made = here.run("init", "--from", "hf:resnet", "--data", "data.py:dataset", "its")
    assert made.stdout.splitlines()[1:] == [
        "fill in first: data.batch_size: that of training",
        "then: bnprobe scan its/spec.yaml",
    ]
    path = here.folder / "its" / "spec.yaml"
    text = path.read_text()
    assert "Found: accuracy, from logits and labels" in " ".join(text.replace("\n# ", " ").split())
    assert here.run("scan", "its/spec.yaml").error().startswith("The batch size of dataset of data.py is unknown.")
    path.write_text(text.replace("  # batch_size: 32", "  batch_size: 8"))
    assert here.run("scan", "its/spec.yaml", "--batches", "2").code in (CLEAN, FINDINGS)


def test_synthetic_images(here: Workspace) -> None:
    result = here.run(
        "scan", "hf:resnet", "--input-shape", "3,16,16", "--batch-size", "8", "--batches", "2", "--format", "json"
    )
    assert result.report(result.code)["scan"]["synthetic"]


def test_a_checkpoint_besides_the_folder(here: Workspace) -> None:
    other = resnet()
    torch.save({"model": other.state_dict()}, here.folder / "last.pt")
    report = scan(here, "hf:resnet", checkpoint={"path": "last.pt"})
    assert 'The weights were taken from the key "model" of last.pt.' in report["scan"]["notes"]


def test_nothing_is_written_besides_the_report(here: Workspace) -> None:
    """Neither progress bars nor warnings of transformers."""
    result = here.run("scan", spec(here, "hf:resnet"), "--max-batches", "4")
    assert "Loading weights" not in result.stderr
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.WARNING


def test_the_network_is_not_asked(here: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*arguments: Any) -> None:
        raise AssertionError(f"connected to {arguments[1:]}")

    monkeypatch.setattr("socket.socket.connect", connect)
    scan(here, "hf:prepared", "images")
    assert "bnprobe downloads nothing" in error(here, "hf:google/mobilenet_v2_1.0_224")


def test_a_data_set_of_datasets_for_any_model(here: Workspace) -> None:
    here.write(
        "model.py",
        "from torch import nn\n"
        "from data import make as load_data\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, pixel_values):\n"
        "        return super().forward(pixel_values)\n"
        "model = Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n",
    )
    report = scan(here, "model.py", None)
    assert report["scan"]["images"] == 48
    assert report["layers"][0]["values_per_channel"] == 8 * 14 * 14


# ---- other classes of models

_SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 5),
    "conv_kernel": (10, 5),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
}
_BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 8],
    "patch_sizes": [3, 3],
    "strides": [2, 2],
    "num_attention_heads": [1, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
_TRANSFORMER = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 1)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "RegNetForImageClassification": ("RegNetConfig", {**_BACKBONE, "groups_width": 4}),
    "MobileNetV2ForImageClassification": ("MobileNetV2Config", {"depth_multiplier": 0.1, "min_depth": 4}),
    "EfficientNetForImageClassification": (
        "EfficientNetConfig",
        {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
    ),
    "SegformerForSemanticSegmentation": ("SegformerConfig", _SEGFORMER),
    "Wav2Vec2ConformerForSequenceClassification": ("Wav2Vec2ConformerConfig", _SPEECH),
    "ConvNextForImageClassification": ("ConvNextConfig", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}),
    "DetrForObjectDetection": (
        "DetrConfig",
        {**_TRANSFORMER, "d_model": 8, "num_queries": 2, "use_timm_backbone": False},
    ),
}
SAMPLES = """\
import torch
random = torch.Generator().manual_seed(0)
loader = torch.utils.data.DataLoader([
    {"%s": torch.randn(%s, generator=random), "labels": torch.randint(0, 4, %s, generator=random)} for _ in range(32)
], batch_size=8)
"""


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_models(here: Workspace, kind: str) -> None:
    config_class, settings = FAMILIES[kind]
    if kind.startswith("Detr"):
        settings = {**settings, "backbone_config": transformers.ResNetConfig(**_BACKBONE)}
    config = getattr(transformers, config_class)(num_labels=CLASSES, **settings)
    getattr(transformers, kind)(config).save_pretrained(here.folder / "model")
    speech, segmentation = "Wav2Vec2" in kind, "Segmentation" in kind
    shape, labels = ("2000" if speech else "3, 32, 32"), ("(32, 32)" if segmentation else "()")
    here.write("data.py", SAMPLES % ("input_values" if speech else "pixel_values", shape, labels))
    result = here.run("scan", spec(here, "hf:model", "loader"), "--batches", "4", "--format", "json")
    if kind.startswith("ConvNext"):
        assert "has no Batch Normalization layer" in result.error(NOTHING)
    elif kind.startswith("Detr"):
        assert "(DetrFrozenBatchNorm2d): frozen batch norm: the same constants" in result.error(NOTHING)
    else:
        output = result.report(result.code)["summary"]["output"]
        assert output["loss"]["eval"] == pytest.approx(1.386, abs=0.2)  # log(4): not trained
        assert 0 < output["metric"]["train"] < 0.6


def test_masks_are_prepared_with_their_images(here: Workspace) -> None:
    config = transformers.SegformerConfig(num_labels=CLASSES, **_SEGFORMER)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(here.folder / "model")
    transformers.SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(here.folder / "model")
    text = DATA.replace(
        'labels = {"label": [index % 4 for index in range(32)]}',
        'labels = {"annotation": [Image.fromarray(np.full((20, 24), index % 4, np.uint8)) for index in range(32)]}',
    )
    here.write("data.py", text)
    output = scan(here, "hf:model", "images")["summary"]["output"]
    assert output["metric"]["eval"] is not None


RECORDINGS = """\
import datasets
import numpy as np

random = np.random.default_rng(0)
lengths = random.integers(1500, 2500, 32)
audio = [{"array": random.normal(size=length).tolist(), "sampling_rate": 16000} for length in lengths]
dataset = datasets.Dataset.from_dict({"audio": audio, "label": [index % 4 for index in range(32)]})
"""


def test_recordings_are_prepared_and_padded(here: Workspace) -> None:
    config = transformers.Wav2Vec2ConformerConfig(num_labels=CLASSES, **_SPEECH)
    transformers.Wav2Vec2ConformerForSequenceClassification(config).save_pretrained(here.folder / "model")
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(here.folder / "model")
    here.write("data.py", RECORDINGS)
    report = scan(here, "hf:model", "dataset")
    assert [layer["kind"] for layer in report["layers"]] == ["BatchNorm1d"]
    assert report["summary"]["output"]["metric"]["eval"] >= 0


# ---- errors


def test_batches_with_other_keys(here: Workspace) -> None:
    message = error(here, "hf:resnet", "misnamed")
    assert "ResNetForImageClassification takes pixel_values, but the samples have pixel_value, label and id" in message
    assert "dataset.rename_column('pixel_value', 'pixel_values')" in message
    message = error(here, "hf:resnet", "wrong_keys")
    assert 'takes labels, but the batches have pixel_values and label_s. The nearest is "label_s"' in message


def test_images_that_nothing_says_how_to_prepare(here: Workspace) -> None:
    message = error(here, "hf:resnet", "images")
    assert "resnet/preprocessor_config.json does not exist" in message
    assert "processor.save_pretrained" in message
    assert "several images: image and photo. Rename" in error(here, "hf:prepared", "two")


def test_no_data(here: Workspace) -> None:
    message = error(here, "hf:resnet", None)
    assert "hf:resnet comes without data. Name some with --data FILE.py:NAME" in message


def test_arguments_that_the_configuration_does_not_have(here: Workspace) -> None:
    model = {"target": "hf:resnet", "args": {"num_chanels": 3}}
    assert 'ResNetConfig has no "num_chanels" (model.args); the nearest is "num_channels"' in error(
        here, "", model=model
    )


def test_folders_that_hold_no_model(here: Workspace) -> None:
    def said(name: str, text: str | None = None, file: str = "config.json") -> str:
        (here.folder / name).mkdir(exist_ok=True)
        if text is not None:
            here.write(f"{name}/{file}", text)
        return error(here, f"hf:{name}")

    assert "does not exist. Did you mean" in error(here, "hf:resnett")
    assert "bnprobe downloads nothing" in error(here, "hf:microsoft/resnet-50")
    assert "has no config.json. Save the model with" in said("empty")
    assert "model.merge_and_unload()" in said("lora", "{}", "adapter_config.json")
    assert "pipeline of diffusers" in said("diffusers", "{}", "model_index.json")
    assert "could not be read" in said("broken", "{")
    assert "holds a list" in said("list", "[]")
    assert 'names no class of model ("architectures")' in said("plain", "{}")
    unknown = said("unknown", '{"architectures": ["ResNettForImageClassification"]}')
    assert "The nearest name there is ResNetForImageClassification" in unknown
    remote = said("remote", '{"architectures": ["MyNet"], "auto_map": {"AutoModel": "modeling.MyNet"}}')
    assert "code of its own" in remote
    assert "trust_remote_code=True" in remote
    assert "has no weights (model.safetensors" in said("bare", '{"architectures": ["ResNetForImageClassification"]}')
    (here.folder / "outer").mkdir()
    here.write("outer/inner/config.json", "{}")
    assert "these folders in it have one: inner" in error(here, "hf:outer")


def test_weights_that_do_not_fit(here: Workspace, saved: Path) -> None:
    folder = here.folder / "partial"
    model = resnet()
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("running_var")}
    model.save_pretrained(folder, state_dict=state)
    message = error(here, "hf:partial")
    assert "do not fit ResNetForImageClassification. Missing" in message
    assert "running_var" in message
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "could not be loaded" in error(here, "hf:partial")
