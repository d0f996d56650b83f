"""``bnprobe recalibrate`` from end to end: scan, recalibrate, score, scan again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

import bnprobe
from bnprobe.analysis.comparison import AS_IS, RECALIBRATED, estimate
from bnprobe.describe import environment
from bnprobe.errors import NonFiniteError, UsageError
from bnprobe.heldout import HeldOut
from bnprobe.loading.workload import Workload, load_workload, read_anew
from bnprobe.pipeline import no_progress, scan_workload, whole
from bnprobe.probing.scan_loop import Progress
from bnprobe.probing.session import device_named
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.recalibration import Recalibrated, StatisticsPath, renew
from bnprobe.records import SCHEMA_VERSION, Arm, Conclusion, Estimate, Proof, RepairRecord, Report, Run, Score, Tool
from bnprobe.repairs import left_out, on_host
from bnprobe.spec import ScanSettings, Spec


@dataclass(frozen=True)
class Renewed:
    """The result of a recalibration.

    Attributes:
        record: The record, without the weights file, which is not written yet.
        weights: Weights of the recalibrated model, by the keys of its state dict, on the host.
        before, after: Scan reports; ``before`` is None if the model as loaded cannot be scanned.
    """

    record: RepairRecord
    weights: dict[str, Tensor]
    before: Report | None
    after: Report


def recalibrate_spec(
    spec: Spec,
    *,
    path: StatisticsPath = "train",
    layers: tuple[str, ...] = (),
    num_batches: int | None = None,
    command: str | None = None,
    progress: Progress = no_progress,
) -> Renewed:
    """Load what a spec names, recalibrate it, and measure the effect.

    Args:
        spec: Model, data and how to scan.
        path, layers, num_batches: As in ``bnprobe.recalibrate``.
        command: The command line as typed.
        progress: Called with the batches done and planned, in each stage.

    Raises:
        UsageError: The inputs are synthetic.
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        _require_real_data(workload)
        settings = spec.settings()
        before, notes = _first_scan(workload, settings, progress)
        seed_everything(spec.data.seed)
        workload = read_anew(spec, workload)
        held_out = HeldOut.of(spec, workload)
        scores = [held_out.scores(workload.model)]
        found = renew(
            workload.model,
            workload.source,
            workload.forward,
            path=path,
            layers=layers,
            settings=settings.model_copy(update={"batches": num_batches}),
            progress=progress,
        )
        scores.append(held_out.scores(workload.model))
        seed_everything(spec.data.seed)
        after = whole(scan_workload(replace(read_anew(spec, workload), checkpoint=None), settings, progress))
    proof = _proof(spec, held_out, *scores)
    notes = (*notes, *_how(found, path), *held_out.notes, *left_out(workload.model))
    record = _record(spec, workload, found, proof, (before, after), notes, command)
    return Renewed(record, on_host(workload.model.state_dict()), before, after)


def _require_real_data(workload: Workload) -> None:
    if workload.source.synthetic:
        raise UsageError(
            "Recalibration needs real data: the statistics of synthetic inputs (--input-shape) do not match any data"
            " that the model will see. Add load_data(batch_size) to the model file, or name data in the spec."
        )


def _first_scan(
    workload: Workload, settings: ScanSettings, progress: Progress
) -> tuple[Report | None, tuple[str, ...]]:
    """Scan the model as loaded. NaN in running statistics prevents a scan, but recalibration can replace them."""
    try:
        return whole(scan_workload(workload, settings, progress)), ()
    except NonFiniteError as error:
        return None, (f"The model as loaded could not be scanned. {error}",)


def _how(found: Recalibrated, path: StatisticsPath) -> tuple[str, ...]:
    way = (
        "large batches, normalized by their own statistics"
        if path == "train"
        else "layer by layer, using the new statistics of earlier layers"
    )
    sentence = f"The statistics are those of {found.images} samples in {found.batches} batches ({path} path: {way})."
    return (sentence, *found.notes)


def _proof(spec: Spec, held_out: HeldOut, before: list[Score], after: list[Score]) -> Proof | None:
    """Compare both models batch by batch, so that chance lies only in the choice of samples; None: not scored."""
    if not held_out.batches:
        return None
    measure: Literal["loss", "metric"] = "loss" if held_out.metric is None else "metric"
    sign = 1.0 if measure == "metric" and spec.repair.goal == "max" else -1.0
    pairs = [(getattr(one, measure), getattr(two, measure)) for one, two in zip(before, after, strict=True)]
    gain = estimate([None if one is None or two is None else sign * (two - one) for one, two in pairs])
    arms = tuple(
        _arm(name, spec.data.seed, held_out, scores) for name, scores in ((AS_IS, before), (RECALIBRATED, after))
    )
    conclusion, message = _conclude(gain, len(pairs), f"The {measure} on the same {held_out.images} held-out samples")
    return Proof(measure, arms, RECALIBRATED, AS_IS, gain, conclusion, message, 0, held_out.images)


def _arm(name: str, seed: int, held_out: HeldOut, scores: list[Score]) -> Arm:
    means = {measure: held_out.mean([getattr(score, measure) for score in scores]) for measure in ("loss", "metric")}
    loss, metric = (None if value is None else Estimate(value, None) for value in means.values())
    return Arm(name, False, (Run(seed, 0, 0, Score(**means), "finished", "", 0.0),), loss, metric)


def _conclude(gain: Estimate | None, batches: int, what: str) -> tuple[Conclusion, str]:
    """The conclusion, and a sentence that explains it."""
    if gain is None:
        return "not_compared", f"{what} is not finite before or after the recalibration."
    if gain.interval is None:
        return "undecided", f"{what}: there is only one batch, so a difference cannot be told from chance."
    low, high = gain.interval
    sure = high is not None and (low > 0 or high < 0)
    verdict: Conclusion = "same" if not sure else "better" if gain.mean > 0 else "worse"
    return verdict, f"{what}, compared over {batches} batches."


def _record(
    spec: Spec,
    workload: Workload,
    found: Recalibrated,
    proof: Proof | None,
    scans: tuple[Report | None, Report],
    notes: tuple[str, ...],
    command: str | None,
) -> RepairRecord:
    before, after = scans
    return RepairRecord(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", bnprobe.__version__),
        environment=environment(device_named(spec.scan.device, workload.model)),
        action="recalibrate",
        command=command,
        model=workload.model_name,
        checkpoint=workload.checkpoint,
        weights=None,
        weights_sha256=None,
        settings=spec.recorded(),
        seeds=(spec.data.seed,),
        plan=None,
        recalibrated=found.layers,
        proof=proof,
        flagged_before=None if before is None else before.summary.flagged,
        flagged_after=after.summary.flagged,
        requirements=(),
        notes=(*workload.notes, *workload.source.notes, *notes),
    )
