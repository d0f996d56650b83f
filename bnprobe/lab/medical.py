"""``medical``: 3-D volumes, of which one or two fit into memory, so that batch norm has as many to take statistics of.

Scans differ from each other by gain and bias field, far more than by what is looked for. A layer of batch norm then
takes its mean and variance over many voxels, but of one or two scans: at batch 1 it is instance norm in training, and
something else at inference, where it has the running averages of all scans. Wu & He 2018 (arXiv 1803.08494) divide the
channels of each scan into groups instead, Ioffe 2017 (arXiv 1702.03275) corrects towards the running averages.

Volumes are made from a seed: a lesion of random place, size and brightness, which is a ball, a shell or a rod, on
tissue with noise; a linear bias field; a gain for the whole. A network of three convolutions says which voxels are of
the lesion. All trainings see as many volumes, with a learning rate in proportion to the batch (Goyal et al. 2017,
section 2.1), and running averages reach back over as many volumes. The score is Dice's: twice the voxels that are in
both the lesion and the answer, over the sum of the voxels in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.experiment import (
    SHARE,
    Budget,
    Condition,
    Experiment,
    Results,
    Values,
    above,
    average,
    told,
)
from bnprobe.lab.layers import SCHEDULE, BatchNorm, BatchRenorm, GroupNorm, instance_norm, opening, set_limits
from bnprobe.lab.networks import Norm, architecture, batch_norms, keep_statistics, take_population, train
from bnprobe.numbers import joined, score
from bnprobe.records import Claim, LabChart

BATCH_NORM, RENORM, GROUP, INSTANCE = "batch norm", "Batch Renorm", "group norm", "instance norm"
NORMS: Mapping[str, Callable[[int, float], nn.Module]] = {
    BATCH_NORM: BatchNorm,
    RENORM: lambda channels, momentum: BatchRenorm(channels, momentum, r_max=1.0, d_max=0.0),
    GROUP: lambda channels, momentum: GroupNorm(channels, 4),
    INSTANCE: lambda channels, momentum: instance_norm(channels),
}
"""Make the normalization of so many channels, with such a momentum of the moving averages."""

SIZES = SINGLE, PAIR, LARGE = 1, 2, 8

SIDE, WIDTH = 10, 8
SEEN = 1200
"""Volumes that a training sees, all different."""

TEST, RATE, MOMENTUM = 200, 0.1, 0.1
"""Volumes that are held out; learning rate and momentum of the averages at the largest batch."""

POINT = 0.01
"""A loss of less than this of the Dice score counts as none."""


class Medical(Experiment):
    """Four normalizations at three batch sizes."""

    def conditions(self, budget: Budget) -> Iterable[Condition]:
        """All pairs."""
        return [{"norm": norm, "batch": size} for norm in NORMS for size in SIZES]

    def trial(self, condition: Condition, seed: int, budget: Budget) -> Values:
        """Train, and score on held-out volumes in eval mode; batch norm and Batch Renorm in other ways, too."""
        size, seen = int(condition["batch"]), budget.of(SEEN, 80)
        draws = torch.Generator().manual_seed(seed)
        scans, lesions = volumes(seen, draws)
        test, expected = volumes(budget.of(TEST, 40), draws)
        momentum = 1 - (1 - MOMENTUM) ** (size / LARGE)
        norm = NORMS[str(condition["norm"])]
        model = _network(lambda channels: norm(channels, momentum))
        schedule = opening(seen // size)
        train(
            model,
            zip(scans.split(size), lesions.split(size), strict=True),
            RATE * size / LARGE,
            lambda step, loss: set_limits(model, *schedule.at(step + 1)),
        )
        found = {"Dice": dice(model.eval(), test, expected)}
        if batch_norms(model):
            keep_statistics(model)
            found["Dice in train mode"] = dice(model.train(), test, expected, size)
            found["cost of eval mode"] = found["Dice in train mode"] - found["Dice"]
            take_population(model, scans)
            found["Dice with statistics taken anew"] = dice(model.eval(), test, expected)
        return found

    def answer(self, results: Results, budget: Budget) -> str:
        """The score of each at the smallest and the largest batch."""

        scores = [
            f"{norm} {told(results.where(norm=norm, batch=SINGLE).mean('Dice'), SHARE)} and"
            f" {told(results.where(norm=norm, batch=LARGE).mean('Dice'), SHARE)}"
            for norm in NORMS
        ]
        return f"Held-out Dice score at batch {SINGLE} and at batch {LARGE}: {'; '.join(scores)}."

    def claims(self, results: Results, budget: Budget) -> Iterator[Claim]:
        """What small batches cost each normalization."""

        def arm(norm: str, size: int) -> Results:
            return results.where(norm=norm, batch=size)

        for size in (SINGLE, PAIR):
            yield above(
                f"At batch {size} batch norm at inference is worse than at batch {LARGE}.",
                f"Held-out Dice score at batch {LARGE} less that at batch {size}",
                arm(BATCH_NORM, LARGE).less("Dice", arm(BATCH_NORM, size)),
            )
        yield above(
            f"At batch {SINGLE} the network of batch norm is better with the statistics of the volume that it answers"
            " for.",
            "Held-out Dice score in train mode less that in eval mode",
            arm(BATCH_NORM, SINGLE).mean("cost of eval mode"),
        )
        for norm in (RENORM, GROUP):
            yield above(
                f"At batch {PAIR} {norm} is better than batch norm.",
                f"Held-out Dice score of {norm} less that of batch norm",
                arm(norm, PAIR).less("Dice", arm(BATCH_NORM, PAIR)),
            )
        yield above(
            f"At batch {LARGE} Batch Renorm costs less than {POINT:g} against batch norm (Ioffe 2017, section 4.1: it"
            " costs nothing).",
            "Held-out Dice score of Batch Renorm less that of batch norm",
            arm(RENORM, LARGE).less("Dice", arm(BATCH_NORM, LARGE)),
            -POINT,
        )
        yield above(
            f"From batch {LARGE} to batch {PAIR} batch norm loses more than group norm.",
            "Loss of held-out Dice score of batch norm less that of group norm",
            results.mean_over_seeds(lambda one: _lost(one, BATCH_NORM) - _lost(one, GROUP)),
        )

    def charts(self, results: Results, budget: Budget) -> Iterator[LabChart]:
        """Each normalization against the batch size, and batch norm with other statistics."""
        yield LabChart(
            "dice",
            "Held-out Dice score against the batch size in training",
            "volumes in a batch",
            "Dice score in eval mode",
            tuple(results.series("Dice", "batch", norm, norm=norm) for norm in NORMS),
            (f"All trainings see {budget.of(SEEN, 80):,} volumes.",),
            x_scale="log",
            bounds=SHARE,
        )
        names = {
            "Dice": "running averages",
            "Dice with statistics taken anew": "statistics of all volumes, taken anew",
            "Dice in train mode": "statistics of the batch",
        }
        yield LabChart(
            "modes",
            "Batch norm with other statistics",
            "volumes in a batch",
            "held-out Dice score",
            results.where(norm=BATCH_NORM).several_series("batch", names),
            ("Statistics of the batch: train mode, with batches of the size that was trained with.",),
            x_scale="log",
            bounds=SHARE,
        )

    def notes(self, results: Results, budget: Budget) -> Iterator[str]:
        """What a volume is, and how limits open."""
        yield (
            f"Each volume of {SIDE} x {SIDE} x {SIDE} voxels is made from the seed: a ball, a shell or a rod on tissue"
            " with noise, under a bias field and a gain that differ from volume to volume."
        )
        yield architecture(_network(BatchNorm))
        if worst := list(filter(None, (_worst(results.where(batch=size)) for size in SIZES))):
            yield f"Lowest Dice score, mean over seeds: {joined(worst)}."
        yield SCHEDULE


def _worst(of_size: Results) -> str:
    """The normalization with the lowest score at a batch size, and its range over seeds; empty: no trial has one."""
    scores = {norm: values for norm in NORMS if (values := of_size.where(norm=norm).values("Dice"))}
    if not scores:
        return ""
    norm, found = min(scores.items(), key=lambda item: average(item[1]))
    size = of_size.levels("batch")[0]
    return f"{norm} at batch {size} ({score(average(found))}, from {score(min(found))} to {score(max(found))})"


def _lost(of_seed: Results, norm: str) -> float:
    """From the large batch to two volumes."""
    return of_seed.value("Dice", norm=norm, batch=LARGE) - of_seed.value("Dice", norm=norm, batch=PAIR)


def _network(norm: Norm) -> nn.Sequential:
    """Two outputs for each voxel: log odds of tissue, and of lesion."""
    return nn.Sequential(
        nn.Conv3d(1, WIDTH, 3, padding=1),
        norm(WIDTH),
        nn.ReLU(),
        nn.Conv3d(WIDTH, 2 * WIDTH, 3, padding=1),
        norm(2 * WIDTH),
        nn.ReLU(),
        nn.Conv3d(2 * WIDTH, 2, 1),
    )


@torch.no_grad()
def dice(model: nn.Module, scans: Tensor, lesions: Tensor, batch: int = 50) -> float:
    """2 |A and B| / (|A| + |B|) of answer A and lesion B, mean over volumes, in the mode that the model is in."""
    scores = []
    for chosen, expected in zip(scans.split(batch), lesions.split(batch), strict=True):
        found = model(chosen).argmax(1)
        both, each = (voxels.flatten(1).sum(1) for voxels in (found * expected, found + expected))
        scores.append(2 * both / each)
    return torch.cat(scores).mean().item()


def volumes(count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Volumes with one lesion each, and which voxels are of it.

    Returns:
        Shape (count, 1, 10, 10, 10), and (count, 10, 10, 10), int64.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draws)

    axis = torch.arange(SIDE, dtype=torch.float32)
    places = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), 3)
    away = places - uniform(3, SIDE - 4, 1, 1, 1, 3)  # from the middle of the lesion, (count, 10, 10, 10, 3)
    distance, radius = away.norm(dim=4), uniform(1.8, 3.2, 1, 1, 1)
    along = (away * F.normalize(torch.randn(count, 1, 1, 1, 3, generator=draws), dim=4)).sum(4)
    ball, shell = distance <= radius, (distance - radius).abs() <= 0.6
    rod = (along.abs() <= 1.8 * radius) & (distance.square() - along.square() <= 1)
    kind = torch.randint(3, (count, 1, 1, 1), generator=draws)
    lesion = torch.where(kind == 0, ball, torch.where(kind == 1, shell, rod))
    tissue = 1 + 0.3 * torch.randn(count, SIDE, SIDE, SIDE, generator=draws)
    slope = 0.5 * torch.randn(count, 1, 1, 1, 3, generator=draws)
    field = 1 + (slope * (places / (SIDE - 1) - 0.5)).sum(4)
    gain = (0.5 * torch.randn(count, 1, 1, 1, generator=draws)).exp()
    return (gain * field * (tissue + uniform(0.8, 1.6, 1, 1, 1) * lesion))[:, None], lesion.long()
