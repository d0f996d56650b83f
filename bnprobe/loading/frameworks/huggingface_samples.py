"""Samples of a data set as the inputs that a model of Hugging Face takes: columns by name, images by its processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from bnprobe.errors import DataError
from bnprobe.loading.frameworks import Prepared
from bnprobe.loading.model import attribute, has_attribute, kind_of, user_code
from bnprobe.loading.tensors import from_array
from bnprobe.numbers import joined, listed
from bnprobe.wording import nearest

_LABEL_NAMES = ("label", "label_ids", "labels")
_MASK_NAMES = (*_LABEL_NAMES, "annotation", "mask", "segmentation_mask", "segmentation_map")


@dataclass(frozen=True)
class Preparation:
    """Makes inputs of samples.

    Attributes:
        main: The parameter of the model's forward that takes its main input, e.g. "pixel_values".
        takes: All its parameters.
        labels: The one that takes the labels.
        kind: Class of the model, for messages.
        processor: Loads what makes inputs of images and recordings; None: the model has none.
        where: The file that describes it.
        in_colour: Whether the model takes images of three channels.
    """

    main: str
    takes: frozenset[str]
    labels: str
    kind: str
    processor: Callable[[], Any] | None = None
    where: str = ""
    in_colour: bool = True

    def __call__(self, dataset: Any) -> tuple[Any, tuple[str, ...]]:
        """A data set of samples that ``default_collate`` makes batches of, and notes; unchanged where it is one.

        Raises:
            DataError: Its samples lack the main input, or hold images that nothing says how to prepare.
            UserCodeError: The data set or the processor raised.
        """
        dataset = _formatted(dataset)
        first = _first_of(dataset)
        if first is None or _has_own_transform(dataset):
            return dataset, ()
        if not isinstance(first, Mapping) and not (isinstance(first, list | tuple) and _is_raw(first[0])):
            return dataset, ()
        plan = self._plan(_as_mapping(first, self.main, self.labels))
        prepared = _Stream(dataset, plan) if isinstance(dataset, IterableDataset) else _Samples(dataset, plan)
        return prepared, plan.notes

    def _plan(self, first: Mapping[str, Any]) -> _Plan:
        """What becomes of the columns of the first sample."""
        names = {key: self._parameter(key, first) for key in first}
        raw = [key for key, value in first.items() if _is_raw(value)]
        if self.main in names.values() and not any(names[key] == self.main for key in raw):
            raw = []
        masks = [key for key in raw if key in _MASK_NAMES] if len(raw) > 1 else []
        raw = [key for key in raw if key not in masks]
        if len(raw) > 1:
            raise DataError(
                f"The samples have several images: {joined(raw)}. Rename the one that {self.kind} takes to {self.main},"
                " and remove the others (dataset.remove_columns)."
            )
        if not raw and self.main not in names.values():
            raise DataError(self._lacking(list(first)))
        if raw and self.processor is None:
            raise DataError(
                f"The samples hold {kind_of(first[raw[0]])} under {raw[0]!r}, and nothing says how {self.main} is made"
                f" of it{f': {self.where} does not exist' if self.where else ''}. Save the processor beside the model"
                " (processor.save_pretrained), or prepare the samples with dataset.with_transform(...)."
            )
        columns = {key: name for key, name in names.items() if name and key not in (*raw, *masks)}
        left_out = [key for key in first if key not in columns and key not in raw and key not in masks]
        recording = bool(raw) and isinstance(first[raw[0]], Mapping)
        return _Plan(self, columns, raw[0] if raw else None, masks[0] if masks else None, tuple(left_out), recording)

    def _parameter(self, key: str, first: Mapping[str, Any]) -> str | None:
        """The parameter of the model that a column is for."""
        if key in self.takes:
            return key
        if key in _LABEL_NAMES and self.labels in self.takes and self.labels not in first:
            return self.labels
        return None

    def _lacking(self, keys: list[str]) -> str:
        close = nearest(self.main, keys, cutoff=0.5)
        hint = (
            f' The nearest is "{close}": rename it with dataset.rename_column({close!r}, {self.main!r}).'
            if close
            else ""
        )
        return (
            f"{self.kind} takes {self.main}, but the samples have {joined(keys)}, and none of them is an image.{hint}"
        )


@dataclass(frozen=True)
class _Plan:
    """What becomes of the columns of a sample.

    Attributes:
        preparation: Whose plan it is.
        columns: Those that are taken as they are, and the parameter that each is for.
        raw: The image or recording that the processor prepares; None: there is none.
        mask: The segmentation map that is prepared with it; None: there is none.
        left_out: What the model does not take.
        is_recording: Whether ``raw`` is a recording.
    """

    preparation: Preparation
    columns: Mapping[str, str]
    raw: str | None
    mask: str | None
    left_out: tuple[str, ...]
    is_recording: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader should know, one sentence each."""
        where, main = self.preparation.where, self.preparation.main
        prepared = f"{main} is made of {self.raw} as {where} says, without augmentations of training."
        dropped = f"{self.preparation.kind} does not take {listed(self.left_out)} of the samples."
        return (*([prepared] if self.raw else []), *([dropped] if self.left_out else []))

    def apply(self, sample: Any, processor: Any) -> dict[str, Any]:
        """The inputs of one sample."""
        own = self.preparation
        sample = _as_mapping(sample, own.main, own.labels)
        found = {name: _as_tensor(sample[key]) for key, name in self.columns.items()}
        if self.raw is not None:
            with user_code(f"preparing {self.raw!r} of a sample as {own.where} says"):
                raw = sample[self.raw]
                if own.in_colour and not self.is_recording and raw is not None:
                    raw = raw.convert("RGB")  # as pipelines do: data sets of photos hold some in grey
                found |= _prepared(processor, raw, None if self.mask is None else sample[self.mask])
        return found


