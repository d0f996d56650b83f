"""A network that several real processes train together, each with its part of every batch.

`train_together` starts them with torchrun, whose processes run this module.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bnprobe.distributed import connected
from bnprobe.errors import ProcessError
from bnprobe.lab.layers import BatchNorm
from bnprobe.lab.networks import Norm, conv_net, train
from bnprobe.nn import SyncBatchRenorm

PATIENCE = 300.0
"""Seconds that a launch may take; it takes a few, most of them to start."""

WORK, TRAINED = "work.pt", "trained.pt"


@dataclass(frozen=True)
class Work:
    """What the processes train.

    Attributes:
        state: Of the `conv_net` that they begin with, by the names of its parameters and buffers.
        batches: Images and labels of each step, for all processes together, float64.
        classes: Outputs.
        rate: Learning rate.
        synchronized: Whether statistics are those of the whole batch; else each process has its own.
    """

    state: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]
    classes: int
    rate: float
    synchronized: bool


def train_together(work: list[Work], processes: int = 2) -> list[dict[str, Tensor]]:
    """Train each network in so many processes, and return the states that the first process has at the end.

    Raises:
        ProcessError: Processes cannot be started here, or fail.
    """
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise _refused("this build of PyTorch has no torch.distributed with gloo")
    with tempfile.TemporaryDirectory() as folder:
        torch.save([vars(each) for each in work], Path(folder) / WORK)
        _launch(folder, processes)
        trained: list[dict[str, Tensor]] = torch.load(Path(folder) / TRAINED)
        return trained


def _launch(folder: str, processes: int) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
        *(f"--nproc-per-node={processes}", "-m", __name__, folder),
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1"}
    try:
        launch = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # so that all of it can be ended
        )
    except OSError as error:
        raise _refused(str(error)) from error
    with launch:
        try:
            said, _ = launch.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise _refused(f"they did not end within {PATIENCE:g} seconds") from None
        finally:
            _end(launch)
    if launch.returncode:
        raise _refused(_why(said) or f"torchrun ended with exit code {launch.returncode}")


def _end(launch: subprocess.Popen[str]) -> None:
    """End a launch with its processes, if it has not ended."""
    if launch.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(launch.pid, signal.SIGKILL)
        else:
            launch.kill()


def _why(said: str) -> str:
    """The first line that names an error, without what torchrun puts before it."""
    found = re.search(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception): .+)$", said, re.MULTILINE)
    return found[1] if found else ""


def _refused(why: str) -> ProcessError:
    return ProcessError(
        f"This experiment trains one network in several processes of torchrun, which failed here: {why.rstrip('.')}."
        " It needs to start processes that reach each other at 127.0.0.1."
    )


# --- In each process --------------------------------------------------------------------------------------------------


def synchronized_norm(channels: int) -> SyncBatchRenorm:
    """Batch norm with statistics of all processes: Batch Renorm whose limits leave nothing to correct."""
    return SyncBatchRenorm(channels, momentum=0.1, r_max=1.0, d_max=0.0)


def train_part(work: Work, rank: int, size: int) -> dict[str, Tensor]:
    """Train with this process's part of every batch; gradients are averaged over processes, as ever."""
    norm: Norm = synchronized_norm if work.synchronized else BatchNorm
    model = conv_net(work.batches[0][0].shape[1:], work.classes, norm).double()
    model.load_state_dict(work.state, strict=False)  # synchronized layers count batches too
    together = DistributedDataParallel(model)
    train(
        together, ((pixels.chunk(size)[rank], labels.chunk(size)[rank]) for pixels, labels in work.batches), work.rate
    )
    return {name: value for name, value in nn.Module.state_dict(model).items() if name in work.state}


def main(folder: Path) -> None:
    """Train all networks; the first process keeps their states."""
    torch.set_num_threads(1)
    with connected() as world:
        work = [Work(**each) for each in torch.load(folder / WORK)]
        trained = [train_part(each, world.rank, world.size) for each in work]
        if world.is_main:
            torch.save(trained, folder / TRAINED)
        world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
