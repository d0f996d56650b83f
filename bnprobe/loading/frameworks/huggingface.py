"""Models of Hugging Face: a folder with config.json and weights, or a model of transformers in the user's own file.

Everything is read from disk: the network is never asked, and code that comes with a model is never run.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.config.spec import Spec, why_missing
from bnprobe.errors import CheckpointError, DataError, ModelError, first_line_of, reason_of
from bnprobe.loading.frameworks import Project, Reader, imported, is_a
from bnprobe.loading.frameworks.huggingface_samples import Preparation
from bnprobe.loading.frameworks.libraries import library
from bnprobe.loading.model import attribute, kind_of, user_code
from bnprobe.numbers import joined, listed
from bnprobe.paths import is_file, is_folder, placed
from bnprobe.wording import nearest

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_STATISTICS = ("running_mean", "running_var")
_CLASSIFIERS = ("ForImageClassification", "ForVideoClassification", "ForSequenceClassification")
"""Ends of the names of classes that give one class to a sample."""

_PER_PLACE = ("ForSemanticSegmentation", "ForTokenClassification")
"""Of those that give one to each pixel or token."""

_IGNORED = {"ForSemanticSegmentation": 255, "ForTokenClassification": -100}


class HuggingFace(Reader):
    """A folder of Hugging Face, models of transformers, and data sets of datasets."""

    def named(self, name: str, spec: Spec) -> Project:
        """See the base class."""
        folder = placed(Path(name).expanduser())
        config = _read_config(folder)
        kind = _class_named(config, folder)
        with user_code(f"loading hf:{name}"), _alone():
            if spec.checkpoint.path is not None:
                return _project(_built(kind, _settings(kind, folder, spec)), f"hf:{name}", folder)
            return _with_weights(kind, folder, name, spec)

    def claims(self, value: Any) -> bool:
        """See the base class."""
        return is_a(value, imported("transformers.modeling_utils", "PreTrainedModel"))

    def project(self, value: Any, name: str, spec: Spec) -> Project:
        """See the base class."""
        args, made = spec.model.args, value
        if isinstance(value, type):
            with user_code(f"making {name}({', '.join(args)})"), _alone():
                made = _built(value, attribute(value, "config_class")(**args))
        origin = attribute(made, "name_or_path") or ""
        folder = placed(Path(origin)) if isinstance(origin, str) and origin else None
        return _project(made, name, folder if folder is not None and is_folder(folder) else None)

    def claims_data(self, value: Any) -> bool:
        """See the base class."""
        kinds = (imported(f"datasets.{module}", name) for module, name in _DATA)
        return not isinstance(value, type) and is_a(value, *kinds)

    def data(self, value: Any, name: str, args: Mapping[str, Any]) -> Any:
        """See the base class."""
        if isinstance(value, Mapping):
            return {split: self.data(part, name, {}) for split, part in value.items()}
        return value.with_format("torch") if _is_unformatted(value) else value


_DATA = (
    *(("arrow_dataset", "Dataset"), ("iterable_dataset", "IterableDataset")),
    *(("dataset_dict", "DatasetDict"), ("dataset_dict", "IterableDatasetDict")),
)
"""Modules and classes of datasets."""


def _is_unformatted(dataset: Any) -> bool:
    """Whether a data set gives lists and numbers of Python, for want of anything else that was asked for."""
    formatted = attribute(dataset, "format")  # streams have none that can be read
    kind = formatted.get("type") if isinstance(formatted, Mapping) else attribute(dataset, "_formatting")
    return kind is None


# ---- the folder


def _read_config(folder: Path) -> Mapping[str, Any]:
    """The config.json of a folder.

    Raises:
        ModelError: There is none; says what the folder holds instead.
    """
    if (missing := why_missing(folder)) is not None:
        raise ModelError(
            f"The folder {folder} {missing} hf: names a folder on this machine; bnprobe downloads nothing. Fetch a"
            " model with: hf download NAME --local-dir FOLDER"
        )
    path = folder / _CONFIG
    if not is_file(path):
        raise ModelError(f"{folder} {_instead(folder)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = reason_of(error) if isinstance(error, OSError | ValueError) else "it is nested too deeply"
        raise ModelError(f"{path} could not be read: {reason}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {kind_of(config)}, not the configuration of a model (a mapping).")
    return config


def _instead(folder: Path) -> str:
    """What a path is instead of the folder of a model, the end of a sentence, and what to do."""
    if not is_folder(folder):
        return "is not a folder. Name the folder that has config.json and the weights."
    if is_file(folder / "adapter_config.json"):
        return (
            "holds an adapter (adapter_config.json), not a model. Merge it into its model first:"
            " model.merge_and_unload().save_pretrained(FOLDER)."
        )
    if is_file(folder / "model_index.json"):
        return "holds a pipeline of diffusers. Name the folder of one of its models, e.g. vae or unet in it."
    inside = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
    if inside:
        return f"has no {_CONFIG}, but these folders in it have one: {listed(inside)}. Name one of them."
    return f"has no {_CONFIG}. Save the model with model.save_pretrained(FOLDER)."


def _class_named(config: Mapping[str, Any], folder: Path) -> Any:
    """The class of transformers that a configuration names.

    Raises:
        ModelError: transformers has none of that name, or the class comes with the model.
    """
    transformers = library("transformers", "huggingface")
    given = config.get("architectures")
    names = [each for each in given if isinstance(each, str)] if isinstance(given, list) else []
    kind = next((found for name in names if (found := _transformers_class(transformers, name)) is not None), None)
    if kind is not None:
        return kind
    if "auto_map" in config:
        raise ModelError(
            f"{folder} comes with code of its own ({_CONFIG}: auto_map), which bnprobe does not run. Read the code; if"
            " you trust it, write a model file that loads the model: def load_model(): return"
            f" AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)"
        )
    if not names:
        raise ModelError(
            f'{folder / _CONFIG} names no class of model ("architectures"). Save the model with save_pretrained(), or'
            " write a model file that loads it."
        )
    close = nearest(names[0], dir(transformers))
    hint = f" The nearest name there is {close}." if close else ""
    raise ModelError(
        f'transformers {transformers.__version__} has no model "{names[0]}", which {folder / _CONFIG} names.{hint}'
        " Install the version that the model was saved with, or write a model file that loads it."
    )


def _transformers_class(transformers: Any, name: str) -> Any:
    """A class of models of transformers; None where it has none of that name."""
    if not name.isidentifier() or name not in dir(transformers):
        return None
    with user_code(f"importing {name} of transformers"):
        found = getattr(transformers, name)
    is_model = isinstance(found, type) and is_a(found, imported("transformers.modeling_utils", "PreTrainedModel"))
    return found if is_model else None


def _settings(kind: Any, folder: Path, spec: Spec) -> Any:
    """The configuration of a folder, with the user's arguments in it.

    Raises:
        ModelError: An argument is no key of it.
    """
    args = spec.model.args
    config, unused = kind.config_class.from_pretrained(
        folder, local_files_only=True, return_unused_kwargs=True, trust_remote_code=False, **args
    )
    unknown = [name for name in args if name in unused]
    if unknown:
        close = nearest(unknown[0], config.to_dict())
        hint = f'; the nearest is "{close}"' if close else ""
        raise ModelError(f'{kind.config_class.__name__} has no "{unknown[0]}" (model.args){hint}.')
    return config


def _built(kind: Any, config: Any) -> nn.Module:
    model: nn.Module = kind(config)
    return model


def _with_weights(kind: Any, folder: Path, name: str, spec: Spec) -> Project:
    """The model with the weights of its folder.

    Raises:
        CheckpointError: They are missing or damaged, or do not fit.
    """
    if not any(is_file(folder / each) for each in _WEIGHTS):
        raise CheckpointError(
            f"{folder} has no weights ({' or '.join(_WEIGHTS[:2])}). Copy them there, or name others with --checkpoint."
        )
    config, notes = _settings(kind, folder, spec), []
    half = str(attribute(config, "dtype") or "").removeprefix("torch.")
    if half in ("float16", "bfloat16"):
        notes.append(f"The weights are saved in {half} and used in float32; --autocast {half} computes in {half}.")
    try:
        model, found = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # whatever transformers raises for files that are damaged or do not fit
        said = first_line_of(error)
        raise CheckpointError(f"The weights in {folder} could not be loaded into {kind.__name__}: {said}") from error
    notes += _fit(found, folder, kind.__name__, spec.checkpoint.strict)
    return _project(model.eval(), f"hf:{name}", folder, notes)


def _fit(found: Mapping[str, Any], folder: Path, kind: str, strict: bool) -> list[str]:
    """What of the weights was missing or left over, sentences.

    Raises:
        CheckpointError: Running statistics are missing, or whatever else must be there.
    """
    missing, unexpected = (sorted(map(str, found.get(f"{each}_keys") or ())) for each in ("missing", "unexpected"))
    statistics = [name for name in missing if name.endswith(_STATISTICS)]
    refused = missing if strict else statistics
    if refused:
        raise CheckpointError(
            f"The weights in {folder} do not fit {kind}. Missing ({len(refused)}): {listed(refused, 10)}. Save the"
            " whole model with save_pretrained(); checkpoint.strict: false accepts missing parameters, but not missing"
            " running statistics."
        )
    notes = (
        [f"{folder.name} lacks {len(missing)} keys; they begin at random: {listed(missing, 10)}."] if missing else []
    )
    if unexpected:
        notes.append(f"{len(unexpected)} keys of {folder.name} were not used: {listed(unexpected, 10)}.")
    return notes


@contextmanager
def _alone() -> Iterator[None]:
    """transformers and what it uses say nothing on the terminal, and do not ask the network."""
    logging = library("transformers.utils.logging", "huggingface")
    constants = sys.modules.get("huggingface_hub.constants")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offline = getattr(constants, "HF_HUB_OFFLINE", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if constants is not None:
        vars(constants)["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
        if constants is not None:
            vars(constants)["HF_HUB_OFFLINE"] = offline


# ---- how such a model is called


def _project(model: nn.Module, name: str, folder: Path | None, notes: list[str] | None = None) -> Project:
    """A model of transformers with what its class says: how it is called, its loss, and what a prediction is."""
    kind, functions = type(model).__name__, {"forward": _forward}
    taken = {"model": f"{kind} of {name}"}
    if _labels_of(model):
        functions["loss"] = _loss
        taken["loss"] = f"the loss of {kind}, from the labels of a batch"
    if _metric_of(model) is not None:
        functions["metric"] = _accuracy
        taken["metric"] = "accuracy, from logits and labels"
    preparation = Preparation(
        main=_main_input(model),
        takes=frozenset(_parameters(model)),
        labels=(*_labels_of(model), "labels")[0],
        kind=kind,
        processor=None if folder is None or not is_file(folder / _PREPROCESSOR) else lambda: _processor(folder),
        where=str(folder / _PREPROCESSOR) if folder is not None else "",
        in_colour=getattr(getattr(model, "config", None), "num_channels", 3) == 3,
    )
    return Project(model, functions, taken, tuple(notes or ()), prepare=preparation)


def _processor(folder: Path) -> Any:
    """What makes inputs of images or recordings, as the folder's preprocessor_config.json says."""
    transformers = library("transformers", "huggingface")
    try:
        said = json.loads((folder / _PREPROCESSOR).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / _PREPROCESSOR} could not be read: {reason_of(error)}.") from None
    sounds = isinstance(said, dict) and "feature_extractor_type" in said and "image_processor_type" not in said
    auto = "AutoFeatureExtractor" if sounds else "AutoImageProcessor"
    with user_code(f"loading {folder / _PREPROCESSOR}"), _alone():
        return getattr(transformers, auto).from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the model's class takes by name."""
    kind: Any = type(model)
    return _signature(kind)


