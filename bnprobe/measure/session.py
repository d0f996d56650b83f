"""A session: the user's model on its device with hooks on its norm layers, and the functions that the user gave.

Every command that runs the model opens one with ``Session.open`` and hands it on whole.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnprobe.config.spec import ScanSettings
from bnprobe.errors import DataError, EndOfPass
from bnprobe.loading.arguments import device_named
from bnprobe.loading.model import BatchFunction, attribute, eagerly, require_values, signature_of, user_code
from bnprobe.loading.returned import written_at
from bnprobe.loading.samples import require_readable
from bnprobe.measure.batch import (
    CannotEmulateError,
    copy_tensors,
    leaves_of,
    map_leaves,
    tensors_of,
    to_device,
    with_leaves,
)
from bnprobe.measure.exploration import explore
from bnprobe.measure.forward_pass import Pass, Slot
from bnprobe.measure.hooks import Interceptor, Watch
from bnprobe.measure.interrupts import Restore, Restoring, deferred_interrupts, run_all
from bnprobe.measure.keepers import set_flag
from bnprobe.measure.layers import LayerSet, find_layers, named_once, require_layers
from bnprobe.measure.memory import is_out_of_memory
from bnprobe.measure.norms import FunctionFamily, place_of
from bnprobe.measure.recognition import own_tensors
from bnprobe.measure.restore import ModelState, held_in_eval, keep_random_state, random_state, set_mode
from bnprobe.wording import either

Outputs = dict[tuple[int, ...], Any]
"""Outputs of the model, by the positions in the batch of the tensors that it was called on."""

PathName = Literal["train", "steady", "eval", "check", "check train", "check eval"]
"""The two paths; "steady", the train path without dropout and other random layers (batch statistics, all else in eval
mode); and the same three as the self-check runs them, always without autocast."""

PATHS: tuple[PathName, PathName] = ("train", "eval")
"""The two paths."""

Progress = Callable[[int, int], None]
"""Called with the micro-batches done and planned, or of a scan, the number after which it looks again."""


def no_progress(done: int, planned: int) -> None:
    """Report progress to nobody."""


Announce = Callable[[str], None]
"""Called with a phrase that says what is measured from then on."""


def announce_nothing(what: str) -> None:
    """Tell nobody."""


_IN_WORDS: dict[PathName, str] = {
    "train": "training",
    "steady": "training without dropout and the like",
    "eval": "inference",
    "check": "self-check",
    "check train": "self-check",
    "check eval": "self-check",
}


@dataclass
class Alone:
    """What a micro-batch gave by itself.

    Attributes:
        batch: On the host, as the loader gave it.
        passes, outputs: On the train and the eval path; those that raised are missing.
        random: Random numbers were drawn.
    """

    batch: Any
    passes: dict[PathName, Pass] = field(default_factory=dict)
    outputs: dict[PathName, Any] = field(default_factory=dict)
    random: bool = False


@dataclass(frozen=True)
class UserFunctions:
    """The optional functions of a model file, ``f(model, batch)``.

    Attributes:
        offered: Those that a framework gave, not the user: a loss or metric that the batches do not do for is left out.
    """

    forward: BatchFunction | None = None
    loss: BatchFunction | None = None
    metric: BatchFunction | None = None
    offered: frozenset[str] = frozenset()

    def without(self, role: str) -> UserFunctions:
        """The others."""
        nothing: Any = {role: None}
        return replace(self, **nothing)

    @property
    def scores(self) -> bool:
        """Whether there is a loss or a metric."""
        return self.loss is not None or self.metric is not None


class Session:
    """The user's model with the interceptor in place.

    Args:
        model: Already on ``device``.
        layers: Its norm layers.
        functions: The user's own forward, loss and metric.
        device: Where to run.
        autocast: Autocast dtype, or None.
        settings: Which layers are selected, and what is said of norms of the user's own; None: all, and nothing.
        kept: What ``untouched`` keeps of the model.

    Attributes:
        held: Modules that the user keeps in eval mode while training.
        alone: What the micro-batch gave by which layers were looked for, until the self-check takes it; None where that
            is not wanted, or layers were found that this pass is without.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSet,
        functions: UserFunctions,
        device: torch.device,
        autocast: torch.dtype | None = None,
        settings: ScanSettings | None = None,
        kept: Iterable[Restore] = (),
    ) -> None:
        self.model = model
        self.layers = layers
        self.functions = functions
        self.device = device
        self.autocast = autocast
        self.held = held_in_eval(model)
        self.alone: Alone | None = None
        self._settings = settings or ScanSettings()
        self._kept = kept
        self._explored = False
        self._interceptor = Interceptor(layers.layers)
        self._forward = functions.forward or default_forward
        self._last = Pass(samples=0, batch_size=0)
        self._frozen: frozenset[int] = frozenset()
        self._functions: frozenset[int] = frozenset()
        self._careful: set[Slot] = set()

    @classmethod
    def open(
        cls,
        model: nn.Module,
        settings: ScanSettings,
        functions: UserFunctions | None = None,
        *,
        synthetic: bool = False,
        kept: Iterable[Restore] = (),
    ) -> Session:
        """Put the model on its device and find its layers; the model is the caller's to restore.

        Layers that no class gives away are found by ``explore``.

        Args:
            model: The user's model, without wrappers.
            settings: Device, autocast, and which layers are selected.
            functions: The user's own, where given.
            synthetic: The inputs are made up: all of a batch's items are inputs.
            kept: What ``untouched`` keeps of the model.

        Raises:
            DeviceError: The device is not there.
        """
        require_values(model)
        functions = functions or UserFunctions()
        if synthetic and functions.forward is None:
            functions = replace(functions, forward=forward_all)
        device = device_named(settings.device, model)
        model.to(device)
        layers = find_layers(model, settings.is_selected, required=False)
        return cls(model, layers, functions, device, autocast_dtype(settings.autocast), settings, kept)

    @cached_property
    def _state(self) -> ModelState:
        """The state when the session is first installed: until then the caller may change the model."""
        return ModelState(self.model, self._kept)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks in place while the block runs, and put back what it moved."""
        self._state.put_back()
        with self._interceptor.installed(), torch.no_grad(), eagerly():
            self._find_frozen()
            try:
                yield
            finally:
                with deferred_interrupts():
                    self._state.put_back()

    def explore(self, opening: Iterable[Any], samples: int | None = None, *, required: bool = True) -> None:
        """Find the layers that no class gives away, and what state a pass moves, by one micro-batch; once.

        Args:
            opening: Micro-batches on the host, of which the first is used.
            samples: In it, where what it gives is to be kept for the self-check.
            required: Refuse a model without layers.

        Raises:
            NothingToProbeError: No layer can be measured, or none is selected.
        """
        if self._explored:
            return
        batch = next(iter(opening), None)
        if batch is not None:
            known, settings, alone = self.layers, self._settings, Alone(batch)

            def run(training: bool, watch: Watch) -> None:
                path: PathName = "train" if training else "eval"
                if samples is None:
                    self.forward(path, to_device(batch, self.device), Pass(1, 1, watch=watch))
                else:
                    self.run_alone(path, alone, samples, watch)

            with Restoring(self._state.keep_generators), self._state.watching():
                self.layers = explore(self.model, self.layers, run, settings.is_selected, settings.norms)
            same = [layer.module for layer in known.layers] == [layer.module for layer in self.layers.layers]
            self.alone = alone if same and samples is not None else None
            self._interceptor.layers = self.layers.layers
            skipped = {layer.name for layer in self.layers.skipped}
            modules = [named.module for named in named_once(self.model) if named.name in skipped]
            held = (place_of(tensor) for module in modules for tensor in own_tensors(module).values())
            self._interceptor.named = frozenset(place for place in held if place is not None)
            self._state.put_back()
            self._find_frozen()
        if required:
            require_layers(self.model, self.layers)
        self._explored = True

    def run_alone(self, path: PathName, alone: Alone, samples: int, watch: Watch | None = None) -> None:
        """Run a micro-batch by itself, and note what it gives; ``watch`` as of ``Pass``."""
        # In the first pass in a mode it is not known yet which calls lose digits.
        pass_, before = Pass(samples, samples, watch=watch, exact=watch is not None), random_state()
        alone.outputs[path], _ = self.forward(path, to_device(alone.batch, self.device), pass_)
        alone.passes[path] = pass_
        alone.random |= random_state() != before

    def forward(self, path: PathName, batch: Any, pass_: Pass) -> tuple[Any, Outputs]:
        """Run the model on a copy of a batch that is on the device, as ``pass_`` says; the moments go there.

        A copy, since a model may write into its input, and every pass is to see the same values. Where the moments of a
        call lost digits, the model runs again, from the same random state, and that call is computed with care.

        Returns:
            What forward returned, and what the model itself returned on the way, for ``call`` to use again.

        Raises:
            UserCodeError: The model or the user's forward raised.
            EndOfPass: A hook ended the pass; what it recorded until then is there.
        """
        self._last = pass_
        if path in ("steady", "check"):
            pass_.by_batch |= self._functions
        pass_.careful = self._careful
        before = [*keep_random_state(), *self._state.keep_generators()]
        found = self._run(path, batch, pass_)
        # More than once: what a call loses changes what later ones are given.
        while uncertain := pass_.compute_moments():
            self._careful |= uncertain  # from now on they are looked at by themselves
            del found  # which may hold a graph
            pass_.restart()
            run_all(before)
            found = self._run(path, batch, pass_)
        if isinstance(found, EndOfPass):
            raise found
        return found

    def _run(self, path: PathName, batch: Any, pass_: Pass) -> tuple[Any, Outputs] | EndOfPass:
        self._state.put_back()
        self._set_flags(path)
        self._state.accept_attributes()
        batch = copy_tensors(batch)
        call = f"calling {describe_call(self._forward, batch)} ({_IN_WORDS[path]})"
        border = model_code(call, lambda: _how_to_call(self._forward, self.model, batch))
        try:
            with self._running(path, pass_), recording(self.model, batch) as outputs, border:
                output = self._forward(self.model, batch)
        except EndOfPass as ended:
            return ended
        if self._forward not in (default_forward, forward_all):
            require_readable(output, f"What forward(model, batch){written_at(self._forward)} returned")
        return output, outputs

    @contextmanager
    def calling(
        self, path: PathName, name: str, function: BatchFunction, pass_: Pass, again: bool = True
    ) -> Iterator[Callable[[Any, Outputs], Any]]:
        """Call the user's loss or metric on batches and the model's outputs, right after ``forward`` on the same path.

        The flags are still set, and layers whose statistics that pass chose use the same, of groups of the same size,
        if the model is called again. The batch and the outputs of a call are its own: it may write into them.

        Args:
            again: The model may be called again. If not, ``pass_.entered`` says whether it was, and functions are not
                watched, which takes longer than most calls.
        """
        last = self._last
        chosen: dict[str, Any] = {name: getattr(last, name) for name in ("by_batch", "statistics", "blend", "layouts")}
        pass_ = replace(pass_, batch_size=min(last.batch_size, pass_.batch_size), **chosen)
        border = model_code(f"calling {name}(model, batch) ({_IN_WORDS[path]})")
        running = self._running(path, pass_, functions=again)
        with replaying(self.model, self._state.put_back) as answered_with, running:

            def call(batch: Any, outputs: Outputs) -> Any:
                answered_with(batch, outputs)
                if again or pass_.entered:
                    pass_.restart()
                with border:
                    return function(self.model, batch)

            yield call

    def inputs_in(self, batch: Any) -> Any:
        """The part of a batch that the forward pass can see."""
        only_first = self._forward is default_forward and isinstance(batch, list | tuple) and len(batch) > 0
        return batch[0] if only_first else batch

    @property
    def frozen(self) -> frozenset[int]:
        """Indices of the layers that train() of the model leaves in eval mode; known once the session is installed."""
        return self._frozen

    def left_in_train_mode(self) -> frozenset[int]:
        """Indices of the layers that eval() of the model does not reach; the session is installed."""
        self._set_flags("eval")
        return frozenset(layer.index for layer in self.layers.layers if layer.module.training)

    def set_attribute(self, name: str, values: Iterable[tuple[nn.Module, Any]]) -> None:
        """Set an attribute of modules, which no pass puts back: a measurement changes it on purpose."""
        self._state.put_back()  # what the last pass left in other attributes is not meant to stay
        for module, value in values:
            setattr(module, name, value)
        self._state.accept_attributes()

    @contextmanager
    def _running(self, path: PathName, pass_: Pass, functions: bool = True) -> Iterator[None]:
        autocast = None if path.startswith("check") else self.autocast
        entered, outside = (lambda layer: pass_.entered.add(layer.index)), pass_.functional.add if functions else None
        answering = self._interceptor.answering(pass_.answer, entered, outside, pass_.watch)
        with casting(self.device, autocast), answering:
            yield

    def _set_flags(self, path: PathName) -> None:
        with user_code("calling train() of the model"):
            set_mode(self.model, path in ("train", "check train"), self.held)
        if path in ("steady", "check"):
            for layer in self.layers.layers:
                # The flag of a module with others inside says more than how it normalizes.
                if not isinstance(layer.family, FunctionFamily) or not any(layer.module.children()):
                    set_flag(layer.module, layer.index not in self._frozen)

    def _find_frozen(self) -> None:
        self._set_flags("train")
        # A model whose own train() keeps layers in eval mode trains with them frozen, too.
        self._frozen = frozenset(layer.index for layer in self.layers.layers if not layer.module.training)
        functions = [layer.index for layer in self.layers.layers if isinstance(layer.family, FunctionFamily)]
        self._functions = frozenset(functions) - self._frozen


def autocast_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that a setting names; None: no autocast."""
    dtype: torch.dtype | None = getattr(torch, name) if name else None
    return dtype


