"""A small GAN on the digits: the BN layers of its discriminator see real and generated batches apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

DATA = Path(__file__).parent.parent / "digits" / "digits.npz"
LATENT = 16

Batch = tuple[Tensor, Tensor]
Scores = tuple[Tensor, Tensor]


class NoisyDigits(Dataset[Batch]):
    """Images, each with noise for one generated image: drawn here, so that forward draws nothing."""

    def __init__(self, *, held_out: bool) -> None:
        with np.load(DATA) as file:
            images = file["images"][file["is_eval"] == held_out]
        self.images = torch.from_numpy(images).float().div(8).sub(1).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        """An image (1, 8, 8) in -1..1 and noise (LATENT,), the same at every call."""
        generator = torch.Generator().manual_seed(index)
        return self.images[index], torch.randn(LATENT, generator=generator)


class Generator(nn.Module):
    """Noise (N, LATENT) -> images (N, 1, 8, 8) in -1..1, with three BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT, 32 * 4), nn.BatchNorm1d(32 * 4), nn.ReLU(), nn.Unflatten(1, (32, 2, 2)),
            nn.ConvTranspose2d(32, 24, 4, 2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.ConvTranspose2d(24, 16, 4, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, noise: Tensor) -> Tensor:
        """(N, LATENT) -> (N, 1, 8, 8)."""
        return self.layers(noise)


class Discriminator(nn.Module):
    """Images (N, 1, 8, 8) -> logits (N,), positive for real ones, with two BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 24, 4, 2, padding=1, bias=False), nn.BatchNorm2d(24), nn.LeakyReLU(0.2),
            nn.Conv2d(24, 32, 4, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(32 * 4, 1), nn.Flatten(0),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N,)."""
        return self.layers(images)


class GAN(nn.Module):
    """Generator and discriminator, run as in a training step: real and generated images in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Generator()
        self.discriminator = Discriminator()

    def forward(self, images: Tensor, noise: Tensor) -> Scores:
        """Logits (N,) of the real images, and of as many generated from ``noise``."""
        return self.discriminator(images), self.discriminator(self.generator(noise))


def load_model() -> nn.Module:
    """Both networks, untrained; the spec names the checkpoint."""
    return GAN()


def load_data(batch_size: int = 64) -> DataLoader[Batch]:
    """The 1437 training images with noise, shuffled; no partial batch."""
    generator = torch.Generator().manual_seed(0)
    digits = NoisyDigits(held_out=False)
    return DataLoader(digits, batch_size, shuffle=True, generator=generator, drop_last=True)


def load_eval_data(batch_size: int = 64) -> DataLoader[Batch]:
    """The 360 images that no training saw, with noise."""
    return DataLoader(NoisyDigits(held_out=True), batch_size)


def forward(model: nn.Module, batch: Batch) -> Scores:
    """Logits (N,) of real and of generated images."""
    images, noise = batch
    return model(images, noise)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The discriminator's cross entropy, in nats, mean over real and generated images."""
    real, fake = forward(model, batch)
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def metric(model: nn.Module, batch: Batch) -> Tensor:
    """The discriminator's accuracy, 0 to 1."""
    real, fake = forward(model, batch)
    return torch.cat([real > 0, fake <= 0]).float().mean()
