"""Trains a small network on the digits with a monitor. From step 200 on each batch holds one class.

``python docs/examples/while_training.py run`` writes run/monitor.jsonl; while_training.jsonl beside this file is one.
"""

import importlib.util
import sys
from itertools import islice
from pathlib import Path

import torch
from torch import nn

import bnprobe

_DIGITS = Path(__file__).parents[2] / "sample_configs" / "digits" / "model.py"
_spec = importlib.util.spec_from_file_location("digits_model", _DIGITS)
_digits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_digits)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU())
        self.last = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.last(self.hidden(images)))


def batches(steps):
    """Images and labels."""
    for step in range(0, steps, 40):
        loader = _digits.load_data(32, order="shuffled" if step < 200 else "sorted")
        yield from islice(loader, 40)


def main(log):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    with bnprobe.Monitor(model, every=10, log=log):
        for batch in batches(400):
            optimizer.zero_grad()
            _digits.loss(model, batch).backward()
            optimizer.step()


if __name__ == "__main__":
    main(sys.argv[1])
