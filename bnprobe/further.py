"""What a scan measures beyond the two paths: impact on the output, what-if, training steps, gradients."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from bnprobe.errors import BnprobeError, UsageError
from bnprobe.loading.optimizer import load_optimizer
from bnprobe.loading.workload import Workload
from bnprobe.probing.batch import to_device
from bnprobe.probing.evidence import Evidence
from bnprobe.probing.gradients import measure_gradients
from bnprobe.probing.impact import SAMPLES, joint_impact, measure_impact
from bnprobe.probing.layers import LayerSet
from bnprobe.probing.session import Session
from bnprobe.probing.train_steps import OptimizerFactory, train_steps
from bnprobe.probing.what_if import what_if
from bnprobe.records import Backward, ExtraPass, GradientAngle, Impact, Layer, Remedy, Updates
from bnprobe.rules.evidence import Anatomy
from bnprobe.spec import OptimizerSpec, ScanSettings
from bnprobe.usercode import user_code

IMPACT_BYTES = 2**27
"""Norm-layer inputs of the images that impacts are measured on: backward passes keep these and as much again."""

IMPACT_PART = 8
"""Impacts are measured on one image in so many: an image costs a dozen forward passes there, and two on the paths."""

WHAT_IF_IMAGES = 512
"""Images of training and of evaluation data that remedies are tried on; kept in host memory for it."""

GRADIENT_BATCHES = 32
"""Micro-batches whose gradients are measured: the noise is then known to a quarter."""


@dataclass
class Further:
    """Results by index of the layer, and what they cost."""

    impacts: dict[int, Impact] = field(default_factory=dict)
    backward: dict[int, Backward] = field(default_factory=dict)
    updates: dict[int, Updates] = field(default_factory=dict)
    angle: GradientAngle | None = None
    remedies: tuple[Remedy, ...] = ()
    passes: list[ExtraPass] = field(default_factory=list)


def wanted_batches(settings: ScanSettings, batch_size: int) -> int:
    """How many micro-batches must be kept for what the settings ask for."""
    images = max(SAMPLES, WHAT_IF_IMAGES if settings.what_if else 0)
    trained = settings.train_steps or 0
    return max(2, images // batch_size, trained, GRADIENT_BATCHES if settings.gradients else 0)


def check_wishes(settings: ScanSettings, workload: Workload) -> None:
    """Refuse before anything is measured what could not be measured in the end.

    Raises:
        UsageError: Names the option and what it lacks.
    """
    for option, wanted in (("--train-steps", settings.train_steps), ("--gradients", settings.gradients)):
        if wanted and workload.loss is None:
            raise UsageError(f"{option} needs loss(model, batch) in the model file, or a loss that the spec names.")
    if settings.what_if and workload.loss is None and workload.metric is None:
        raise UsageError("--what-if needs loss(model, batch) or metric(model, batch), in the model file or the spec.")
    source, held_out = workload.source, workload.evaluation
    if settings.what_if and held_out is not None and held_out.batch_size != source.batch_size:
        raise UsageError(
            f"--what-if needs evaluation batches of the size that is scanned, {source.batch_size}, and"
            f" eval_data.batch_size is {held_out.batch_size}. Leave it out of the spec."
        )
    if settings.what_if and held_out is None:
        raise UsageError(
            "--what-if needs evaluation data: add load_eval_data(batch_size) to the model file, or eval_data to the"
            " spec."
        )


def measure_further(
    found: Further,
    session: Session,
    evidence: Evidence,
    settings: ScanSettings,
    make_optimizer: OptimizerFactory | None = None,
    *,
    impact: bool = True,
) -> None:
    """Everything that the settings ask for, into ``found``.

    Args:
        impact: Measure what layers do to the output: of no use where every layer is fine.
        make_optimizer: For training steps; None: SGD at a learning rate of 0.01.

    Raises:
        BnprobeError: See the single measurements; what was measured before is in ``found``.
    """
    found.passes += _passes_so_far(evidence)
    size = evidence.batch_size
    with session.installed():
        if impact:
            some = _first_images(session, evidence)
            with _counted(found, "impact", "which layers move the output", len(some) * size):
                found.impacts = measure_impact(session, some, evidence.batching)
        if settings.what_if and evidence.held_out is not None:
            _try_remedies(found, session, evidence, evidence.held_out)
    if settings.train_steps:
        steps, make = settings.train_steps, _guarded(make_optimizer or load_optimizer(OptimizerSpec()))
        with _counted(found, "training steps", "asked for", steps * size):
            trained = train_steps(session, evidence.micro_batches, make, steps)
            found.updates = {
                index: replace(updates, repeated=trained.repeated.get(index, 0.0))
                for index, updates in trained.updates.items()
            }
    if settings.gradients:
        batches = evidence.micro_batches[:GRADIENT_BATCHES]
        with _counted(found, "gradients", "asked for", len(batches) * size):
            found.backward, found.angle = measure_gradients(session, batches, seed=settings.seed)


def with_further(
    layers: Sequence[Layer], anatomy: Sequence[Anatomy], found: Further, among: LayerSet
) -> tuple[Layer, ...]:
    """The layers with what was measured of them, and their places in the user's code."""
    positions = {layer.name: layer.index for layer in among.layers}
    places = {layer.name: layer.location for layer in anatomy}
    return tuple(
        replace(
            layer,
            location=places.get(layer.name),
            impact=found.impacts.get(positions[layer.name]),
            backward=found.backward.get(positions[layer.name]),
            updates=found.updates.get(positions[layer.name]),
        )
        for layer in layers
    )


