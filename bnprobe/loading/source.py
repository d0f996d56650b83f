"""What the user's files offer as data: the function, loader or data set that the spec or the model file names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from bnprobe.config.spec import DataSpec, EvalDataSpec
from bnprobe.errors import DataError, UsageError
from bnprobe.loading import frameworks
from bnprobe.loading.data import (
    BatchSource,
    Request,
    counted_by,
    dataset_source,
    is_source,
    known_size,
    source_of,
    synthetic_source,
)
from bnprobe.loading.frameworks import Data
from bnprobe.loading.model import (
    Described,
    UserModule,
    accepts,
    has_attribute,
    kind_of,
    locate,
    required_of,
    signature_of,
    user_code,
)
from bnprobe.loading.tensors import tensor_samples
from bnprobe.numbers import listed
from bnprobe.wording import option


def load_source(
    spec: DataSpec, module: UserModule | None, known: Mapping[str, Any] = MappingProxyType({})
) -> BatchSource:
    """Load the data: the spec's target; else load_data, loader or dataset of the model's module; else synthetic.

    Further names that are common are found too (``TRAINING_NAMES``), unless synthetic inputs are asked for.

    Args:
        spec: Where it comes from.
        module: The model's module.
        known: Arguments for a class of a framework, where the spec does not give them.

    Raises:
        DataError: There is no data, or it is not available at this batch size.
        UsageError: The batch size is unknown.
        UserCodeError: The user's code raised.
    """
    if spec.tensors is not None:
        return _from_tensors(spec, "data.tensors", module)
    found = _find(spec, module, _TRAINING, () if spec.input_shape else TRAINING_NAMES)
    if found is not None:
        source = _from_symbol(*found, spec, known=known, prepare=_preparation(module))
        if not spec.input_shape:
            return source
        note = f"--input-shape was not used: {source.description} gives real data."
        return replace(source, notes=(note, *source.notes))
    if not spec.input_shape:
        raise DataError(_no_data(module))
    return synthetic_source(list(spec.input_shape), known_size(spec.batch_size, "synthetic inputs"), spec.seed)


def load_held_out(
    spec: EvalDataSpec, module: UserModule | None, batch_size: int, known: Mapping[str, Any] = MappingProxyType({})
) -> BatchSource | None:
    """Load the held-out data: the spec's target; else load_eval_data of the model's module; else None.

    A loader is read at the size that it has, unless the spec asks for another. Further names that are common are found
    too (``EVALUATION_NAMES``).

    Args:
        spec: Where it comes from.
        module: The model's module.
        batch_size: What load_eval_data is called with if the spec does not say: the batch size of the training data.
        known: As for ``load_source``.

    Raises:
        DataError: The data is not available at this batch size.
        UserCodeError: The user's code raised.
    """
    size = spec.batch_size or batch_size
    asked = spec.model_copy(update={"batch_size": size})
    if spec.tensors is not None:
        source = _from_tensors(asked, "eval_data.tensors", module, as_given=spec.batch_size is None)
        return replace(source, most=spec.batches)
    found = _find(spec, module, _EVALUATION, EVALUATION_NAMES)
    if found is None:
        return None
    given, prepare = spec.batch_size is None, _preparation(module)
    source = _from_symbol(*found, asked, as_given=given, known=known, prepare=prepare)
    return replace(source, most=spec.batches, beside=None)


def _from_tensors(spec: EvalDataSpec, key: str, module: UserModule | None, as_given: bool = False) -> BatchSource:
    """The tensors of a file, as a data set."""
    assert spec.tensors is not None
    request = Request(spec.tensors, spec.batch_size, as_given=as_given, batch_size_of=_batch_size_of(spec, module))
    return dataset_source(tensor_samples(spec.tensors, key), request)


_TRAINING = {"load_data": "load_data(batch_size)", "loader": "loader", "dataset": "dataset"}

_EVALUATION = {"load_eval_data": "load_eval_data(batch_size)"}


def _variants(parts: Iterable[str]) -> tuple[str, ...]:
    """train_loader, train_dataloader, trainloader, get_train_loader, ..."""
    parts = tuple(parts)
    loaders = [
        f"{part}{name}" for part in parts for name in ("_loader", "_dataloader", "_data_loader", "loader", "_dl")
    ]
    makers = [f"{verb}_{name}" for verb in ("get", "make", "build", "create") for name in loaders]
    return (*loaders, *makers)


def _sets(parts: Iterable[str]) -> tuple[str, ...]:
    """train_dataset, train_set, trainset, train_ds."""
    return tuple(f"{part}{name}" for part in parts for name in ("_dataset", "_set", "set", "_ds"))


_PAIRS = ("get_loaders", "get_dataloaders", "get_data_loaders", "make_loaders", "make_dataloaders", "build_dataloaders")

TRAINING_NAMES = (
    *_variants(("train", "training")),
    *("dataloader", "data_loader", "get_loader", "get_dataloader", "make_loader", "make_dataloader", "build_loader"),
    *_PAIRS,
    *_sets(("train", "training")),
)
"""Names beside the documented ones under which training data is found, in this order: a loader has the user's own order
of samples, and may come with held-out data, so that data sets are last."""

_EVALUATION_PARTS = ("eval", "val", "valid", "validation", "dev", "test")
EVALUATION_NAMES = (*_variants(_EVALUATION_PARTS), *_sets(_EVALUATION_PARTS))
"""The same for held-out data."""

_BATCH_SIZE_NAMES = frozenset(
    ("batchsize", "bs", "batch", "batchsz", "microbatchsize", "minibatchsize", "mbs", "samplespergpu")
)

_SHORT_NAMES = frozenset(("n", "b", "size", "k"))
"""These are a batch size only where the function cannot be called without them."""


def _find(
    spec: EvalDataSpec, module: UserModule | None, names: Mapping[str, str], more: Sequence[str]
) -> tuple[UserModule, str] | None:
    if spec.target is not None:
        module, symbol = locate(spec.target, module)
        if symbol is not None:
            return module, symbol
    if module is None:
        return None
    named = next((name for name in names if module.find(name) is not None), None)
    if named is None:
        named = next((name for name in more if _is_data(module.find(name), name)), None)
    if named is None and spec.target is not None:
        raise DataError(_no_data(module, names))
    return (module, named) if named else None


def _is_data(value: Any, name: str) -> bool:
    """Whether what has a common name is data: a loader, a data set, or a function that needs at most a batch size.

    What is called a loader may be an object of a class of the user's own that can be iterated over again and again.
    """
    if is_source(value):
        return True
    plain = (str, bytes, Mapping, Sequence, Tensor, Iterator, type)
    if "load" in name and isinstance(value, Iterable) and not isinstance(value, plain):
        return True
    if isinstance(value, type) or not callable(value) or not has_attribute(value, "__code__"):
        return False
    return not set(required_of(value)) - {batch_size_parameter(value)}


def batch_size_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter of a user's function that takes the batch size: batch_size, bs, train_batch_size, n, ...; or None.

    A name as short as n is the batch size only where it is the one argument that the function needs.
    """
    parameters = signature_of(function)
    if "batch_size" in parameters:
        return "batch_size"
    for name in parameters:
        plain = name.lower().replace("_", "")
        if plain in _BATCH_SIZE_NAMES or plain.endswith("batchsize"):
            return name
    required = required_of(function)
    if len(required) == 1 and required[0].lower() in _SHORT_NAMES:
        return required[0]
    return "batch_size" if accepts(function, "batch_size") else None


