"""``speed``: folding against torch's own, variants in turn, answers of formats, and packages that are missing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnprobe.lab import speed
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.speed import FOLDED, INT8, PLAIN, Speed, _times, fold
from bnprobe.records import Trial


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.BatchNorm2d(5)
    ).double()
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    for _ in range(3):
        model(2 + 3 * torch.randn(4, 3, 9, 9, dtype=torch.float64))
    return model.eval()


def test_folding_is_torchs_and_changes_no_output() -> None:
    model, images = _network(), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    assert [type(layer) for layer in folded] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    torch.testing.assert_close(folded(images), model(images), rtol=1e-12, atol=1e-12)
    for ours, position in ((folded[0], 0), (folded[2], 3)):
        torchs = fuse_conv_bn_eval(model[position], model[position + 1])
        torch.testing.assert_close(ours.weight, torchs.weight)
        torch.testing.assert_close(ours.bias, torchs.bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_variants_run_in_turn_on_the_same_images_and_what_warms_up_is_not_counted() -> None:
    seen: list[tuple[str, float]] = []

    def run(name: str) -> speed.Run:
        def call(image: Tensor) -> Tensor:
            seen.append((name, image.item()))
            return image

        return call

    images = torch.arange(3.0).reshape(3, 1, 1, 1)
    times = _times({"a": run("a"), "b": run("b")}, images, 5)
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 5}
    assert len(seen) == 2 * (5 + speed.WARM_UP)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert all({one[0], other[0]} == {"a", "b"} and one[1] == other[1] for one, other in pairs)
    assert {one[0] for one, _ in pairs} == {"a", "b"}  # each is first sometimes


@pytest.mark.parametrize("format_", [speed.TORCH, speed.SCRIPT])
def test_folding_and_8_bits_keep_answers(format_: str) -> None:
    found = Speed().trial({"format": format_}, 0, Budget(0.05))
    assert found["difference of folded"] < 1e-5
    assert found[f"p50, {PLAIN}"] > 0
    assert found[f"p99, {FOLDED}"] >= found[f"p50, {FOLDED}"]
    if format_ == speed.SCRIPT and f"p50, {INT8}" in found:
        assert found["same class with 8 bits"] > 0.8


def test_onnx_is_measured_where_its_packages_are_and_named_where_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(package: str) -> bool:
        return package != "onnxruntime"

    monkeypatch.setattr(speed, "is_installed", installed)
    assert [each["format"] for each in Speed().conditions(Budget())] == [speed.TORCH, speed.SCRIPT, speed.EXPORT]
    said = 'onnx was not measured: it needs onnxruntime. Run: pip install "bnprobe[lab]".'
    assert said in list(Speed().notes(Results(()), Budget()))


def test_in_onnx_the_exporter_folds() -> None:
    onnx = pytest.importorskip("onnx")
    model = _network().float()
    images = torch.randn(2, 3, 9, 9)
    as_it_is, folded = (
        [node.op_type for node in onnx.load_from_string(speed._written(speed.ONNX, each, images)).graph.node]
        for each in (model, fold(model))
    )
    assert as_it_is == folded
    assert "BatchNormalization" not in as_it_is


def test_to_count_as_faster_a_margin_is_needed() -> None:
    def verdicts(ratio: float) -> dict[str, str]:
        values = {"time of folded over plain": ratio, f"p99, {FOLDED}": 1.0}
        trials = [Trial({"format": speed.TORCH}, seed, values, 0.0) for seed in range(3)]
        return {claim.text: claim.verdict for claim in Speed().claims(Results(trials), Budget())}

    folding = "Folding makes torch faster by 5% or more."
    assert verdicts(0.9)[folding] == "shown"
    assert verdicts(0.99)[folding] == "refuted"
