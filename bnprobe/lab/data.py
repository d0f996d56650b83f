"""Images to train on: the digits that come with scikit-learn, or the user's own."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnprobe.errors import UsageError
from bnprobe.numbers import count, listed
from bnprobe.registry import require

_TEST = 4
"""One in so many images is held out where the data does not say which."""

_SIZE = 32
"""Height and width that images of a folder are scaled to."""

POPULATION = 2048
"""So many images stand for the population, and as many are held out at most: what layers make of all of a large data
set would not fit into memory."""

_CIFAR_CLASSES = 10

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """Images and their classes, standardized with mean and standard deviation of each channel of the training part.

    Attributes:
        train, test: Shape (images, channels, height, width), float32.
        train_labels, test_labels: Shape (images,), int64.
        classes: Their number.
        description: What they are, for reports.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    description: str


@functools.cache
def load(path: str | None = None) -> Images:
    """The images of a folder; None: scikit-learn's 1,797 digits of 8 x 8 pixels.

    Args:
        path: Of a folder that holds one folder of images for each class, or the files of CIFAR-10, as binary files or
            pickled.

    Raises:
        UsageError: There is no such folder, it holds neither, or an image cannot be read.
    """
    if path is None:
        return _digits()
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"--data {path} is no folder.")
    if any(folder.glob("data_batch_*")):
        return _cifar(folder)
    return _folder(folder)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None]
    return _split(pixels, torch.from_numpy(found.target).long(), "scikit-learn's digits")


def _split(pixels: Tensor, labels: Tensor, what: str) -> Images:
    """Held out is every fourth image of a class, in a random order that is always the same."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order], labels[order]
    place = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        of_class = labels == label
        place[of_class] = torch.arange(int(of_class.sum()))
    held = place % _TEST == 0
    return _standardized(pixels[~held], labels[~held], pixels[held], labels[held], what)


def _standardized(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, what: str) -> Images:
    if not len(train):
        raise UsageError(f"{what}: no image is left to train on, as the first of each class is held out.")
    test, test_labels = test[:POPULATION], test_labels[:POPULATION]
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    size = "x".join(map(str, train.shape[1:]))
    described = f"{what}: {count(len(train), 'image')} to train on, {len(test):,} held out, {size}"
    classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    for part in (train, test):
        part.sub_(mean).div_(std)  # in place, as data sets are large
    return Images(train, train_labels, test, test_labels, classes, described)


# --- The user's own ---------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> Images:
    require("PIL", "lab", "--data with a folder of images")
    from PIL import Image

    found = {each.name: _images_in(each) for each in sorted(folder.iterdir()) if each.is_dir()}
    classes = [name for name, images in found.items() if images]
    paths = [(path, label) for label, name in enumerate(classes) for path in found[name]]
    if len(classes) < 2:
        raise UsageError(
            f"--data {folder} needs a folder of images for each of two or more classes, or the files of CIFAR-10;"
            f" images end in {', '.join(_SUFFIXES)}."
        )
    pixels = np.empty((len(paths), _SIZE, _SIZE, 3), dtype=np.uint8)
    for number, (path, _) in enumerate(paths):
        try:
            with Image.open(path) as image:
                deep = image.mode.startswith("I")  # 16 bits, of which Pillow would make 255 whatever is above it
                shown = Image.fromarray((np.asarray(image) // 256).astype(np.uint8)) if deep else image
                pixels[number] = np.asarray(shown.convert("RGB").resize((_SIZE, _SIZE)))
        except Exception as error:  # Pillow has many
            raise UsageError(f"The image {path} cannot be read: {error}.") from None
    labels = torch.tensor([label for _, label in paths])
    what = f"{folder.resolve().name}, {len(classes)} classes ({listed(classes, 4)})"
    return _split(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), labels, what)


def _images_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _SUFFIXES and path.is_file()]


def _cifar(folder: Path) -> Images:
    """The files of CIFAR-10, in the binary or the Python version."""
    read = _read_binary if any(folder.glob("*.bin")) else _read_pickled
    suffix = ".bin" if read is _read_binary else ""
    names = [f"data_batch_{number}{suffix}" for number in range(1, 6)], [f"test_batch{suffix}"]
    parts = []
    for part in names:
        present = [folder / name for name in part if (folder / name).is_file()]
        if not present:
            raise UsageError(f"--data {folder} has no {part[-1]}, which CIFAR-10 has.")
        batches = [read(path) for path in present]
        parts.append(tuple(np.concatenate(each) for each in zip(*batches, strict=True)))
    (train, train_labels), (test, test_labels) = parts
    tensors = (torch.from_numpy(each.reshape(-1, 3, 32, 32)).float() for each in (train, test))
    train_pixels, test_pixels = tensors
    wrong = [int(each) for part in (train_labels, test_labels) for each in part if not 0 <= each < _CIFAR_CLASSES]
    if wrong:
        raise UsageError(f"--data {folder} has an image of class {wrong[0]}; those of CIFAR-10 are 0 to 9.")
    labels = (torch.from_numpy(each.astype(np.int64)) for each in (train_labels, test_labels))
    return _standardized(train_pixels, next(labels), test_pixels, next(labels), "CIFAR-10")


def _read_binary(path: Path) -> tuple[Any, Any]:
    """Records of one byte for the class and 3072 for the pixels."""
    content = np.fromfile(path, dtype=np.uint8)
    if not len(content) or len(content) % 3073:
        raise UsageError(f"{path} is no binary file of CIFAR-10: its size is no multiple of 3073 bytes.")
    records = content.reshape(-1, 3073)
    return records[:, 1:], records[:, 0]


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays and plain data; a pickle can name any code, which would run."""

    _ALLOWED = frozenset({("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        if name in ("_reconstruct", "_frombuffer") and module.startswith("numpy."):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are read")


def _read_pickled(path: Path) -> tuple[Any, Any]:
    try:
        found = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(found[b"data"]), np.asarray(found[b"labels"])
    except Exception as error:
        raise UsageError(f"{path} is no file of CIFAR-10: {error}.") from None
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or pixels.dtype != np.uint8 or len(labels) != len(pixels):
        raise UsageError(f"{path} is no file of CIFAR-10: its data is no array of 3072 bytes for each label.")
    return pixels, labels


# --- Batches ----------------------------------------------------------------------------------------------------------


def batches(
    images: Tensor, labels: Tensor, size: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches for training, of one epoch after the other, each in a new order.

    Args:
        images, labels: The data.
        size: Images in a batch.
        steps: Batches.
        generator: Draws the orders.
    """
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(left) < size:
            left = torch.cat([left, torch.randperm(len(labels), generator=generator)])
        chosen, left = left[:size], left[size:]
        yield images[chosen], labels[chosen]
