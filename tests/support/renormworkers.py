"""What the processes of the tests of Batch Renorm over several processes run; they find it by this module's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bnprobe.nn import BatchRenorm2d, SyncBatchRenorm

SIZES = {"even": (3, 3), "uneven": (5, 1), "empty": (4, 0)}
"""Images of each process."""
STEPS = 3


def images(case: str) -> list[Tensor]:
    """The batches of all steps, for all processes together."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.linspace(0.5, 3, 6).reshape(6, 1, 1, 1)  # the images of different processes differ
    batches = [torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    return [(batch * scale + scale)[: sum(SIZES[case])] for batch in batches]


def layer(sync: bool, limits: tuple[float, float] = (1.5, 0.8)) -> nn.Module:
    """A layer with parameters and statistics that show."""
    made = (SyncBatchRenorm if sync else BatchRenorm2d)(3, momentum=0.3, r_max=limits[0], d_max=limits[1])
    made = made.double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        made.bias.copy_(torch.tensor([0.1, 0.2, -0.3]))
        made.running_mean.copy_(torch.tensor([0.2, 3.0, 1.0]))
    return made


def steps(model: nn.Module, batches: list[Tensor], seeds: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients by the input of all steps, then gradients of the parameters, then the buffers."""
    found = []
    for batch, seed in zip(batches, seeds, strict=True):
        leaf = batch.clone().requires_grad_()
        y = model(leaf)
        y.backward(seed)
        found += [y.detach(), leaf.grad]
    return [*found, *(parameter.grad for parameter in model.parameters()), *(part.clone() for part in model.buffers())]


def seeds(case: str) -> list[Tensor]:
    """Gradients by the outputs."""
    return [batch.roll(1, 0).cos() for batch in images(case)]


def work(folder: Path) -> None:
    """All that is run over two processes; the findings are saved by rank."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    for case in SIZES:
        mine = [[batch.split(SIZES[case])[rank] for batch in part] for part in (images(case), seeds(case))]
        found[case] = steps(layer(sync=True), *mine)
        found[f"{case} plain"] = steps(layer(sync=True, limits=(1.0, 0.0)), *mine)
    found["ddp"] = _ddp(rank)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _ddp(rank: int) -> dict[str, Tensor]:
    """One optimizer step under DDP, with local statistics in one layer and common ones in the other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer(sync=False).float(), nn.Conv2d(3, 3, 1), layer(sync=True).float())
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in images("even"):
        model(batch.split(3)[rank].float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in net.state_dict().items()}
