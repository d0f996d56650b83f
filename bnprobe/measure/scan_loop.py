"""Measure the paths over the user's batches until every layer is decided."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bnprobe.config.spec import ScanSettings
from bnprobe.distributed import ALONE, OPENING, Share, World
from bnprobe.errors import BnprobeError, DataError, DeviceError, ProcessError, UsageError, UserCodeError
from bnprobe.loading.order import other_samples
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, to_device
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.interrupts import deferred_interrupts
from bnprobe.measure.measurement import Measurement
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.measure.physical_batch import DIFFERENT_SIZES, Batching, plan_batching
from bnprobe.measure.reader import Reader
from bnprobe.measure.restore import preserved_random_state
from bnprobe.measure.scores import score_outputs, why_unscored
from bnprobe.measure.session import PATHS, Progress, Session
from bnprobe.records import MEASURES, StopReason
from bnprobe.rules.shares import deciding_limit, noise_limit
from bnprobe.stats.intervals import mean_interval
from bnprobe.stats.theory import mismatch_iid, standing
from bnprobe.wording import option

FIRST_LOOK = 16
"""Micro-batches before the first look at what is decided; the number doubles from look to look."""

FEWEST_PER_SIZE = 8
"""Micro-batches wanted of every size in --batch-sizes before the scan may stop by itself."""

STOPPING_CONFIDENCE = 0.99
"""Confidence of the intervals by which a scan stops. It is above 95% because a scan looks up to five times."""

SCORED_SAMPLES = 256
"""Samples that loss and metric are taken on at least, where data and --max-batches allow: a few batches decide a layer
that is far off, but not what that does to an accuracy."""

SCORING_SECONDS = 60.0
"""No micro-batch is scored, after the layers are decided, once this time has passed."""

CAUGHT = (KeyboardInterrupt, UserCodeError, DataError, DeviceError)
"""Errors that end a measurement but keep what was measured so far."""


def probe(
    session: Session,
    reader: Reader,
    settings: ScanSettings,
    progress: Progress,
    held_out: Reader | None = None,
    world: World = ALONE,
) -> Evidence | None:
    """Measure both paths on the same micro-batches, and the eval path on held-out data; ``session`` is installed.

    Ctrl-C and errors of the user's code end the measurement and keep what there is, if there is anything. In several
    processes each measures its share; they meet when the scan looks at what is decided and at the end.

    Returns:
        What all processes measured, in process 0; None in the others.

    Raises:
        KeyboardInterrupt, DataError, UserCodeError, DeviceError: Before the first micro-batch was measured; see
            ``Reader``, ``Session`` and ``Measurement``. Later errors are in ``Evidence.failure``.
        ProcessError: Another process is gone.
    """
    started = time.perf_counter()
    measurement = _prepare(session, reader, settings)
    evidence, size = measurement.evidence, reader.batch_size
    evidence.other_samples = other_samples(reader.look_ahead(1), world)
    ending, total = _measure_until_done(measurement, reader, settings, progress, world)
    if not ending.early:
        try:
            measurement.settle()  # open still in a process that has no micro-batch
            _score_more(_to_score(session, total, size, settings), measurement, reader, progress, world)
            reader.fill()
            measurement.check_again([batch.data for batch in reader.kept.values()])
            if held_out is not None:
                as_many = max(total, -(-total * size // held_out.batch_size))
                wanted = _to_score(session, as_many, held_out.batch_size, settings)
                evidence.held_out = _measure_held_out(measurement, held_out, wanted, progress, world)
        except CAUGHT as error:
            ending = ended_by(error, world)
    evidence.kept, evidence.left_out, evidence.sizes = reader.kept, reader.left_out, reader.own_sizes(evidence.batches)
    whole, ending = _put_together(evidence.on_host(), ending, world)
    if whole is None:
        return None
    seconds = time.perf_counter() - started
    return replace(
        whole, layers=session.layers, stopped=ending.stopped or "requested", failure=ending.error, seconds=seconds
    )


def _put_together(evidence: Evidence, ending: ScanEnding, world: World) -> tuple[Evidence | None, ScanEnding]:
    """Merge the evidence of all processes in process 0, and decide how the scan ended for all."""
    whole, endings = None, [ending]
    try:
        with deferred_interrupts():
            for position, (received, other) in enumerate(world.to_main((evidence, ending.portable()))):
                if whole is None:
                    whole = received
                else:
                    whole.merge(received)
                if position:
                    endings.append(other)
    except KeyboardInterrupt:
        endings.append(ScanEnding("interrupted"))
    return whole, together(endings)


def _prepare(session: Session, reader: Reader, settings: ScanSettings) -> Measurement:
    session.explore(reader.look_ahead(1), reader.batch_size)
    unscored = _leave_out_unscorable(session, reader)
    size, share = reader.batch_size, reader.share
    batching = plan_batching(session, reader, settings, later=True)
    if settings.batch_sizes and not batching.emulation.trusted:
        raise UsageError(
            f"{option('--batch-sizes')} regroups samples, which is not possible for this model."
            f" {batching.emulation.reason}"
            f" Run one scan per size with {option('--batch-size')}."
        )
    path = partial(PathEvidence, batch_size=size, share=share, seed=settings.seed)
    # A run of micro-batches that stay in one process holds whole batches of every size.
    others = {
        other: PathEvidence("other sizes", other, replace(share, run=max(1, share.run * size // other)))
        for other in settings.batch_sizes
    }
    evidence = Evidence(session.layers, batching, {"train": path("train"), "eval": path("eval")}, others)
    evidence.unscored = unscored
    measurement = Measurement(session, evidence, steady=path("steady"), samples_in=reader.samples_in)
    # Those by which it is checked.
    measurement.extremes.widened_by(session, [MicroBatch(batch, size) for batch in reader.look_ahead(OPENING)])
    return measurement


def _measure_held_out(
    measured: Measurement, reader: Reader, batches: int, progress: Progress, world: World
) -> Evidence:
    """The eval path on so many micro-batches of held-out data, or on all that there are.

    Samples are counted one by one where they are told apart: it does not matter in which batches they come. Data that
    the loss or metric cannot take, as data without labels, is measured without them.

    Raises:
        UserCodeError: The model cannot be run on it; says that it is the held-out data.
    """
    started = time.perf_counter()
    size, batching = reader.batch_size, measured.evidence.batching
    emulation = batching.emulation
    at_once = max(1, batching.at_once * batching.batch_size // size) if emulation.trusted else 1
    samples = Share(reader.share.rank, reader.share.size, reader.share.run * size)
    path = PathEvidence("held-out", 1, samples)
    evidence = Evidence(measured.session.layers, Batching(size, emulation, at_once), {"eval": path})
    try:
        evidence.unscored = _why_unscored(measured.session, reader)
        measurement = Measurement(
            measured.session,
            evidence,
            more=False,
            samples_in=reader.samples_in,
            scored=evidence.unscored is None,
            extremes=measured.extremes,
        )
        _measure(batches if reader.most is None else reader.most, measurement, reader, progress, world)
    except UserCodeError as error:
        raise UserCodeError(f"{error.call}, on the held-out data", error.error) from error.error
    reader.fill()
    evidence.kept, evidence.seconds = reader.kept, time.perf_counter() - started
    evidence.sizes = reader.own_sizes(evidence.batches)
    return evidence


def _leave_out_unscorable(session: Session, reader: Reader) -> str | None:
    """Do without the loss or metric of a framework where the batches do not do for it; why, sentences."""
    given, left_out = session.functions, []
    loss, metric = MEASURES
    for measure, other in ((loss, metric), (metric, loss)):
        if measure in given.offered:
            session.functions = given.without(other)
            why = _why_unscored(session, reader, measure.capitalize(), "training")
            if why is not None:
                left_out.append(why)
                given = given.without(measure)
    session.functions = given
    return " ".join(left_out) or None


def _why_unscored(session: Session, reader: Reader, *words: str) -> str | None:
    """That loss or metric raise on the first micro-batch, on which the model runs, and what; None if nothing."""
    batch = next(iter(reader.look_ahead(1)), None)
    if batch is None or not session.functions.scores:
        return None
    size, on_device = reader.samples_in(batch) or reader.batch_size, to_device(batch, session.device)
    with preserved_random_state():
        _, outputs = session.forward("eval", on_device, Pass(size, size))
        return why_unscored(lambda: score_outputs(session, "eval", [on_device], outputs, size), *words)


def measure_mixed(session: Session, evidence: Evidence, reader: Reader, progress: Progress) -> None:
    """The eval path on as many batches of the same size as were measured, drawn at random, into ``evidence.mixed``.

    For batches whose samples cannot be regrouped, because they differ in size or are no longer told apart. ``session``
    is installed.
    """
    started = time.perf_counter()
    batching = Batching(reader.batch_size, evidence.batching.emulation)
    mixed = Evidence(session.layers, batching, {"eval": PathEvidence("held-out", reader.batch_size)})
    _measure(evidence.batches, Measurement(session, mixed, more=False), reader, progress, ALONE)
    mixed.seconds = time.perf_counter() - started
    evidence.mixed = mixed


def _measure_until_done(
    measurement: Measurement, reader: Reader, settings: ScanSettings, progress: Progress, world: World
) -> tuple[ScanEnding, int]:
    """Measure from look to look; how that ended, and the micro-batches of all processes.

    Every process is at the same look: one that was stopped goes to the next one without measuring.
    """
    evidence = measurement.evidence
    own, seen, batches, stopped = ScanEnding(), ScanEnding(), 0, None
    for look in _looks(settings):
        own = own if own.early else _measure_to(look, measurement, reader, progress, world)
        try:
            with deferred_interrupts():
                seen, found = _meet(own, evidence, settings, world)
                batches, stopped = found.batches, seen.stopped or _decided(found, settings)
        except KeyboardInterrupt as error:
            own = ended_by(error, world)
        if stopped:
            break
    planned: StopReason = "requested" if settings.batches else "max_batches"
    ending = own if own.early else replace(seen, stopped=stopped or planned)
    if ending.early and batches == 0:
        raise ending.error or KeyboardInterrupt
    return ending, batches


def _measure_to(total: int, measurement: Measurement, reader: Reader, progress: Progress, world: World) -> ScanEnding:
    """Like ``_measure``, but return errors as an ending."""
    try:
        return _measure(total, measurement, reader, progress, world)
    except CAUGHT as error:
        return ended_by(error, world)


def _measure(total: int, measurement: Measurement, reader: Reader, progress: Progress, world: World) -> ScanEnding:
    """Measure this process's micro-batches among the first ``total`` of all.

    Raises:
        KeyboardInterrupt: Here, or another process asked all to stop.
    """
    evidence, share = measurement.evidence, reader.share
    mine = share.count(total)
    while evidence.batches < mine:
        if world.halted:
            raise KeyboardInterrupt
        progress(share.position(evidence.batches), total)
        micro_batches = reader.take(min(evidence.batching.at_once, mine - evidence.batches))
        if not micro_batches:
            return ScanEnding("data_exhausted")
        _require_equal(measurement, reader)
        measurement.step(micro_batches)
    progress(total, total)
    return ScanEnding()


def _require_equal(measurement: Measurement, reader: Reader) -> None:
    """Go on with real micro-batches once some of them had another size."""
    if reader.varies and not reader.any_size and measurement.evidence.batching.emulation.trusted:
        measurement.refuse(CannotEmulateError(DIFFERENT_SIZES))


def _to_score(session: Session, measured: int, size: int, settings: ScanSettings) -> int:
    """Micro-batches of all processes that loss and metric are wanted of, where they are given."""
    if settings.batches is not None or not session.functions.scores:
        return measured
    return max(measured, min(-(-SCORED_SAMPLES // size), settings.max_batches))


def _score_more(total: int, measurement: Measurement, reader: Reader, progress: Progress, world: World) -> None:
    """Loss and metric of further micro-batches of this process, up to the first ``total`` of all.

    Raises:
        KeyboardInterrupt: Here, or another process asked all to stop.
    """
    done, share, started = measurement.evidence.batches, reader.share, time.perf_counter()
    mine = share.count(total)
    while done < mine and measurement.evidence.scoring_seconds < SCORING_SECONDS:
        if world.halted:
            raise KeyboardInterrupt
        progress(share.position(done), total)
        micro_batches = reader.take(min(measurement.evidence.batching.at_once, mine - done))
        if not micro_batches:
            return
        _require_equal(measurement, reader)
        measurement.score(micro_batches)
        done += len(micro_batches)
        measurement.evidence.scoring_seconds = time.perf_counter() - started


def _looks(settings: ScanSettings) -> Iterator[int]:
    if settings.batches:
        yield settings.batches
        return
    look = FIRST_LOOK
    while look < settings.max_batches:
        yield look
        look *= 2
    yield settings.max_batches


def _decided(seen: Evidence, settings: ScanSettings) -> StopReason | None:
    """Whether no layer's interval straddles the limit that decides on it: more batches would change no verdict."""
    few = seen.batches * seen.batch_size < FEWEST_PER_SIZE * max(settings.batch_sizes, default=0)
    if settings.batches is not None or few:
        return None
    training, inference, beyond_noise = seen.train.layer_sums(), seen.eval.layer_sums(), seen.beyond_noise()
    for layer in seen.layers.selected:
        index, threshold = layer.index, settings.threshold_of(layer.name, *layer.aliases)
        if seen.normalizes_alike(index):
            continue
        found = [path[index] for path in (training, inference) if index in path]
        limit, others = mismatch_iid(threshold), beyond_noise.get(index)
        if index not in inference:  # runs in training only, and is judged by the noise of its batches
            limit = noise_limit(threshold)
        elif others is not None:
            limit = deciding_limit(inference[index].mean - others, others, threshold)
        intervals = [mean_interval(sums, STOPPING_CONFIDENCE) for sums in found]
        if standing(intervals, limit) == "undecided" or any(sums.heavy_tailed for sums in found):
            return None
    return "decided"