def _no_data(module: UserModule | None, names: Mapping[str, str] = _TRAINING) -> str:
    wanted = " or ".join(", ".join(names.values()).rsplit(", ", 1))
    if names is _EVALUATION:
        where = f"{module.name} has no {wanted}" if module else "There is no data"
        return f"{where}. Add it, or name another function or loader in the spec (eval_data: target)."
    hint, advice = "", "Name some with --data FILE.py:NAME"
    if module is None:
        where = "There is no data"
    elif module.project is not None and module.project.no_data is not None:
        where, advice = module.project.no_data()
    elif getattr(module.module, "__file__", None) is None:  # a model by its name, or a folder
        where = f"{module.name} comes without data"
    else:
        where, likely = f"{module.name} has no {wanted}", _likely(module)
        advice = "Add one of them, name one with --data FILE.py:NAME"
        hint = f" Of what it defines, {listed(likely)} may be data: --data {likely[0]}." if likely else ""
    return (
        f"{where}.{hint} {advice} (data: target in a spec), or give --input-shape, e.g."
        " 3,224,224, to use synthetic inputs."
    )


_LIKELY = re.compile(r"load|data|batches|_set$|_ds$|_dl$", re.IGNORECASE)


def _likely(module: UserModule) -> list[str]:
    """Names in a module that may be data: loaders and data sets first, then functions, then classes."""
    own = module.own()
    there = {
        name: value
        for name, value in vars(module.module).items()
        if not name.startswith("_") and (is_source(value) or name in own) and not isinstance(value, nn.Module)
    }
    kinds = {name: (not is_source(value), isinstance(value, type)) for name, value in there.items()}
    named = [name for name, value in there.items() if is_source(value) or _is_named_like_data(name, value)]
    return sorted(named, key=lambda name: kinds[name])


