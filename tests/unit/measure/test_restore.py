"""The model and the process come back bit-identical, whatever happened in between."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnprobe.commands.scan import scan
from bnprobe.errors import BnprobeError, DataError, ModelError, UserCodeError
from bnprobe.measure.restore import untouched
from support.fingerprint import fingerprint
from support.networks import Residual, images, unsettled

DATA = images(6, 2, 3, 5, 5)


def tricky() -> nn.Module:
    """Signs of zero, NaN payloads, gradients, mixed flags, a hook, and attributes of every kind."""
    model = unsettled(Residual())
    model.bn1.running_mean[0] = -0.0
    model.bn2.momentum = 0.07
    model.register_buffer("spare", torch.tensor([float("nan"), -0.0, float("inf")]))
    model.plain = torch.tensor([1.0, -0.0])
    model.notes, model.table, model.names = ["a"], {"b": 1}, {"c"}
    model.stem.weight.requires_grad_(False)
    model.head.weight.grad = torch.full_like(model.head.weight, -0.0)
    model.conv.register_forward_hook(lambda module, inputs, output: None)
    model.eval()
    model.bn2.train()
    return model


@pytest.fixture(autouse=True)
def _random_state() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def assert_untouched(model: nn.Module, run: Callable[[], Any], error: type[BaseException] | None = None) -> Any:
    before = fingerprint(model)
    if error is None:
        result = run()
    else:
        with pytest.raises(error) as caught:
            run()
        result = caught.value
    after = fingerprint(model)
    assert after.keys() == before.keys()
    for name in before:
        assert after[name] == before[name], name
    return result


def test_the_fingerprint_sees_what_it_should() -> None:
    """Else the tests below could not fail."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda model: model.bn1.running_mean.abs_(),
        lambda model: model.head.weight.data.add_(1e-7),
        lambda model: setattr(model.head.weight, "grad", None),
        lambda model: model.head.weight.grad.abs_(),
        lambda model: model.stem.weight.requires_grad_(True),
        lambda model: model.train(),
        lambda model: setattr(model.bn2, "momentum", None),
        lambda model: model.bn2.num_batches_tracked.add_(1),
        lambda model: model.conv._forward_hooks.clear(),
        lambda model: setattr(model, "more", 1),
        lambda model: model.notes.append("x"),
        lambda model: model.table.update(b=2),
        lambda model: model.plain.abs_(),
        lambda model: random.random(),
        lambda model: np.random.rand(),
        lambda model: torch.rand(1),
    ]
    for change in changes:
        model = tricky()
        before = fingerprint(model)
        change(model)
        assert fingerprint(model) != before


@pytest.mark.parametrize(
    "options", [{}, {"emulate": False}, {"autocast": "bfloat16"}, {"batch_sizes": (1, 4)}], ids=str
)
def test_after_a_scan(options: dict[str, Any]) -> None:
    model = tricky()
    report = assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6, **options))
    assert report.scan.batches == 6


def test_grad_mode_off_beforehand() -> None:
    model = tricky()
    with torch.no_grad():
        assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))


@pytest.mark.parametrize("error", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_user_code_that_switches_grad_mode(before: bool, error: bool) -> None:
    def switch() -> None:
        with untouched(nn.BatchNorm1d(2)):
            torch.set_grad_enabled(not before)
            if error:
                raise ZeroDivisionError

    with torch.set_grad_enabled(before):
        with pytest.raises(ZeroDivisionError) if error else nullcontext():
            switch()
        assert torch.is_grad_enabled() is before


def test_with_loss_and_metric_and_forward() -> None:
    model = tricky()
    functions = {
        "forward": lambda model, batch: model(batch),
        "loss": lambda model, batch: model(batch).square().mean(),
        "metric": lambda model, batch: model(batch).mean(),
    }
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6, **functions))