@dataclass(frozen=True)
class ScanEnding:
    """How the measurement ended, as far as a process knows.

    Attributes:
        stopped: None: it has not.
        failure: The error that ended it, where that was this process's own.
        said: What the failing process says of it: message, exit code, and the user's frames.
    """

    stopped: StopReason | None = None
    failure: BnprobeError | None = None
    said: tuple[str, int, str] | None = None

    @property
    def early(self) -> bool:
        """Whether something went wrong."""
        return self.stopped in ("interrupted", "failed")

    @property
    def error(self) -> BnprobeError | None:
        """The failure, in whichever process it occurred."""
        return self.failure or (ProcessError(*self.said) if self.said else None)

    def portable(self) -> ScanEnding:
        """A copy without the exception of the user's code, which may not be picklable."""
        return replace(self, failure=None)


def ended_by(error: BaseException, world: World) -> ScanEnding:
    """The ending for one of ``CAUGHT``; also asks the other processes to stop."""
    world.halt()
    if not isinstance(error, BnprobeError):
        return ScanEnding("interrupted")
    return ScanEnding("failed", error, (str(error), error.exit_code, getattr(error, "frames", "")))


def together(endings: Sequence[ScanEnding]) -> ScanEnding:
    """The ending for all processes: a failure if there was one, else Ctrl-C, else the end of the data."""
    for stopped in ("failed", "interrupted", "data_exhausted"):
        for ending in endings:
            if ending.stopped == stopped:
                return ending
    return endings[0]


def _meet(ending: ScanEnding, evidence: Evidence, settings: ScanSettings, world: World) -> tuple[ScanEnding, Evidence]:
    """How all processes stand, and what all of them have measured, where that decides whether to go on.

    Every process must call this, and all get the same result.
    """
    own = evidence.at_a_look(PATHS if settings.batches is None else ())
    endings, parts = zip(*world.gather((ending.portable(), own)), strict=True)
    seen = parts[0]
    for other in parts[1:]:
        seen.merge(other)
    return together(endings), replace(seen, layers=evidence.layers)
