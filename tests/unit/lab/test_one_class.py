"""What activations tell: the estimates against scikit-learn's, and what theory fixes of batches of one class."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from bnprobe.lab.data import load
from bnprobe.lab.experiment import Budget, Results, Values
from bnprobe.lab.one_class import (
    BATCH_STATISTICS,
    LAYER_NORM,
    MEANS,
    MIXED,
    ONE_CLASS,
    RIDGE,
    SOURCE,
    OneClass,
    _positions,
    between_classes,
    bits,
    linear,
    neighbours,
)
from bnprobe.records import Trial


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bits_are_those_of_the_counts_less_their_bias() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    labels = torch.randint(4, (300,), generator=draws())
    predicted = torch.where(torch.rand(300, generator=draws(1)) < 0.7, labels, 0)
    pairs, rows, columns = len({*zip(predicted.tolist(), labels.tolist(), strict=True)}), 4, 4
    expected = metrics.mutual_info_score(labels, predicted) - (pairs - rows - columns + 1) / 600
    assert bits(predicted, labels) == pytest.approx(expected / math.log(2))


def test_what_tells_nothing_has_no_bits_on_average_and_what_tells_all_has_the_entropy() -> None:
    found = [
        bits(*(torch.randint(10, (1500,), generator=draws(2 * seed + part)) for part in (0, 1))) for seed in range(100)
    ]
    assert sum(found) / 100 == pytest.approx(0, abs=0.005)  # 0.04 without the correction
    assert bits(torch.zeros(50, dtype=torch.long), torch.arange(50) % 5) == 0
    classes = torch.arange(1000) % 8
    assert bits(classes, classes) == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("probe", [linear, neighbours])
def test_probes_tell_classes_that_are_apart(probe: object) -> None:
    labels = torch.arange(90) % 3
    x = torch.eye(3, dtype=torch.float64)[labels] * 10 + torch.randn(90, 3, dtype=torch.float64, generator=draws())
    assert callable(probe)
    assert probe(x[:60], labels[:60], x[60:], 3).tolist() == labels[60:].tolist()


def test_the_linear_probe_is_the_same_with_more_features_than_images() -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    labels = torch.randint(3, (40,), generator=draws())
    for features in (10, 100):
        x = torch.randn(40, features, dtype=torch.float64, generator=draws(1))
        x -= x.mean(0)
        y = torch.randn(200, features, dtype=torch.float64, generator=draws(2))
        ridge = sklearn.Ridge(RIDGE * 40).fit(x, torch.nn.functional.one_hot(labels, 3).double())
        assert linear(x, labels, y, 3).tolist() == ridge.predict(y).argmax(1).tolist()


def test_positions_of_large_images_are_means_of_parts() -> None:
    small, large = (torch.randn(3, 4, side, side, generator=draws()) for side in (8, 32))
    assert torch.equal(_positions(small), small.flatten(1))
    expected = large.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    torch.testing.assert_close(_positions(large), expected.flatten(1))


def test_the_share_between_classes() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert between_classes(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), labels) == pytest.approx(1)
    assert between_classes(torch.tensor([[1.0], [3.0], [1.0], [3.0]]), labels) == 0
    assert between_classes(torch.tensor([[0.0], [2.0], [2.0], [4.0]]), labels) == pytest.approx(0.5)


def measured(state: str, kind: str) -> Values:
    torch.manual_seed(0)
    return OneClass().trial({"layer": state, "batches": kind}, 0, Budget(0.05))


def test_batches_of_one_class_erase_it_from_the_means_of_channels_alone() -> None:
    """The mean of a normalized channel is its bias, over each batch and so over each class."""
    one, mixed, source = (
        measured(BATCH_STATISTICS, ONE_CLASS),
        measured(BATCH_STATISTICS, MIXED),
        measured(SOURCE, ONE_CLASS),
    )
    bits_of_means, bits_of_positions = (f"bits of layer 3, {what}, linear" for what in (MEANS, "all positions"))
    assert one["between classes"] < 1e-9
    assert mixed["between classes"] > 0.01
    assert one[bits_of_means] < 0.1
    assert source[bits_of_means] > 0.5
    assert one[bits_of_positions] > 0.5
    assert one["taken for its company"] > one["taken for itself"]
    assert source["taken for its company"] < source["taken for itself"]


def test_layer_norm_sees_no_batch() -> None:
    torch.manual_seed(0)
    one, mixed = measured(LAYER_NORM, ONE_CLASS), measured(LAYER_NORM, MIXED)
    for name in mixed:
        assert one[name] == pytest.approx(mixed[name], abs=0.02), name


def test_a_class_that_no_held_out_image_has_is_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large data sets so many images are held out, in which rare classes may be missing."""
    images = load()
    rest = images.test_labels < 9
    fewer = replace(images, test=images.test[rest], test_labels=images.test_labels[rest])
    monkeypatch.setattr(sys.modules["bnprobe.lab.one_class"], "load", lambda path: fewer)
    assert measured(SOURCE, ONE_CLASS)["taken for itself"] > 0


def test_the_erasure_decides_its_claim() -> None:
    def verdict(share: float) -> str:
        trial = Trial({"layer": BATCH_STATISTICS, "batches": ONE_CLASS}, 0, {"between classes": share}, 0.0)
        erased, *_ = OneClass().claims(Results([trial]), Budget())
        return erased.verdict

    assert (verdict(1e-12), verdict(0.1)) == ("shown", "refuted")
