"""A monitor for the Trainer of Lightning."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnprobe.errors import UsageError, warn_user
from bnprobe.loading.model import unwrapped
from bnprobe.measure.layers import find_layers
from bnprobe.monitor.log import scalars
from bnprobe.monitor.monitor import Monitor
from bnprobe.nn.limits import POSITION
from bnprobe.numbers import joined

if TYPE_CHECKING or "lightning" in sys.modules or ("pytorch_lightning" not in sys.modules and find_spec("lightning")):
    from lightning.pytorch import Callback, LightningModule, Trainer
else:  # the same under its other name, where that is the one in use
    from pytorch_lightning import Callback, LightningModule, Trainer


class LightningMonitor(Callback):
    """Runs a `bnprobe.Monitor` on each network that ``training_step`` calls, while a Trainer fits.

    The figures of samples and findings go to the Trainer's loggers too. The state is saved in Lightning's checkpoints,
    and a resumed run goes on with it.

    Args:
        every: Optimizer steps from sample to sample.
        modules: Names of the networks in the LightningModule, e.g. ["generator", "discriminator"]. Empty: those that
            the first ``training_step`` calls in train mode. The names of layers are those within a network.
        settings: The other arguments of `bnprobe.Monitor`. Of several networks, each has a folder of its own in the
            folder that is given as the log.

    Attributes:
        monitors: By the names of the networks; "" is the LightningModule itself. Empty until the first step is over.

    Example:
        trainer = Trainer(callbacks=[LightningMonitor(every=100)])
    """

    def __init__(self, every: int = 100, *, modules: Sequence[str] = (), **settings: Any) -> None:
        self.monitors: dict[str, Monitor] = {}
        self._modules = list(modules)
        self._settings = {"every": every, **settings}
        self._saved: dict[str, Any] = {}
        self._search: _Search | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start, where it is known what to watch; else look for it."""
        if not trainer.global_step:  # nothing is resumed, whatever was trained before
            self._saved, self.monitors = {}, {}
        if pl_module._compiler_ctx is not None:
            _warn("its training_step is compiled as a whole. Compile the network in it: self.net = torch.compile(net)")
        elif names := self._modules or list(self._saved):
            self._start(names, trainer, pl_module)
        else:
            self._search = _Search(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *given: Any) -> None:
        """Start, once the first batch has shown what there is."""
        if self._search is None:
            return
        self._search.stop()
        names, self._search = self._search.found(), None
        if not names:
            _warn(
                'no network with norm layers is called by training_step, or only compiled. Name one: modules=["net"].'
                " Under DistributedDataParallel it must be a module in the LightningModule"
            )
        self._start(names, trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the weights load into the module as it was made; what the monitors changed is in their own state."""
        for prefix, monitor in self.monitors.items():
            for name in [name for made in monitor.changes for name in made.layers]:
                checkpoint["state_dict"].pop(f"{prefix}.{name}.{POSITION}".removeprefix("."), None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop; a fit that goes on with this training goes on from here."""
        self._stop()
        self._saved = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The state of every monitor by the name of its network."""
        return {name: monitor.state_dict() for name, monitor in self.monitors.items()} or self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, once training starts."""
        self._saved, self.monitors = state_dict, {}

    def _start(self, names: Sequence[str], trainer: Trainer, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        if unknown := [name for name in names if name not in modules]:
            layers = find_layers(pl_module, lambda *names: True).layers
            parts = dict.fromkeys(layer.name.partition(".")[0] for layer in layers)
            raise UsageError(
                f"modules: {type(pl_module).__name__} has no module {unknown[0]!r}. With norm layers it has"
                f" {joined(list(parts))}; '' is all of it."
            )
        for name in names:
            several = name if len(names) > 1 else ""
            given = self._settings.get("log")
            logs = [_part(each, several) for each in (given if isinstance(given, list) else [given])]
            settings = {**self._settings, "log": [*logs, partial(_log, trainer, several)]}
            monitor = self.monitors[name] = Monitor(pl_module.get_submodule(name), **settings)
            # It counts the steps of each optimizer.
            monitor.step = trainer.global_step // max(len(trainer.optimizers), 1)
            if name in self._saved:
                monitor.load_state_dict(self._saved[name])
            monitor.start()

    def _stop(self) -> None:
        if self._search is not None:
            self._search.stop()
        for monitor in self.monitors.values():
            monitor.stop()


class _Search:
    """Finds the outermost modules that hold norm layers and are called in train mode.

    Where the LightningModule is called and only hands on to one network, it is that network: in a GAN ``self(z)`` is
    often the generator, and the discriminator is called beside it.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._layers = {layer.name for layer in find_layers(root, lambda *names: True).layers}
        self._running: list[str] = []
        self._outer: dict[str, None] = {}
        self._within_root: dict[str, None] = {}
        self._redirected = False
        self._hooks = ExitStack()
        for name in self._candidates():
            module = root.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(partial(self._before, name)),
                module.register_forward_hook(partial(self._after, name)),
            ):
                self._hooks.callback(handle.remove)

    def stop(self) -> None:
        """Leave nothing on the modules."""
        self._hooks.close()

    def found(self) -> list[str]:
        """Names of the modules, in the order of their calls."""
        outer = dict(self._outer)
        within = [name for name in self._within_root if name not in self._layers]
        if "" in outer and len(within) == len(self._within_root) == 1:
            outer = {within[0] if name == "" else name: None for name in outer}
        return [name for name in outer if name not in self._layers and not (self._redirected and name == "")]

    def _candidates(self) -> list[str]:
        """The layers and all modules around them, but nothing within a wrapper, which compiles it or splits batches."""
        found: dict[str, None] = {"": None}
        for layer in self._layers:
            parts = layer.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                found[name] = None
                module = self._root.get_submodule(name)
                if unwrapped(module)[0] is not module:
                    break
        return list(found)

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not module.training:
            return
        if module is self._root and not inspect.ismethod(module.forward):
            self._redirected = True  # DistributedDataParallel calls training_step by way of forward
            return
        if not self._running:
            self._outer[name] = None
        elif self._running == [""]:
            self._within_root[name] = None
        self._running.append(name)

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._running and self._running[-1] == name:
            self._running.pop()


def _part(log: Any, name: str) -> Any:
    """Where a network logs, if there are several."""
    if not name or not isinstance(log, str | PathLike):
        return log
    path = Path(log)
    return path.with_name(f"{path.stem}-{name}.jsonl") if path.suffix == ".jsonl" else path / name


def _log(trainer: Trainer, name: str, event: dict[str, Any]) -> None:
    found = scalars(event)
    if name:
        found = {key.replace("bnprobe/", f"bnprobe/{name}/", 1): value for key, value in found.items()}
    for logger in trainer.loggers if found else ():
        logger.log_metrics(found, step=event["step"])


def _warn(why: str) -> None:
    warn_user(f"bnprobe does not watch this training: {why}.")
