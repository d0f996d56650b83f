"""The user's data: a loader, dataset or iterable as a source of batches of the requested size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from bnprobe.config.spec import DataSpec, EvalDataSpec
from bnprobe.errors import DataError, UsageError
from bnprobe.loading.model import GuardedBatches, UserModule, accepts, kind_of, locate, signature_of, user_code


def own_batch_size(loader: DataLoader[Any]) -> int | None:
    """The loader's batch size; a custom batch sampler leaves ``loader.batch_size`` None but may state its own."""
    size = loader.batch_size
    if size is None:
        size = getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def refuse_rebuild(loader: DataLoader[Any], own: int | None, size: int, origin: str) -> None:
    """Raise a DataError if the loader's batch size cannot be changed, and say what to do."""
    reason = why_fixed(loader)
    if reason is None:
        return
    has = f"its batch size is {own}" if own else "its batch size is unknown"
    keep = f"give --batch-size {own}, or " if own else ""
    raise DataError(
        f"{origin} cannot be rebuilt at batch size {size}, because {reason}; {has}. Measuring at another "
        f"batch size would give a wrong diagnosis. To go on, {keep}write a function load_data(batch_size) "
        "that makes the loader at the requested size."
    )


def why_fixed(loader: DataLoader[Any]) -> str | None:
    """Why a loader cannot be rebuilt with other batches, as a clause; None if it can."""
    if isinstance(loader.dataset, IterableDataset):
        return "its data set is iterable (IterableDataset)"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"{type(loader).__name__} has its own __iter__"
    if loader.batch_sampler is None:
        return "it has batch_size=None, so its data set makes the batches"
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return f"it has a custom batch sampler ({type(loader.batch_sampler).__name__})"
    return None


