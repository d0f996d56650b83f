"""What a layer can be converted to: the registry of repair targets.

A row imports no torch, so that the command line can list and validate the targets at once. It names its code as
``"package.module:CLASS"``, which is imported when a layer is converted (``bnprobe.repairs.conversions``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bnprobe.errors import RepairError, UsageError
from bnprobe.numbers import joined
from bnprobe.registry import Registry
from bnprobe.wording import nearest

DEFAULT_TARGET, AUTO = "batch-renorm", "auto"
"""The target if none is named, and the name that stands for whichever does best in a short training run."""


@dataclass(frozen=True)
class Target:
    """A kind of layer that can replace BN.

    Attributes:
        name: The name after ``--to``.
        summary: What its layers normalize with in training, a phrase for help and documentation.
        conversion: Where its ``bnprobe.repairs.conversions.Conversion`` is, as "package.module:CLASS".
        advice: When to choose it, a phrase for documentation.
        deploys: Whether plain BN with the converted layer's weights gives the same output at inference.
        agrees: Whether training and inference give the same output by construction.
        settings: The keys of the spec's ``repair`` section that its layers use: "renorm", "groups", "blend",
            "virtual_batch_size", "window", "burn_in", "domains". With "renorm", training raises the limits of its Batch
            Renorm layers by the schedule in that section.
        needs_processes: Whether it only changes something where several processes train.
        plain_up_to: The key of the spec's ``repair`` section with the batch size up to which its layers are plain BN.
        needs_domains: Whether its layers must be told of which domain their data is, by ``bnprobe.nn.domain``.
        unflagged_remark: What a reader should know if the repaired model has no flagged layer, a sentence.
        at_inference: What its layers normalize with at inference, unless it ``agrees``, a phrase.
        marks: Tensors of the state_dict that its layers alone have: a checkpoint is known by them.
        also_called: Names that it has elsewhere, for the suggestion where one of them is given.
    """

    name: str
    summary: str
    conversion: str
    advice: str = ""
    deploys: bool = False
    agrees: bool = False
    settings: tuple[str, ...] = ()
    needs_processes: bool = False
    plain_up_to: str = ""
    needs_domains: bool = False
    unflagged_remark: str = ""
    at_inference: str = "running statistics"
    marks: tuple[str, ...] = ()
    also_called: tuple[str, ...] = ()


_HERE = "bnprobe.repairs.conversions:"

TARGETS: Registry[Target] = Registry(
    "bnprobe.targets",
    (
        Target(
            name="batch-renorm",
            summary="batch statistics, corrected towards the running ones",
            conversion=_HERE + "ToBatchRenorm",
            advice="small or non-i.i.d. batches",
            deploys=True,
            settings=("renorm",),
            unflagged_remark="Within its limits, Batch Renorm gives the same output in training and at inference by"
            " construction. That no layer is flagged only says that r and d stay within the limits; the scores say what"
            " the repair gains.",
            also_called=("brn",),
        ),
        Target(
            name="frozen",
            summary="the running statistics, as at inference",
            conversion=_HERE + "ToFrozen",
            advice="short fine-tuning with good statistics; any batch size",
            deploys=True,
            agrees=True,
            also_called=("frozen-bn", "fixed"),
        ),
        Target(
            name="group-norm",
            summary="groups of channels of one sample",
            conversion=_HERE + "ToGroupNorm",
            advice="when there is time to train the weights for long, and BN need not be kept",
            agrees=True,
            settings=("groups",),
            also_called=("gn",),
        ),
        Target(
            name="sync",
            summary="batch statistics of all processes together",
            conversion=_HERE + "ToSync",
            advice="several processes; in one process it is plain BN",
            deploys=True,
            needs_processes=True,
            also_called=("syncbn",),
        ),
        Target(
            name="instance-renorm",
            summary="statistics of one sample, mixed with the running ones",
            conversion=_HERE + "ToInstanceRenorm",
            advice="batch size 1; samples that differ in gain and offset; plain BN only at `blend: 0`",
            agrees=True,
            settings=("blend",),  # BN at inference only at blend 0: deployable_state looks at the layers themselves
        ),
        Target(
            name="example-weighing",
            summary="batch statistics, as in BN",
            conversion=_HERE + "ToExampleWeighing",
            advice="weights that are trained already, without training them again; plain BN only at `blend: 0`",
            settings=("blend",),
            at_inference="running statistics, mixed with those of the sample",
        ),
        Target(
            name="gated",
            summary="a learned mix of batch and running statistics",
            conversion=_HERE + "ToGated",
            advice="batches that can partly be trusted; usable at batch size 1",
            deploys=True,
            settings=("blend",),
            marks=("gate_logit",),
        ),
        Target(
            name="ghost",
            summary="parts of a batch, each with its own statistics",
            conversion=_HERE + "ToGhost",
            advice="large batches that should train as smaller ones do; no remedy for small ones",
            deploys=True,
            settings=("virtual_batch_size",),
            plain_up_to="virtual_batch_size",
            also_called=("gbn",),
        ),
        Target(
            name="mabn",
            summary="averages over the last batches, in the backward pass too",
            conversion=_HERE + "ToMovingAverage",
            advice="small batches, and batches of one kind each if the window holds all kinds",
            deploys=True,
            settings=("window",),
            marks=("batch_means", "batch_vars", "gradient_means", "gradient_products", "gradients_seen"),
            also_called=("moving-average",),
        ),
        Target(
            name="cross-iteration",
            summary="the last batches, at the present weights of the convolution before",
            conversion=_HERE + "ToCrossIteration",
            advice="small batches, where each layer stands behind a convolution or linear module of its own",
            deploys=True,
            settings=("window", "burn_in"),
            marks=("patches", "slopes", "projections", "mean_offsets", "variance_offsets"),
            also_called=("cbn",),
        ),
        Target(
            name="per-domain",
            summary="the samples of each domain, with their own statistics",
            conversion=_HERE + "ToPerDomain",
            advice="one layer for several kinds of input; your code says which it is: `with bnprobe.nn.domain(index):`",
            settings=("domains",),
            needs_domains=True,
            marks=("domain_mean", "domain_var", "domain_batches"),
            also_called=("dsbn", "domain-specific"),
        ),
    ),
    lambda target: target.name,
    "repair target",
    RepairError,
)


def nearest_target(name: str) -> str:
    """The target name, or "auto", that is spelled most like ``name``, or whose name elsewhere is."""
    known = {AUTO: AUTO} | {each: target.name for target in TARGETS for each in (target.name, *target.also_called)}
    return known[nearest(name.lower(), known, cutoff=0.0)]


def require_used(to: str, given: Mapping[str, Any], written: Callable[[str, Any], str]) -> None:
    """Refuse settings that the layers of a target do not use.

    Args:
        to: A target, or "auto", which tries all of them.
        given: Settings by name; None: not given.
        written: How the user writes a setting and its value.

    Raises:
        UsageError: Names the setting, and the targets that use it.
    """
    used = {name for target in TARGETS if to in (AUTO, target.name) for name in target.settings}
    for name, value in given.items():
        if value is not None and name not in used:
            takers = [target.name for target in TARGETS if name in target.settings]
            raise UsageError(
                f"{written(name, value)} has no effect on {to}: it is a setting of {joined(takers)}. Name such a"
                " target, or leave it out."
            )


def settings_of(to: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings of a spec's ``repair`` section that the layers of a target use, in order."""
    used = TARGETS[to].settings if to in TARGETS else ()  # of a package that is not installed here
    return {name: given[name] for name in used if name in given}


