"""``python -m benchmarks``: all sections on all available devices, as Markdown tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from benchmarks import (
    batch_sizes,
    finetune,
    loop,
    memory,
    operators,
    paths,
    recalibrate,
    renorm,
    rivals,
    scaling,
    stages,
    startup,
)
from benchmarks.networks import NETWORKS
from benchmarks.setting import Setting, devices, load, machine
from benchmarks.tables import Row, render

SECTIONS: dict[str, tuple[str, Callable[[Setting], list[Row]]]] = {
    "paths": ("Cost of a scan beside the plain forward pass", paths.rows),
    "operators": ("Operators of a scan", operators.rows),
    "stages": ("Where the time of a scan goes", stages.rows),
    "loop": ("Speed-up over a loop of real batches with hooks", loop.rows),
    "rivals": ("Speed-up over other tools, each doing its own job", rivals.rows),
    "batch-sizes": ("Cost of all batch sizes beside one", batch_sizes.rows),
    "renorm": ("Cost of Batch Renorm beside plain BN, forward and backward", renorm.rows),
    "recalibrate": ("Cost of recalibrating on the eval path beside the plain forward pass", recalibrate.rows),
    "finetune": ("Cost of a step of fine-tuning beside a loop written by hand", finetune.rows),
    "memory": ("Peak memory", memory.rows),
    "scaling": ("How the time of a scan grows", scaling.rows),
    "startup": ("Start-up time", startup.rows),
}


def main() -> int:
    """Print the requested sections. Returns 0 whatever the figures are, since a busy machine is not a bug."""
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for device in devices(arguments.device):
        setting = _setting(arguments, device)
        print(f"{machine(device)}\n{setting.images} images of {setting.image_size}x{setting.image_size}, batch size 2,")
        print(f"medians of {setting.rounds} interleaved rounds; load at the start: {load()}", flush=True)
        for name in arguments.only or SECTIONS:
            title, rows = SECTIONS[name]
            print(f"\n## {title} ({device})\n\n{render(rows(setting))}", flush=True)
        print(f"\nload at the end: {load()}", flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small ResNet-18 only, few rounds: check that it runs")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="one section; may be repeated")
    parser.add_argument("--device", help="cpu, cuda, ...; without it the CPU, and CUDA where there is one")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="one network; may be repeated")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--images", type=int, help="images per timed run (default: 64 on the CPU, 512 on CUDA)")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each contender (default: 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    return parser.parse_args()


def _setting(arguments: argparse.Namespace, device: torch.device) -> Setting:
    if arguments.quick:
        return Setting(device, ("resnet18",), 64 if device.type == "cpu" else 256, 64, 3)
    return Setting(
        device=device,
        networks=tuple(arguments.network or NETWORKS),
        images=arguments.images or (64 if device.type == "cpu" else 512),
        image_size=arguments.image_size,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    sys.exit(main())
