"""A Trainer of Lightning with a monitor trains as one without, and the monitor sees the networks that it calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bnprobe.errors import NothingToProbeError, UsageError
from support.frameworks import framework
from unit.monitor.loops import (
    CLASSES,
    FEATURES,
    Blobs,
    Net,
    assert_nothing_is_left,
    assert_same,
    loss_of,
    only_warnings_of_bnprobe,
)

pl = framework("lightning.pytorch")
LightningMonitor = framework("bnprobe.monitor.lightning").LightningMonitor


class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A network as an attribute; validation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self, batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", loss_of(self, batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.5)


class Direct(Lit):
    """The network is called without the module around it."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return loss_of(self.net, batch)


class Flat(Lit):
    """The layers are the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU())
        self.norm = nn.BatchNorm1d(8)
        self.more = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.norm(self.net(x)))


class Gan(Lit):
    """Two networks, two optimizers, stepped by hand; the module itself is the generator, as in Lightning's example."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net, self.judge = Net(FEATURES), Net(1)

    def training_step(self, batch: Any, index: int) -> None:
        of_maker, of_judge = self.optimizers()
        made = self(torch.randn(len(batch[0]), FEATURES))
        of_maker.zero_grad()
        self.manual_backward(F.softplus(-self.judge(made)).mean())
        of_maker.step()
        of_judge.zero_grad()
        true, false = self.judge(batch[0]), self.judge(made.detach())
        self.manual_backward(F.softplus(-true).mean() + F.softplus(false).mean())
        of_judge.step()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self(batch[0]).mean())

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(each.parameters(), 1e-3) for each in (self.net, self.judge)]


