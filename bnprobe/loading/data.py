"""Batches of the requested size: a loader, data set or iterable of the user as a source of micro-batches."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from bnprobe.errors import DataError, UsageError
from bnprobe.loading import frameworks
from bnprobe.loading.model import attribute, has_attribute, kind_of, user_code
from bnprobe.loading.returned import written_at
from bnprobe.loading.samples import SampleCount, count_samples, require_readable
from bnprobe.wording import either, option


class GuardedBatches:
    """The user's batches. An exception while drawing one becomes a UserCodeError.

    Attributes:
        wrapped: The user's own iterable.
        origin: Name of the iterable in messages.
        indices: Maps the number of a drawn batch, from 1, to the indices of its samples in the data set; None: unknown.
        samples_in: Tells how many samples a batch has.
    """

    def __init__(
        self,
        wrapped: Iterable[Any],
        origin: str,
        indices: Callable[[int], Sequence[Any]] | None = None,
        samples_in: Callable[[Any], int | None] = count_samples,
    ) -> None:
        self.wrapped = wrapped
        self.indices = indices
        self.origin = origin
        self.samples_in = samples_in

    def over(self, wrapped: Iterable[Any], indices: Callable[[int], Sequence[Any]] | None = None) -> GuardedBatches:
        """The same data from another iterable, e.g. in another order."""
        return GuardedBatches(wrapped, self.origin, indices, self.samples_in)

    def __iter__(self) -> Iterator[Any]:
        with user_code(f"starting {self.origin}"):
            iterator = iter(self.wrapped)
        number = 0
        while True:
            number += 1
            with user_code(f"drawing batch {number} from {self.origin}"):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            require_readable(batch, f"Batch {number} (the first is 1) of {self.origin}")
            yield batch


@dataclass(frozen=True)
class BatchSource:
    """Micro-batches, as the user's loader collates them.

    Attributes:
        batches: Yields batches of ``batch_size`` samples; the last one may be partial, and some loaders vary in size.
        batch_size: Samples in a batch: as requested where the data allows it, else the loader's own.
        description: Where the batches come from, in words.
        images: Number of samples; None: unknown.
        synthetic: Whether the inputs are synthetic.
        notes: What the reader should know, one sentence each.
        drop_last: Whether the user's loader drops a partial last batch; None: unknown.
        most: Upper limit on the micro-batches to draw; None: no limit.
        dealt: Whether only this process's share is read; see ``loading.order``.
        own_order: The order of the samples is the user's; False: bnprobe shuffles a data set.
        composed: A batch sampler of the user's own says which samples make a batch.
        beside: Held-out data that came with it, from a function that returns both.
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
    own_order: bool = True
    composed: bool = False
    beside: BatchSource | None = None

    @property
    def origin(self) -> str:
        """Where the batches come from, without how many there are."""
        return str(getattr(self.batches, "origin", self.description))

    @property
    def samples_in(self) -> Callable[[Any], int | None]:
        """Tells how many samples a batch has."""
        found: Callable[[Any], int | None] = getattr(self.batches, "samples_in", count_samples)
        return found


@dataclass(frozen=True)
class Request:
    """A request for the user's data.

    Attributes:
        origin: Where the data comes from, e.g. "load_data(batch_size=2) of model.py".
        batch_size: Requested batch size; None: the loader's own.
        told: Batch size that the user's function was called with, or its default; None: it takes none.
        as_given: Take a loader as it is, whatever its batch size.
        batch_size_of: The user's function.
        prepare: What the framework of the model makes of a data set; see ``bnprobe.loading.frameworks.Project``.
    """

    origin: str
    batch_size: int | None
    told: int | None = None
    as_given: bool = False
    batch_size_of: Callable[[Any], int] | None = None
    prepare: Callable[[Any], tuple[Any, tuple[str, ...]]] | None = None

    @property
    def wanted(self) -> int | None:
        """The batch size that was asked for in one way or the other."""
        return self.batch_size or self.told

    def count(self, stated: int | None = None, usual: int | None = None) -> SampleCount:
        """What counts the samples of its batches.

        Args:
            stated: The batch size that a loader states.
            usual: That of the first batch, where nothing states one.
        """
        usual = usual or self.wanted
        return SampleCount(stated, usual, self.batch_size_of, self.origin, strict=not self.as_given)


