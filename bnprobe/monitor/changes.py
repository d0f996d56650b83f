"""What a monitor changes about the layers that it found, and takes back once the cause is gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnprobe.errors import UsageError
from bnprobe.monitor.inputs import INPUTS
from bnprobe.monitor.sampling import Inputs, call_model
from bnprobe.nn.limits import RenormSchedule
from bnprobe.records import RECALIBRATE
from bnprobe.repairs import convert
from bnprobe.repairs.recalibration import recalibrate
from bnprobe.repairs.surgery import replace_everywhere

TARGETS = {"freeze": "frozen", "renorm": "batch-renorm"}
"""The actions that convert layers, and to what."""

WARN = "warn"

ACTIONS = (*TARGETS, RECALIBRATE)
"""What may be done to the layers of a finding."""

RAMP = 10
"""Samples over which the limits of Batch Renorm open, from those of BN on: opened at once they caused spikes of the
loss (Ioffe 2017, section 4)."""


@dataclass
class Change:
    """Layers that were converted.

    Attributes:
        action: "freeze" or "renorm".
        layers: The layers that took the place of others, by name.
        originals: Those in whose place they stand, with the same parameters and buffers.
        schedule: Of the limits of Batch Renorm.
    """

    action: str
    layers: dict[str, nn.Module]
    originals: dict[str, nn.Module]
    schedule: RenormSchedule | None = None

    def state(self) -> dict[str, Any]:
        """What ``restored`` takes, of plain values."""
        return {
            "action": self.action,
            "layers": list(self.layers),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
        }


def change(model: nn.Module, action: str, names: Sequence[str], steps: int) -> Change:
    """Convert layers in place; parameters and buffers stay the same objects.

    Args:
        model: Not wrapped, and not a layer itself.
        action: "freeze" or "renorm".
        names: Of the layers.
        steps: Over which the limits of Batch Renorm open.

    Raises:
        RepairError: A layer cannot be converted; then none is.
    """
    originals = {name: model.get_submodule(name) for name in names}
    convert(model, names, to=TARGETS[action], inplace=True)
    layers = {name: model.get_submodule(name) for name in names}
    made = Change(action, layers, originals)
    if action == "renorm":
        made.schedule = RenormSchedule(steps, warmup=0.0, r_ramp=1.0, d_ramp=1.0)
        made.schedule.attach(nn.ModuleList(layers.values()))
    return made


def restored(model: nn.Module, state: Mapping[str, Any]) -> Change:
    """The change of a saved run, made on the model of a new one."""
    steps = state["schedule"]["steps"] if state["schedule"] else 1
    made = change(model, state["action"], state["layers"], int(steps))
    if made.schedule is not None:
        made.schedule.load_state_dict(state["schedule"])
    return made


def take_back(model: nn.Module, made: Change) -> None:
    """Put the original layers in their places; their statistics are those that the others had at last."""
    for name, layer in made.layers.items():
        made.originals[name].train(layer.training)
    replace_everywhere(model, {layer: made.originals[name] for name, layer in made.layers.items()})


def take_statistics(model: nn.Module, names: Sequence[str], kept: Sequence[Inputs], size: int) -> None:
    """Replace the running statistics of layers by those of some batches."""
    recalibrate(
        model,
        list(kept),
        size,
        forward=call_model,
        layers=names,
        include_frozen=True,
        batch_size_of=lambda batch: size,
    )


def require_response(given: object) -> None:
    """Refuse what is no response to a finding, nor a dictionary of some by rule.

    Raises:
        UsageError: Names what there is.
    """
    for response in given.values() if isinstance(given, Mapping) else (given,):
        if not callable(response) and response not in (WARN, *ACTIONS):
            known = ", ".join(f'"{name}"' for name in (WARN, *ACTIONS))
            raise UsageError(
                f"on_finding={given!r}: give one of {known}, a function of (monitor, finding), or a dictionary of these"
                " by rule."
            )
    if isinstance(given, Mapping) and given.get(INPUTS) in ACTIONS:
        raise UsageError(
            f'on_finding={given!r}: "{INPUTS}" is a finding on the data, and has no layers to change. Give "{WARN}" or'
            " a function of (monitor, finding)."
        )