def _fit(
    module: Any,
    *callbacks: Any,
    epochs: int = 3,
    checkpoint: Path | None = None,
    in_order: bool = False,
    **settings: Any,
) -> Any:
    """Train for epochs of eight batches; the Trainer."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **settings},
    )
    train = DataLoader(Blobs(256, in_order), 32, shuffle=not in_order, drop_last=True)
    with only_warnings_of_bnprobe(findings=in_order):
        trainer.fit(module, train, DataLoader(Blobs(64), 32), ckpt_path=checkpoint, weights_only=False)
    return trainer


def _module(kind: Callable[[], Any]) -> Any:
    torch.manual_seed(3)
    return kind()


SETTINGS: list[dict[str, Any]] = [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}]


@pytest.mark.parametrize(
    ("kind", "settings", "watched"),
    [
        *((Lit, settings, ["net"]) for settings in SETTINGS),
        (Direct, {"gradient_clip_val": 0.5}, ["net"]),
        (Flat, {}, [""]),
        (Gan, {}, ["net", "judge"]),
    ],
)
def test_a_run_that_is_watched_is_bit_identical(
    kind: Callable[[], Any], settings: dict[str, Any], watched: list[str]
) -> None:
    alone, seen = _module(kind), _module(kind)
    _fit(alone, **settings)
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    seen = kind()
    callback = LightningMonitor(every=4)
    _fit(seen, callback, **settings)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert_same(alone.state_dict(), seen.state_dict())
    assert list(callback.monitors) == watched
    steps = 9 if "accumulate_grad_batches" in settings else 24
    for monitor in callback.monitors.values():
        assert monitor.step == steps
        assert monitor.sample is not None
        assert monitor.sample.step == 4 * ((steps - 1) // 4)
        assert monitor.sample.samples == 32
        assert monitor.sample.layers
        assert kind is Gan or monitor.sample.loss is not None
    assert_nothing_is_left(seen)


def test_networks_can_be_named_and_log_apart(tmp_path: Path) -> None:
    gan = _module(Gan)
    callback = LightningMonitor(every=4, modules=["judge"], log=tmp_path / "one")
    _fit(gan, callback)
    assert list(callback.monitors) == ["judge"]
    assert (tmp_path / "one" / "monitor.jsonl").is_file()
    logs = [tmp_path / "two", tmp_path / "log.jsonl"]
    _fit(gan, LightningMonitor(every=4, log=logs, on_finding=lambda *_: None))
    for path in ("two/net/monitor.jsonl", "two/judge/monitor.jsonl", "log-net.jsonl", "log-judge.jsonl"):
        events = [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "sample"][:2] == [4, 8]


def test_a_network_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"Gan has no module 'critic'\. With norm layers it has net and judge;"):
        _fit(_module(Gan), LightningMonitor(every=4, modules=["critic"]))


def test_figures_and_findings_are_in_the_logger(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    callback = LightningMonitor(every=4, on_finding=lambda *_: None)
    _fit(_module(Lit), callback, epochs=20, in_order=True, logger=logger)
    header = Path(logger.experiment.metrics_file_path).read_text().partition("\n")[0].split(",")
    rules = {finding.rule for finding in callback.monitors["net"].findings}
    assert "BN202" in rules
    expected = {f"bnprobe/finding/{rule}" for rule in rules} | {"bnprobe/n_eq/body.1", "bnprobe/loss/eval"}
    assert expected <= set(header)


def test_a_checkpoint_has_the_state_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    def findings(resumed: bool) -> list[Any]:
        module = _module(Certain)
        callback = LightningMonitor(every=4, on_finding=lambda *_: None)
        if not resumed:
            _fit(module, callback, epochs=20, in_order=True)
            return list(callback.monitors["net"].findings)
        trainer = _fit(module, callback, epochs=4, in_order=True)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        callback = LightningMonitor(every=4, on_finding=lambda *_: None)
        _fit(_module(Certain), callback, epochs=20, in_order=True, checkpoint=tmp_path / "last.ckpt")
        return list(callback.monitors["net"].findings)

    assert findings(resumed=True) == findings(resumed=False) != []


def test_another_training_begins_anew_and_one_that_goes_on_does_not() -> None:
    callback = LightningMonitor(every=4)
    _fit(_module(Lit), callback, epochs=1)
    assert callback.monitors["net"].step == 8
    _fit(_module(Flat), callback, epochs=1)
    assert {name: monitor.step for name, monitor in callback.monitors.items()} == {"": 8}
    module = _module(Lit)
    trainer = _fit(module, callback, epochs=1)
    trainer.fit_loop.max_epochs = 2
    with only_warnings_of_bnprobe():
        trainer.fit(module, DataLoader(Blobs(256), 32))
    assert callback.monitors["net"].step == 16
    assert_nothing_is_left(module)


class Certain(Lit):
    """Without random layers: Lightning does not restore the state of the generators."""

    def __init__(self) -> None:
        super().__init__()
        self.net.body[3] = nn.Identity()


@pytest.mark.parametrize("action", ["freeze", "renorm"])
def test_layers_that_were_changed_are_changed_again_in_a_resumed_run(tmp_path: Path, action: str) -> None:
    module, callback = _module(Certain), LightningMonitor(every=4, on_finding=action)
    trainer = _fit(module, callback, epochs=9, in_order=True)
    changed = [type(layer) for layer in module.net.modules()]
    assert callback.monitors["net"].changes
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _module(Certain).load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])
    again, resumed = _module(Certain), LightningMonitor(every=4, on_finding=action)
    _fit(again, resumed, epochs=10, in_order=True, checkpoint=tmp_path / "last.ckpt")
    assert [type(layer) for layer in again.net.modules()] == changed
    assert {each.action for each in resumed.monitors["net"].changes} == {action}


class Fails(Lit):
    """Raises between the forward pass and backward, in a step that is looked at."""

    calls = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.calls += 1
        if self.calls == 5:
            raise RuntimeError("out of luck")
        return loss


class FailsAtOnce(Fails):
    calls = 4


@pytest.mark.parametrize("kind", [Fails, FailsAtOnce])
def test_nothing_is_left_after_an_exception(kind: Callable[[], Any]) -> None:
    module = _module(kind)
    with pytest.raises(RuntimeError, match="out of luck"):
        _fit(module, LightningMonitor(every=4))
    assert_nothing_is_left(module)


def test_what_cannot_be_watched_is_said() -> None:
    class Scattered(Lit):
        def training_step(self, batch: Any, index: int) -> Tensor:
            x = self.net.body[1](self.net.body[0](batch[0]))
            return F.cross_entropy(self.net.head(self.net.neck[1](self.net.neck[0](x))), batch[1])

    class Plain(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(FEATURES, CLASSES)

    with pytest.raises(
        UserWarning, match="watch this training: no network with norm layers is called by training_step"
    ):
        _fit(_module(Scattered), LightningMonitor())
    with pytest.raises(UserWarning, match=r"its training_step is compiled as a whole\. Compile the network in it"):
        _fit(torch.compile(_module(Lit), backend="eager"), LightningMonitor())
    with pytest.raises(NothingToProbeError):
        _fit(_module(Plain), LightningMonitor())


def test_a_network_that_is_compiled_is_watched() -> None:
    module = _module(Lit)
    module.net = torch.compile(module.net, backend="eager")
    callback = LightningMonitor(every=4)
    _fit(module, callback)
    assert list(callback.monitors) == ["net"]
    sample = callback.monitors["net"].sample
    assert sample is not None
    assert set(sample.layers) == {"body.1", "neck.1"}


def test_distributed_training_is_watched_where_a_network_is_called() -> None:
    for kind, watched in ((Lit, ["net"]), (Direct, ["net"])):
        callback = LightningMonitor(every=4)
        alone, seen = _module(kind), _module(kind)
        _fit(alone, strategy="ddp")
        torch.manual_seed(3)
        seen = kind()
        _fit(seen, callback, strategy="ddp")
        assert_same(alone.state_dict(), seen.state_dict())
        assert list(callback.monitors) == watched
        assert callback.monitors["net"].sample is not None
        assert_nothing_is_left(seen)
    with pytest.raises(UserWarning, match="Under DistributedDataParallel it must be a module in the LightningModule"):
        _fit(_module(Flat), LightningMonitor(every=4), strategy="ddp")


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_framework_is_imported_when_its_monitor_is() -> None:
    code = """