def as_batch_source(
    batches: Any,
    batch_size: int | None = None,
    origin: str = "the data given",
    *,
    as_given: bool = False,
    batch_size_of: Callable[[Any], int] | None = None,
) -> BatchSource:
    """Wrap a DataLoader, Dataset or iterable of batches as micro-batches of ``batch_size``.

    A Dataset is shuffled. Any iterable that is not a DataLoader is used unchanged.

    Args:
        batches: The data.
        batch_size: Samples in a micro-batch; None: the loader's own.
        origin: Name of the data in messages.
        as_given: Take a loader as it is, whatever its batch size.
        batch_size_of: Tells how many samples a batch has; None: the loader or the batch does.

    Raises:
        DataError: The data is empty, or not available at this batch size.
        UsageError: The batch size is unknown.
    """
    request = Request(origin, batch_size, as_given=as_given)
    return source_of(batches, replace(request, batch_size_of=counted_by(batch_size_of)))


_FEW = 4


def few_samples(source: BatchSource) -> Any | None:
    """A few samples of the data as a batch, for a trial; None of synthetic data, and of what can be read only once.

    Of a loader over what can be indexed, the first samples are collated as it does that, so that its order is not
    touched; of any other the first batch is drawn.
    """
    loader = getattr(source.batches, "wrapped", None)
    if source.synthetic or loader is None or isinstance(loader, Iterator):
        return None
    if not isinstance(loader, DataLoader) or not _is_indexable(loader):
        return next(iter(source.batches), None)
    held = _length(loader.dataset, source.description)
    if not held:
        return None
    size = min(_FEW, max(2, source.batch_size), held)
    with user_code(f"reading {size} samples of {source.description}"):
        return loader.collate_fn([loader.dataset[position] for position in range(size)])


_MOST_SYNTHETIC = 2**31
"""Values of a batch of synthetic inputs: 8 GiB."""


def synthetic_source(shapes: list[tuple[int, ...]], batch_size: int, seed: int) -> BatchSource:
    """Endless batches of standard-normal float32 inputs.

    Args:
        shapes: Shape of one sample for each input of the model, without the batch axis.
        batch_size: Samples in a micro-batch.
        seed: Seed of the inputs; every iteration gives the same ones.

    Raises:
        DataError: A batch would be larger than any memory.
    """
    values = batch_size * sum(map(math.prod, shapes))
    if values > _MOST_SYNTHETIC:
        raise DataError(
            f"A batch of synthetic inputs would have {values:,} values; {_MOST_SYNTHETIC:,} are possible. Give a"
            f" smaller {option('--input-shape')} or {option('--batch-size')}."
        )
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


def own_batch_size(loader: DataLoader[Any]) -> int | None:
    """The loader's batch size: its own, else that of the first batch of its batch sampler; None: it states none."""
    size = loader.batch_size
    if size is not None or loader.batch_sampler is None:
        return size
    once = isinstance(loader.batch_sampler, Iterator)
    with user_code("reading the batch sampler of the loader"):
        first = None if once else next(iter(loader.batch_sampler), None)
    stated = len(first) if isinstance(first, Sized) else getattr(loader.batch_sampler, "batch_size", None)
    return stated if isinstance(stated, int) else None


def refuse_rebuild(loader: DataLoader[Any], own: int | None, size: int, origin: str) -> None:
    """Raise a DataError if the loader's batch size cannot be changed, and say what to do."""
    reason = why_fixed(loader)
    if reason is None:
        return
    has = f"its batch size is {own}" if own else "its batch size is unknown"
    keep = f"give {option('--batch-size', own)}, or " if own else ""
    raise DataError(
        f"{origin} cannot be rebuilt at batch size {size}, because {reason}; {has}. Measuring at another "
        f"batch size would give a wrong diagnosis. To go on, {keep}{_loader_of(size)}."
    )


def _loader_of(size: int) -> str:
    return either(
        "write a function load_data(batch_size) that makes the loader at the requested size",
        f"pass a loader whose batches have {size} samples",
    )


def why_fixed(loader: DataLoader[Any]) -> str | None:
    """Why a loader cannot be rebuilt with other batches, as a clause; None if it can."""
    if isinstance(loader.dataset, IterableDataset):
        return "its data set is iterable (IterableDataset)"
    own = next((name for name in ("__iter__", "_get_iterator") if _overrides(type(loader), name)), None)
    if own is not None:
        return f"{type(loader).__name__} has its own {own}"
    if attribute(loader, "repeats", 1) != 1:  # of MONAI's loader that reads ahead
        return "it gives every batch several times"
    if loader.batch_sampler is None:
        return "it has batch_size=None, so its data set makes the batches"
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return f"it has a custom batch sampler ({type(loader.batch_sampler).__name__})"
    return None


