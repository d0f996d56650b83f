"""``bnprobe drift``: whether data looks as a profile says that healthy data does."""

from __future__ import annotations

from bnprobe._version import __version__
from bnprobe.commands.profile import passes, reader_of, session_of
from bnprobe.config.spec import Spec
from bnprobe.errors import NothingToProbeError
from bnprobe.loading.workload import load_workload
from bnprobe.measure.drift import Drift, LayerInputs, slots_of, watchable
from bnprobe.measure.restore import preserved_random_state, seed_everything, untouched
from bnprobe.measure.session import Progress, no_progress
from bnprobe.numbers import count
from bnprobe.records import DriftReport, Profile, Tool

ALPHA = 0.01
"""The probability of a false alarm in a stream."""


def drift_spec(
    spec: Spec, profile: Profile, alpha: float = ALPHA, *, held_out: bool = True, progress: Progress = no_progress
) -> DriftReport:
    """Load what a spec names, and compare its data with a profile.

    Args:
        spec: Model and data.
        profile: Of this model.
        alpha: The probability of a false alarm.
        held_out: Take the held-out data where there is any, as ``bnprobe profile`` does; else the training data.
        progress: Called with the batches done and planned.

    Raises:
        UsageError: The profile is of another model, or of other weights.
        NothingToProbeError: There is not one block of samples.
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    with preserved_random_state():
        seed_everything(spec.data.seed)
        workload = load_workload(spec)
        settings = workload.settings(spec.settings())
        source = (workload.held_out if held_out else None) or workload.source
        found = Drift(profile, alpha, settings.seed)
        batches = left_out = 0
        with untouched(workload.model) as kept:
            session = session_of(workload, settings, kept.restores)
            layers, _ = watchable(session.layers.layers)
            slots = slots_of(profile, layers)
            inputs = LayerInputs(layers, exact=True)
            with session.installed():
                for batches, _ in enumerate(passes(session, inputs, reader_of(source, settings)), 1):
                    features = inputs.features(slots)
                    if features is None:
                        left_out += 1
                    else:
                        found.add(features)
                    progress(batches, batches)
    if found.samples < profile.block:
        raise NothingToProbeError(
            f"{source.origin} gave {count(found.samples, 'sample')} of which every layer of the profile saw a row each,"
            f" and a block has {profile.block}: there is nothing to compare."
        )
    return report_of(found, profile, workload.model_name, alpha, batches, left_out, source.origin)


def report_of(
    drift: Drift, profile: Profile, model: str, alpha: float, batches: int, left_out: int, data: str | None
) -> DriftReport:
    """What was seen so far, as a record."""
    notes = []
    if left_out:
        notes.append(
            f"{count(left_out, 'batch')} left out: not every layer of the profile saw a row for each sample, in eval"
            " mode."
        )
    if drift.samples < profile.block:
        notes.append(f"Fewer than the {profile.block} samples of a block were seen: nothing was compared.")
    return DriftReport(
        tool=Tool("bnprobe", __version__),
        model=model,
        data=data,
        alpha=alpha,
        e_value=drift.e_value,
        alarm=drift.alarm,
        samples=drift.samples,
        batches=batches,
        left_out=left_out,
        block=profile.block,
        layers=drift.layers(),
        notes=tuple(notes),
    )
