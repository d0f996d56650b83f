"""bnprobe compared with the script that it replaces: a loop over real batches of two, with hooks on BN layers."""

from __future__ import annotations

from benchmarks.contenders import Probe, hook_loop, whole_scan
from benchmarks.setting import Setting
from benchmarks.tables import Row, at_least
from benchmarks.timing import interleave

GOAL = 2.5


def rows(setting: Setting) -> list[Row]:
    """The train path compared with the loop in train mode, and the whole scan with the loops of both modes."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, batches = setting.network(name), setting.micro_batches()
    probe = Probe(model, batches, whole_scan(model, batches).scan.physical_batch)
    contenders = {
        "train": lambda: probe.run("train"),
        "paths": lambda: (probe.run("train"), probe.run("eval")),
        "scan": lambda: whole_scan(model, batches),
        "train loop": lambda: hook_loop(model, batches, train=True),
        "both loops": lambda: (hook_loop(model, batches, train=True), hook_loop(model, batches, train=False)),
    }
    rounds = interleave(contenders, setting.rounds, setting.device)
    pairs = {
        "train": ("train loop", "loop in train mode / train path"),
        "paths": ("both loops", "loops in both modes / both paths"),
        "scan": ("both loops", "loops in both modes / whole scan"),
    }
    return [
        at_least(
            f"{name}, {words}",
            rounds.ratio(loop, ours),
            GOAL,
            f"{rounds.median(loop):.2f} s / {rounds.median(ours):.2f} s",
        )
        for ours, (loop, words) in pairs.items()
    ]