def loader(after: int, error: BaseException | None = None) -> Iterator[Tensor]:
    yield from DATA[:after]
    if error:
        raise error
    yield torch.full((2, 3, 5, 5), float("nan"))


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("emulate", [True, False])
def test_an_exception_in_the_loader(after: int, emulate: bool) -> None:
    model = tricky()
    data = loader(after, ZeroDivisionError("oops"))
    run = partial(scan, model, data, 2, num_batches=6, emulate=emulate)
    error = assert_untouched(model, run, UserCodeError)
    assert "oops" in str(error)
    assert isinstance(error.error, ZeroDivisionError)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_bad_batch(after: int) -> None:
    model = tricky()
    error = assert_untouched(model, lambda: scan(model, loader(after), 2, num_batches=6, emulate=False), DataError)
    assert f"Micro-batch {after + 1} " in str(error)


class Failing(Residual):
    """Raises halfway through its n-th forward pass, and an Exception through all later ones too.

    Counts in its class: attributes come back after every pass.
    """

    passes = 0

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        Failing.passes, self.at, self.error = 0, at, error

    def forward(self, x: Tensor) -> Tensor:
        Failing.passes += 1
        x = self.bn1(self.stem(x)).relu()
        if Failing.passes == self.at or (Failing.passes > self.at and isinstance(self.error, Exception)):
            raise self.error
        return self.head(self.bn2(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("at", [3, 4, 8, 11])  # two passes look for layers and moving state
@pytest.mark.parametrize("emulate", [True, False])
def test_an_exception_in_forward(at: int, emulate: bool) -> None:
    model = unsettled(Failing(at, RuntimeError("my layer")))
    run = partial(scan, model, DATA, 2, num_batches=6, emulate=emulate, physical_batch=4)
    error = assert_untouched(model, run, UserCodeError)
    assert "my layer" in str(error)
    assert "test_restore.py" in error.frames


def test_ctrl_c_in_the_loader_gives_what_was_measured() -> None:
    model = tricky()
    data = loader(4, KeyboardInterrupt())
    report = assert_untouched(model, lambda: scan(model, data, 2, num_batches=6, emulate=False))
    assert (report.scan.stopped, report.scan.partial, report.scan.batches) == ("interrupted", True, 4)
    expected = scan(model, DATA[:4], 2, num_batches=4, emulate=False)
    assert report.layers == tuple(replace(layer, impact=None) for layer in expected.layers)
    assert report.summary == expected.summary


def test_ctrl_c_in_forward_counts_whole_micro_batches_only() -> None:
    model = unsettled(Failing(10, KeyboardInterrupt()))  # the fourth micro-batch's eval path
    report = assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6, emulate=False))
    assert (report.scan.stopped, report.scan.partial, report.scan.batches) == ("interrupted", True, 3)
    expected = scan(unsettled(_same_weights(model)), DATA[:3], 2, num_batches=3, emulate=False)
    assert report.layers == tuple(replace(layer, impact=None) for layer in expected.layers)
    assert report.summary == expected.summary


def _same_weights(model: nn.Module) -> nn.Module:
    twin = Failing(-1, KeyboardInterrupt())
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("emulate", [True, False])
def test_ctrl_c_before_anything_was_measured_passes_on(emulate: bool) -> None:
    model = tricky()
    data = loader(0, KeyboardInterrupt())
    assert_untouched(model, lambda: scan(model, data, 2, emulate=emulate), KeyboardInterrupt)
    failing = unsettled(Failing(2, KeyboardInterrupt()))
    assert_untouched(failing, lambda: scan(failing, DATA, 2, emulate=emulate), KeyboardInterrupt)


def test_refused_before_it_starts() -> None:
    model = tricky()
    assert_untouched(model, lambda: scan(model, DATA, 2, device="nowhere"), BnprobeError)