def casting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast of the forward pass, or none."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


_MOST_ITEMS, _DEEPEST = 6, 3
"""So much of the structure of a batch is shown in a message."""

_INPUT_KEYS = ("image", "images", "input", "inputs", "pixel_values", "x", "data")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the inputs of a batch, for model files without ``forward(model, batch)``.

    A tensor is the input; of a tuple or list the first item is; of a mapping those items are whose keys are parameters
    of the model's ``forward``, else the item under a usual key (image, input, pixel_values, ...).

    Raises:
        DataError: The batch is something else; says to write ``forward(model, batch)``.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, list | tuple) and batch:
        return model(batch[0])
    if isinstance(batch, Mapping):
        return _forward_mapping(model, batch)
    named = _named_parts(model, batch)
    if named is not None:
        return model(batch) if _takes_all(model) and not named else model(**named)
    raise DataError(
        f"bnprobe does not know how to give a batch of type {type(batch).__name__} to the model."
        f" {_sample_forward(model, batch)}"
    )


def forward_all(model: nn.Module, batch: Any) -> Any:
    """Call the model with every item of a batch as an argument, for synthetic inputs."""
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def describe_call(forward: BatchFunction, batch: Any) -> str:
    """The call, for messages: ``"the model on a batch of shape (2, 3, 8, 8)"``."""
    if forward is default_forward and isinstance(batch, list | tuple) and len(batch) > 1:
        return f"the model on batch[0]{_described(batch[0])} only, because there is no forward(model, batch)"
    name = "the model" if forward in (default_forward, forward_all) else "forward(model, batch)"
    return f"{name} on a batch{_described(batch)}"


