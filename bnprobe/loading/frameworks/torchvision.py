"""Models of torchvision by name: ``torchvision:resnet18``."""

from __future__ import annotations

from bnprobe.config.spec import Spec
from bnprobe.loading.frameworks import Project, Reader
from bnprobe.loading.frameworks.libraries import library, model_of


class Torchvision(Reader):
    """Models of torchvision by name."""

    def named(self, name: str, spec: Spec) -> Project:
        """See the base class."""
        models, args = library("torchvision.models"), spec.model.args
        return Project(model_of(name, models.list_models(), lambda: models.get_model(name, **args), "torchvision"))
