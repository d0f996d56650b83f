"""What the processes of a launch tell each other, and what each of them sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from bnprobe.distributed import connected
from bnprobe.errors import ModelError
from bnprobe.measure.layers import find_layers
from bnprobe.measure.rank_agreement import agree


def work(folder: Path) -> None:
    """Ask and answer; what this process saw is saved by its rank."""
    with connected() as world:
        found: dict[str, Any] = {
            "rank": world.rank,
            "gathered": world.gather(world.rank),
            "shared": world.share(f"of {world.rank}"),
        }
        found["to_main"] = list(world.to_main(world.rank))
        with connected() as inner:
            found["same"] = inner is world
        world.wait()
        found["halted before"] = world.halted
        world.wait()
        if world.rank == 2:
            world.halt()
        world.wait()
        found["halted"] = world.halted

        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_().add_(1)
        model[1].running_mean += world.rank
        model[1].running_var += 3 * world.rank
        agreement = agree(model, find_layers(model, lambda *names: True).selected, world)
        found["mismatch"], found["note"] = dict(agreement.mismatch), agreement.note
        found["mean"] = model[1].running_mean.tolist()
        again = agree(model, find_layers(model, lambda *names: True).selected, world)
        found["again"] = [dict(again.mismatch), again.note]
        try:
            agree(nn.Linear(2, 2 + world.rank // 2), (), world)
        except ModelError as error:
            found["refused"] = str(error)
        (folder / str(world.rank)).write_text(json.dumps(found), encoding="utf-8")
