"""Train the checkpoint of this sample; on one machine the file comes out the same bit for bit."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from model import Batch, load_data, load_eval_data, load_model, loss, metric
from safetensors.torch import save_file
from torch import nn

BATCH_SIZE = 64
EPOCHS = 60


def train() -> nn.Module:
    """Adam at a constant rate."""
    torch.manual_seed(0)
    model = load_model().train()
    loader = load_data(BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for _ in range(EPOCHS):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model


def mean_metric(model: nn.Module, batches: list[Batch], *, training: bool) -> float:
    """The metric in train or eval mode, on a copy: train mode moves the running statistics."""
    probed = copy.deepcopy(model).train(training)
    with torch.no_grad():
        values = [float(metric(probed, batch)) * len(batch[0]) for batch in batches]
    return sum(values) / sum(len(batch[0]) for batch in batches)


def report(name: str, model: nn.Module) -> None:
    """Print the accuracy in both modes, on the same batches."""
    print(f"{'checkpoint':12}{'batch':>5}  {'data':12}{'train mode':>10}{'eval mode':>10}")
    for data, load in (("training", load_data), ("evaluation", load_eval_data)):
        batches = list(load(BATCH_SIZE))
        modes = [mean_metric(model, batches, training=training) for training in (True, False)]
        print(f"{name:12}{BATCH_SIZE:>5}  {data:12}{modes[0]:>10.3f}{modes[1]:>10.3f}")


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    model = train()
    save_file(model.state_dict(), options.out / "trained.safetensors")
    report("trained", model)


if __name__ == "__main__":
    main()
