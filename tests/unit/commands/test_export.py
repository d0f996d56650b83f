"""An exported file gives the model's outputs, at every batch size, or it is said that it does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from bnprobe.commands import export as exporting
from bnprobe.commands.export import Exported, difference, export_spec, format_named
from bnprobe.commands.exporters import exporter_of
from bnprobe.config.exporters import EXPORTERS, ExportFormat
from bnprobe.config.load import build_spec
from bnprobe.errors import RepairError, UsageError, UserCodeError
from bnprobe.measure.restore import random_state

FORMATS = [
    "torch-export",
    "torchscript",
    pytest.param("onnx", marks=pytest.mark.skipif(not exporting.is_installed("onnxruntime"), reason="no onnxruntime")),
]

MODEL = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHAPE = (3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 4, 3))
        self.bn = nn.BatchNorm2d(4)
        self.body[1].running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.head = nn.Linear(4, 3)

    def features(self, x):
        return self.bn(self.body(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def load_model():
    return Net().train()


def load_data(batch_size=4):
    data = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data, torch.arange(20) % 3), batch_size=batch_size)
"""

TWO_INPUTS = """
class Net(Net):
    def forward(self, image, number, scale=1.0):
        found = self.features(image) + number[:, None] * scale
        return {"scores": self.head(found), "features": found, "sums": found.sum(1)}


def forward(model, batch):
    return model(batch[0], number=batch[1].float())
"""

NESTED = """
class Net(Net):
    def forward(self, inputs):
        return self.head(self.features(inputs["image"])), inputs["image"]


def forward(model, batch):
    return model({"image": batch[0]})
"""

FIXED = """
class Net(Net):
    def forward(self, x):
        return super().forward(x).reshape(4, 3)
"""

BRANCH = """
class Net(Net):
    def forward(self, x):
        if float(x[0, 0, 0, 0]) > 0:
            return self.head(self.features(x))
        return self.head(self.features(-x))
"""

BRANCH_NOT_TO_BE_SCRIPTED = BRANCH.replace("-x))", "-x)) + len(repr(lambda: None))")

PARTS = """
def forward(model, batch):
    return model.head(model.features(batch[0]))
"""

NAMED_ONLY = """
class Net(Net):
    def forward(self, *, image):
        return self.head(self.features(image))


def forward(model, batch):
    return model(image=batch[0])
"""

RAISING = """
def forward(model, batch):
    raise ValueError("no such layer")
"""


def exported(
    folder: Path, changes: str = "", to: str = "torch-export", quantize: bool = False, **given: int
) -> Exported:
    path = folder / "model.py"
    path.write_text(MODEL + changes)
    return export_spec(build_spec(str(path), {f"data.{key}": value for key, value in given.items()}), to, quantize)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("changes", ["", TWO_INPUTS, NESTED], ids=["plain", "two inputs", "nested"])
def test_the_file_gives_the_outputs_of_the_model_in_eval_mode(tmp_path: Path, to: str, changes: str) -> None:
    before = random_state()
    found = exported(tmp_path, changes, to)
    assert random_state() == before
    assert [each.images for each in found.differences] == [4, 4, 4, 8, 1]
    assert found.relative < 1e-5
    assert (found.format, found.quantization, found.notes) == (to, (), ())


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_runs_without_bnprobe(tmp_path: Path, to: str) -> None:
    """It is the file that was checked: loaded by hand it gives what the user's model gives, on seven images."""
    found = exported(tmp_path, to=to)
    names: dict[str, object] = {}
    exec(MODEL, names)
    model, images = names["load_model"]().eval(), torch.randn(7, 3, 8, 8)  # type: ignore[operator]
    run = exporter_of(format_named(to, quantize=False)).read(found.content)
    assert run is not None
    output = run((images,))
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(output, model(images), rtol=1e-5, atol=1e-6)


