"""Four networks whose mistake shows in what is written or saved, for `bnprobe lint`."""

import torch
from torch import nn


def _network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, **options)
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(1000)
    return model


def overflowed():
    """One activation overflowed in float16; the running mean of its channel is NaN ever since."""
    model = _network()
    model[4].running_mean[3] = torch.nan
    return model


def from_keras():
    """Momentum as Keras writes it."""
    return _network(momentum=0.99)


def without_buffers():
    """Loaded from a file without the buffers of one layer."""
    model = _network()
    model[4].reset_running_stats()
    return model


def without_statistics():
    """Layers that keep no running statistics."""
    return _network(track_running_stats=False)
