"""Cost of a scan, per path and as a whole, relative to the plain forward pass of the same images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from benchmarks.contenders import Probe, plain, whole_scan
from benchmarks.setting import Setting
from benchmarks.tables import Row, at_most
from benchmarks.timing import Contender, Rounds, interleave

GOAL = 1.3

SCAN_GOAL, LONG_SCAN_GOAL = 2.0, 1.3
LONG = 512
"""Images of a long scan, in which what does not grow with them counts little."""

_SMALL = 64
"""Height and width up to which a long scan is timed, too."""


def rows(setting: Setting) -> list[Row]:
    """Each path, and the whole scan, compared with the plain eval-mode forward at its best physical batch."""
    found = [row for name in setting.networks for row in _network(setting, name)]
    if setting.image_size > _SMALL:
        return found
    longer = replace(setting, images=LONG)
    return [*found, *(row for name in setting.networks for row in _network(longer, name)[-1:])]


def _network(setting: Setting, name: str) -> list[Row]:
    model = setting.network(name)
    physical = whole_scan(model, setting.micro_batches()).scan.physical_batch
    rounds = interleave(_contenders(setting, model, physical), setting.rounds, setting.device)
    best = min(setting.physical, key=lambda size: rounds.median(f"plain {size}"))
    fastest = f"plain {best}"
    tried = ", ".join(f"{size}: {setting.images / rounds.median(f'plain {size}'):.0f}" for size in setting.physical)
    return [
        Row(f"{name}, plain forward, images/s by physical batch", f"{tried}; the best is {best}"),
        _path(setting, name, "train", rounds, fastest, physical),
        _path(setting, name, "eval", rounds, fastest, physical),
        at_most(
            f"{name}, whole scan of {setting.images} images / 2 plain forwards",
            rounds.ratio("scan", fastest, times=2),
            LONG_SCAN_GOAL if setting.images >= LONG else SCAN_GOAL,
            f"{rounds.median('scan'):.2f} s",
        ),
    ]


def _contenders(setting: Setting, model: nn.Module, physical: int) -> dict[str, Contender]:
    images, micro_batches = setting.data(), setting.micro_batches()
    probe = Probe(model, micro_batches, physical)
    contenders: dict[str, Contender] = {
        f"plain {size}": partial(plain, model, images.split(size)) for size in setting.physical
    }
    return contenders | {
        "train": lambda: probe.run("train"),
        "eval": lambda: probe.run("eval"),
        "scan": lambda: whole_scan(model, micro_batches),
    }


def _path(setting: Setting, name: str, path: str, rounds: Rounds, fastest: str, physical: int) -> Row:
    speed = setting.images / rounds.median(path)
    detail = f"{speed:.0f} images/s, physical batch {physical}"
    return at_most(f"{name}, {path} path / plain forward", rounds.ratio(path, fastest), GOAL, detail)