_PREFETCHING = ("ThreadDataLoader",)
"""Loaders of libraries that only read ahead: a plain one gives the same batches."""


def _overrides(kind: type, method: str) -> bool:
    """Whether a class of loaders makes its batches in a way of its own."""
    where = next(each for each in kind.__mro__ if method in vars(each))
    return where is not DataLoader and not (where.__name__ in _PREFETCHING and where.__module__.startswith("monai."))


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


def counted_by(function: Any) -> Callable[[Any], int] | None:
    """Turn errors of the user's ``batch_size_of`` into UserCodeError, and anything but a count into a DataError."""
    if not callable(function):
        return None

    def count(batch: Any) -> int:
        with user_code("calling batch_size_of(batch)"):
            size = function(batch)
        try:
            whole = None if isinstance(size, bool) else operator.index(size)
        except TypeError:
            whole = None
        if whole is None or not 0 <= whole <= _MOST_SAMPLES:
            gave = kind_of(size) if whole is None else "a negative number" if whole < 0 else "one that is too large"
            raise DataError(
                f"batch_size_of(batch){written_at(function)} must return the number of samples in the batch, a whole"
                f" number from 0, but gave {gave}."
            )
        return whole

    return count


_MOST_SAMPLES = 2**40
"""Nobody's batch has more."""


def source_of(value: Any, request: Request) -> BatchSource:
    """What a value of the user yields, as a source of batches; errors as for ``as_batch_source``."""
    parts = _training_and_held_out(value)
    if parts is not None:
        return _from_parts(*parts, request)
    if isinstance(value, DataLoader):
        return _from_loader(value, request)
    if _is_dataset(value):
        return dataset_source(value, request)
    if _is_buffer(value):
        value = _Drawn(value, known_size(request.wanted, request.origin))
    _refuse_no_batches(value, request.origin)
    if _length(value, request.origin) == 0:
        raise DataError(f"{request.origin} is empty: it yields no batch.")
    attributes = attribute(value, "__dict__", {})
    inner = next((attributes[name] for name in _WRAPPED if isinstance(attributes.get(name), DataLoader)), None)
    stated = None if inner is None else own_batch_size(inner)
    if stated is None and request.wanted is not None and isinstance(value, Iterator):  # its batches exist only once
        batches = GuardedBatches(value, request.origin, samples_in=request.count())
        return BatchSource(batches, request.wanted, request.origin)
    return _at_own_size(value, stated, request)


def _is_buffer(value: Any) -> bool:
    """Whether a value gives batches only as a replay buffer does, by ``sample(batch_size)``."""
    iterable = any(has_attribute(value, name) for name in ("__iter__", "__getitem__"))
    return callable(attribute(value, "sample")) and not iterable and not isinstance(value, type)


@dataclass(frozen=True)
class _Drawn:
    """Endless batches of a replay buffer."""

    buffer: Any
    size: int

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.buffer.sample(self.size)


_TRAIN_KEYS = frozenset(("train", "training"))

_HELD_OUT_KEYS = ("val", "valid", "validation", "eval", "dev", "test")

_WRAPPED = ("loader", "dataloader", "data_loader", "_loader", "_dataloader")
"""Where wrappers of a loader, which prefetch or move batches, keep it."""


def _at_own_size(value: Any, stated: int | None, request: Request) -> BatchSource:
    """An iterable whose batches have the size that it states, or that its first batch has."""
    size = stated
    if size is None:
        value, size = _first_size(value, request)
    size = known_size(size or request.wanted, request.origin)
    asked = request.batch_size
    if asked not in (None, size) and request.told is None and not request.as_given:
        raise DataError(
            f"The first batch of {request.origin} has {size} samples, not {asked}, and only a loader or data set can be"
            " read at another size. Leave the batch size out, or write a function load_data(batch_size)."
        )
    batches = GuardedBatches(value, request.origin, samples_in=request.count(stated, size))
    return BatchSource(batches, size, request.origin, notes=_notes_on_size(size, request))


