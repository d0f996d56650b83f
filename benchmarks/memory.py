"""Peak memory of a scan and of the plain forward pass at the same physical batch, each in a fresh process."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.contenders import plain
from benchmarks.networks import settled
from benchmarks.setting import BATCH_SIZE, RandomBatches, Setting
from benchmarks.tables import Row, at_most
from bnprobe.commands.scan import scan

GOAL = 1.25
COUNTS = (16, 128)
"""Number of micro-batches in the short and in the long run."""

MIB = 2**20


def rows(setting: Setting) -> list[Row]:
    """Ratios of scan to plain forward for a short and a long run, and of the long scan to the short one."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    found, peaks = [], []
    for count in COUNTS:
        ours, physical = _in_fresh_process(setting, name, count, 0)
        theirs, _ = _in_fresh_process(setting, name, count, physical)
        what = f"{name}, {count} micro-batches: scan / plain forward, physical batch {physical}"
        found.append(at_most(what, ours / theirs, GOAL, f"{ours:.0f} MiB / {theirs:.0f} MiB"))
        peaks.append(ours)
    short, long = peaks
    what = f"{name}, scan: {COUNTS[1]} micro-batches / {COUNTS[0]}"
    return [*found, at_most(what, long / short, 1.05, f"{long:.0f} MiB / {short:.0f} MiB")]


def _in_fresh_process(setting: Setting, name: str, count: int, physical: int) -> tuple[float, int]:
    arguments = [name, setting.device, setting.image_size, count, physical]
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    mebibytes, physical = json.loads(output)
    return mebibytes, physical


def measure(name: str, device: torch.device, image_size: int, count: int, physical: int) -> tuple[float, int]:
    """Peak memory of this process in MiB, and the physical batch.

    Args:
        name: Name of the network.
        device: Where to run: on CUDA the device's memory is measured, on the CPU that of the process.
        image_size: Height and width.
        count: Number of micro-batches.
        physical: Images per batch of a plain forward pass; 0: scan instead.
    """
    model = settled(name, image_size, device)
    batches = RandomBatches(count, image_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if physical:
        _forward_all(model, batches, device, physical)
    else:
        report = scan(model, batches, BATCH_SIZE, num_batches=count, device=str(device))
        physical = report.scan.physical_batch
    return _peak_mebibytes(device), physical


def _forward_all(model: torch.nn.Module, batches: RandomBatches, device: torch.device, physical: int) -> None:
    waiting: list[torch.Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) * BATCH_SIZE == physical:
            plain(model, [torch.cat(waiting).to(device)])
            waiting.clear()


def _peak_mebibytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss is that of the parent process if that was larger at the fork
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    network, on, *numbers = sys.argv[1:]
    print(json.dumps(measure(network, torch.device(on), *map(int, numbers))))