import sys
import bnprobe
from bnprobe.errors import UsageError
import bnprobe.monitor
bnprobe.Monitor
print({"lightning", "transformers", "ignite"} & set(sys.modules), dir(bnprobe.monitor))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set() ['HuggingFaceMonitor', 'IgniteMonitor', 'LightningMonitor']\n"


def test_the_base_is_that_of_the_lightning_in_use() -> None:
    code = """
from support.frameworks import framework
pytorch_lightning = framework("pytorch_lightning")
from bnprobe.monitor import LightningMonitor
print(issubclass(LightningMonitor, pytorch_lightning.Callback))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout == "True\n", found.stderr


def test_a_checkpoint_of_a_run_that_nobody_watched(tmp_path: Path) -> None:
    trainer = _fit(_module(Lit), epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = LightningMonitor(every=4)
    _fit(_module(Lit), callback, epochs=2, checkpoint=tmp_path / "last.ckpt")
    assert callback.monitors["net"].step == 16


SEVERAL = """
import sys, torch
from support.frameworks import framework
framework("lightning.pytorch")
from bnprobe.monitor import LightningMonitor
from unit.monitor.loops import assert_same
from unit.monitor.test_lightning import Lit, _fit, _module
alone, seen = _module(Lit), _module(Lit)
for module, callbacks in ((alone, []), (seen, [LightningMonitor(every=2, log=sys.argv[1])])):
    torch.manual_seed(3)
    _fit(module, *callbacks, strategy="ddp_fork", devices=2)
assert_same(alone.state_dict(), seen.state_dict())
assert not torch.equal(alone.net.head.weight, _module(Lit).net.head.weight)
"""


def test_in_several_processes_the_first_one_watches(tmp_path: Path) -> None:
    """From a process of its own, which has no threads yet: those of OpenMP do not come along into a fork."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SEVERAL, str(tmp_path)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    events = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 1),
        *(("sample", step) for step in (2, 4, 6, 8, 10)),
    ]