def _described(value: Any) -> str:
    """What a batch or an item is, as it follows its name: " of shape (2, 3, 8, 8)"."""
    leaves = leaves_of(value)
    if len(leaves) == 1 and isinstance(leaves[0], Tensor):
        return f" of shape {tuple(leaves[0].shape)}"
    return (
        f" = {_structure(value)}" if isinstance(value, list | tuple | Mapping) else f" of type {type(value).__name__}"
    )


def _structure(value: Any, depth: int = 0) -> str:
    """Nested tensors with their shapes, e.g. "[tensor (2, 3), {mask: tensor (2, 8)}]"; of many items the first."""
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    if not isinstance(value, list | tuple | Mapping):
        return type(value).__name__
    if depth == _DEEPEST:
        return "..."
    if isinstance(value, Mapping):
        items = [f"{key}: {_structure(item, depth + 1)}" for key, item in islice(value.items(), _MOST_ITEMS)]
    else:
        items = [_structure(item, depth + 1) for item in value[:_MOST_ITEMS]]
    listed = ", ".join([*items, *(["..."] if len(value) > _MOST_ITEMS else [])])
    return (
        f"{{{listed}}}" if isinstance(value, Mapping) else f"({listed})" if isinstance(value, tuple) else f"[{listed}]"
    )