def rebuilt(loader: DataLoader[Any], size: int, batch_sampler: Any = None) -> DataLoader[Any]:
    """The same loader at another batch size, or with other batches; the last partial batch is kept."""
    how: dict[str, Any] = {"batch_size": size, "sampler": loader.sampler, "drop_last": False}
    return DataLoader(
        loader.dataset,
        **({"batch_sampler": batch_sampler} if batch_sampler is not None else how),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
    )


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches, as the user's loader collates them.

    Attributes:
        batches: Yields batches of ``batch_size`` samples; the last one may be partial.
        batch_size: Samples in a batch, as requested; an iterable that is not a loader may give another number.
        description: Where the batches come from, in words.
        images: Number of samples; None: unknown.
        synthetic: Whether the inputs are synthetic.
        notes: What the reader should know, one sentence each.
        drop_last: Whether the user's loader drops a partial last batch; None: unknown.
        most: Upper limit on the micro-batches to draw; None: no limit.
        dealt: Whether only this process's share is read; see ``loading.order``.
    """

    batches: Iterable[Any]
    batch_size: int
    description: str
    images: int | None = None
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    drop_last: bool | None = None
    most: int | None = None
    dealt: bool = False


@dataclass(frozen=True)
class _Request:
    """A request for the user's data.

    Attributes:
        origin: Where the data comes from, e.g. "load_data(batch_size=2) of model.py".
        batch_size: Requested batch size; None: the loader's own.
        told: Batch size that the user's function was called with, or its default; None: it takes none.
    """

    origin: str
    batch_size: int | None
    told: int | None = None


def load_source(spec: DataSpec, module: UserModule | None) -> BatchSource:
    """Load the data: the spec's target; else load_data, loader or dataset of the model's module; else synthetic.

    Raises:
        DataError: There is no data, or it is not available at this batch size.
        UsageError: The batch size is unknown.
        UserCodeError: The user's code raised.
    """
    found = _find(spec, module, _TRAINING)
    if found is not None:
        source = _from_symbol(*found, spec)
        if not spec.input_shape:
            return source
        note = f"The input shape was not used, because {source.description} gives real data."
        return replace(source, notes=(*source.notes, note))
    if not spec.input_shape:
        raise DataError(_no_data(module))
    return synthetic_source(list(spec.input_shape), _known(spec.batch_size, "synthetic inputs"), spec.seed)


def load_held_out(spec: EvalDataSpec, module: UserModule | None, batch_size: int) -> BatchSource | None:
    """Load the held-out data: the spec's target; else load_eval_data of the model's module; else None.

    Args:
        spec: Where it comes from.
        module: The model's module.
        batch_size: Samples in a micro-batch if the spec does not say: the batch size of the training data.

    Raises:
        DataError: The data is not available at this batch size.
        UserCodeError: The user's code raised.
    """
    found = _find(spec, module, _EVALUATION)
    if found is None:
        return None
    size = spec.batch_size or batch_size
    try:
        source = _from_symbol(*found, spec.model_copy(update={"batch_size": size}))
    except _TooFewImagesError as error:  # the eval path does not depend on the batch size
        source = _from_symbol(*found, spec.model_copy(update={"batch_size": error.images}))
    return replace(source, most=spec.batches)


def as_batch_source(batches: Any, batch_size: int | None = None, origin: str = "the data given") -> BatchSource:
    """Wrap a DataLoader, Dataset or iterable of batches as micro-batches of ``batch_size``.

    A Dataset is read in its own order. Any other iterable is used unchanged and must yield batches of ``batch_size``.

    Args:
        batches: The data.
        batch_size: Samples in a micro-batch; None: the loader's own.
        origin: Name of the data in messages.

    Raises:
        DataError: The data is empty, or not available at this batch size.
        UsageError: The batch size is unknown.
    """
    return _from_value(batches, _Request(origin, batch_size))


def synthetic_source(shapes: list[tuple[int, ...]], batch_size: int, seed: int) -> BatchSource:
    """Endless batches of standard-normal float32 inputs.

    Args:
        shapes: Shape of one sample for each input of the model, without the batch axis.
        batch_size: Samples in a micro-batch.
        seed: Seed of the inputs; every iteration gives the same ones.
    """
    words = " and ".join("x".join(map(str, shape)) for shape in shapes)
    description = f"synthetic inputs of shape {words}"
    return BatchSource(_Synthetic(shapes, batch_size, seed), batch_size, description, synthetic=True)


@dataclass(frozen=True)
class _Synthetic:
    shapes: list[tuple[int, ...]]
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[torch.Tensor | tuple[torch.Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            batch = tuple(
                torch.randn((self.batch_size, *shape), generator=generator, dtype=torch.float32)
                for shape in self.shapes
            )
            yield batch[0] if len(batch) == 1 else batch


# ---- finding the data


_TRAINING = {"load_data": "load_data(batch_size)", "loader": "loader", "dataset": "dataset"}
_EVALUATION = {"load_eval_data": "load_eval_data(batch_size)"}


def _find(spec: EvalDataSpec, module: UserModule | None, names: Mapping[str, str]) -> tuple[UserModule, str] | None:
    if spec.target is not None:
        module, symbol = locate(spec.target, module)
        if symbol is not None:
            return module, symbol
    if module is None:
        return None
    named = next((name for name in names if module.find(name) is not None), None)
    if named is None and spec.target is not None:
        raise DataError(_no_data(module, names))
    return (module, named) if named else None


def _no_data(module: UserModule | None, names: Mapping[str, str] = _TRAINING) -> str:
    wanted = " or ".join(", ".join(names.values()).rsplit(", ", 1))
    where = f"{module.name} has no {wanted}" if module else "There is no data"
    if names is _EVALUATION:
        return f"{where}. Add it, or name another function or loader in the spec (eval_data: target)."
    return (
        f"{where}. Add one of them, name one in the spec (data: target), or give --input-shape, "
        "e.g. 3,224,224, to use synthetic inputs."
    )


def _from_symbol(module: UserModule, symbol: str, spec: EvalDataSpec) -> BatchSource:
    value, name = module.get(symbol), f"{symbol} of {module.name}"
    if _is_callable_data(value):
        return _from_call(value, name, spec)
    if spec.args:
        raise DataError(f"{name} is {kind_of(value)}, so it cannot take data.args ({', '.join(spec.args)}).")
    if symbol == "dataset" and hasattr(value, "__getitem__") and not isinstance(value, DataLoader):
        return _from_dataset(value, _Request(name, spec.batch_size))  # a plain list of samples works too
    return _from_value(value, _Request(name, spec.batch_size))


def _is_callable_data(value: Any) -> bool:
    if isinstance(value, type):
        return True
    return callable(value) and not hasattr(value, "__iter__") and not hasattr(value, "__getitem__")


def _from_call(function: Callable[..., Any], name: str, spec: EvalDataSpec) -> BatchSource:
    args, told = dict(spec.args), None
    if accepts(function, "batch_size"):
        told = _told(function, name, spec)
        if spec.batch_size is not None:
            args["batch_size"] = spec.batch_size
    symbol, _, where = name.partition(" of ")
    call = f"{symbol}({', '.join(f'{key}={value!r}' for key, value in args.items())}) of {where}"
    with user_code(f"calling {call}"):
        value = function(**args)
    return _from_value(value, _Request(name, spec.batch_size, told))


def _told(function: Callable[..., Any], name: str, spec: EvalDataSpec) -> int | None:
    """The batch size that the user's function will use."""
    if spec.batch_size is not None:
        return spec.batch_size
    parameter = signature_of(function).get("batch_size")
    default = parameter.default if parameter else None
    chosen = spec.args.get("batch_size", default)
    if parameter and chosen is parameter.empty:
        raise UsageError(f"{name} needs a batch size. Give one with --batch-size.")
    return chosen if isinstance(chosen, int) else None


