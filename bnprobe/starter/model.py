"""A starter for bnprobe: replace the model and the data with your own, then run ``bnprobe scan spec.yaml``.

bnprobe looks for these names; only load_model and load_data are required.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def load_model() -> nn.Module:
    """Return your model, untrained: the weights come from the spec's checkpoint."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def load_data(batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return your training loader, with the sampler and augmentations that training uses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(512, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)


def load_eval_data(batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Optional: return held-out data, which reveals a data shift and shows what a remedy gains."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(128, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (128,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Optional: compared in train and eval mode; ``convert --finetune``, --train-steps and --gradients need it."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def metric(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Optional: another number to compare, here the accuracy."""
    images, labels = batch
    accuracy: torch.Tensor = (model(images).argmax(dim=1) == labels).float().mean()
    return accuracy


# Also optional:
# def forward(model, batch): ...           how to run the model on a batch, if not model(batch[0])
# def make_schedule(optimizer): ...        your own learning rate schedule, for train.schedule
