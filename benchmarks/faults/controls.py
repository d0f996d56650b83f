"""What looks like a fault of batch normalization and is none: healthy networks, and networks with other troubles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.faults import shifts
from benchmarks.faults.architectures import ARCHITECTURES
from benchmarks.faults.cases import Case, on_inputs
from benchmarks.faults.faults import CLASSIFIERS, EVERYWHERE, FAULTS
from benchmarks.faults.samples import Samples
from benchmarks.faults.surgery import WithCopy, WithSideHead, set_momentum


@dataclass(frozen=True)
class Control:
    """Something that no cause of batch normalization is to be blamed for.

    Attributes:
        change: Makes it from a healthy case.
        networks: Where.
        healthy: False: the metric is worse than that of the healthy network, for another reason.
    """

    change: Callable[[Case], Case]
    networks: tuple[str, ...] = EVERYWHERE
    healthy: bool = True

    @property
    def name(self) -> str:
        """Of the kind, in words."""
        return self.change.__name__.strip("_").replace("_", " ")


def as_trained(case: Case) -> Case:
    """As it is."""
    return case


def without_held_out_data(case: Case) -> Case:
    """Scanned on training data alone."""
    return replace(case, held_out_given=False)


def with_everything(case: Case) -> Case:
    """Every measurement that a scan can make, on batches in another order."""
    return case.drawn(seed=case.seed + 100).with_options(train_steps=8, gradients=True)


def slower_average(case: Case) -> Case:
    """A running average of more batches, which has settled all the same."""
    set_momentum(case.model, 0.03)
    return case.settled(200)


def cumulative_average(case: Case) -> Case:
    """momentum=None."""
    for norm in case.model.modules():
        if hasattr(norm, "reset_running_stats"):
            norm.momentum = None
            norm.reset_running_stats()
    return case.settled(40)


def weak_dropout(case: Case) -> Case:
    """Dropout that hardly changes what the layers see."""
    return replace(FAULTS["dropout_before_norm"].plant(case, 2), alone=False)


def batches_of_32(case: Case) -> Case:
    """Trained further at batch size 32: rows of a table are just as many values."""
    return case.drawn(batch_size=32).trained(150, rate=1e-3)


def heavy_tails(case: Case) -> Case:
    """Trained further on inputs with heavy tails, in training and at evaluation."""
    heavy = on_inputs(lambda inputs: inputs.sign() * (inputs.abs().exp() - 1))
    return replace(case, prepared=heavy, evaluated=heavy).trained(200, rate=3e-3)


def noisy_training(case: Case) -> Case:
    """Trained further with noise that held-out data does not have: an augmentation."""
    return replace(case, prepared=on_inputs(shifts.noise(0.2))).trained(100)


def slight_shift(case: Case) -> Case:
    """Held-out data a little brighter, which hardly costs anything."""
    return replace(case, evaluated=on_inputs(shifts.brightness(0.1)))


def small_evaluation(case: Case) -> Case:
    """Fewer held-out samples than a batch."""
    return replace(case, evaluated=lambda samples: samples.take(torch.arange(40)))


def two_batches(case: Case) -> Case:
    """No more training data than two batches."""
    return case.drawn(images=2 * case.sampling.batch_size)


def other_class_mix(case: Case) -> Case:
    """Held-out samples of two classes alone."""
    return replace(case, evaluated=_two_groups)


def augmented_by_batch(case: Case) -> Case:
    """Trained further with a scale and an offset that are drawn anew for every batch."""
    size = case.sampling.batch_size
    case = replace(case, prepared=functools.partial(_by_batch, size=size)).drawn(order="grouped")
    return case.trained(100)


def momentum_encoder(case: Case) -> Case:
    """Beside a copy of it that gradients do not train."""
    return replace(case, model=WithCopy(case.model))


def side_head(case: Case) -> Case:
    """With a head that runs in training only."""
    inputs = case.network.data().training.inputs[0].numel()
    return replace(case, model=WithSideHead(case.model, inputs)).trained(60, rate=3e-4)


def hardly_trained(case: Case) -> Case:
    """A new network after a few steps, with statistics that fit: as bad in both modes."""
    torch.manual_seed(case.seed)
    return replace(case, model=ARCHITECTURES[case.network.name]()).trained(5, rate=1e-4, settling=100)


def overfitted(case: Case) -> Case:
    """Trained further on few samples, for long."""
    return case.drawn(images=2 * case.sampling.batch_size).trained(150, rate=1e-2)


def padded_batches(case: Case) -> Case:
    """Trained further on signals that are cut at random lengths and filled up with zeros, and served whole."""
    ragged = functools.partial(shifts.ragged, shortest=2)
    return replace(case, prepared=ragged, evaluated=on_inputs(shifts.lowered)).trained(100, rate=3e-3)


def wrong_labels(case: Case) -> Case:
    """Held-out samples whose targets belong to others: worse, whatever batch normalization does."""
    return replace(case, evaluated=_with_other_targets)


def _two_groups(samples: Samples) -> Samples:
    return samples.take((samples.groups < 2).nonzero().flatten())


def _by_batch(samples: Samples, size: int) -> Samples:
    """Consecutive samples make a group, which a grouped order keeps in one batch."""
    groups = torch.arange(len(samples)) // size
    generator = torch.Generator().manual_seed(5)
    drawn = torch.rand((2, int(groups.max()) + 1), generator=generator)[:, groups]
    scale, offset = (values.view(-1, *[1] * (samples.inputs.dim() - 1)) for values in (0.8 + 0.4 * drawn[0], drawn[1]))
    inputs: Tensor = samples.inputs * scale + 0.2 * (offset - 0.5) * samples.inputs.std()
    return replace(samples, inputs=inputs, groups=groups)


def _with_other_targets(samples: Samples) -> Samples:
    """A third of the targets, by turns."""
    targets = samples.targets.clone()
    targets[::3] = targets[::3].roll(1, 0)
    return replace(samples, targets=targets)


CONTROLS: dict[str, Control] = {
    control.name: control
    for control in (
        Control(as_trained),
        Control(without_held_out_data),
        Control(with_everything),
        Control(slower_average),
        Control(cumulative_average),
        Control(weak_dropout),
        Control(batches_of_32),
        Control(heavy_tails, ("audio", "points", "generator")),
        Control(noisy_training),
        Control(slight_shift),
        Control(small_evaluation),
        Control(two_batches),
        Control(other_class_mix, ("plain", "residual", "dense", "audio", "points", "mixer")),
        Control(augmented_by_batch),
        Control(momentum_encoder, ("plain", "residual", "dense", "mlp", "audio", "mixer")),
        Control(side_head, ("plain", "residual", "mlp", "audio", "mixer")),
        Control(hardly_trained, CLASSIFIERS, healthy=False),
        Control(overfitted, CLASSIFIERS, healthy=False),
        Control(padded_batches, ("audio",), healthy=False),
        Control(wrong_labels, CLASSIFIERS, healthy=False),
    )
}
"""By name of the kind."""