# ---- turning it into a source


def _from_value(value: Any, request: _Request) -> BatchSource:
    if isinstance(value, DataLoader):
        return _from_loader(value, request)
    if isinstance(value, Dataset):
        return _from_dataset(value, request)
    _refuse_no_batches(value, request.origin)
    size = _known(request.batch_size or request.told, request.origin)
    if _length(value, request.origin) == 0:
        raise DataError(f"{request.origin} is empty: it yields no batch.")
    return BatchSource(GuardedBatches(value, request.origin), size, request.origin)


def _refuse_no_batches(value: Any, origin: str) -> None:
    advice = "Give a DataLoader, a Dataset or an iterable of batches."
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, tuple | list) and any(isinstance(part, DataLoader | Dataset) for part in parts):
        raise DataError(f"{origin} gives {kind_of(value)}, but a single loader is needed. Return only that loader.")
    iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    one_array = hasattr(value, "__array__")  # a tensor would be split into samples
    if not iterable or one_array or isinstance(value, str | bytes | Mapping | type):
        raise DataError(f"{origin} gives {kind_of(value)}, which is not a source of batches. {advice}")


def _from_dataset(dataset: Any, request: _Request) -> BatchSource:
    size = _known(request.batch_size or request.told, request.origin)
    images = _length(dataset, request.origin)
    _check_images(images, size, request.origin)
    source = _loader_source(DataLoader(dataset, batch_size=size), size, request.origin, images)
    source = replace(source, drop_last=None)  # bnprobe made the loader
    return replace(source, notes=(f"{request.origin} is a Dataset and was read in its own order.",))


def _from_loader(loader: DataLoader[Any], request: _Request) -> BatchSource:
    own = own_batch_size(loader)
    size = _known(request.batch_size or own or request.told, request.origin)
    images = None  # an iterable data set may count batches or samples; a batch sampler may repeat samples
    if not isinstance(loader.dataset, IterableDataset) and loader.batch_size is not None:
        images = _length(loader.sampler, request.origin)
    _check_images(images, size, request.origin)
    if own == size or (own is None and request.told == size):
        return _loader_source(loader, size, request.origin, images)
    refuse_rebuild(loader, own, size, request.origin)
    with user_code(f"rebuilding {request.origin} at batch size {size}"):
        again = rebuilt(loader, size)
    source = _loader_source(again, size, request.origin, images)
    note = f"The loader was rebuilt at batch size {size}, with its own sampler; its batch size was {own}."
    return replace(source, notes=(note,), drop_last=loader.drop_last)


def _loader_source(loader: DataLoader[Any], size: int, origin: str, images: int | None) -> BatchSource:
    if _length(loader, origin) == 0:
        raise DataError(f"{origin} is empty: it yields no batch.")
    words = origin if images is None else f"{origin} ({images} samples)"
    return BatchSource(GuardedBatches(loader, origin), size, words, images, drop_last=loader.drop_last)


class _TooFewImagesError(DataError):
    def __init__(self, message: str, images: int) -> None:
        super().__init__(message)
        self.images = images


def _check_images(images: int | None, size: int, origin: str) -> None:
    if images == 0:
        raise DataError(f"{origin} is empty: its data set has no samples.")
    if images is not None and size > images:
        raise _TooFewImagesError(
            f"Batch size {size} is larger than the data set of {images} samples ({origin}). "
            f"Give a --batch-size of at most {images}.",
            images,
        )


def _length(value: Any, origin: str) -> int | None:
    """len(), or None where it is not defined: an iterator, or a loader over an iterable data set."""
    if not isinstance(value, Sized):
        return None
    try:
        with user_code(f"asking for the length of {origin}"):
            return _sized(value)
    except _NoLengthError:
        return None


class _NoLengthError(DataError):
    pass


def _sized(value: Sized) -> int:
    try:
        return len(value)
    except (TypeError, NotImplementedError):
        raise _NoLengthError from None


def _known(batch_size: int | None, origin: str) -> int:
    if batch_size is None:
        raise UsageError(f"The batch size of {origin} is unknown. Give one, e.g. with --batch-size 2.")
    return batch_size
