"""All batch sizes from one eval pass: images are measured one by one, and larger batches are sums of them."""

from __future__ import annotations

from benchmarks.contenders import Probe, whole_scan
from benchmarks.setting import BATCH_SIZE, Setting
from benchmarks.tables import Row, at_most
from benchmarks.timing import interleave

SIZES = (1, 2, 4, 8, 16, 32, 64)
GOAL = 1.1


def rows(setting: Setting) -> list[Row]:
    """Seven batch sizes compared with one: the eval path alone, and the whole scan."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, batches = setting.network(name), setting.micro_batches()
    probe = Probe(model, batches, whole_scan(model, batches).scan.physical_batch)
    contenders = {
        "one": lambda: probe.run("eval"),
        "seven": lambda: probe.run("eval", (BATCH_SIZE, *SIZES)),
        "scan, one": lambda: whole_scan(model, batches),
        "scan, seven": lambda: whole_scan(model, batches, SIZES),
    }
    rounds = interleave(contenders, setting.rounds, setting.device)
    return [
        at_most(
            f"{name}, {words}, batch sizes 1 to 64 / size {BATCH_SIZE} alone",
            rounds.ratio(seven, one),
            GOAL,
            f"{rounds.median(seven):.2f} s / {rounds.median(one):.2f} s",
        )
        for one, seven, words in (("one", "seven", "eval path"), ("scan, one", "scan, seven", "whole scan"))
    ]
