"""``bnprobe recalibrate``: scan, recalibrate, compare with the model as loaded, scan again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from bnprobe._version import __version__
from bnprobe.analysis.description import environment
from bnprobe.commands.scan import scan_workload, whole
from bnprobe.config import PathChoice
from bnprobe.config.spec import ScanSettings, Spec
from bnprobe.errors import NonFiniteError, UsageError
from bnprobe.loading.arguments import device_named
from bnprobe.loading.model import require_state
from bnprobe.loading.workload import Workload, load_workload, read_again
from bnprobe.measure.restore import preserved_random_state, seed_everything
from bnprobe.measure.session import Progress, no_progress
from bnprobe.records import SCHEMA_VERSION, RepairRecord, Report, Tool
from bnprobe.repairs import left_out, on_host
from bnprobe.repairs.recalibration_compared import Compared, recalibrate_compared


@dataclass(frozen=True)
class Repaired:
    """The result of a recalibration or conversion.

    Attributes:
        record: The record, without the weights file, which is not written yet.
        weights: Weights of the repaired model by the keys of its state dict, in their order, on the host.
        before, after: Scan reports of the model as loaded and repaired; None if it could not be scanned.
    """

    record: RepairRecord
    weights: dict[str, Tensor]
    before: Report | None
    after: Report | None


def recalibrate_spec(
    spec: Spec,
    *,
    path: PathChoice = "auto",
    layers: tuple[str, ...] = (),
    num_batches: int | None = None,
    include_frozen: bool = False,
    command: str | None = None,
    progress: Progress = no_progress,
) -> Repaired:
    """Load what a spec names, recalibrate it, and measure the effect.

    Args:
        spec: Model, data and how to scan. The checkpoint may lack the running statistics.
        path, layers, num_batches, include_frozen: As for ``recalibrate_compared``.
        command: The command line as typed.
        progress: Called with the batches done and planned, in each stage.

    Raises:
        UsageError: The inputs are synthetic.
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec, need_statistics=False)
        spec = workload.completed(spec)
        require_state(workload.model)
        _require_real_data(workload)
        settings = workload.settings(spec.settings())
        if settings.what_if is None:
            # What this command does is compared below. Other remedies would be tried twice, and shown to nobody.
            settings = settings.model_copy(update={"what_if": False})
        before, notes = _first_scan(workload, settings, progress)
        seed_everything(spec.data.seed)
        workload = read_again(spec, workload)
        compared = recalibrate_compared(
            spec,
            workload,
            path=path,
            layers=layers,
            num_batches=num_batches,
            include_frozen=include_frozen,
            progress=progress,
        )
        seed_everything(spec.data.seed)
        after = whole(scan_workload(replace(read_again(spec, workload), checkpoint=None), settings, progress))
    notes = (*notes, *compared.notes, *left_out(workload.model))
    record = _record(spec, workload, compared, (before, after), notes, command)
    return Repaired(record, on_host(workload.model.state_dict()), before, after)


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


def _record(
    spec: Spec,
    workload: Workload,
    compared: Compared,
    scans: tuple[Report | None, Report],
    notes: tuple[str, ...],
    command: str | None,
) -> RepairRecord:
    before, after = scans
    return RepairRecord(
        schema_version=SCHEMA_VERSION,
        tool=Tool("bnprobe", __version__),
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
        recalibrated=compared.found.layers,
        proof=compared.proof,
        flagged_before=None if before is None else before.summary.flagged,
        flagged_after=after.summary.flagged,
        requirements=(),
        notes=(*workload.notes, *workload.source.notes, *notes),
        tracked=compared.found.tracked,
    )
