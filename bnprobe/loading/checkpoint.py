"""The weights: find the state dict in a checkpoint that fits the model, and load it.

Where none fits, the error says what does not, and which prefix or key would make it fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnprobe.config.spec import CheckpointSpec
from bnprobe.config.targets import TARGETS, Target, conversion_call, groups_for
from bnprobe.errors import CheckpointError
from bnprobe.loading.model import kind_of, user_code
from bnprobe.loading.samples import why_unreadable
from bnprobe.loading.tracking import keeps_none, tracking
from bnprobe.loading.weights import Stub, read_conversion, read_weights, state_of, weights_file
from bnprobe.numbers import count, joined, listed
from bnprobe.records import ROOT
from bnprobe.wording import nearest

WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded from a checkpoint.

    Attributes:
        notes: What the reader should know, one sentence each.
        parameters_alone: Layers lack their running statistics in the file.
        averaged: Why the weights are taken to be an average of those of many steps, whose running statistics are others
            than those of the last step, a clause; None where nothing says so.
        beside: That averaged weights are there which were not used, a clause; None where there are none.
        undone: By name of a layer that is plain BN in the model, what the file shows it to be converted to.
    """

    notes: tuple[str, ...] = ()
    parameters_alone: bool = False
    averaged: str | None = None
    beside: str | None = None
    undone: Mapping[str, str] = field(default_factory=dict)


def without_prefix(state: Mapping[str, Any], prefix: str, path: Path) -> dict[str, Any]:
    """The state dict with the user's prefix removed from the keys that start with it.

    Raises:
        CheckpointError: No key starts with the prefix.
    """
    prefix = prefix if prefix.endswith(".") else f"{prefix}."
    if not any(key.startswith(prefix) for key in state):
        raise CheckpointError(
            f'No key of {path} starts with "{prefix}" (checkpoint.strip_prefix); the first key is {next(iter(state))}.'
        )
    return {key.removeprefix(prefix): value for key, value in state.items()}


