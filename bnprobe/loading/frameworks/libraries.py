"""Models of a library by their names, for the readers of the libraries; and what a checkpoint says of its model."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnprobe.config.spec import CheckpointSpec
from bnprobe.errors import CheckpointError, ModelError
from bnprobe.loading.checkpoint import state_fitting
from bnprobe.loading.model import kind_of, user_code
from bnprobe.loading.weights import Stub, read_weights, weights_file
from bnprobe.paths import placed


def library(module: str, extra: str = "") -> Any:
    """A module of a package that need not be installed.

    Args:
        module: Its name.
        extra: The extra of bnprobe that installs it; "": the package has that name.

    Raises:
        ModelError: The package is not installed; says how to install it.
        UserCodeError: It cannot be imported.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ModelError(f'{package} is not installed. Run: pip install "bnprobe[{extra or package}]".')
    with user_code(f"importing {module}"):
        return importlib.import_module(module)


def model_of(name: str, known: Sequence[str], make: Callable[[], object], library: str) -> nn.Module:
    """A model of a library by its name.

    Raises:
        ModelError: The library has no model of that name.
    """
    # timm names may have a weights tag (resnet50.a1_in1k) or a hub address; neither is listed
    if ":" not in name and name.lower().split(".")[0] not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"The nearest names are {', '.join(close)}." if close else "See its list of models."
        raise ModelError(f'{library} has no model "{name}". {hint}')
    with user_code(f"making {library}:{name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library about itself
        made = make()
    if not isinstance(made, nn.Module):
        raise ModelError(f"{library}:{name} is {kind_of(made)}, not an nn.Module.")
    return made


@dataclass(frozen=True)
class Trained:
    """What the checkpoint of a training script holds.

    Attributes:
        path: The file.
        saved: All of it.
        spec: How the user names it.
        args: The arguments of the script by name, from its ``argparse.Namespace``; empty where the file has none.
    """

    path: Path
    saved: Any
    spec: CheckpointSpec
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str | None:
        """The name of the model, as the script was told; None where the file does not say."""
        told = self.args.get("model") or (self.saved.get("arch") if isinstance(self.saved, Mapping) else None)
        return told if isinstance(told, str) else None

    def require_name(self, name: str, library: str) -> None:
        """Refuse the weights of a model that has another name.

        Raises:
            CheckpointError: Says which target belongs to the file.
        """
        if self.name is not None and _plain(self.name) != _plain(name):
            raise CheckpointError(
                f"{self.path} holds {self.name}, by what its training script was told, not {name}. Scan"
                f" {library}:{self.name}."
            )

    def state(self, model: nn.Module) -> Mapping[str, Any]:
        """The state dict for a model; empty where none fits, of which loading it says why."""
        try:
            return state_fitting(model, self.saved, self.spec, self.path)
        except CheckpointError:
            return {}

    def classes(self, model: nn.Module, usual: int) -> int | None:
        """For how many classes the model was built, where its heads are the only tensors of another size.

        Args:
            model: The same model with the usual number of classes.
            usual: That number.

        Returns:
            None where the file has the usual number, or differs in other ways.
        """
        own, found = dict(model.state_dict(keep_vars=True)), set()
        for name, value in self.state(model).items():
            mine = own.get(name)
            if not isinstance(mine, Tensor) or not isinstance(value, Tensor) or value.shape == mine.shape:
                continue
            if mine.shape[1:] != value.shape[1:] or not mine.dim() or mine.shape[0] % usual:
                return None
            found.add(value.shape[0] / (mine.shape[0] // usual))
        number = found.pop() if len(found) == 1 else 0.5
        return int(number) if float(number).is_integer() else None


def _plain(name: str) -> str:
    """The name of a model without the tag of its weights, e.g. of "resnet50.a1_in1k"."""
    return name.lower().rpartition("/")[2].split(".")[0]


def trained(spec: CheckpointSpec) -> Trained | None:
    """What the user's checkpoint holds; None without one.

    Raises:
        CheckpointError: It cannot be read.
    """
    if spec.path is None:
        return None
    path = weights_file(placed(Path(spec.path)))
    saved, _ = read_weights(path, spec.unsafe_load)
    args = saved.get("args") if isinstance(saved, Mapping) else None
    given = vars(args) if isinstance(args, Stub) else args
    return Trained(path, saved, spec, given if isinstance(given, Mapping) else {})
