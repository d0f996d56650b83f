"""Frameworks whose projects are read as they stand, without a model file: the registry of frameworks.

A row imports neither torch nor the framework, so that the command line can list all of them at once. It names its code
as ``"package.module:CLASS"``, which is imported when a target leads to it (``bnprobe.loading.frameworks``).
"""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.errors import ModelError
from bnprobe.registry import Registry


@dataclass(frozen=True)
class Framework:
    """A framework whose projects can be scanned.

    Attributes:
        name: As in documentation, e.g. "Lightning".
        reader: Where its ``bnprobe.loading.frameworks.Reader`` is, as "package.module:CLASS".
        prefix: What its targets begin with, before a colon, e.g. "timm"; "": its classes are known by themselves.
        packages: Packages of which one has been imported wherever a value of the framework exists.
        is_path: What follows the prefix is the path of a file or folder.
    """

    name: str
    reader: str
    prefix: str = ""
    packages: tuple[str, ...] = ()
    is_path: bool = False


_HERE = "bnprobe.loading.frameworks."

FRAMEWORKS: Registry[Framework] = Registry(
    "bnprobe.frameworks",
    (
        Framework("timm", _HERE + "timm:Timm", prefix="timm"),
        Framework("torchvision", _HERE + "torchvision:Torchvision", prefix="torchvision"),
        Framework(
            "Hugging Face",
            _HERE + "huggingface:HuggingFace",
            prefix="hf",
            packages=("transformers", "datasets"),
            is_path=True,
        ),
        Framework("Lightning", _HERE + "lightning:Lightning", packages=("lightning", "pytorch_lightning")),
        Framework("MONAI", _HERE + "monai:Monai", packages=("monai",)),
        Framework("PyTorch Geometric", _HERE + "pyg:Graphs", packages=("torch_geometric",)),
    ),
    lambda framework: framework.name,
    "framework",
    ModelError,
)


def framework_named_in(target: str) -> Framework | None:
    """The framework with whose prefix a target begins."""
    prefix, colon, name = target.partition(":")
    if not colon or not name:
        return None
    return next((row for row in FRAMEWORKS if row.prefix and row.prefix == prefix), None)
