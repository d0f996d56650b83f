"""What ``--data`` takes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from bnprobe import lab
from bnprobe.errors import UsageError
from bnprobe.lab import data
from bnprobe.lab.data import batches, load


def test_digits_are_split_evenly_and_standardized() -> None:
    found = load(None)
    assert found.train.shape == (1343, 1, 8, 8)
    assert len(found.test) == 454
    assert found.train.mean().item() == pytest.approx(0, abs=1e-5)
    assert found.train.std().item() == pytest.approx(1, abs=1e-3)
    shares = torch.bincount(found.test_labels) / torch.bincount(torch.cat([found.train_labels, found.test_labels]))
    assert shares.min() >= 0.25
    assert shares.max() < 0.26


def cifar(folder: Path, binary: bool) -> Path:
    draws = np.random.default_rng(0)
    folder.mkdir()
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        labels, pixels = draws.integers(10, size=20), draws.integers(256, size=(20, 3072), dtype=np.uint8)
        if binary:
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            records.tofile(folder / f"{name}.bin")
        else:
            with (folder / name).open("wb") as file:
                pickle.dump({b"data": pixels, b"labels": labels.tolist(), b"batch": number}, file)
    return folder


def test_both_versions_of_cifar_are_read_alike(tmp_path: Path) -> None:
    binary, pickled = (load(str(cifar(tmp_path / str(kind), kind))) for kind in (True, False))
    assert binary.train.shape == (40, 3, 32, 32)
    assert torch.equal(binary.train, pickled.train)
    assert torch.equal(binary.test_labels, pickled.test_labels)


def test_no_more_images_are_held_out_than_memory_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "POPULATION", 15)
    found = load(str(cifar(tmp_path / "cifar", binary=True)))
    assert (len(found.train), len(found.test), len(found.test_labels)) == (40, 15, 15)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "made"),)

    folder = cifar(tmp_path / "cifar", binary=False)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": [1]}))
    with pytest.raises(UsageError, match=r"data_batch_1 is no file of CIFAR-10: it names \w+\.mkdir"):
        load(str(folder))
    assert not (tmp_path / "made").exists()


def test_a_folder_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        for number in range(8):
            image.new("RGB", (40, 20), (number * 20, 0, 0 if label == "cats" else 255)).save(
                tmp_path / label / f"{number}.png"
            )
    found = load(str(tmp_path))
    assert found.train.shape == (12, 3, 32, 32)
    assert found.classes == 2
    assert found.description.startswith(f"{tmp_path.name}, 2 classes (cats, dogs): 12 images")
    monkeypatch.chdir(tmp_path)
    os.mkfifo("dogs/8.png")  # reading it would wait for ever
    assert load(".").description == found.description
    with pytest.raises(UsageError, match="has 12 images to train on; at least 256 are needed"):
        lab.run("style", data=".")
    (tmp_path / "dogs" / "9.png").write_bytes(b"no image")
    load.cache_clear()
    with pytest.raises(UsageError, match=r"9\.png cannot be read"):
        load(str(tmp_path))


def test_images_of_16_bits_are_no_white_ones_and_folders_without_images_no_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / ".git" / "hooks").mkdir(parents=True)
    for label in ("bright", "dark"):
        (tmp_path / label).mkdir()
        for number in range(4):
            pixels = np.full((9, 9), 40000 if label == "bright" else 1000, dtype=np.uint16)
            image.fromarray(pixels).save(tmp_path / label / f"{number}.png")
    found = load(str(tmp_path))
    assert found.classes == 2
    shades = [found.train[found.train_labels == label].unique() for label in (0, 1)]
    assert [len(each) for each in shades] == [1, 1]
    assert shades[0] > shades[1]


def test_classes_of_one_image_leave_nothing_to_train_on(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        image.new("L", (4, 4)).save(tmp_path / label / "one.png")
    with pytest.raises(UsageError, match="no image is left to train on"):
        load(str(tmp_path))


def test_classes_that_cifar_has_not_are_named(tmp_path: Path) -> None:
    folder = cifar(tmp_path / "cifar", binary=False)
    pixels = np.zeros((2, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [3, -1]}))
    with pytest.raises(UsageError, match="an image of class -1; those of CIFAR-10 are 0 to 9"):
        load(str(folder))


@pytest.mark.parametrize("what", ["missing", "empty", "short"])
def test_what_is_no_data_is_named(tmp_path: Path, what: str) -> None:
    folder = tmp_path / what
    if what != "missing":
        folder.mkdir()
    if what == "short":
        (folder / "data_batch_1.bin").write_bytes(b"x" * 100)
        (folder / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(UsageError, match=str(folder)):
        load(str(folder))


def test_an_epoch_shows_every_image_once() -> None:
    drawn = list(batches(torch.arange(60), torch.arange(60) % 3, 10, 12, torch.Generator().manual_seed(0)))
    orders = [torch.cat([images for images, _ in epoch]) for epoch in (drawn[:6], drawn[6:])]
    assert [order.sort().values.tolist() for order in orders] == [list(range(60))] * 2
    assert not torch.equal(*orders)
    assert all(torch.equal(images % 3, labels) for images, labels in drawn)
