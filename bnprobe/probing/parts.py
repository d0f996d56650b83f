"""A measurement -> its part on the host, and the parts put together -> evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnprobe.errors import BnprobeError
from bnprobe.probing.evidence import Evaluation, Evidence, channels_of, path_evidence
from bnprobe.probing.feed import Feed
from bnprobe.probing.layers import LayerSet
from bnprobe.probing.measurement import Measurement
from bnprobe.probing.merge import HeldOut, Part
from bnprobe.probing.replicates import PoolSample
from bnprobe.probing.runner import PathName
from bnprobe.records import StopReason

_PATHS: tuple[PathName, ...] = ("train", "steady", "eval")


def part_of(measurement: Measurement, feed: Feed, held_out: HeldOut | None) -> Part:
    """Transfer the sums of this process to the host."""
    pool = measurement.eval.pool
    return Part(
        train=path_evidence(measurement.train),
        eval=path_evidence(measurement.eval),
        steady=path_evidence(measurement.steady) if measurement.random else None,
        steady_seconds=measurement.steady_seconds,
        batch_sizes={size: path_evidence(path) for size, path in measurement.batch_sizes.items()},
        pool=PoolSample() if pool is None else pool.sample(),
        channels=channels_of(measurement.eval),
        output=measurement.output.on_host(),
        values=measurement.values,
        by_batch={name: frozenset(indices) for name, indices in measurement.by_batch.items()},
        entered=frozenset(measurement.entered),
        functional=frozenset(measurement.functional),
        batches=measurement.batches,
        left_out=feed.left_out,
        largest=measurement.largest,
        at_once=measurement.at_once,
        emulation=measurement.emulation,
        kept=feed.kept,
        held_out=held_out,
    )


def held_out_of(measurement: Measurement, feed: Feed, seconds: float) -> HeldOut:
    """The same of the evaluation data, which is measured on the eval path only."""
    return HeldOut(
        path_evidence(measurement.eval),
        measurement.output.on_host(),
        measurement.batches,
        seconds,
        measurement.batch_size,
        feed.kept,
    )


def evidence_of(
    part: Part, layers: LayerSet, batch_size: int, stopped: StopReason, failure: BnprobeError | None, seconds: float
) -> Evidence:
    """What was measured by all processes, with what is divided divided."""
    held_out = part.held_out
    return Evidence(
        layers=layers,
        train=part.train,
        eval=part.eval,
        steady=part.steady,
        steady_seconds=part.steady_seconds,
        evaluation=None if held_out is None else _evaluation(held_out),
        pool=part.pool.per_call(part.channels),
        pool_bytes=part.pool.bytes,
        scores={path: part.output.score(path) for path in _PATHS},
        batch_sizes=part.batch_sizes,
        values=part.values,
        by_batch=part.by_batch,
        entered=part.entered,
        functional=part.functional,
        output=part.output.result(),
        batch_size=batch_size,
        batches=part.batches,
        left_out=part.left_out,
        physical_batch=part.largest,
        kept=_in_order(part.kept),
        at_once=part.at_once,
        trust=part.emulation,
        emulated=part.largest > batch_size,
        emulation=part.emulation.reason,
        self_check=part.emulation.check,
        stopped=stopped,
        failure=failure,
        seconds=seconds,
    )


def _evaluation(held_out: HeldOut) -> Evaluation:
    return Evaluation(
        held_out.path,
        held_out.output.score("eval"),
        held_out.batches * held_out.batch_size,
        held_out.seconds,
        held_out.batch_size,
        _in_order(held_out.kept),
    )


def _in_order(kept: Mapping[int, Any]) -> list[Any]:
    return [kept[position] for position in sorted(kept)]