def _first_images(session: Session, evidence: Evidence) -> list[Any]:
    """The micro-batches that impacts are measured on, on the device."""
    layers = session.layers.layers
    numbers = sum(values * layers[index].info.channels for (index, _), values in evidence.values.items())
    memory = IMPACT_BYTES * evidence.batch_size // (4 * max(numbers, 1))
    images = min(SAMPLES, memory, evidence.samples // IMPACT_PART)
    number = max(2, images // evidence.batch_size)
    return [to_device(batch, session.device) for batch in evidence.micro_batches[:number]]


def _try_remedies(found: Further, session: Session, evidence: Evidence, held_out: Evidence) -> None:
    size = evidence.batch_size
    most = max(2, WHAT_IF_IMAGES // size)
    training, unseen = evidence.micro_batches[:most], held_out.micro_batches[:most]
    with _counted(found, "what-if", "asked for", (len(training) + len(unseen)) * size):
        found.remedies = what_if(session, training, unseen, evidence.batching)


def joint_impacts(
    session: Session, evidence: Evidence, further: Further, groups: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], float | None]:
    """For groups of layers, the change of the outputs if all layers of a group normalize with their batches.

    None where it cannot be measured. Errors and Ctrl-C are not raised: the report that this is for is worth more. After
    a scan that ended early nothing more is run.
    """
    positions = {layer.name: layer.index for layer in session.layers.layers}
    known: dict[frozenset[int], float | None] = {}

    def measured(names: tuple[str, ...]) -> float | None:
        layers = frozenset(positions[name] for name in names if positions[name] in further.impacts)
        if not layers or evidence.partial:
            return None
        alone = further.impacts[next(iter(layers))].exact if len(layers) == 1 else None
        if alone is not None:
            return alone
        if layers not in known:
            known[layers] = None
            with suppress(BnprobeError, KeyboardInterrupt), session.installed():
                some = _first_images(session, evidence)
                known[layers] = joint_impact(session, some, evidence.batching, layers)
        return known[layers]

    return {names: measured(names) for names in groups}


def _guarded(make_optimizer: OptimizerFactory) -> OptimizerFactory:
    """An optimizer of the user's own making may raise anything."""

    def make(parameters: list[nn.Parameter]) -> Any:
        with user_code("making the optimizer of the training steps"):
            return make_optimizer(parameters)

    return make


@contextmanager
def _counted(found: Further, name: str, reason: str, images: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found.passes.append(ExtraPass(name, reason, images, time.perf_counter() - started))


def _passes_so_far(evidence: Evidence) -> Iterator[ExtraPass]:
    """What the two paths were joined by, with its reason."""
    if evidence.steady is not None:
        reason = "the model draws random numbers in training"
        yield ExtraPass("train path without random layers", reason, evidence.samples, evidence.steady_seconds)
    if evidence.held_out is not None:
        held_out = evidence.held_out
        yield ExtraPass("evaluation data", "to measure the data shift", held_out.samples, held_out.seconds)