OF_BNPROBE = """
import bnprobe.nn


class Net(Net):
    def __init__(self):
        super().__init__()
        self.bn = bnprobe.nn.LAYER(4)
        self.bn.running_mean.normal_()
"""
LAYERS = [
    "BatchRenorm2d",
    "FrozenBatchNorm2d",
    "GatedBatchNorm2d",
    "GhostBatchNorm2d",
    "InstanceRenorm2d",
    "ExampleWeighedBatchNorm2d",
]
SCRIPTED = ["BatchRenorm2d", "InstanceRenorm2d", "ExampleWeighedBatchNorm2d"]


@pytest.mark.parametrize(
    ("to", "layer"),
    [*(("torch-export", layer) for layer in LAYERS), *(("torchscript", layer) for layer in SCRIPTED)],
)
def test_layers_of_bnprobe_are_exported(tmp_path: Path, to: str, layer: str) -> None:
    found = exported(tmp_path, OF_BNPROBE.replace("LAYER", layer), to)
    assert found.relative < 1e-6
    assert found.notes == ()


@pytest.mark.skipif(not exporting.is_installed("onnxruntime"), reason="no onnxruntime")
@pytest.mark.parametrize("layer", SCRIPTED)
def test_layers_are_exported_to_onnx(tmp_path: Path, layer: str) -> None:
    found = exported(tmp_path, OF_BNPROBE.replace("LAYER", layer), "onnx")
    assert found.relative < 1e-5
    assert found.notes == ()


@pytest.mark.parametrize("to", FORMATS)
def test_data_of_single_images_gives_an_example_of_two(tmp_path: Path, to: str) -> None:
    found = exported(tmp_path, to=to, batch_size=1)
    assert sorted(each.images for each in found.differences) == [1, 1, 1, 2]
    assert found.relative < 1e-5
    assert found.notes == ()


@pytest.mark.parametrize("to", ["torch-export", "torchscript"])
def test_a_model_that_fixes_its_batch_is_said_to(tmp_path: Path, to: str) -> None:
    found = exported(tmp_path, FIXED, to)
    assert found.notes == ("The file accepts only batches of 4 samples, because the model fixes its batch size.",)
    assert [each.images for each in found.differences] == [4, 4, 4]
    assert found.relative == 0


def test_a_branch_on_the_data_is_scripted(tmp_path: Path) -> None:
    found = exported(tmp_path, BRANCH, "torchscript")
    assert found.relative < 1e-5
    assert found.notes == ()


def test_a_branch_that_was_frozen_is_found_out(tmp_path: Path) -> None:
    found = exported(tmp_path, BRANCH_NOT_TO_BE_SCRIPTED, "torchscript")
    assert found.relative > 0.01
    assert found.notes[0].startswith("The trace may have frozen a branch that depends on the data; scripting failed")


def test_a_branch_that_a_graph_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RepairError, match=r"Net could not be exported as torch-export \(.+\)\. Another format may do"):
        exported(tmp_path, BRANCH)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (PARTS, RepairError, "calls only parts of the model, never the model itself"),
        (NAMED_ONLY, RepairError, r"keyword-only arguments \(image\)"),
        (RAISING, UserCodeError, "ValueError while calling forward"),
    ],
    ids=["parts", "named only", "raising"],
)
def test_what_cannot_be_exported_says_why(tmp_path: Path, changes: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        exported(tmp_path, changes)


def test_made_up_images_need_no_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL.replace("def load_data", "def unused"))
    found = export_spec(build_spec(str(path), {"data.input_shape": ["3,8,8"]}), "torch-export")
    assert [each.images for each in found.differences] == [4, 4, 4, 8, 1]


def test_the_weights_of_the_checkpoint_are_exported(tmp_path: Path) -> None:
    names: dict[str, object] = {}
    exec(MODEL, names)
    model = names["load_model"]()  # type: ignore[operator]
    model.head.bias.data.fill_(100.0)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    found = export_spec(build_spec(str(path), {"checkpoint.path": str(tmp_path / "w.pt")}), "torchscript")
    run = exporter_of(format_named("torchscript", quantize=False)).read(found.content)
    assert run is not None
    assert float(run((torch.zeros(1, 3, 8, 8),)).detach().min()) > 90
    assert found.checkpoint == str(tmp_path / "w.pt")


