"""A monitor sees what there is, and changes nothing; see tests/unit/stats/test_sequential.py for its tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

import bnprobe
from bnprobe.errors import NothingToProbeError, OutputError, StateError, UsageError
from bnprobe.records import MonitorFinding

CLASSES, FEATURES = 4, 12
CENTRES = 3 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two BN layers and a dropout."""

    def __init__(self, momentum: float | None = 0.1, checkpointed: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(FEATURES, 24), nn.BatchNorm1d(24, momentum=momentum), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16, momentum=momentum), nn.ReLU())
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(16, CLASSES)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)
        return self.head(self.drop(x))


def _net(**settings: Any) -> Net:
    torch.manual_seed(3)
    return Net(**settings)


def _batch(step: int, size: int = 32, sort: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (1 if sort else size,), generator=generator).expand(size)
    return CENTRES[labels] + torch.randn(size, FEATURES, generator=generator), labels.clone()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, **kind: Any) -> None:
    x, y = _batch(step, **kind)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _train(model: nn.Module, steps: range, **kind: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
    for step in steps:
        _step(model, optimizer, step, **kind)


# --- What a loop may do; each trains a model that it makes, and gives what it trained ---------------------------------


def _plain(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net()
    with watch(model):
        _train(model, range(25))
    return [model]


def _in_autocast(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model):
        for step in range(12):
            x, y = _batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [model]


def _accumulating(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    total = torch.zeros(())
    with watch(model):
        for step in range(12):
            for part in range(3):
                x, y = _batch(3 * step + part)
                loss = F.cross_entropy(model(x), y) / 3
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
    model.register_buffer("total", total)
    return [model]


def _checkpointed(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net(checkpointed=True)
    with watch(model):
        _train(model, range(12))
    return [model]


def _partly_frozen(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net(momentum=None)
    model.first.eval().requires_grad_(False)
    with watch(model):
        _train(model, range(12))
    return [model]


def _evaluated_between(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with watch(model):
        for step in range(12):
            model.eval()
            with torch.no_grad():
                model(_batch(100)[0])
            model.train()
            _step(model, optimizer, step)
    return [model]


def _clipped_by_a_closure(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    model = _net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    with watch(model):
        for step in range(6):
            x, y = _batch(step)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                return loss

            optimizer.step(closure)
    return [model]


def _compiled(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    torch.compiler.reset()
    model = torch.compile(_net(), backend="aot_eager")
    assert isinstance(model, nn.Module)
    with watch(model):
        _train(model, range(8))
    return [model._orig_mod]


def _in_data_parallel(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    with TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            model = nn.parallel.DistributedDataParallel(_net())
            with watch(model):
                _train(model, range(8))
        finally:
            torch.distributed.destroy_process_group()
    return [model.module]


def _two_models(watch: Callable[[nn.Module], Any]) -> list[nn.Module]:
    """As a GAN: the second is called on what the first makes, within one step of each."""
    maker, judge = _net(), _net()
    of_maker, of_judge = (torch.optim.Adam(each.parameters(), 0.001) for each in (maker, judge))
    with watch(maker), watch(judge):
        for step in range(12):
            made = maker(_batch(step)[0])
            padded = F.pad(made, (0, FEATURES - CLASSES))
            of_judge.zero_grad()
            (judge(_batch(step)[0]).mean() - judge(padded.detach()).mean()).backward()
            of_judge.step()
            of_maker.zero_grad()
            judge(padded).mean().backward()
            of_maker.step()
    return [maker, judge]


LOOPS = [
    _plain,
    _in_autocast,
    _accumulating,
    _checkpointed,
    _partly_frozen,
    _evaluated_between,
    _clipped_by_a_closure,
    _compiled,
    _in_data_parallel,
    _two_models,
]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_is_watched_is_bit_identical(loop: Callable[..., list[nn.Module]]) -> None:
    for each in assert_bit_identical(loop):
        assert sum(event["event"] == "sample" for event in each) >= 1


def assert_bit_identical(loop: Callable[..., list[nn.Module]]) -> list[list[dict[str, Any]]]:
    """A loop trains alone what it trains when it is watched; the events of its monitors."""
    events: list[list[dict[str, Any]]] = []

    def watch(model: nn.Module) -> bnprobe.Monitor:
        events.append([])
        return bnprobe.Monitor(model, every=3, log=events[-1].append)

    class Nothing:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    torch.manual_seed(0)
    alone = loop(lambda model: Nothing())
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The .grad attribute")  # of torch.compile, of a compiled loss
        watched = loop(watch)
    assert torch.equal(torch.get_rng_state(), drawn)
    for one, other in zip(alone, watched, strict=True):
        assert [key for key, _ in one.named_modules()] == [key for key, _ in other.named_modules()]
        for (key, mine), (_, its) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(mine, its), key
        for mine, its in zip(one.parameters(), other.parameters(), strict=True):
            assert (mine.grad is None) == (its.grad is None)
            assert mine.grad is None or (its.grad is not None and torch.equal(mine.grad, its.grad))
        assert [module.training for module in one.modules()] == [module.training for module in other.modules()]
        for mine, its in zip(one.modules(), other.modules(), strict=True):
            assert len(mine._forward_hooks) == len(its._forward_hooks)
            assert len(mine._forward_pre_hooks) == len(its._forward_pre_hooks)
    assert not torch.overrides._get_current_function_mode_stack()
    assert not _global_optimizer_post_hooks
    assert not _global_optimizer_pre_hooks
    return events


def test_a_sample_is_what_a_reference_in_float64_says() -> None:
    model = _net()
    model.drop.p = 0.0
    found: list[dict[str, Any]] = []
    with bnprobe.Monitor(model, every=5, log=found.append):
        _train(model, range(5))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        x, y = _batch(5)
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) * 2 + 1).backward()
        optimizer.step()
    sample = found[-1]
    assert (sample["step"], sample["samples"]) == (5, 32)
    reference = _net().double()
    reference.load_state_dict(before)
    reference.drop.p = 0.0
    inputs: dict[str, Tensor] = {}
    for name in ("first.1", "second.1"):
        module = reference.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, name=name: inputs.__setitem__(name, given[0].detach()))
    losses, outputs = {}, {}
    for mode in ("eval", "train"):  # in this order: the statistics move in training
        reference.train(mode == "train")
        with torch.no_grad():
            outputs[mode] = reference(x.double())
        losses[mode] = float(F.cross_entropy(outputs[mode], y) * 2 + 1)
        if mode == "train":
            seen = dict(inputs)
    assert sample["loss"] == pytest.approx(losses, rel=1e-5)
    distance = float((outputs["train"] - outputs["eval"]).norm() / outputs["eval"].norm())
    assert sample["output"] == pytest.approx(distance, rel=1e-4)
    for name, layer in sample["layers"].items():
        mean, variance = (before[f"{name}.running_{what}"].double() for what in ("mean", "var"))
        trained = (seen[name] - seen[name].mean(0)) / (seen[name].var(0, correction=0) + 1e-5).sqrt()
        tested = (seen[name] - mean) / (variance + 1e-5).sqrt()
        r = ((seen[name].var(0, correction=0) + 1e-5) / (variance + 1e-5)).sqrt()
        d = (seen[name].mean(0) - mean) / (variance + 1e-5).sqrt()
        assert layer["mismatch"] == pytest.approx(float((trained - tested).square().mean()), rel=1e-4)
        assert layer["r"] == pytest.approx(float(r.mean()), rel=1e-4)
        assert layer["d"] == pytest.approx(float(d.square().mean().sqrt()), rel=1e-4)


def test_nothing_is_left_between_samples_nor_afterwards() -> None:
    model = _net()
    attributes = {key: repr(value) for key, value in vars(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    with bnprobe.Monitor(model, every=20) as monitor:
        for step in range(50):
            due, input_due = step > 0 and step % 20 == 0, step % 2 == 0
            assert len(model._forward_pre_hooks) == input_due
            assert len(model._forward_hooks) == len(model.first[1]._forward_hooks) == due
            _step(model, optimizer, step)
            assert not torch.overrides._get_current_function_mode_stack()
    assert monitor.step == 50
    assert {key: repr(value) for key, value in vars(model).items()} == attributes
    assert not model.first[1]._forward_hooks
    _step(model, optimizer, 50)
    assert monitor.step == 50


@pytest.mark.parametrize(("kind", "rule"), [({"size": 2}, "BN201"), ({"sort": True}, "BN202")], ids=["small", "sorted"])
def test_a_fault_is_found_and_named_once(kind: dict[str, Any], rule: str) -> None:
    model = _net()
    said: list[MonitorFinding] = []
    with bnprobe.Monitor(model, every=5, on_finding=lambda monitor, finding: said.append(finding)) as monitor:
        _train(model, range(150))
        assert monitor.findings == []
        _train(model, range(150, 450), **kind)
    assert len({finding.rule for finding in said}) == len(said)
    # The batches of one class are not like those before, either; batches of another size are not compared.
    assert ("inputs" in {finding.rule for finding in said}) == ("sort" in kind)
    said = [finding for finding in said if finding.rule != "inputs"]
    assert rule in {finding.rule for finding in said}
    assert 150 < said[0].alarm <= 250
    assert said[0].step == said[0].alarm + 1 + 15
    assert monitor.report is not None
    assert monitor.report.scan.batches == 16
    scanned = [finding for finding in monitor.findings if finding.rule != "inputs"]
    assert [finding.rule for finding in said] == list(dict.fromkeys(finding.rule for finding in scanned))
    # What goes on as it was is looked at less and less often.
    scans = sorted({finding.step for finding in scanned})
    assert len(scans) <= 6


def _train_on_sizes(model: Net, optimizer: torch.optim.Optimizer, step: int, sizes: Sequence[int]) -> None:
    for late, size in enumerate(sizes):
        _step(model, optimizer, step + late, sort=True, size=size)


@pytest.mark.parametrize("sizes", [(24, 32, 32, 32, 32), (24, 32), (20, 24, 28, 32)], ids=["last", "half", "four"])
def test_batches_of_other_sizes_do_not_keep_an_alarm_from_being_looked_into(sizes: tuple[int, ...]) -> None:
    """The first batch that is kept may be the short last one of an epoch."""
    model, step = _net(), 200
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
    with bnprobe.Monitor(model, every=5, on_finding=lambda *_: None) as monitor:
        _train(model, range(step))
        while not monitor._keeps and step < 400:
            _step(model, optimizer, step, sort=True)
            step += 1
        assert monitor._keeps
        _train_on_sizes(model, optimizer, step, [sizes[late % len(sizes)] for late in range(34)])
        assert not monitor._keeps
    assert "BN202" in {finding.rule for finding in monitor.findings}
    assert monitor.report is not None
    assert monitor.report.scan.batches == (16 if len(sizes) != 4 else 8)


def test_an_alarm_that_cannot_be_looked_into_is_said_and_watching_goes_on() -> None:
    model, step = _net(), 200
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.5)
    with bnprobe.Monitor(model, every=5, on_finding=lambda *_: None) as monitor:
        _train(model, range(step))
        while not monitor._keeps and step < 400:
            _step(model, optimizer, step, sort=True)
            step += 1
        with pytest.warns(UserWarning, match="could not be looked into: batches differ in their number of samples"):
            _train_on_sizes(model, optimizer, step, range(10, 44))
        taken = monitor.sample
        _train(model, range(step, step + 10), sort=True)
    assert monitor.sample is not taken


def _hold_norms(model: Net) -> None:
    model.first[1].eval()
    model.second[1].eval()


@pytest.mark.parametrize("hold", [_hold_norms, lambda model: model.eval()], ids=["norms", "all"])
def test_layers_that_training_holds_in_eval_mode_are_found_once_their_statistics_do_not_fit(
    hold: Callable[[Net], object],
) -> None:
    model, said, events = _net(), [], []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
    responses = lambda monitor, finding: said.append(finding)  # noqa: E731
    with bnprobe.Monitor(model, every=5, log=events.append, on_finding=responses) as monitor:
        for step in range(400):
            if step == 30:
                hold(model)
            _step(model, optimizer, step)
    assert [finding.rule for finding in said] == ["BN105"]
    assert said[0].alarm > 30
    assert "The running statistics are frozen (eval mode during training), but weight and bias are" in said[0].message
    assert monitor.report is not None
    assert all(layer.train is None for layer in monitor.report.layers)
    samples = [event for event in events if event["event"] == "sample"]
    assert {layer["frozen"] for event in samples if event["step"] >= 30 for layer in event["layers"].values()} == {True}
    assert not any(layer["frozen"] for event in samples if event["step"] < 30 for layer in event["layers"].values())
    assert not any(module.training for name, module in model.named_modules() if name in ("first.1", "second.1"))


@pytest.mark.parametrize("size", [1, 2, 32])
def test_layers_in_eval_mode_whose_statistics_fit_are_left_alone_whatever_the_batch_size(size: int) -> None:
    """As in fine-tuning on batches too small for BN: the weights hardly move."""
    model = _net()
    _train(model, range(200))
    _hold_norms(model)
    alarms: list[dict[str, Any]] = []

    def log(event: dict[str, Any]) -> None:
        if event["event"] == "alarm":
            alarms.append(event)

    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    with bnprobe.Monitor(model, every=2, log=log):
        for step in range(200, 600):
            _step(model, optimizer, step, size=size)
    assert alarms == []


def test_a_validation_with_gradients_is_none_of_the_training() -> None:
    """The model in eval mode, on other data, between two steps: what is sampled is the step's own batch."""
    model = _net()
    model.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bnprobe.Monitor(model, every=1) as monitor:
        for step in range(4):
            model.eval()
            model(torch.full((8, FEATURES), 1000.0))
            model.train()
            x, y = _batch(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    assert monitor.sample is not None
    assert monitor.sample.samples == 32
    assert not any(layer.frozen for layer in monitor.sample.layers.values())
    assert monitor.sample.loss is not None
    assert monitor.sample.loss.train == pytest.approx(float(loss.detach()))


def test_a_finding_is_a_warning_unless_told_otherwise() -> None:
    model = _net()
    with warnings.catch_warnings(record=True) as caught, bnprobe.Monitor(model, every=5) as monitor:
        warnings.simplefilter("always")
        _train(model, range(200), size=2)
    said = [str(each.message) for each in caught]
    assert any(
        each.startswith(f"bnprobe, step {monitor.findings[0].step}: BN201 in first.1, second.1: ") for each in said
    )
    assert len(said) == len({finding.rule for finding in monitor.findings})


def test_a_resumed_run_goes_on_as_if_it_had_not_ended() -> None:
    def run(resumed: bool) -> list[MonitorFinding]:
        model = _net()
        monitor = bnprobe.Monitor(model, every=5, on_finding=lambda *_: None)
        with monitor:
            _train(model, range(150))
            _train(model, range(150, 163), size=2)
        if resumed:
            state = json.loads(json.dumps(monitor.state_dict()))
            monitor = bnprobe.Monitor(model, every=5, on_finding=lambda *_: None)
            monitor.load_state_dict(state)
        with monitor:
            _train(model, range(163, 300), size=2)
        return monitor.findings

    assert run(resumed=True) == run(resumed=False) != []


def test_a_state_of_other_layers_is_refused_and_changes_nothing() -> None:
    model = _net()
    with bnprobe.Monitor(model, every=5) as monitor:
        _train(model, range(20))
    names = monitor.state_dict()["screening"]["layers"]
    other = bnprobe.Monitor(model, every=5, exclude=[names[0]])
    with pytest.raises(StateError, match=f"only that one watched {names[0]}"):
        other.load_state_dict(monitor.state_dict())
    assert other.step == 0


def test_a_loss_that_cannot_be_computed_again_is_left_out() -> None:
    """One through a layer that keeps statistics of its own; not one that adds to a tensor of the loop's."""
    model = _net()
    model.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    total = torch.zeros((), requires_grad=False)

    judge = nn.BatchNorm1d(CLASSES)

    def judged(x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        return F.cross_entropy(outputs, y) + judge(outputs).square().mean()

    def adding(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        total.add_(loss.detach())
        return loss

    def weighing(x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        return (F.cross_entropy(outputs, y, reduction="none") * torch.rand(len(y))).mean()

    def indirect(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).cpu().clone() if len(y) else x, y)

    seen = []
    with bnprobe.Monitor(model, every=1) as monitor:
        for step, loss in enumerate((judged, judged, adding, weighing, indirect)):
            optimizer.zero_grad()
            found = loss(*_batch(step))
            found.backward()
            optimizer.step()
            seen.append(None if monitor.sample is None else monitor.sample.loss)
            if seen[-1] is not None:
                assert seen[-1].train == pytest.approx(float(found.detach()))
    assert [each is not None for each in seen] == [False, False, True, True, True]
    assert float(total) > 0


def test_a_forward_without_gradients_is_none_of_the_step() -> None:
    """As for a log or a second view, before the forward that trains; the batches of a scan are not of it, either."""
    model = _net()
    model.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bnprobe.Monitor(model, every=1) as monitor:
        for step in range(3):
            x, y = _batch(step)
            with torch.no_grad():
                model(torch.full_like(x, 1000.0))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    assert monitor.sample is not None
    assert monitor.sample.loss is not None
    assert monitor.sample.loss.train == pytest.approx(float(loss.detach()))


def test_an_error_in_a_sample_ends_the_monitor_and_not_the_training() -> None:
    class Picky(Net):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            if type(self).calls == 4:
                raise RuntimeError("not again")
            return super().forward(x)

    torch.manual_seed(3)
    model = Picky()
    with (
        pytest.warns(UserWarning, match=r"Monitor stopped at step 3, and training goes on: UserCodeError: .*not again"),
        bnprobe.Monitor(model, every=3) as monitor,
    ):
        _train(model, range(10))
    assert monitor.step == 3
    assert not model._forward_pre_hooks


def test_a_model_that_is_compiled_behind_its_back_ends_the_monitor_and_not_the_training() -> None:
    torch.compiler.reset()
    model = _net()
    compiled = torch.compile(model, backend="aot_eager")
    with (
        pytest.warns(
            UserWarning, match="training goes on: UsageError: .* Give the monitor what torch.compile returned"
        ),
        bnprobe.Monitor(model, every=3) as monitor,
    ):
        _train(compiled, range(8))
    assert monitor.sample is None
    assert not model._forward_pre_hooks


def test_monitors_of_several_models_do_not_get_in_each_others_way() -> None:
    """torch iterates over the hooks of all monitors: one that ends a sample, or gives up, must not end the training."""
    maker, judge = _net(), _net()
    of_maker, of_judge = (torch.optim.SGD(each.parameters(), 0.01) for each in (maker, judge))

    def log(event: dict[str, Any]) -> None:
        if event["event"] == "sample" and event["step"] == 4:
            raise OutputError("The disk is full.")

    def train() -> None:
        for step in range(9):
            made, judged = maker(_batch(step)[0]), judge(_batch(step)[0])
            (made.square().mean() + judged.square().mean()).backward()
            of_maker.step()
            of_judge.step()

    with bnprobe.Monitor(maker, every=2, log=log) as first, bnprobe.Monitor(judge, every=2) as second:
        with pytest.warns(UserWarning, match=r"stopped at step 4, and training goes on: OutputError: The disk is full"):
            train()
        assert not maker._forward_pre_hooks
    assert (first.step, second.step) == (4, 9)
    assert second.sample is not None
    assert second.sample.step == 8
    assert not _global_optimizer_post_hooks


def test_a_log_that_raises_ends_the_monitor_and_not_the_training() -> None:
    def full(event: dict[str, Any]) -> None:
        if event["event"] == "sample":
            raise OSError("no space")

    model = _net()
    said = "stopped at step 3, and training goes on: OSError: no space"
    with pytest.warns(UserWarning, match=said), bnprobe.Monitor(model, every=3, log=full) as monitor:
        _train(model, range(8))
    assert monitor.step == 3
    assert not model._forward_pre_hooks


def test_a_log_is_a_file_of_lines_or_whatever_takes_scalars(tmp_path: Path) -> None:
    class Writer:
        def __init__(self) -> None:
            self.rows: list[tuple[str, float, int]] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.rows.append((name, value, step))

    class Run:
        def __init__(self) -> None:
            self.rows: list[tuple[int, dict[str, float]]] = []

        def log(self, values: dict[str, float], step: int) -> None:
            self.rows.append((step, values))

    writer, run = Writer(), Run()
    model = _net()
    with bnprobe.Monitor(model, every=5, log=[tmp_path / "new", writer, run]):
        _train(model, range(12))
    lines = [json.loads(line) for line in (tmp_path / "new" / "monitor.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [("start", 0), ("sample", 5), ("sample", 10)]
    size = lines[1]["layers"]["first.1"]["equivalent_batch_size"]
    assert ("bnprobe/n_eq/first.1", size, 5) in writer.rows
    assert [step for step, _ in run.rows] == [5, 10]
    assert run.rows[0][1]["bnprobe/loss/eval"] == lines[1]["loss"]["eval"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every=0 and batches=16: give at least 1 step and 2 batches"),
        ({"false_alarms": 1.0}, "false_alarms=1.0 is a probability"),
        ({"on_finding": "panic"}, 'on_finding=\'panic\': give one of "warn", "freeze"'),
        ({"on_finding": {"inputs": "freeze"}}, '"inputs" is a finding on the data, and has no layers to change'),
        ({"log": 3}, "log=3 is nothing that a monitor can write to"),
    ],
)
def test_arguments_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bnprobe.Monitor(_net(), **settings)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(NothingToProbeError):
        bnprobe.Monitor(nn.Linear(2, 2))
    with pytest.raises(NothingToProbeError):
        bnprobe.Monitor(_net(), include=["nothing"])
