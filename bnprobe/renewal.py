"""``bnprobe recalibrate`` from end to end: scan, take the running statistics anew, score, scan again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

import bnprobe
from bnprobe.describe import device_named, environment
from bnprobe.errors import NonFiniteError, UsageError
from bnprobe.heldout import HeldOut
from bnprobe.loading.workload import Workload, load_workload, read_anew
from bnprobe.pipeline import no_progress, scan_workload
from bnprobe.probing.drive import Progress
from bnprobe.randomness import preserved_random_state, seed_everything
from bnprobe.recalibration import Recalibrated, StatisticsPath, renew
from bnprobe.records import SCHEMA_VERSION, Arm, Conclusion, Estimate, Proof, RepairRecord, Report, Run, Score, Tool
from bnprobe.repairs import on_host
from bnprobe.spec import ScanSettings, Spec

AS_IS, RECALIBRATED = "as is", "recalibrated"
"""Names of the arms, as in every proof."""


@dataclass(frozen=True)
class Renewed:
    """What recalibration gives.

    Attributes:
        record: Without the weights' file, which is not written yet.
        weights: Of the recalibrated model, by the keys of its state dict, on the host.
        before, after: Reports of the scans; ``before`` is None where the model as loaded cannot be scanned.
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
    """Load what a spec names, recalibrate it, and measure what that gave.

    Args:
        spec: Model, data and how to scan.
        path, layers, num_batches: As ``bnprobe.recalibrate`` has them.
        command: As typed.
        progress: Called with the batches done and planned, stage after stage.

    Raises:
        UsageError: The data is made up.
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
        scores = [held_out.score(workload.model)]
        found = renew(
            workload.model,
            workload.source,
            workload.forward,
            path=path,
            layers=layers,
            settings=settings.model_copy(update={"batches": num_batches}),
            progress=progress,
        )
        scores.append(held_out.score(workload.model))
        seed_everything(spec.data.seed)
        after = scan_workload(replace(read_anew(spec, workload), checkpoint=None), settings, progress)
    proof = _proof(spec, workload, scores, held_out.images)
    notes = (*notes, *_how(found, path), *held_out.notes)
    record = _record(spec, workload, found, proof, (before, after), notes, command)
    return Renewed(record, on_host(workload.model.state_dict()), before, after)


def _require_real_data(workload: Workload) -> None:
    if workload.source.synthetic:
        raise UsageError(
            "Recalibration needs real data: statistics of made-up images (--input-shape) are those of no data that the"
            " model will see. Add load_data(batch_size) to the model file, or name data in the spec."
        )


def _first_scan(
    workload: Workload, settings: ScanSettings, progress: Progress
) -> tuple[Report | None, tuple[str, ...]]:
    """The model as it is; running statistics that are NaN cannot be scanned, and are what recalibration is for."""
    try:
        return scan_workload(workload, settings, progress), ()
    except NonFiniteError as error:
        return None, (f"The model as loaded could not be scanned. {error}",)


def _how(found: Recalibrated, path: StatisticsPath) -> tuple[str, ...]:
    way = (
        "large batches normalized by themselves" if path == "train" else "layer by layer, on the new statistics before"
    )
    sentence = f"The statistics are those of {found.images} images in {found.batches} batches ({path} path: {way})."
    return (sentence, *found.notes)


def _proof(spec: Spec, workload: Workload, scores: list[Score], images: int) -> Proof | None:
    """The two scores side by side; None where nothing was scored."""
    if not images:
        return None
    arms = tuple(_arm(name, spec.data.seed, score) for name, score in zip((AS_IS, RECALIBRATED), scores, strict=True))
    measure: Literal["loss", "metric"] = "loss" if workload.metric is None else "metric"
    more_is_better = measure == "metric" and spec.repair.goal == "max"
    before, after = (getattr(score, measure) for score in scores)
    gain = None
    if before is not None and after is not None:
        gain = Estimate(after - before if more_is_better else before - after, None)
    conclusion, message = _conclude(before, after, gain, f"Held-out {measure} on the same {images} images")
    return Proof(measure, arms, RECALIBRATED, AS_IS, gain, conclusion, message, 0, images)


def _arm(name: str, seed: int, score: Score) -> Arm:
    loss, metric = (None if value is None else Estimate(value, None) for value in (score.loss, score.metric))
    return Arm(name, False, (Run(seed, 0, 0, score, "finished", "", 0.0),), loss, metric)


def _conclude(before: float | None, after: float | None, gain: Estimate | None, what: str) -> tuple[Conclusion, str]:
    """The verdict, and a sentence; nothing was left to chance but which images there are."""
    if gain is None:
        return "not_compared", f"{what}: not finite {'as it was' if before is None else 'recalibrated'}."
    verdict: Conclusion = "better" if gain.mean > 0 else "worse" if gain.mean < 0 else "same"
    return verdict, f"{what}: {before:.4g} as it was, {after:.4g} recalibrated."


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
