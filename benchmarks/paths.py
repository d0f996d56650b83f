"""Cost of a scan, per path and as a whole, relative to the plain forward pass of the same images."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from benchmarks.contenders import Probe, plain, scored, whole_scan
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
    return [*found, *(_long_scan(longer, name) for name in setting.networks)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, micro_batches = setting.network(name), setting.micro_batches()
    physical = whole_scan(model, micro_batches).scan.physical_batch
    probe = Probe(model, micro_batches, physical)
    others = {"train": lambda: probe.run("train"), "eval": lambda: probe.run("eval")}
    rounds, fastest = _timed(setting, model, {**others, **_scans(model, micro_batches)})
    tried = ", ".join(f"{size}: {setting.images / rounds.median(f'plain {size}'):.0f}" for size in setting.physical)
    return [
        Row(f"{name}, plain forward, images/s by physical batch", f"{tried}; the best is {fastest.split()[-1]}"),
        _path(setting, name, "train", rounds, fastest, physical),
        _path(setting, name, "eval", rounds, fastest, physical),
        *(_scan(setting, name, scan, rounds, fastest, SCAN_GOAL) for scan in _scans(model, micro_batches)),
    ]


def _long_scan(setting: Setting, name: str) -> Row:
    model, micro_batches = setting.network(name), setting.micro_batches()
    rounds, fastest = _timed(setting, model, {_SCAN: lambda: whole_scan(model, micro_batches)})
    return _scan(setting, name, _SCAN, rounds, fastest, LONG_SCAN_GOAL)


_SCAN = "whole scan"


def _scans(model: nn.Module, micro_batches: list[Tensor]) -> dict[str, Contender]:
    """Whole scans of as many images each, by what they are given."""
    stale = [2 * batch + 1 for batch in micro_batches]
    data, options = scored(model, micro_batches)
    return {
        _SCAN: lambda: whole_scan(model, micro_batches),
        f"{_SCAN}, statistics of other data": lambda: whole_scan(model, stale),
        f"{_SCAN}, with a loss, a metric and held-out data": lambda: whole_scan(model, data, what_if=False, **options),
        f"{_SCAN}, with these and remedies": lambda: whole_scan(model, data, **options),
    }


def _timed(setting: Setting, model: nn.Module, contenders: dict[str, Contender]) -> tuple[Rounds, str]:
    """Rounds of contenders and plain forward passes, and which of these is the fastest."""
    images = setting.data()
    plains: dict[str, Contender] = {
        f"plain {size}": partial(plain, model, images.split(size)) for size in setting.physical
    }
    rounds = interleave({**plains, **contenders}, setting.rounds, setting.device)
    return rounds, min(plains, key=rounds.median)


def _scan(setting: Setting, name: str, scan: str, rounds: Rounds, fastest: str, goal: float) -> Row:
    what = f"{name}, {scan} of {setting.images} images / 2 plain forwards"
    return at_most(what, rounds.ratio(scan, fastest, times=2), goal, f"{rounds.median(scan):.2f} s")


def _path(setting: Setting, name: str, path: str, rounds: Rounds, fastest: str, physical: int) -> Row:
    speed = setting.images / rounds.median(path)
    detail = f"{speed:.0f} images/s, physical batch {physical}"
    return at_most(f"{name}, {path} path / plain forward", rounds.ratio(path, fastest), GOAL, detail)
