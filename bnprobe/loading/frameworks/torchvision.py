"""Models of torchvision by name, ``torchvision:resnet18``, as its training scripts make, call and score them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from bnprobe.config.spec import Spec
from bnprobe.loading.frameworks import Project, Reader
from bnprobe.loading.frameworks.libraries import Trained, library, model_of, trained
from bnprobe.loading.frameworks.vision import (
    class_accuracy,
    class_loss,
    detect,
    detection_loss,
    pixel_accuracy,
    pixel_loss,
)

_CLASSES = {"segmentation": 21, "detection": 91, "video": 400, "keypoint_rcnn": 2}
"""Classes of a model by the module that makes it; all others have 1000."""


class Torchvision(Reader):
    """Models of torchvision by name."""

    def named(self, name: str, spec: Spec) -> Project:
        """See the base class."""
        models, known = library("torchvision.models"), trained(spec.checkpoint)
        builder = models.get_model_builder(name) if name.lower() in models.list_models() else None
        places = () if builder is None else builder.__module__.split(".")
        given = _given(builder, known)

        def made(**more: Any) -> nn.Module:
            args = {**given, **more, **spec.model.args}
            return model_of(name, models.list_models(), lambda: models.get_model(name, **args), "torchvision")

        model, words = made(), ""
        if known is not None:
            known.require_name(name, "torchvision")
            usual = next((_CLASSES[place] for place in reversed(places) if place in _CLASSES), 1000)
            classes = known.classes(model, usual)
            if classes is not None and "num_classes" not in spec.model.args:
                model, words = made(num_classes=classes), f" (num_classes={classes} as in its checkpoint)"
            if "detection" in places:
                _freeze(model, known.state(model))
        task = next((_TASKS[place] for place in places if place in _TASKS), _CLASSIFICATION)
        taken = {role: words for role, (_, words) in task.items() if words}
        functions = {role: function for role, (function, _) in task.items()}
        return Project(model, functions, {"model": f"{name} of torchvision{words}", **taken})


_CLASSIFICATION = {"loss": (class_loss, "cross-entropy"), "metric": (class_accuracy, "accuracy")}

_TASKS: dict[str, dict[str, tuple[Any, str]]] = {
    "detection": {"forward": (detect, ""), "loss": (detection_loss, "the sum of the model's losses")},
    "segmentation": {
        "loss": (pixel_loss, "cross-entropy of pixels, and half of that of the auxiliary head"),
        "metric": (pixel_accuracy, "accuracy of pixels"),
    },
}
"""How the models of a module are called and scored, as functions and as words for the report."""


def _given(builder: Any, known: Trained | None) -> dict[str, Any]:
    """Arguments that say that nothing is downloaded, and which heads the checkpoint has."""
    if builder is None:
        return {}
    given: dict[str, Any] = {}
    takes = inspect.signature(builder).parameters
    if "weights_backbone" in takes:  # it would be downloaded
        given["weights_backbone"] = None
    if "aux_loss" in takes and known is not None and known.args.get("aux_loss"):
        given["aux_loss"] = True
    return given


def _freeze(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Freeze the norms of a detector that were so where it was trained: their weights come without a counter."""
    frozen = library("torchvision.ops").FrozenBatchNorm2d
    for name, parent in list(model.named_modules()):
        for child, module in list(parent.named_children()):
            place = f"{name}.{child}".removeprefix(".")
            counted = f"{place}.num_batches_tracked" in state
            if isinstance(module, nn.BatchNorm2d) and f"{place}.running_mean" in state and not counted:
                setattr(parent, child, frozen(module.num_features, eps=module.eps))