def _is_named_like_data(name: str, value: Any) -> bool:
    is_model = isinstance(value, type) and issubclass(value, nn.Module)
    return bool(_LIKELY.search(name)) and name != "load_model" and not is_model


_Prepare = Callable[[Any], tuple[Any, tuple[str, ...]]]


def _preparation(module: UserModule | None) -> _Prepare | None:
    """What the framework of the model makes of a data set."""
    return None if module is None or module.project is None else module.project.prepare


def _from_symbol(
    module: UserModule,
    symbol: str,
    spec: EvalDataSpec,
    *,
    as_given: bool = False,
    known: Mapping[str, Any] = MappingProxyType({}),
    prepare: _Prepare | None = None,
) -> BatchSource:
    value, name = module.get(symbol), f"{symbol} of {module.name}"
    if isinstance(value, Described):
        spec = spec.model_copy(update={"args": {**value.args, **spec.args}})
        value = value.function
    counted = _batch_size_of(spec, module)
    request = Request(name, spec.batch_size, as_given=as_given, batch_size_of=counted, prepare=prepare)
    reader = frameworks.claiming_data(value)
    if reader is None and _is_callable_data(value):
        return _from_call(value, request, spec)
    if spec.args and not isinstance(value, type):
        raise DataError(f"{name} is {kind_of(value)}, so it cannot take data.args ({', '.join(spec.args)}).")
    if reader is not None:
        taken = signature_of(value) if isinstance(value, type) else {}
        args = {**{key: given for key, given in known.items() if key in taken}, **spec.args}
        return _from_framework(reader.data(value, f"{module.name}:{symbol}", args), request)
    if symbol == "dataset" and has_attribute(value, "__getitem__") and not isinstance(value, DataLoader):
        return dataset_source(value, request)  # a plain list of samples works too
    return source_of(value, request)


def _from_framework(data: Any, request: Request) -> BatchSource:
    """What the reader of a framework gave: it names its loaders itself, or gives what a model file may."""
    if not isinstance(data, Data):
        return source_of(data, request)
    if request.as_given and data.held_out is not None:  # asked for as held-out data
        data = Data(data.held_out, origin=data.held_out_origin, notes=data.notes)
    source = source_of(data.training, replace(request, origin=data.origin or request.origin))
    beside = None
    if data.held_out is not None:
        beside = source_of(data.held_out, replace(request, origin=data.held_out_origin, as_given=True))
    return replace(source, notes=(*data.notes, *source.notes), beside=beside)


def _batch_size_of(spec: EvalDataSpec, module: UserModule | None) -> Callable[[Any], int] | None:
    """The user's function that counts the samples of a batch: the one that the spec names, or that of the module."""
    if spec.batch_size_of is None:
        return None if module is None else counted_by(module.find("batch_size_of"))
    home, symbol = locate(spec.batch_size_of, module)
    return counted_by(home.get(symbol or "batch_size_of"))


def _is_callable_data(value: Any) -> bool:
    if isinstance(value, type):
        return True
    return callable(value) and not has_attribute(value, "__iter__") and not has_attribute(value, "__getitem__")


def _from_call(function: Callable[..., Any], request: Request, spec: EvalDataSpec) -> BatchSource:
    args, told, parameter = dict(spec.args), None, batch_size_parameter(function)
    if parameter is not None:
        told = _told(function, parameter, request.origin, spec)
        if spec.batch_size is not None:
            args[parameter] = spec.batch_size
    missing = [name for name in required_of(function) if name not in args]
    if missing:
        raise DataError(
            f"{request.origin} needs {listed(missing)}, but bnprobe calls it with the batch size alone, as"
            " load_data(batch_size). Give the other arguments default values, or name their values in the spec"
            " (data: args)."
        )
    symbol, _, where = request.origin.partition(" of ")
    call = f"{symbol}({', '.join(f'{key}={value!r}' for key, value in args.items())}) of {where}"
    with user_code(f"calling {call}"):
        value = function(**args)
    reader = frameworks.claiming_data(value)
    if reader is not None:
        value = reader.data(value, f"{where}:{symbol}", {})
    return _from_framework(value, replace(request, told=told))


def _told(function: Callable[..., Any], parameter: str, name: str, spec: EvalDataSpec) -> int | None:
    """The batch size that the user's function will use."""
    if spec.batch_size is not None:
        return spec.batch_size
    found = signature_of(function).get(parameter)
    default = found.default if found else None
    chosen = spec.args.get(parameter, default)
    if found and chosen is found.empty:
        raise UsageError(f"{name} needs a batch size. Give one with {option('--batch-size')}.")
    return chosen if isinstance(chosen, int) else None
