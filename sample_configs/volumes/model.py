"""A small 3-D U-Net on made-up volumes with lesions: BatchNorm3d at batch size 1 or 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

SIDE = 16
TRAINING_VOLUMES = 128
EVAL_VOLUMES = 32

Batch = tuple[Tensor, Tensor]


class Lesions(Dataset[Batch]):
    """Volumes of smooth noise with one to three bright ellipsoids, each drawn from its own seed.

    Gain and offset differ from volume to volume, as those of a magnetic resonance scanner do.
    """

    def __init__(self, first_seed: int, length: int) -> None:
        self.first_seed, self.length = first_seed, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        """Intensities and mask (0 or 1), each (1, SIDE, SIDE, SIDE)."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.first_seed + index)
        count = int(torch.randint(1, 4, (), generator=generator))
        mask = torch.stack([_ellipsoid(generator) for _ in range(count)]).amax(dim=0)
        gain, offset = 0.5 + torch.rand(2, generator=generator)
        volume = gain * (_smooth_noise(generator) + 0.7 * mask) + offset
        return volume.unsqueeze(0), mask.unsqueeze(0)


class DoubleConv(nn.Sequential):
    """Twice: 3x3x3 convolution, BN, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(*_conv(inputs, outputs), *_conv(outputs, outputs))


class UNet(nn.Module):
    """Three levels of 16, 8 and 4 voxels a side, of 6, 12 and 24 channels: ten BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = DoubleConv(1, 6)
        self.middle = DoubleConv(6, 12)
        self.coarse = DoubleConv(12, 24)
        self.up_middle = DoubleConv(24 + 12, 12)
        self.up_fine = DoubleConv(12 + 6, 6)
        self.head = nn.Conv3d(6, 1, 1)

    def forward(self, volumes: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> logits of the same shape."""
        fine = self.fine(volumes)
        middle = self.middle(F.max_pool3d(fine, 2))
        coarse = self.coarse(F.max_pool3d(middle, 2))
        middle = self.up_middle(_join(coarse, middle))
        return self.head(self.up_fine(_join(middle, fine)))


def load_model() -> nn.Module:
    """The network, untrained; the specs name the checkpoints."""
    return UNet()


def load_data(batch_size: int = 2) -> DataLoader[Batch]:
    """128 training volumes in shuffled order."""
    generator = torch.Generator().manual_seed(0)
    volumes = Lesions(0, TRAINING_VOLUMES)
    return DataLoader(volumes, batch_size, shuffle=True, generator=generator, drop_last=True)


def load_eval_data(batch_size: int = 2) -> DataLoader[Batch]:
    """32 volumes that no training saw."""
    return DataLoader(Lesions(TRAINING_VOLUMES, EVAL_VOLUMES), batch_size)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (N, 1, D, H, W)."""
    volumes, _ = batch
    return model(volumes)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross entropy (nats per voxel) plus one minus the soft Dice score."""
    logits, mask = forward(model, batch), batch[1]
    return F.binary_cross_entropy_with_logits(logits, mask) + 1 - _dice(logits.sigmoid(), mask)


def metric(model: nn.Module, batch: Batch) -> Tensor:
    """Dice score of the thresholded prediction, 0 to 1, mean over volumes."""
    return _dice((forward(model, batch) > 0).float(), batch[1])


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]


def _join(coarse: Tensor, skip: Tensor) -> Tensor:
    return torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), skip], dim=1)


def _dice(prediction: Tensor, mask: Tensor) -> Tensor:
    overlap = (prediction * mask).flatten(1).sum(dim=1)
    total = (prediction + mask).flatten(1).sum(dim=1)
    return (2 * overlap / total).mean()


def _ellipsoid(generator: torch.Generator) -> Tensor:
    centre = 3 + (SIDE - 7) * torch.rand(3, generator=generator)
    radii = 1.5 + 2.5 * torch.rand(3, generator=generator)
    voxels = torch.cartesian_prod(*[torch.arange(SIDE, dtype=torch.float32)] * 3)
    inside = ((voxels - centre) / radii).square().sum(dim=1) <= 1
    return inside.float().reshape(SIDE, SIDE, SIDE)


def _smooth_noise(generator: torch.Generator) -> Tensor:
    coarse = torch.randn(1, 1, SIDE // 4, SIDE // 4, SIDE // 4, generator=generator)
    smooth = F.interpolate(coarse, size=(SIDE, SIDE, SIDE), mode="trilinear", align_corners=True)
    fine = torch.randn(SIDE, SIDE, SIDE, generator=generator)
    return 0.5 * smooth.reshape(SIDE, SIDE, SIDE) + 0.3 * fine