def _how_to_call(forward: BatchFunction, model: nn.Module, batch: Any) -> str:
    """How to write a forward of one's own, where bnprobe gave the model fewer inputs than it takes, or no tensor."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else None
    known = isinstance(batch, Mapping) or isinstance(first, Tensor)
    if forward is not default_forward or isinstance(batch, Tensor) or (known and _inputs_of(model) == 1):
        return ""
    return f"The batch is {_structure(batch)}. {_sample_forward(model, batch)}"


def _sample_forward(model: nn.Module, batch: Any) -> str:
    """A line for the model file, with as many items of the batch as the model has inputs."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else None
    needed, most = _inputs_of(model), len(_positional(model))
    if isinstance(first, list | tuple) and needed < len(batch) <= most and _are_columns(batch):
        inputs = ["*batch"]
    elif isinstance(batch, Mapping) and needed == 1 and _takes_all(model):
        inputs = ["batch"]
    elif isinstance(first, list | tuple) and len(first) == needed:
        inputs = ["*batch[0]"]
    elif isinstance(first, list | tuple | Mapping):
        inputs = _items("batch[0]", first, needed)
    else:
        inputs = _items("batch", batch, needed)
    line = f"def forward(model, batch): return model({', '.join(inputs)})"
    return f"Say {either('in the model file', 'with forward=...')} how to call the model, for example:\n  {line}"


