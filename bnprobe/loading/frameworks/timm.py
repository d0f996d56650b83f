"""Models of timm by name: ``timm:resnet18``."""

from __future__ import annotations

from bnprobe.config.spec import Spec
from bnprobe.loading.frameworks import Project, Reader
from bnprobe.loading.frameworks.libraries import library, model_of


class Timm(Reader):
    """Models of timm by name."""

    def named(self, name: str, spec: Spec) -> Project:
        """See the base class."""
        timm, args = library("timm"), spec.model.args
        return Project(model_of(name, timm.list_models(), lambda: timm.create_model(name, **args), "timm"))
