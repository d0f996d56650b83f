"""Find the layers of a model: which are probed, which are skipped and why."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnprobe.errors import NonFiniteError, NothingToProbeError
from bnprobe.norms import NormFamily, NormInfo, family_of, lookalike_reason
from bnprobe.records import SkippedLayer
from bnprobe.spec import ScanSettings, matches_any

ROOT = "(root)"
"""What the root module is called where it is itself a layer: its qualified name is empty."""


@dataclass(frozen=True)
class ProbedLayer:
    """A layer of a known family.

    Attributes:
        index: Position among the probed layers, in the order of ``named_modules``.
        name: First qualified name; ``aliases`` holds the others of a shared module.
        selected: False if --include/--exclude leave it out of the report; it still normalizes per micro-batch.
    """

    index: int
    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    family: NormFamily
    info: NormInfo
    selected: bool


@dataclass(frozen=True)
class LayerSet:
    """All layers of a model."""

    layers: tuple[ProbedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def selected(self) -> tuple[ProbedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.selected)


def find_layers(model: nn.Module, is_selected: Callable[..., bool]) -> LayerSet:
    """List the model's norm layers in network order, each shared module once.

    Args:
        model: Any module.
        is_selected: Called with all names of a layer: whether it is in the report.

    Raises:
        NothingToProbeError: No layer can be probed, or none is selected.
    """
    layers: list[ProbedLayer] = []
    skipped: list[SkippedLayer] = []
    for names, module in _named_once(model):
        family = family_of(module)
        reason = family.obstacle(module) if family else lookalike_reason(module)
        if reason:
            skipped.append(SkippedLayer(names[0], type(module).__name__, reason))
        elif family:
            selected = is_selected(*names)
            info = family.describe(module)
            layers.append(ProbedLayer(len(layers), names[0], names[1:], module, family, info, selected))
    found = LayerSet(tuple(layers), tuple(skipped))
    _require_layers(model, found)
    return found


def unmatched_globs(settings: ScanSettings, found: LayerSet) -> tuple[str, ...]:
    """A sentence for each glob of the settings that matches no layer, probed or skipped: likely a misspelt name."""
    names = [name for layer in found.layers for name in (layer.name, *layer.aliases)]
    names += [layer.name for layer in found.skipped]
    globs = [("--include", glob) for glob in settings.include]
    globs += [("--exclude", glob) for glob in settings.exclude]
    globs += [("rules.exempt", exemption.layers) for exemption in settings.rules.exempt]
    globs += [("thresholds", glob) for glob in settings.thresholds if glob != "*"]
    return tuple(_unmatched(glob, origin, names) for origin, glob in globs if not matches_any(glob, names))


def _unmatched(glob: str, origin: str, names: list[str]) -> str:
    nearest = difflib.get_close_matches(glob, names, 1, cutoff=0.0)
    hint = f'; the nearest name is "{nearest[0]}"' if nearest else ""
    return f'The glob "{glob}" of {origin} matches no layer{hint}.'


def check_buffers(layers: tuple[ProbedLayer, ...]) -> None:
    """Refuse layers whose running statistics are no statistics.

    Raises:
        NonFiniteError: Names the first layer and what is in its buffers.
    """
    for layer in layers:
        for name, buffer in layer.module.named_buffers(recurse=False):
            if not isinstance(buffer, Tensor) or not buffer.is_floating_point():
                continue
            _check_buffer(f"{layer.name}.{name}", buffer)


def _check_buffer(name: str, buffer: Tensor) -> None:
    bad = int((~torch.isfinite(buffer)).sum())
    if bad:
        raise NonFiniteError(
            f"{bad} of {buffer.numel()} values of the buffer {name} are NaN or Inf: one such activation in training"
            " poisons running statistics for ever. Reset them (reset_running_stats()) or load an earlier checkpoint."
            " `bnprobe lint` lists all such layers (BN103)."
        )
    negative = int((buffer < 0).sum())
    if name.endswith("running_var") and negative:
        raise NonFiniteError(
            f"{negative} of {buffer.numel()} values of the buffer {name} are negative; a variance cannot be."
            " Reset the running statistics (reset_running_stats()) or load an earlier checkpoint."
        )


def _named_once(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or ROOT)
    return [(tuple(aliases), module) for module, aliases in names.items()]


def _require_layers(model: nn.Module, found: LayerSet) -> None:
    if found.selected:
        return
    kind = type(model).__name__
    if found.layers:
        raise NothingToProbeError(
            f"--include/--exclude leave none of the BN layers of {kind} ({len(found.layers)})."
            f" The first is called {found.layers[0].name!r}."
        )
    if found.skipped:
        first = found.skipped[0]
        raise NothingToProbeError(
            f"No layer of {kind} can be probed. Of those skipped ({len(found.skipped)})"
            f" the first is {first.name} ({first.kind}): {first.reason}."
        )
    raise NothingToProbeError(f"{kind} has no Batch Normalization layer: there is nothing to probe.")