class Restless(Residual):
    """Changes itself in every way in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("signed", torch.tensor([-0.0, 0.0]))
        self.head.weight.grad = torch.ones_like(self.head.weight)
        self.head.bias.grad = torch.ones_like(self.head.bias)
        self.plain = torch.zeros(3)
        self.log: list[float] = []
        self.table: dict[str, int] = {}
        self.seen: set[int] = set()
        self.nested: dict[str, list[int]] = {"a": []}
        self.bank = ([torch.zeros(2)], deque([1], maxlen=3))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.replaced = self.replaced + 1
        self.signed.abs_()
        self.head.weight.grad = None
        self.head.bias.grad.zero_()
        self.plain.add_(1)
        self.log.append(float(self.steps))
        self.table["steps"] = len(self.log)
        self.seen.add(len(self.log))
        self.nested["a"].append(1)
        self.bank[0][0].add_(1)
        self.bank[1].append(2)
        self.brand_new = x
        self.head.weight.data.mul_(1.0001)
        self.head.bias.data = self.head.bias.data + 0.001
        self.bn1.momentum = 0.5
        self.bn1.running_var.mul_(1.01)
        self.conv.weight.requires_grad_(False)
        self.conv.added = nn.Identity()
        self.stem.register_forward_hook(lambda module, inputs, output: None)
        self.stem.weight = nn.Parameter(self.stem.weight.detach().clone())
        return super().forward(x)


def test_a_model_that_changes_itself() -> None:
    model = unsettled(Restless())
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))


@pytest.mark.parametrize("new", [True, False], ids=["parametrization", "hook"])
def test_spectral_norm(new: bool) -> None:
    model = unsettled(Residual())
    wrap = torch.nn.utils.parametrizations.spectral_norm if new else torch.nn.utils.spectral_norm
    wrap(model.conv)
    model(DATA[0])
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))


def test_lazy_layers_stay_lazy() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyConv2d(2, 1), nn.LazyBatchNorm2d())
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))
    assert type(model[2]) is nn.LazyBatchNorm2d


def test_tied_and_shared_parameters_stay_tied() -> None:
    model = unsettled(Residual())
    model.second = model.head
    model.bn2.weight = model.bn1.weight
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))
    assert model.bn2.weight is model.bn1.weight


def test_cumulative_statistics_and_their_counter() -> None:
    model = unsettled(Residual(momentum=None))
    model.train()
    model(DATA[0])
    assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))
    assert int(model.bn1.num_batches_tracked) == 1


def held(kind: str) -> nn.Module:
    """A network with a tensor of an odd kind."""
    model = unsettled(Residual())
    odd = {
        "COO": lambda: torch.eye(3).to_sparse(),
        "CSR": lambda: torch.eye(3).to_sparse_csr(),
        "expanded": lambda: torch.arange(4.0).expand(2, 4),
        "unfolded": lambda: torch.arange(6.0).unfold(0, 3, 1),
        "transposed": lambda: torch.arange(6.0).view(2, 3).T,
        "empty from numpy": lambda: torch.from_numpy(np.array([], dtype=np.float32)),
        "complex": lambda: torch.ones(3, dtype=torch.complex64),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    }
    model.register_buffer("odd", odd[kind]())
    return model


def flat(tensor: Tensor) -> list[Tensor]:
    if tensor.is_nested:
        return [tensor.values().clone()]
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return [(tensor.int_repr() if tensor.is_quantized else tensor).clone()]


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("COO", lambda model: model.odd._values().add_(1)),
        ("COO", lambda model: setattr(model, "odd", model.odd * 2)),
        ("CSR", lambda model: model.odd.values().add_(1)),
        ("expanded", lambda model: model.odd[:1].add_(1)),
        ("expanded", lambda model: None),
        ("unfolded", lambda model: model.odd[0].add_(1)),
        ("transposed", lambda model: model.odd.add_(1)),
        ("transposed", lambda model: model.odd.resize_(7)),
        ("empty from numpy", lambda model: None),
        ("empty from numpy", lambda model: model.odd.resize_(3).fill_(1)),
        ("complex", lambda model: model.odd.add_(1j)),
        ("quantized", lambda model: model.odd.copy_(torch.zeros(3))),
        ("nested", lambda model: model.odd.values().add_(1)),
    ],
)
def test_tensors_of_odd_kinds(kind: str, write: Callable[[nn.Module], Any]) -> None:
    model = held(kind)
    tensor, before, shape = model.odd, flat(model.odd), model.odd.shape

    def hook(module: nn.Module, inputs: Any) -> None:
        write(model)

    model.bn1.register_forward_pre_hook(hook)
    assert scan(model, DATA, 2, num_batches=6).scan.batches == 6
    assert model.odd is tensor
    assert kind == "nested" or tensor.shape == shape
    assert all(map(torch.equal, flat(tensor), before))


def test_a_tensor_that_cannot_be_saved_is_refused_before_anything_runs() -> None:
    model = unsettled(Residual())
    model.register_buffer("nowhere", torch.zeros(3, device="meta"))
    error = assert_raises_unrun(model)
    assert "nowhere is on the meta device, where tensors have no values" in str(error)


def assert_raises_unrun(model: nn.Module) -> ModelError:
    calls: list[Any] = []
    model.bn1.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    with pytest.raises(ModelError) as caught:
        scan(model, DATA, 2, num_batches=6)
    assert calls == []
    return caught.value


class Hidden(nn.Module):
    """Layers that train(), eval() and state_dict() do not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.blocks = [nn.BatchNorm2d(3), {"a": nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))}]

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1]["a"](self.blocks[0](self.bn(x)))


