"""Train the three checkpoints of this sample; on one machine the files come out the same bit for bit."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from model import Batch, load_data, load_eval_data, load_model, loss, metric
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is trained."""

    batch_size: int
    order: str
    epochs: int


RECIPES = {
    "healthy": Recipe(batch_size=64, order="shuffled", epochs=12),
    "batch2": Recipe(batch_size=2, order="shuffled", epochs=6),
    "sorted": Recipe(batch_size=8, order="sorted", epochs=16),
}


def train(recipe: Recipe) -> nn.Module:
    """SGD at a constant rate, the same for all recipes."""
    torch.manual_seed(1)
    model = load_model().train()
    loader = load_data(recipe.batch_size, recipe.order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(recipe.epochs):
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


def report(name: str, recipe: Recipe, model: nn.Module) -> None:
    """Print accuracy in both modes, on the same batches, as they came in training."""
    for data, load in (("training", load_data), ("evaluation", load_eval_data)):
        batches = list(load(recipe.batch_size, recipe.order))
        modes = [mean_metric(model, batches, training=training) for training in (True, False)]
        print(f"{name:12}{recipe.batch_size:>5}  {data:12}{modes[0]:>10.3f}{modes[1]:>10.3f}")


def main() -> None:
    """Train, save and report every checkpoint asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for the checkpoints")
    parser.add_argument("--only", choices=RECIPES, help="train one checkpoint instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{'checkpoint':12}{'batch':>5}  {'data':12}{'train mode':>10}{'eval mode':>10}")
    for name in [options.only] if options.only else RECIPES:
        model = train(RECIPES[name])
        save_file(model.state_dict(), options.out / f"{name}.safetensors")
        report(name, RECIPES[name], model)


if __name__ == "__main__":
    main()
