"""Small networks of many shapes, with running statistics that are wrong on purpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def unsettled(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every BN layer running statistics and affine parameters that fit no data in particular."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            shape = (module.num_features,)
            if module.running_mean is not None:
                module.running_mean.copy_(0.3 * torch.randn(shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(shape, generator=generator))
            if module.affine:
                module.weight.data.copy_(0.5 + torch.rand(shape, generator=generator))
                module.bias.data.copy_(0.2 * torch.randn(shape, generator=generator))
    return model


def images(count: int, size: int, *shape: int, seed: int = 2) -> list[Tensor]:
    """``count`` micro-batches of ``size`` standard-normal images."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, *shape, generator=generator))


class Flat(nn.Module):
    """(N, C) all the way."""

    def __init__(self, features: int = 6, **options: object) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(features, 8),
            nn.BatchNorm1d(8, **options),
            nn.ReLU(),
            nn.Linear(8, 5),
            nn.BatchNorm1d(5, **options),
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


class Residual(nn.Module):
    """A convolutional network with a skip connection, in 1, 2 or 3 dimensions."""

    def __init__(self, dimensions: int = 2, norm: object = None, **options: object) -> None:
        super().__init__()
        conv, make = CONV[dimensions], norm or NORM[dimensions]
        self.stem = conv(3, 4, 3, padding=1)
        self.bn1 = make(4, **options)
        self.conv = conv(4, 4, 3, padding=1)
        self.bn2 = make(4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.stem(x)).relu()
        x = (x + self.bn2(self.conv(x))).relu()
        return self.head(x.flatten(2).mean(2))


class Dense(nn.Module):
    """Concatenating skip connections, norm before convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.last = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(self.last(x).mean((2, 3)))


class InvertedBottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation with a norm of its own, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.SiLU()
        )
        self.squeeze = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 12), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(12, 3, 1, bias=False), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = y * self.squeeze(y.mean((2, 3)))[:, :, None, None]
        return self.head((x + self.project(y)).mean((2, 3)))


class UNet(nn.Module):
    """Down, up and a long skip; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.bottom(skip))], 1))


class Video(nn.Module):
    """(N, T, C, H, W), frames folded into the batch: those of a clip one after the other, or frame by frame."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.frame = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.token = nn.BatchNorm1d(4)
        self.clip = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        folded = x.transpose(0, 1).flatten(0, 1) if self.interleaved else x.flatten(0, 1)
        y = self.token(self.frame(folded).mean((2, 3)))
        y = y.unflatten(0, (t, n)).mean(0) if self.interleaved else y.unflatten(0, (n, t)).mean(1)
        return self.head(self.clip(y).relu())


class Siamese(nn.Module):
    """Two images through one network: one call each, or both in one batch."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.together = together
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, pair: Tensor) -> Tensor:
        one, other = pair[:, 0], pair[:, 1] * 2 + 1
        if self.together:
            one, other = self.norm(self.body(torch.cat([one, other]))).chunk(2)
        else:
            one, other = self.norm(self.body(one)), self.norm(self.body(other))
        return one - other


class Gan(nn.Module):
    """The discriminator sees real and fake images in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(5, 8 * 9), nn.Unflatten(1, (8, 3, 3)), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.Tanh()
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(54, 1)
        )

    @staticmethod
    def step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scores of the real images and of fakes made from the batch's noise."""
        return model.critic(batch["real"]), model.critic(model.generator(batch["noise"]))


class MinibatchStd(nn.Module):
    """Appends the spread over the batch, as GAN discriminators do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        spread = x.std(0, unbiased=False).mean().expand(x.shape[0], 1, *x.shape[2:])
        return self.head(self.second(torch.cat([x, spread], 1)).mean((2, 3)))


class BatchAttention(nn.Module):
    """Every image attends to the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.norm(x + (x @ x.T).softmax(1) @ x)


class FunctionalNorm(nn.Module):
    """Normalizes with the batch by hand, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.first(x), None, None, training=True)
        return self.second(x.relu())


class Shuffle(nn.Module):
    """Shuffles the batch before a layer and back after it, as momentum contrast does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(x.shape[0]).flip(0).roll(1)
        return self.body(x[order])[order.argsort()]