def _labels_of(model: nn.Module) -> tuple[str, ...]:
    """The parameters of a model that are labels, as transformers finds them; the model has a loss where it has any."""
    kind: Any = type(model)
    return _labels_in(kind)


@cache  # they are asked for in every batch
def _signature(kind: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


@cache
def _labels_in(kind: Any) -> tuple[str, ...]:
    return tuple(library("transformers.utils.generic", "huggingface").find_labels(kind))


def _main_input(model: nn.Module) -> str:
    return str(attribute(model, "main_input_name") or "input_ids")


def _named(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The items of a batch by the names of the model's parameters.

    Raises:
        DataError: The main input is not among them, or a key is nearly the name of a parameter.
    """
    main, labels = _main_input(model), _labels_of(model)
    if isinstance(batch, Tensor):
        return {main: batch}
    if isinstance(batch, list | tuple) and batch and all(isinstance(each, Tensor) for each in batch):
        pair = len(batch) == 2 and bool(labels) and not batch[1].is_floating_point()
        return dict(zip([main, labels[0]] if pair else _positional(model), batch, strict=False))
    if not isinstance(batch, Mapping):
        raise DataError(
            f"bnprobe does not know how to give {kind_of(batch)} to {type(model).__name__}. Give batches that are"
            f" dictionaries with {main}, or write forward(model, batch) in a model file."
        )
    known = _parameters(model)
    also = {each: labels[0] for each in ("label", "label_ids") if labels and labels[0] not in batch}
    named: dict[Any, Any] = {also.get(key, key): value for key, value in batch.items()}
    found = {key: value for key, value in named.items() if key in known}
    if main not in found:
        raise DataError(_misnamed(model, main, batch))
    for key in named.keys() - found.keys():
        close = nearest(str(key), [each for each in known if each not in (*found, "self", "kwargs")], cutoff=0.8)
        if close:
            raise DataError(_misnamed(model, close, batch, str(key)))
    return found


def _positional(model: nn.Module) -> list[str]:
    return [name for name, each in _parameters(model).items() if each.kind is each.POSITIONAL_OR_KEYWORD][1:]


def _misnamed(model: nn.Module, wanted: str, batch: Mapping[Any, Any], key: str = "") -> str:
    keys = [str(each) for each in batch]
    close = key or nearest(wanted, keys, cutoff=0.5)
    rename = (
        f' The nearest is "{close}": rename it, for a data set of datasets with'
        f" dataset.rename_column({close!r}, {wanted!r})."
        if close
        else f" Give {wanted} in every batch, or write forward(model, batch) in a model file."
    )
    return f"{type(model).__name__} takes {wanted}, but the batches have {joined(keys)}.{rename}"


def _forward(model: nn.Module, batch: Any) -> Any:
    """Call the model by the keys of a batch, without labels: its loss is no output, and a number of a whole batch."""
    named, labels = _named(model, batch), _labels_of(model)
    return model(**{key: value for key, value in named.items() if key not in labels})


def _labelled(model: nn.Module, batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and labels of a batch.

    Raises:
        DataError: It has no labels.
    """
    named, wanted = _named(model, batch), _labels_of(model)
    labels = {key: value for key, value in named.items() if key in wanted and value is not None}
    if not labels:
        keys = [str(each) for each in batch] if isinstance(batch, Mapping) else []
        close = nearest(wanted[0], keys, cutoff=0.5)
        rename = f' Is it "{close}"? Then rename it.' if close else ""
        have = f"the batches have {joined(keys)}" if keys else "the batches have none"
        raise DataError(f"{type(model).__name__} takes its loss from {wanted[0]}, but {have}.{rename}")
    return {key: value for key, value in named.items() if key not in labels}, labels


def _loss(model: Any, batch: Any) -> Any:
    """The loss of the model's class.

    That of a classifier is taken from its outputs, as its forward does: where these are known, nothing runs again, and
    the samples of a batch can be told apart.
    """
    inputs, labels = _labelled(model, batch)
    if attribute(model, "loss_type") == "ForImageClassification":
        return model.loss_function(*labels.values(), model(**inputs)["logits"], model.config)
    output = model(**inputs, **labels)
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    if loss is None:
        raise DataError(f"{type(model).__name__} gave no loss for the labels {joined(list(labels))} of a batch.")
    return loss


def _metric_of(model: nn.Module) -> str | None:
    """The task of a model whose predictions are classes; None where it has another one."""
    name, config = type(model).__name__, attribute(model, "config")
    single = attribute(config, "problem_type") in (None, "single_label_classification")
    several = (attribute(config, "num_labels") or 0) > 1
    task = next((end for end in (*_CLASSIFIERS, *_PER_PLACE) if name.endswith(end)), None)
    return task if single and several and _labels_of(model) else None


def _accuracy(model: nn.Module, batch: Any) -> Tensor:
    """The share of labels that the largest of the logits hits; of pixels, with logits enlarged as for the loss."""
    inputs, given = _labelled(model, batch)
    task, labels = _metric_of(model), next(iter(given.values()))
    logits = model(**inputs)["logits"]
    if task == "ForSemanticSegmentation":
        logits = nn.functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    axis = -1 if task == "ForTokenClassification" else 1
    found = logits.argmax(axis)
    if found.shape != labels.shape or labels.is_floating_point():
        raise DataError(
            f"The accuracy of {type(model).__name__} cannot be taken: its predictions have shape {tuple(found.shape)},"
            f" the labels {tuple(labels.shape)} and dtype {labels.dtype}."
        )
    ignored = attribute(attribute(model, "config"), "semantic_loss_ignore_index", _IGNORED.get(task or ""))
    counted = labels != ignored if task in _PER_PLACE else torch.ones_like(labels, dtype=torch.bool)
    hits: Tensor = (found == labels)[counted].float()
    return hits.mean()
