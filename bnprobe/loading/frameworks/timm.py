"""Models of timm by name, ``timm:resnet18``, as its training script makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bnprobe.config.spec import Spec
from bnprobe.loading.frameworks import Project, Reader
from bnprobe.loading.frameworks.libraries import Trained, library, model_of, trained
from bnprobe.loading.frameworks.vision import class_accuracy, class_loss

_ARGUMENTS = {
    "num_classes": "num_classes",
    "in_chans": "in_chans",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "drop_block": "drop_block_rate",
    "gp": "global_pool",
    "bn_momentum": "bn_momentum",
    "bn_eps": "bn_eps",
}
"""Arguments of timm's train.py, and what its models call them."""


class Timm(Reader):
    """Models of timm by name."""

    def named(self, name: str, spec: Spec) -> Project:
        """See the base class."""
        timm, known = library("timm"), trained(spec.checkpoint)
        told = {} if known is None else _told(known)

        def made(**more: Any) -> Any:
            args = {**told, **more, **spec.model.args}
            return model_of(name, timm.list_models(), lambda: timm.create_model(name, **args), "timm")

        if known is not None:
            known.require_name(name, "timm")
        model = made()
        usual = getattr(model, "num_classes", None)
        classes = known.classes(model, usual) if known is not None and isinstance(usual, int) and usual else None
        if classes is not None and "num_classes" not in spec.model.args:
            model, told = made(num_classes=classes), {**told, "num_classes": classes}
        words = f" ({', '.join(f'{key}={value}' for key, value in told.items())} as in its checkpoint)" if told else ""
        taken = {
            "model": f"{name} of timm{words}",
            "loss": "cross-entropy",
            "metric": "accuracy",
        }
        return Project(model, {"loss": class_loss, "metric": class_accuracy}, taken)


def _told(known: Trained) -> dict[str, Any]:
    """The arguments of a model that the training script was given and that are not its defaults."""
    found = {mine: known.args[theirs] for theirs, mine in _ARGUMENTS.items() if known.args.get(theirs)}
    more = known.args.get("model_kwargs")
    return {**found, **(more if isinstance(more, Mapping) else {})}