def _items(name: str, values: Any, needed: int) -> list[str]:
    """The first items of a sequence or mapping, as an expression names them."""
    if not isinstance(values, list | tuple | Mapping):
        return [f"{name}.inputs"]
    keys = list(values) if isinstance(values, Mapping) else list(range(len(values)))
    return [f"{name}[{key!r}]" for key in keys[:needed]]


def _inputs_of(model: nn.Module) -> int:
    """The number of arguments without which the model's forward cannot be called; at least one."""
    return max(1, sum(each.default is each.empty for each in _positional(model)))


def _positional(model: nn.Module) -> list[inspect.Parameter]:
    """The arguments that the model's forward takes by position."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [each for each in signature_of(model.forward).values() if each.kind in positional]


def _are_columns(batch: Any) -> bool:
    """Whether the parts of a batch are lists of one length: one entry per sample, as ``tuple(zip(*samples))`` makes."""
    return all(isinstance(part, list | tuple) for part in batch) and len({len(part) for part in batch}) == 1


def _takes_all(model: nn.Module) -> bool:
    """Whether the one argument of the model's forward is a whole batch, by its name."""
    names = [each.name.lower() for each in _positional(model)]
    return bool(names) and any(part in names[0] for part in ("dict", "batch", "data", "sample", "inputs", "item"))


def model_code(call: str, hint: Callable[[], str] = lambda: "") -> AbstractContextManager[None]:
    """Turn errors of the user's forward, loss and metric into UserCodeError, except those that bnprobe handles."""
    return user_code(call, lambda error: isinstance(error, CannotEmulateError) or is_out_of_memory(error), hint)


def _forward_mapping(model: nn.Module, batch: Mapping[Any, Any]) -> Any:
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    matching = {key: value for key, value in batch.items() if key in names}
    if matching:
        return model(**matching)
    key = next((key for key in _INPUT_KEYS if key in batch), None)
    if key is None:
        raise DataError(
            f"None of the batch's keys ({', '.join(map(str, batch))}) is a parameter of the model's forward."
            f" {_sample_forward(model, batch)}"
        )
    return model(batch[key])


def _named_parts(model: nn.Module, batch: Any) -> dict[str, Any] | None:
    """The attributes of a batch object, as of graphs, that are named like parameters of the model's ``forward``.

    Returns:
        Empty where the model takes the whole object; None where neither fits.
    """
    if _takes_all(model) and _inputs_of(model) == 1:
        return {}
    parameters = [each for each in signature_of(model.forward).values() if each.kind is not each.VAR_KEYWORD]
    parts = {each.name: attribute(batch, each.name) for each in parameters}
    found = {name: value for name, value in parts.items() if value is not None}
    missing = [each for each in parameters if each.default is each.empty and each.name not in found]
    return None if missing or not found else found


