"""bnprobe's paths compared with three tools that also inspect a network's layers, each doing its own job.

None of them measures what bnprobe does. Each runs with its cheapest setting, on the same images:

* fvcore ``update_bn_stats``: population statistics of every BN layer, from real batches of two in train mode.
* delve ``SaturationTracker``: covariance of every convolution's output channels and its saturation, in eval mode.
* torchlens ``trace``: the graph of the forward pass, with the outputs of the BN layers saved.

A tool that is not installed or fails is listed with the reason.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.contenders import Probe, whole_scan
from benchmarks.setting import Setting
from benchmarks.tables import Row, at_least
from benchmarks.timing import interleave
from bnprobe.measure.session import PathName

_ROUNDS = 3
"""Limit on the rounds: some of these run for a minute."""


@dataclass(frozen=True)
class Job:
    """The job of a tool.

    Attributes:
        tool: Name of the installed package.
        path: bnprobe's path in the same mode.
        run: Does the job for its own copy of the model and the batches.
        batches: The images, in batches of the size that the job needs.
    """

    tool: str
    path: PathName
    run: Callable[[nn.Module, Sequence[Tensor]], object]
    batches: Sequence[Tensor]

    @property
    def words(self) -> str:
        """Short description."""
        return f"{self.tool}, {self.path} mode, batches of {len(self.batches[0])}"

    def __call__(self, model: nn.Module) -> None:
        """Run the job on a copy of the model, since hooks of the tools may remain."""
        self.run(copy.deepcopy(model), self.batches)


def rows(setting: Setting) -> list[Row]:
    """Each tool compared with bnprobe's path in the same mode; a ratio above 1 means that bnprobe is faster."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, twos = setting.network(name), setting.micro_batches()
    physical = whole_scan(model, twos).scan.physical_batch
    joined = setting.data().split(physical)
    probe = Probe(model, twos, physical)
    jobs = (
        Job("fvcore", "train", _fvcore, twos),
        Job("delve", "eval", _delve, joined),
        Job("torchlens", "train", _torchlens, twos),
        Job("torchlens", "eval", _torchlens, joined),
    )
    return [_compare(setting, name, model, probe, job) for job in jobs]


def _compare(setting: Setting, name: str, model: nn.Module, probe: Probe, job: Job) -> Row:
    what = f"{name}, {job.words} / {job.path} path"
    try:
        version = importlib.metadata.version(job.tool)
        replace(job, batches=job.batches[:1])(model.train(job.path == "train"))
    except Exception as error:  # another tool may fail in any way, and the others still run
        reason = (str(error).splitlines() or [""])[0]
        return Row(what, f"does not run here: {type(error).__name__}: {reason}"[:110])
    contenders = {
        "ours": lambda: probe.run(job.path),
        "theirs": lambda: job(model.train(job.path == "train")),
    }
    rounds = interleave(contenders, min(_ROUNDS, setting.rounds), setting.device)
    detail = f"{job.tool} {version}: {rounds.median('theirs'):.2f} s / {rounds.median('ours'):.2f} s"
    return at_least(what, rounds.ratio("theirs", "ours"), 1.0, detail)


def _fvcore(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with _quiet():
        from fvcore.nn.precise_bn import update_bn_stats

        update_bn_stats(model, batches, len(batches))


@torch.no_grad()
def _delve(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        import delve

        tracker = delve.SaturationTracker(
            folder, save_to="csv", modules=model, stats=["lsat"], device=str(batches[0].device)
        )
        for batch in batches:
            model(batch)
        tracker.add_saturations()
        tracker.close()


@torch.no_grad()
def _torchlens(model: nn.Module, batches: Sequence[Tensor]) -> None:
    with _quiet():
        import torchlens
        from torchlens.options import CaptureOptions

        wanted = torchlens.func("batch_norm")
        for batch in batches[:-1]:
            torchlens.trace(model, batch, save=wanted)
        # trace leaves torch's functions wrapped, so they must be restored for the next contender.
        torchlens.trace(model, batches[-1], save=wanted, capture=CaptureOptions(unwrap_when_done=True))


@contextmanager
def _quiet() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