# ---- quantization


def test_a_quantized_model_differs_a_little_and_its_file_not_at_all(tmp_path: Path) -> None:
    pytest.importorskip("torch.ao.quantization.quantize_fx")
    found = exported(tmp_path, to="torchscript", quantize=True)
    assert found.relative == 0
    assert 0 < max(each.relative for each in found.quantization) < 0.2
    assert found.notes == ()


def test_a_model_that_cannot_be_quantized_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch.ao.quantization.quantize_fx")
    with pytest.raises(
        RepairError, match=r"could not be quantized by torch\.ao \(.+\)\. Export it without --quantize\."
    ):
        exported(tmp_path, BRANCH, "torchscript", quantize=True)


@pytest.mark.parametrize("to", ["torch-export", "onnx"])
def test_what_cannot_hold_a_quantized_model_is_refused(to: str) -> None:
    with pytest.raises(UsageError, match="give --to torchscript, or leave it out"):
        format_named(to, quantize=True)


# ---- formats


def test_unknown_formats_and_missing_packages_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r'"tflite" \(known: torch-export, torchscript, onnx\)'):
        format_named("tflite", quantize=False)
    monkeypatch.setattr(exporting, "is_installed", lambda package: package != "onnxscript")
    with pytest.raises(UsageError, match=r"--to onnx needs onnxscript\. Run: pip install onnxscript\."):
        format_named("onnx", quantize=False)


def test_formats_have_names_and_suffixes_of_their_own() -> None:
    assert EXPORTERS.names() == ("torch-export", "torchscript", "onnx")
    assert len({format_.suffix for format_ in EXPORTERS}) == len(EXPORTERS)


def test_a_file_that_no_installed_package_runs_is_written_unchecked(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    where = "bnprobe.commands.exporters:TorchScriptExporter"
    with EXPORTERS.including(
        ExportFormat("elsewhere", ".else", "for another machine", where, runtime="no_such_package")
    ):
        found = export_spec(build_spec(str(tmp_path / "net.py"), {}), "elsewhere")
    assert (found.differences, found.relative) == ((), 0.0)
    assert found.notes[-1] == (
        "The outputs were not checked, because no_such_package, which runs elsewhere files, is not installed."
    )


def test_an_exporter_that_cannot_be_imported_is_said_with_its_format() -> None:
    with pytest.raises(UsageError, match=r'exporter of the export format "odd" \(nowhere:Odd\) cannot be loaded: Mod'):
        exporter_of(ExportFormat("odd", ".odd", "oddly", "nowhere:Odd"))


# ---- comparing


def test_differences_are_the_largest_and_relative_to_the_largest_output() -> None:
    one = (torch.tensor([1.0, -4.0]), {"a": torch.tensor([100.0])})
    other = (torch.tensor([1.0, -4.1]), {"a": torch.tensor([101.0])})
    found = difference(one, other, 2)
    assert found.images == 2
    assert found.absolute == pytest.approx(1.0)
    assert found.relative == pytest.approx(0.1 / 4)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0.0),
        ([1.0, math.inf], [1.0, math.inf], 0.0),
        ([1.0, math.nan], [1.0, 1.0], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-9], math.inf),
        ([], [], 0.0),
    ],
)
def test_what_is_not_finite_or_not_alike(one: list[float], other: list[float], expected: float) -> None:
    assert difference(torch.tensor(one), torch.tensor(other), 1).relative == expected


def test_outputs_of_another_number_are_infinitely_apart() -> None:
    one = torch.ones(2)
    assert difference((one, one), one, 2).relative == math.inf
    assert difference("none", "none", 2).relative == math.inf