class _Samples(Prepared):
    """A data set with prepared samples; recordings are padded to the longest of their batch."""

    def __init__(self, dataset: Any, plan: _Plan) -> None:
        self.dataset, self._plan = dataset, plan
        self._processor = plan.preparation.processor() if plan.raw and plan.preparation.processor else None
        self.collate = self._padded if plan.is_recording else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._plan.apply(self.dataset[index], self._processor)

    def _padded(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        assert self._processor is not None  # else no recording is prepared
        made = set(self._processor.model_input_names)
        inputs = [{key: value for key, value in sample.items() if key in made} for sample in samples]
        rest = [{key: value for key, value in sample.items() if key not in made} for sample in samples]
        with user_code(f"padding recordings as {self._plan.preparation.where} says"):
            return {**self._processor.pad(inputs, padding=True, return_tensors="pt"), **default_collate(rest)}


class _Stream(IterableDataset[Any]):
    """The same of a stream."""

    def __init__(self, dataset: Any, plan: _Plan) -> None:
        self.dataset, self._plan = dataset, plan
        self._processor = plan.preparation.processor() if plan.raw and plan.preparation.processor else None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._plan.apply(sample, self._processor) for sample in self.dataset)


def _formatted(dataset: Any) -> Any:
    """A data set of datasets that gives tensors, but images and recordings as they are; others unchanged."""
    features = attribute(dataset, "features")
    if not has_attribute(dataset, "with_format") or not isinstance(features, Mapping) or _has_own_transform(dataset):
        return dataset
    raw = [name for name, feature in features.items() if type(feature).__name__ in ("Image", "Audio")]
    if not raw or not has_attribute(dataset, "format"):  # the format of a stream goes for all of its columns
        return dataset.with_format(None if raw else "torch")
    others = [name for name in features if name not in raw]
    return dataset.with_format("torch", columns=others, output_all_columns=True)


def _has_own_transform(dataset: Any) -> bool:
    """Whether the user says what a data set of datasets gives (``with_transform``)."""
    formatted = attribute(dataset, "format")
    return isinstance(formatted, Mapping) and formatted.get("type") == "custom"


def _first_of(dataset: Any) -> Any:
    """The first sample; None where there is none."""
    with user_code("reading the first sample of the data set"):
        if isinstance(dataset, IterableDataset):
            return next(iter(dataset), None)
        return dataset[0] if len(dataset) else None


def _is_raw(value: Any) -> bool:
    """Whether this is an image or a recording, rather than numbers for the model."""
    if isinstance(value, Mapping):
        return "array" in value and "sampling_rate" in value
    return any(kind.__module__.startswith("PIL.") for kind in type(value).__mro__)


def _as_mapping(sample: Any, main: str, labels: str) -> Mapping[str, Any]:
    """A sample by the names of its parts; a pair is an input and its label."""
    return sample if isinstance(sample, Mapping) else dict(zip((main, labels), sample, strict=False))


def _as_tensor(value: Any) -> Any:
    """Numbers as a tensor, as datasets does; what is none stays as it is."""
    if isinstance(value, Tensor):
        return value
    found = from_array(np.array(value))
    return found if isinstance(found, Tensor) else value


def _prepared(processor: Any, raw: Any, mask: Any) -> dict[str, Any]:
    """What a processor makes of one image, with its mask, or of one recording; without an axis of samples."""
    if isinstance(raw, Mapping):
        found = processor(raw["array"], sampling_rate=raw["sampling_rate"], return_tensors="pt")
    elif mask is not None:
        found = processor(images=raw, segmentation_maps=mask, return_tensors="pt")
    else:
        found = processor(images=raw, return_tensors="pt")
    return {key: value[0] for key, value in found.items()}