def test_layers_in_plain_containers_are_measured_and_put_back() -> None:
    model = Hidden()
    norms = [model.blocks[0], model.blocks[1]["a"][1]]
    before = [tensor.clone() for norm in norms for tensor in norm.buffers()]
    report = assert_untouched(model, lambda: scan(model, DATA, 2, num_batches=6))
    assert [layer.name for layer in report.layers] == ["bn", "blocks[0]", "blocks[1]['a'].1"]
    assert all(layer.train is not None for layer in report.layers)
    assert report.layers[1].note.startswith("uses batch statistics in eval mode too")
    assert any("holds blocks[0], blocks[1]['a'].1: train(), eval()" in note for note in report.scan.notes)
    assert all(map(torch.equal, before, [tensor for norm in norms for tensor in norm.buffers()]))


def test_quantization_observers() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = quantization.prepare_qat(model)
        before = copy.deepcopy(model.state_dict())
        assert scan(model, DATA, 2, num_batches=6).scan.batches == 6
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


class Noisy(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.generators = [torch.Generator().manual_seed(0), random.Random(0), np.random.default_rng(0)]

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generators[0])
        return super().forward(x + noise * self.generators[1].random() * self.generators[2].random())


def test_generators_of_the_model() -> None:
    model = unsettled(Noisy())
    scan(model, DATA, 2, num_batches=6)
    fresh = Noisy()
    assert torch.equal(model.generators[0].get_state(), fresh.generators[0].get_state())
    assert model.generators[1].getstate() == fresh.generators[1].getstate()
    assert model.generators[2].bit_generator.state == fresh.generators[2].bit_generator.state


@pytest.mark.parametrize("size", [None, 4])
def test_generators_of_the_loader(size: int | None) -> None:
    generator = torch.Generator().manual_seed(5)
    data = DataLoader(TensorDataset(torch.cat(DATA)), 2, shuffle=True, generator=generator)
    before = generator.get_state()
    scan(unsettled(Residual()), data, size, num_batches=2)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("buffers", [1, 3])
def test_a_loader_that_fills_the_same_memory_again(buffers: int) -> None:
    ring = [torch.empty(2, 3, 5, 5) for _ in range(buffers)]

    def refilled() -> Iterator[Tensor]:
        for position, batch in enumerate(DATA):
            yield ring[position % buffers].copy_(batch)

    model = unsettled(Residual())
    expected, found = scan(model, DATA, 2, num_batches=6), scan(model, refilled(), 2, num_batches=6)
    assert found.layers == expected.layers