def without_wrappers(state: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state dict under the model's own names, as far as prefixes of wrappers explain the difference.

    The way of removing prefixes that matches most keys is used; the keys stay unchanged if none matches more.

    Returns:
        The renamed state dict, and the prefixes that were removed.
    """
    best = dict(state)
    for rename in (*_leading(state), _everywhere(target)):
        renamed = {rename(key): value for key, value in state.items()}
        lossless = len(renamed) == len(state)
        if lossless and len(renamed.keys() & target.keys()) > len(best.keys() & target.keys()):
            best = renamed
    changed = [key for key in state if key not in best]
    return best, [prefix for prefix in WRAPPERS if any(prefix in key for key in changed)]


def _leading(state: Mapping[str, Any]) -> list[Callable[[str], str]]:
    """Renamings that remove one leading prefix from each key, or two, up to as many as are nested."""
    deepest = max((_depth(key) for key in state), default=0)
    return [partial(_strip, depth=depth) for depth in range(1, deepest + 1)]


def _depth(key: str) -> int:
    depth = 0
    while key.startswith(WRAPPERS):
        key, depth = key.split(".", 1)[1], depth + 1
    return depth


def _strip(key: str, depth: int) -> str:
    for _ in range(min(depth, _depth(key))):
        key = key.split(".", 1)[1]
    return key


def _everywhere(target: Mapping[str, Any]) -> Callable[[str], str]:
    """A renaming that ignores wrapper parts anywhere in a name, since a submodule alone may be wrapped."""
    names = {_bare(name): name for name in target}
    unique = len(names) == len(target)
    return lambda key: names.get(_bare(key), key) if unique else key


def _bare(key: str) -> str:
    return ".".join(part for part in key.split(".") if f"{part}." not in WRAPPERS)


_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


def check_fit(
    state: Mapping[str, Any], target: Mapping[str, Any], strict: bool, path: Path, need_statistics: bool = True
) -> tuple[dict[str, Any], LoadedWeights]:
    """Compare names and shapes; nothing is copied.

    Args:
        state: State dict of the file.
        target: The model's state dict with its own tensors.
        strict: Whether missing parameters and unexpected keys are errors. Missing BN buffers and mismatched shapes
            always are.
        path: The file, for messages.
        need_statistics: Whether the running statistics of every layer must be there; False where they are about to be
            made. A layer that has one of the two must have the other in any case.

    Returns:
        The entries to load, and what is known of them.

    Raises:
        CheckpointError: The state dict does not fit; the message lists the differences.
    """
    kinds = _other_kinds(state, target)
    if kinds:
        raise CheckpointError(
            f"The checkpoint {path} does not fit the model.\nOf another kind ({len(kinds)}): {_first(kinds)}.\n"
            "Save plain tensors, with real numbers where the model has them: to_dense() makes one of a sparse tensor,"
            " dequantize() of a quantized one."
        )
    missing = _missing(state, target)
    counters = _old_format(missing, state)
    missing = [name for name in missing if name not in counters]
    parameters_alone = [] if need_statistics else _without_statistics(missing)
    buffers = [f"{layer}{end}" for layer in parameters_alone for end in (*_STATISTICS, _COUNTER)]
    missing = [name for name in missing if name not in buffers]
    unexpected = [name for name in state if name not in target]
    # Without those of its domains a converted layer does not do at inference what it did.
    undeployable = [name for name in missing if (made := _target_of(name, target)) and not made.deploys]
    statistics = undeployable + [name for name in missing if name.endswith((*_STATISTICS, _COUNTER))]
    shapes = _other_shapes(state, target)
    if shapes or statistics or (strict and (missing or unexpected)):
        raise CheckpointError(_message(path, missing, unexpected, shapes, state, target))
    usable = {name: value for name, value in state.items() if name in target}
    notes = _notes(path, missing, unexpected, counters)
    if parameters_alone:
        what = f"the running statistics of {count(len(parameters_alone), 'layer')}"
        notes += (f"{path.name} holds parameters alone: {what} are not in it and begin as in the model as built.",)
    return usable, LoadedWeights(notes, bool(parameters_alone))


def _without_statistics(missing: Sequence[str]) -> list[str]:
    """Prefixes of the layers whose running mean and variance are both missing."""
    layers = [name.removesuffix(_STATISTICS[0]) for name in missing if name.endswith(_STATISTICS[0])]
    return [layer for layer in layers if f"{layer}{_STATISTICS[1]}" in missing]


def _missing(state: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """Names that are missing in the file; of a tensor with two names (tied weights) one is enough."""
    given = {id(target[name]) for name in state if name in target}
    return [
        name
        for name, value in target.items()
        if name not in state and id(value) not in given and not name.endswith("_extra_state")
    ]


def _old_format(missing: list[str], state: Mapping[str, Any]) -> list[str]:
    """Counters that files from before PyTorch 0.4.1 lack although they have the statistics."""
    if any(name.endswith(_COUNTER) for name in state):
        return []
    return [
        name for name in missing if name.endswith(_COUNTER) and name.removesuffix(_COUNTER) + "running_var" in state
    ]


def _other_shapes(state: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value, own in _pairs(state, target):
        if isinstance(value, Tensor) and value.shape != own.shape and not (value.numel() == own.numel() == 1):
            found.append(f"{name} (file {_size(value)}, model {_size(own)})")
    return found


def _other_kinds(state: Mapping[str, Any], target: Mapping[str, Any]) -> list[str]:
    """The names of what cannot be copied into the model's tensor, or not without loss, with the kind."""
    found = []
    for name, value, own in _pairs(state, target):
        kind = _kind(value)
        if kind is not None and kind != _kind(own):
            found.append(f"{name} ({kind})")
    return found


def _kind(value: Any) -> str | None:
    """What something is other than a plain tensor of real numbers, a noun; None for such a tensor."""
    if not isinstance(value, Tensor):
        return f"not a tensor, but {type(value).__name__}"
    if value.is_quantized:
        return "a quantized tensor"
    return "a tensor of complex numbers" if value.is_complex() else why_unreadable(value)


def _pairs(state: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[tuple[str, Any, Tensor]]:
    """What the file and the model both have: name, value in the file, and the model's own tensor."""
    for name, value in state.items():
        own = target.get(name)
        if isinstance(own, Tensor) and not is_lazy(own):
            yield name, value, own


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _message(
    path: Path,
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    state: Mapping[str, Any],
    target: Mapping[str, Any],
) -> str:
    lines = [f"The checkpoint {path} does not fit the model."]
    for title, names in (("Missing", missing), ("Unexpected", unexpected), ("Different shape", shapes)):
        if names:
            lines.append(f"{title} ({len(names)}): {_first(names)}.")
    return "\n".join([*lines, _explanation(missing, unexpected, shapes, state, target)])


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _explanation(
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    state: Mapping[str, Any],
    target: Mapping[str, Any],
) -> str:
    matched = len(state.keys() & target.keys())
    prefix = _common_prefix(state, target, matched)
    if prefix:
        return f'Its keys match without the prefix "{prefix}": give --strip-prefix {prefix} (checkpoint.strip_prefix).'
    for name in (*missing, *unexpected):
        converted = _target_of(name, state, target)
        if converted is None:
            continue
        to, layer = converted.name, name.rpartition(".")[0] or ROOT
        if name in missing:
            return (
                f"{layer} is converted to {to} in the model, and was not where the file was saved: load the file before"
                " you convert."
            )
        return (
            f"{layer} was converted to {to} where the file was saved, and is not in this model. Convert it in"
            f" load_model(): {conversion_call('[...]', to, {})}."
        )
    if matched < len(target) / 2:
        return "These look like the weights of a different model."
    halves = [name for name in missing if name.endswith(_STATISTICS) and _other_half(name) in state]
    if halves and not unexpected and not shapes:
        half = listed(sorted({name.rpartition(".")[0] for name in halves}))
        return (
            f"The file holds only one of running_mean and running_var for {half}, so it is not whole: save"
            " model.state_dict() again. `bnprobe recalibrate` computes both for layers of which the file holds neither."
        )
    if missing and not unexpected and all(name.endswith((*_STATISTICS, _COUNTER)) for name in missing):
        return (
            "This looks like parameters saved without buffers. BatchNorm needs its running statistics: save"
            " model.state_dict(), or compute them from training data with `bnprobe recalibrate`, which accepts this"
            " file."
        )
    if shapes and not missing and not unexpected:
        converted = _target_of(shapes[0].split(" ")[0], state, target)
        if converted is not None and converted.settings:
            return (
                f"Layers were converted to {converted.name} with other settings where the file was saved"
                f" ({joined(converted.settings)}): convert with these in load_model()."
            )
        layers = {name.split(" ")[0].rpartition(".")[0] for name in shapes}
        if len(layers) == 1:
            layer = layers.pop()
            return (
                f"Only {layer} differs: this looks like the same model with a different number of classes. Build the"
                f" model with as many as the file has (model.args, or in load_model), or leave {layer} out of the file"
                " and give checkpoint.strict: false."
            )
        return "This looks like the same model with other sizes: check model.args."
    return (
        "This looks like another version of the model. checkpoint.strict: false loads the keys that match; all BN"
        " buffers must still be in the file."
    )


def _target_of(name: str, *states: Mapping[str, Any]) -> Target | None:
    """The repair target of whose layers alone a tensor of this name can be, beside running statistics in all states.

    A model of the user's may have a parameter of the same name, but not in a norm.
    """
    layer, dot, mark = name.rpartition(".")
    if any(f"{layer}{dot}{_STATISTICS[0]}" not in state for state in states):
        return None
    return next((target for target in TARGETS if mark in target.marks), None)


def _undone(model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """The layers that the state dict shows to be converted, and that are plain BN in the model; with the target."""
    modules = dict(model.named_modules(remove_duplicate=False))
    marked = {key.rpartition(".")[0]: target for key in state if (target := _target_of(key, state)) is not None}
    return {
        name or ROOT: target.name
        for name, target in marked.items()
        if isinstance(module := modules.get(name), _BatchNorm) and not _is_converted(module)
    }


def _is_converted(module: _BatchNorm) -> bool:
    return any(kind.__module__.startswith("bnprobe.nn.") for kind in type(module).__mro__)


def _other_half(name: str) -> str:
    """The running variance of a layer whose running mean has this name, and the other way round."""
    layer, dot, end = name.rpartition(".")
    return f"{layer}{dot}{_STATISTICS[1 - _STATISTICS.index(end)]}"


def _common_prefix(state: Mapping[str, Any], target: Mapping[str, Any], matched: int) -> str | None:
    """A prefix such as "model." or "net.backbone." that must be stripped for half of the model's keys to match."""
    prefixes = {key[: end + 1] for key in state for end, char in enumerate(key) if char == "."}
    counts = {
        prefix: sum(key.startswith(prefix) and key.removeprefix(prefix) in target for key in state)
        for prefix in sorted(prefixes, key=len)[:200]
    }
    best = max(counts, key=lambda prefix: counts[prefix], default=None)
    return best if best and counts[best] > max(matched, len(target) / 2) else None


def _notes(path: Path, missing: list[str], unexpected: list[str], counters: list[str]) -> tuple[str, ...]:
    notes = []
    if missing:
        notes.append(f"{path.name} lacks {len(missing)} keys; they keep the values of the model: {_first(missing)}.")
    if unexpected:
        notes.append(f"{len(unexpected)} keys of {path.name} were not used: {_first(unexpected)}.")
    if counters:
        notes.append(f"{path.name} has no update counters (num_batches_tracked), like files from before PyTorch 0.4.1.")
    return tuple(notes)


_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Keys under which training scripts save the weights; of states that fit equally well the first of these is taken."""

_AVERAGED = re.compile(r"ema|swa|averag|shadow|teacher", re.IGNORECASE)
"""Parts of keys under which training scripts save averaged weights."""

_AVERAGED_FILE = re.compile(r"(?<![a-z])(ema|swa|avg|average[d]?)(?![a-z])", re.IGNORECASE)
"""The same in the names of files, which are longer."""

_AVERAGED_COUNTER = "n_averaged"
"""The key that torch.optim.swa_utils.AveragedModel adds to those of its module."""

_DEEPEST = 4
_MOST_CANDIDATES = 256


def load_checkpoint(model: nn.Module, spec: CheckpointSpec, need_statistics: bool = True) -> LoadedWeights:
    """Copy the weights of a file into the model. Without a path, do nothing.

    A file with running statistics of layers that keep none in the model, as ``bnprobe recalibrate`` writes it, switches
    these layers' tracking on.

    Args:
        model: Changed in place; left unchanged if anything is wrong.
        spec: Path, key, prefix, strictness.
        need_statistics: As in ``check_fit``.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the model.
    """
    if spec.path is None:
        return LoadedWeights()
    path = weights_file(Path(spec.path))
    saved, left_out = read_weights(path, spec.unsafe_load)
    _refuse_converted(path, model)
    with user_code("calling state_dict() of the model"):
        target = dict(model.state_dict(keep_vars=True))
    best, others, notes = _find_state(saved, spec.key, path, target)
    averaged, beside = _averaging(best, others, path, target)
    state = best.state
    notes = [*([f"The weights were read from {path}."] if path != Path(spec.path) else []), *notes, *left_out]
    if _AVERAGED_COUNTER in state and _AVERAGED_COUNTER not in target:
        state = {name: value for name, value in state.items() if name != _AVERAGED_COUNTER}
        notes.append(f"{path.name} holds torch's AveragedModel: the weights are an average.")
        averaged = averaged or f"averaged weights, by the {_AVERAGED_COUNTER} of {path.name}: {_WITH_AVERAGE}"
    if spec.strip_prefix:
        state = without_prefix(state, spec.strip_prefix, path)
    state, stripped = without_wrappers(state, target)
    if stripped:
        notes.append(f"The prefixes {' and '.join(stripped)} were stripped from the keys of {path.name}.")
    switched = _untracked(model, state)
    with tracking(switched.values()):
        if switched:
            target = dict(model.state_dict(keep_vars=True))
            notes.append(
                f"{path.name} holds running statistics of {count(len(switched), 'layer')} that keep none as the model"
                f" is built ({listed(list(switched))}): they were switched on. To load the file yourself, build these"
                " layers with track_running_stats=True."
            )
        usable, found = check_fit(state, target, spec.strict, path, need_statistics)
        with user_code(f"loading the weights of {path} into the model"):
            model.load_state_dict(usable, strict=False)
    undone = _undone(model, state)
    return replace(found, notes=(*notes, *found.notes), averaged=averaged, beside=beside, undone=undone)


def state_fitting(model: nn.Module, saved: Any, spec: CheckpointSpec, path: Path) -> dict[str, Any]:
    """The state dict that would be loaded into a model, under its names; sizes may differ.

    Args:
        model: Not changed.
        saved: What the file holds.
        spec: Which key and prefix.
        path: The file, for messages.

    Raises:
        CheckpointError: The file holds none that fits.
    """
    with user_code("calling state_dict() of the model"):
        target = dict(model.state_dict(keep_vars=True))
    state = _find_state(saved, spec.key, path, target)[0].state
    if spec.strip_prefix:
        state = without_prefix(state, spec.strip_prefix, path)
    return without_wrappers(state, target)[0]


def _untracked(model: nn.Module, state: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The layers that keep no running statistics although the state dict has some for them, by name."""
    return {
        name or ROOT: module
        for name, module in model.named_modules()
        if keeps_none(module) and all(f"{name}.{end}".removeprefix(".") in state for end in _STATISTICS)
    }


def _refuse_converted(path: Path, model: nn.Module) -> None:
    """Reject weights of converted layers for a model whose layers are not those of the file's mark.

    It may be plain BN, another layer, or one with other settings: the weights fit all the same, and inference differs.
    """
    mark = read_conversion(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, kind in mark.layers.items() if mark else ():
        module = modules.get("" if name == ROOT else name)
        difference = None if mark is None or module is None else _difference(module, kind, mark.settings)
        if mark and difference:
            raise CheckpointError(
                f"{path} holds the weights of a model whose layers were converted to {mark.to}, but {name}"
                f" {difference}, so inference would differ. Convert it in load_model():"
                f" {conversion_call('[...]', mark.to, mark.settings)}."
            )


def _difference(module: nn.Module, kind: str, settings: Mapping[str, Any]) -> str | None:
    """In what a layer is another than that of this class and these settings, a clause; None if in nothing."""
    own = type(module)
    known = {_without_dimensions(each.__name__) for each in own.__mro__}
    same = _without_dimensions(kind) in known if kind else hasattr(module, "deployment_obstacle")
    if isinstance(module, _BatchNorm) and not same:
        return f"is {own.__name__} in this model"
    for name, value in settings.items():
        found, wanted = getattr(module, name, value), value
        if name == "groups" and isinstance(module, nn.GroupNorm):
            found = module.num_groups
            wanted = groups_for(module.num_channels, value) if isinstance(value, int) and value > 0 else value
        if found != wanted:
            return f"has {name} {found} in this model and {wanted} in the file"
    return None


def _without_dimensions(kind: str) -> str:
    return re.sub("[123]d$", "", kind)


@dataclass(frozen=True)
class _Candidate:
    """A state dict in a file.

    Attributes:
        key: Where it is, as ``checkpoint.key`` takes it; "" for the file itself.
        state: Names and tensors.
        of: Class name, if it is that of a whole pickled model.
        matched: Number of its names that the model has.
    """

    key: str
    state: dict[str, Any]
    of: str | None
    matched: int

    def rank(self, position: int) -> tuple[Any, ...]:
        """Sorts the one to be taken first."""
        last = self.key.rpartition(".")[2]
        usual = _USUAL_KEYS.index(last) if last in _USUAL_KEYS else len(_USUAL_KEYS)
        return -self.matched, bool(_AVERAGED.search(self.key)), usual, position


def _find_state(
    saved: Any, key: str | None, path: Path, target: Mapping[str, Any]
) -> tuple[_Candidate, list[_Candidate], list[str]]:
    """The state dict that fits the model best, or the one under the key; others in the file; notes that say which."""
    inner = saved if key is None else _pick(saved, key, path)
    found = _candidates(inner, key or "", target)
    ranked = [each for _, each in sorted(enumerate(found), key=lambda pair: pair[1].rank(pair[0]))]
    if not ranked or (ranked[0].matched == 0 and len(ranked) > 1):
        raise CheckpointError(_no_state(inner, key, path, ranked))
    best, notes = ranked[0], []
    if best.of:
        notes.append(f"{path.name} holds a whole {best.of}{_under(best.key)}; its state dict was used.")
    elif best.key:
        notes.append(f'The weights were taken from the key "{best.key}" of {path.name}.')
    others = [each.key for each in ranked[1:] if each.matched == best.matched > 0]
    averaged = [other for other in others if _AVERAGED.search(other)]
    if averaged:
        notes.append(f'{path.name} also holds averaged weights (EMA) under "{averaged[0]}": --key {averaged[0]}.')
    elif others:
        notes.append(f"{path.name} also holds weights that fit under {listed(others)}: --key selects them.")
    whole = found if key is None else _candidates(saved, "", target)
    return best, [each for each in whole if each.matched and each.key != best.key], notes


def _averaging(
    best: _Candidate, others: Sequence[_Candidate], path: Path, target: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """``averaged`` and ``beside`` of ``LoadedWeights``, by the names of keys and file, and by what two states share."""
    named = bool(_AVERAGED.search(best.key))
    for other in others:
        statistics, weights = _same(best, other, target)
        if named and statistics and not weights:
            words = f'the weights under "{best.key}" of {path.name} are an average, their running statistics are those'
            return f'{words} under "{other.key}", which belong to other weights', None
        if not named and _AVERAGED.search(other.key) and weights and not statistics:
            return f'the weights are the average under "{other.key}" of {path.name}, their statistics are not', None
    if named:
        return f'averaged weights, by the key "{best.key}" of {path.name}: {_WITH_AVERAGE}', None
    if _AVERAGED_FILE.search(path.name):
        return f"averaged weights, by the name of {path.name}: {_WITH_AVERAGE}", None
    averaged = next((other.key for other in others if _AVERAGED.search(other.key)), None)
    return None, None if averaged is None else f'{path.name} also holds averaged weights, under "{averaged}"'


_WITH_AVERAGE = "their statistics must be taken with the average"


def _same(one: _Candidate, other: _Candidate, target: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether two states have the same running statistics, and the same values in all else that both have."""
    mine, theirs = (without_wrappers(each.state, target)[0] for each in (one, other))
    equal: tuple[list[bool], list[bool]] = ([], [])
    for name in mine.keys() & theirs.keys():
        values = mine[name], theirs[name]
        if not name.endswith(_COUNTER) and all(_is_plain(value) for value in values):
            equal[not name.endswith(_STATISTICS)].append(torch.equal(*values))
    statistics, weights = equal
    return bool(statistics) and all(statistics), bool(weights) and all(weights)


def _is_plain(value: object) -> bool:
    """Whether this is a tensor whose values can be compared."""
    return isinstance(value, Tensor) and why_unreadable(value) is None


def _under(key: str) -> str:
    return f' under the key "{key}"' if key else ""


def _candidates(saved: Any, key: str, target: Mapping[str, Any]) -> list[_Candidate]:
    """The state dicts in what a file holds, from the outside to the inside; not all of a great many.

    What a file holds in many places is judged once, and looked into once on each level: a short file can hold the same
    in billions of places.
    """
    judged: dict[int, tuple[dict[str, Any], str | None, int]] = {}
    entered: set[tuple[int, int]] = set()

    def found(saved: Any, key: str, depth: int) -> Iterator[_Candidate]:
        if id(saved) not in judged:
            state, of = _as_state(saved, target)
            judged[id(saved)] = state, of, _matched(state, target) if state else 0
        state, of, matched = judged[id(saved)]
        if state:
            yield _Candidate(key, state, of, matched)
            if matched or of:
                return
        if depth == 0 or (id(saved), depth) in entered:
            return
        entered.add((id(saved), depth))
        inside = {**saved, **vars(saved)} if isinstance(saved, Stub) else saved if isinstance(saved, Mapping) else {}
        for name, value in inside.items():
            yield from found(value, f"{key}.{name}" if key else str(name), depth - 1)

    return list(islice(found(saved, key, _DEEPEST), _MOST_CANDIDATES))


def _as_state(saved: Any, target: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The names and tensors that something holds; and its class, if it is a whole model."""
    if isinstance(saved, nn.Module):
        return saved.state_dict(), type(saved).__name__
    if isinstance(saved, Stub) and (state := state_of(saved)) is not None:
        return state, type(saved).__name__
    if not isinstance(saved, Mapping):
        return {}, None
    named = {name: _as_tensor(value) for name, value in saved.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not tensors:
        return {}, None
    rest = [name for name in saved if name not in tensors and not str(name).endswith("_extra_state")]
    if not rest:
        return {name: named.get(name, value) for name, value in saved.items()}, None
    return (tensors, None) if _matched(tensors, target) else ({}, None)


def _as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; all else as it is."""
    with suppress(TypeError):  # of a dtype that torch does not have
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())
    return value


def _matched(state: Mapping[str, Any], target: Mapping[str, Any]) -> int:
    """How many names the model has, wrappers and a common prefix aside."""
    renamed, _ = without_wrappers(state, target)
    matched = len(renamed.keys() & target.keys())
    prefix = _common_prefix(renamed, target, matched)
    return sum(name.removeprefix(prefix) in target for name in renamed) if prefix else matched


def _no_state(saved: Any, key: str | None, path: Path, found: Sequence[_Candidate]) -> str:
    inside = f" under the key {key}" if key else ""
    if found:
        keys = listed([each.key or "(the file itself)" for each in found])
        return (
            f"{path} holds several state dicts{inside}, and the names in none of them are those of the model: {keys}."
            " Check the model, or name the right one with --key (checkpoint.key in the spec)."
        )
    if not isinstance(saved, Mapping) or not saved:
        return f"{path} holds {kind_of(saved)}{inside}, not a state dict (name to tensor)."
    return (
        f"{path} holds no state dict{inside}. Its keys are {listed([*map(str, saved)])}. Name the one that holds the"
        " weights with --key (checkpoint.key in the spec)."
    )


def _pick(saved: Any, key: str, path: Path) -> Any:
    """Look up ``"ema.model"``: the key of that name, or else the key "model" under the key "ema"."""
    if isinstance(saved, Mapping) and key in saved:
        return saved[key]
    head, dot, rest = key.partition(".")
    if dot and isinstance(saved, Mapping) and head in saved:
        return _pick(saved[head], rest, path)
    if not isinstance(saved, Mapping):
        raise CheckpointError(f'{path} has no key "{key}": it holds {kind_of(saved)} there, not a mapping.')
    close = nearest(key, [str(name) for name in saved])
    hint = f' Did you mean "{close}"?' if close else ""
    raise CheckpointError(f'{path} has no key "{key}".{hint} Its keys are {listed([*map(str, saved)])}.')