def groups_for(channels: int, most: int) -> int:
    """The largest divisor of ``channels`` that is at most ``most`` and leaves two channels in a group.

    With one channel in a group, group norm would be instance norm, and without space it would make everything 0.
    """
    least = min(2, channels)
    return max(
        groups for groups in range(1, min(most, channels) + 1) if channels % groups == 0 and channels >= groups * least
    )


def conversion_call(layers: str, to: str, settings: Mapping[str, Any]) -> str:
    """The call of ``bnprobe.convert`` that converts layers as they were, a line of Python.

    Args:
        layers: The layers, an expression of Python.
        to: A target.
        settings: Of its layers.
    """
    named = "".join(f", {name}={value!r}" for name, value in settings.items())
    return f"bnprobe.convert(model, {layers}, to={json.dumps(to, ensure_ascii=False)}{named})"


ARGUMENTS = "bnprobe.arguments"
"""Metadata of repaired weights: the arguments of the model's class, as JSON."""

CONVERTED = "bnprobe.converted"
"""Metadata key that marks a safetensors file as unfit for plain BN, with the JSON of a ``ConversionMark``."""


@dataclass(frozen=True)
class ConversionMark:
    """What a weights file says of its converted layers, which the weights alone do not show.

    Attributes:
        to: The target.
        layers: Class names of the layers by name; "" in a file of an earlier version.
        settings: Those with which they were made; none in a file of an earlier version.
    """

    to: str
    layers: Mapping[str, str]
    settings: Mapping[str, Any]