def _first_size(value: Any, request: Request) -> tuple[Any, int | None]:
    """The iterable, still with all its batches, and the samples in the first that has any; None: nothing to count."""
    iterator, drawn = iter(GuardedBatches(value, request.origin)), list[Any]()
    count = request.count()
    for batch in iterator:
        drawn.append(batch)
        size = count(batch)
        if size != 0:
            return (itertools.chain(drawn, iterator) if isinstance(value, Iterator) else value), size
    if drawn:
        raise DataError(f"{request.origin} contains no non-empty batch.")
    raise DataError(f"{request.origin} is empty: it yields no batch.")


def _notes_on_size(size: int, request: Request, varies: bool = False) -> tuple[str, ...]:
    """A sentence where the user's function was told another size than its loader has, which may have several."""
    if request.told in (None, size) or request.as_given:
        return ()
    has = f"whose first batch has {size} samples" if varies else f"of batch size {size}"
    of = "its batches" if varies else f"batches of {size}"
    return (
        f"{request.origin} was told batch size {request.told}, but gave a loader {has}. The loader was used as it is,"
        f" so all figures are for {of}.",
    )


def _training_and_held_out(value: Any) -> tuple[Any, Any, str] | None:
    """Training data, held-out data if any, and words for where they stand, of a value that holds several sources.

    A pair or triple of loaders is (training, validation[, test]); a mapping says by its keys; one loader among other
    things is the training data.
    """
    if isinstance(value, Mapping):
        named = {key: part for key, part in value.items() if isinstance(key, str)}
        plain = {key.lower().split("_")[0].removesuffix("loader"): part for key, part in named.items()}
        training = [part for key, part in plain.items() if key in _TRAIN_KEYS and is_source(part)]
        if len(training) != 1:
            return None
        beside = next((plain[key] for key in _HELD_OUT_KEYS if is_source(plain.get(key))), None)
        return training[0], beside, "its entry for training"
    if not isinstance(value, list | tuple) or _is_dataset(value):
        return None
    sources = [part for part in value if is_source(part)]
    if len(sources) == 1 and len(value) <= 4:
        return (sources[0], None, "the loader in it") if len(value) > 1 else (sources[0], None, "its only entry")
    if len(sources) == len(value) and len(value) in (2, 3):
        return sources[0], sources[1], "the first of them"
    return None


def is_source(value: Any) -> bool:
    """Whether a value is a loader or a data set."""
    return isinstance(value, DataLoader) or _is_dataset(value)


def _is_dataset(value: Any) -> bool:
    """Whether a value is a data set of torch, or of Hugging Face, whose class is none of torch's."""
    hugging_face = all(has_attribute(value, name) for name in ("with_format", "__getitem__", "column_names"))
    return isinstance(value, Dataset) or (hugging_face and not isinstance(value, Mapping))


def _from_parts(training: Any, held_out: Any, words: str, request: Request) -> BatchSource:
    source = source_of(training, request)
    beside = None
    if held_out is not None and not request.as_given:
        symbol, _, where = request.origin.partition(" of ")
        name = f"the validation data of {symbol} of {where}" if where else "the validation data"
        beside = source_of(held_out, replace(request, origin=name, as_given=True))
    note = f"{request.origin} gives several values; {words} was used"
    note += " for training, and the one for validation as held-out data." if beside else "."
    return replace(source, notes=(*source.notes, note), beside=beside)


def _refuse_no_batches(value: Any, origin: str) -> None:
    advice = "Give a DataLoader, a Dataset or an iterable of batches."
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(parts, tuple | list) and any(map(is_source, parts)):
        raise DataError(f"{origin} gives {kind_of(value)}, but a single loader is needed. Return only that loader.")
    iterable = any(has_attribute(value, name) for name in ("__iter__", "__getitem__"))
    one_array = has_attribute(value, "__array__")  # a tensor would be split into samples
    if not iterable or one_array or isinstance(value, str | bytes | Mapping | type):
        raise DataError(f"{origin} gives {kind_of(value)}, which is not a source of batches. {advice}")


