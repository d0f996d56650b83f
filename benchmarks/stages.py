"""Where the time of a whole scan goes: seconds of each stage, in plain forward passes over the same images."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.contenders import plain, whole_scan
from benchmarks.setting import Setting
from benchmarks.tables import Row
from benchmarks.timing import Contender, interleave

STAGES: Mapping[str, tuple[str, ...]] = {
    "model put back and saved": (
        "bnprobe.measure.restore:Restoring.__enter__",
        "bnprobe.measure.restore:Restoring.__exit__",
    ),
    "layers and exploration": (
        "bnprobe.measure.session:Session.explore",
        "bnprobe.measure.session:find_layers",
        "bnprobe.commands.scan:_facts",
    ),
    "self-check": ("bnprobe.measure.scan_loop:plan_batching", "bnprobe.measure.measurement:Measurement._check"),
    "passes of the paths": ("bnprobe.measure.measurement:Measurement._forward",),
    "comparison of outputs": ("bnprobe.measure.outputs:OutputSums.measure",),
    "sums over micro-batches": (
        "bnprobe.measure.evidence:Evidence.add",
        "bnprobe.measure.path_evidence:PathEvidence.settle",
    ),
    "shares and regrouping": ("bnprobe.commands.scan:assemble",),
    "impact": ("bnprobe.measure.further:_measure_impacts", "bnprobe.commands.scan:joint_impacts"),
    "remedies": ("bnprobe.measure.further:_try_remedies",),
    "what tells causes apart": ("bnprobe.measure.further:_tell_apart",),
    "rules and diagnoses": ("bnprobe.commands.scan:judge", "bnprobe.commands.scan:diagnose"),
}
"""The functions that make up a stage, by what it is called; what they call in another stage counts there."""


def rows(setting: Setting) -> list[Row]:
    """A row for each stage of a scan whose layers are flagged, and one for the rest."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, batches = setting.network(name), setting.micro_batches()
    physical = whole_scan(model, batches).scan.physical_batch
    spent: list[dict[str, float]] = []
    contenders: dict[str, Contender] = {
        "plain": partial(plain, model, setting.data().split(physical)),
        "scan": lambda: spent.append(_stages(setting, model, batches)),
    }
    rounds = interleave(contenders, setting.rounds, setting.device)
    runs = list(zip(spent[1:], rounds.seconds["plain"], strict=True))  # the first one is not timed
    return [
        Row(f"{name}, {stage}", f"{statistics.median(run[stage] / each for run, each in runs):.2f} plain forwards")
        for stage in (*STAGES, "the rest")
    ]


def _stages(setting: Setting, model: nn.Module, batches: list[torch.Tensor]) -> dict[str, float]:
    with timed(setting.device) as spent:
        whole_scan(model, batches)
    return {stage: spent[stage] for stage in (*STAGES, "the rest")}


@contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of every stage while the block runs, each without what it calls in others; and of the rest."""
    spent: dict[str, float] = defaultdict(float)
    running, since = ["the rest"], time.perf_counter()

    def switch() -> None:
        nonlocal since
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        spent[running[-1]] += now - since
        since = now

    def within(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            switch()
            running.append(stage)
            try:
                return function(*args, **kwargs)
            finally:
                switch()
                running.pop()

        return call

    with ExitStack() as stack:
        for stage, places in STAGES.items():
            for place in places:
                module, _, attribute = place.partition(":")
                owner: Any = importlib.import_module(module)
                *path, name = attribute.split(".")
                for part in path:
                    owner = getattr(owner, part)
                stack.enter_context(patch.object(owner, name, within(stage, getattr(owner, name))))
        yield spent
        switch()