@contextmanager
def recording(model: nn.Module, batch: Any) -> Iterator[Outputs]:
    """Keep what the model returns while the block runs, where it is called on tensors of the batch themselves."""
    outputs: Outputs = {}
    versions: dict[tuple[int, ...], list[int]] = {}

    def answer(original: Callable[..., Any], key: tuple[int, ...] | None, args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        require_readable(output, "What the model returned")
        if key is not None:
            outputs[key], versions[key] = output, _versions(output)
        return output

    with _intercepted(model, answer) as known:
        known(batch)
        yield outputs
    for key in [key for key in outputs if _versions(outputs[key]) != versions[key]]:
        del outputs[key]  # changed in place since: no longer what the model returned


@contextmanager
def replaying(
    model: nn.Module, before: Callable[[], None] = lambda: None, only: bool = False
) -> Iterator[Callable[[Any, Outputs], None]]:
    """Answer calls of the model on tensors of a batch with outputs; all others run, after ``before``.

    Yields:
        Says which batch, and its outputs.

    Raises:
        CannotEmulateError: Where ``only`` outputs may answer, on any other call.
    """
    outputs: Outputs = {}

    def answer(original: Callable[..., Any], key: tuple[int, ...] | None, args: Any, kwargs: Any) -> Any:
        if key in outputs:
            return outputs[key]
        if only:
            raise CannotEmulateError("the model is called on something else than the batch's own tensors")
        before()
        return original(*args, **kwargs)

    def answered_with(batch: Any, given: Outputs) -> None:
        nonlocal outputs
        outputs = given
        known(batch)

    with _intercepted(model, answer) as known:
        yield answered_with


def rows_of(outputs: Outputs, start: int, stop: int, samples: int) -> Outputs:
    """Copies of the outputs of some of the samples; outputs that do not divide by sample are left out.

    Copies, since a loss may write into what it gets, and the recorded outputs are still to be compared.
    """
    whole = (start, stop) == (0, samples)
    return {
        key: map_leaves(output, lambda leaf: (leaf if whole else leaf[start:stop]).clone())
        for key, output in outputs.items()
        if _are_tensors(output, None if whole else samples)
    }


def outputs_one_by_one(outputs: Outputs, samples: int) -> list[Outputs]:
    """As ``rows_of`` gives them for each sample."""
    found: list[Outputs] = [{} for _ in range(samples)]
    for key, output in outputs.items():
        if _are_tensors(output, samples):
            columns = [leaf.clone().unsqueeze(1).unbind() for leaf in leaves_of(output)]
            plain = isinstance(output, Tensor)
            rows = columns[0] if plain else [with_leaves(output, row) for row in zip(*columns, strict=True)]
            for own, row in zip(found, rows, strict=True):
                own[key] = row
    return found


def _are_tensors(output: Any, rows: int | None) -> bool:
    """Whether an output holds tensors only, all with so many rows; None: any."""
    return all(isinstance(leaf, Tensor) and (rows is None or leaf.shape[:1] == (rows,)) for leaf in leaves_of(output))


def _versions(output: Any) -> list[int]:
    """How often each tensor was changed in place; inference tensors do not count, and cannot be compared."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors_of(output)]


@contextmanager
def _intercepted(model: nn.Module, answer: Callable[..., Any]) -> Iterator[Callable[[Any], None]]:
    """Let ``answer`` answer the calls of a model; what is yielded says on the tensors of which batch."""
    positions: dict[int, int] = {}
    versions: list[int] = []
    original = model.forward
    had_own = "forward" in model.__dict__

    def position_of(leaf: Any) -> int | None:
        """Of a tensor of the batch that nobody has written into since."""
        position = positions.get(id(leaf)) if isinstance(leaf, Tensor) else None
        return None if position is None or _versions(leaf) != versions[position : position + 1] else position

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [position_of(leaf) for leaf in leaves_of([*args, *kwargs.values()])]
        known = tuple(position for position in given if position is not None)
        return answer(original, known if given and len(known) == len(given) else None, args, kwargs)

    def known(batch: Any) -> None:
        nonlocal positions, versions
        positions = {id(tensor): position for position, tensor in enumerate(tensors_of(batch))}
        versions = _versions(batch)

    # Past the class: it may take no attributes.
    vars(model)["forward"] = forward
    try:
        yield known
    finally:
        if had_own:
            vars(model)["forward"] = original
        else:
            del vars(model)["forward"]