def dataset_source(dataset: Any, request: Request) -> BatchSource:
    """The same for what yields single samples by index."""
    size = known_size(request.wanted, request.origin)
    images = _length(dataset, request.origin)
    if request.as_given and images:  # the eval path does not depend on the batch size
        size = min(size, images)
    _check_images(images, size, request.origin)
    dataset, notes = (dataset, ()) if request.prepare is None else request.prepare(dataset)
    # A stream has the order that it has; every framework shuffles what can be indexed.
    stream = isinstance(dataset, IterableDataset)
    collate = None if stream or not images else _collating(dataset, request.origin)
    loader = DataLoader(dataset, batch_size=size, shuffle=not stream, collate_fn=collate)
    source = _loader_source(loader, size, request, images, size)
    source = replace(source, drop_last=None, own_order=stream, notes=notes)  # bnprobe made the loader
    if stream:
        return source
    note = f"{request.origin} is a Dataset: bnprobe shuffles it. Give a DataLoader to have your own order judged."
    return replace(source, notes=(note, *notes))


def _collating(dataset: Any, origin: str) -> Callable[[list[Any]], Any] | None:
    """What makes a batch of samples that a framework knows; None: torch's ``default_collate``."""
    if isinstance(dataset, frameworks.Prepared):
        return dataset.collate
    if not frameworks.may_collate():
        return None  # without a look at a sample, which may take long to read
    with user_code(f"reading the first sample of {origin}"):
        sample = dataset[0]
    return frameworks.collating(sample)


def _from_loader(loader: DataLoader[Any], request: Request) -> BatchSource:
    stated, batches = own_batch_size(loader), loader
    own = stated
    if own is None:
        batches, own = _first_size(loader, request)
    fixed = request.as_given or request.told is not None
    size = known_size((own if fixed else None) or request.batch_size or own or request.told, request.origin)
    images = None  # an iterable data set may count batches or samples; another batch sampler may repeat samples
    if not isinstance(loader.dataset, IterableDataset) and (loader.batch_size is not None or _is_plain(loader)):
        images = _length(getattr(loader.batch_sampler, "sampler", loader.sampler), request.origin)
    if fixed and images and size > images and (request.as_given or request.told != size):
        size = images  # no other size can be asked for
    if loader.batch_size is not None:  # of a batch sampler that was given, no other size can be asked for either
        _check_images(images, size, request.origin)
    if own is None or fixed or own == size:
        source = _loader_source(batches, size, request, images, None if stated is None else size)
        return replace(source, notes=_notes_on_size(size, request, varies=source.composed))
    refuse_rebuild(loader, own, size, request.origin)
    with user_code(f"rebuilding {request.origin} at batch size {size}"):
        again = rebuilt(loader, size)
    source = _loader_source(again, size, request, images, size)
    note = f"The loader was rebuilt at batch size {size}, with its own sampler; its batch size was {own}."
    return replace(source, notes=(note,), drop_last=_drops_last(loader))


def _loader_source(
    loader: DataLoader[Any], size: int, request: Request, images: int | None, stated: int | None
) -> BatchSource:
    origin = request.origin
    if _length(loader, origin) == 0:
        raise DataError(f"{origin} is empty: it yields no batch.")
    # What a batch sampler of the user's own draws in an epoch is not known, but what the data set holds is.
    held = _length(loader.dataset, origin) if images is None and _is_indexable(loader) else images
    words = origin if held is None else f"{origin} ({held} samples)"
    batches = GuardedBatches(loader, origin, samples_in=request.count(stated, size))
    composed = loader.batch_sampler is not None and not _is_plain(loader)
    return BatchSource(batches, size, words, images, drop_last=_drops_last(loader), composed=composed)


def _is_indexable(loader: DataLoader[Any]) -> bool:
    """Whether the loader draws batches from a data set by index: then the length of that is one of samples."""
    return not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether batches are so many samples in a row, whoever made the batch sampler."""
    return type(loader.batch_sampler) is BatchSampler


def _drops_last(loader: DataLoader[Any]) -> bool:
    """A loader that was given a batch sampler says False whatever that one does."""
    return bool(getattr(loader.batch_sampler, "drop_last", loader.drop_last))


def _check_images(images: int | None, size: int, origin: str) -> None:
    if images == 0:
        raise DataError(f"{origin} is empty: its data set has no samples.")
    if images is not None and size > images:
        raise DataError(
            f"Batch size {size} is larger than the data set of {images} samples ({origin}). "
            f"Give a {option('--batch-size')} of at most {images}."
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


def known_size(batch_size: int | None, origin: str) -> int:
    """The batch size, or a UsageError that asks for it."""
    if batch_size is None:
        raise UsageError(f"The batch size of {origin} is unknown. Give one, e.g. with {option('--batch-size', 2)}.")
    return batch_size
