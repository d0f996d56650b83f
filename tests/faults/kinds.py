"""Kinds of model and of data: each holds state of another kind, and moves it in every forward pass."""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import itertools
import random
import types
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

SHAPE = (2, 3, 5, 5)
COUNT = 6


def images(count: int = COUNT) -> list[Tensor]:
    """Micro-batches that are the same in every call."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(SHAPE, generator=generator) + 1 for _ in range(count)]


class Net(nn.Module):
    """Two norm layers, and whatever ``change`` moves at the start of a pass."""

    def __init__(self, change: Callable[[Any], object] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.stem, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self._change = change
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            for norm in (self.bn1, self.bn2):
                norm.running_var.copy_(0.5 + torch.rand(4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        if self._change is not None:
            with torch.no_grad():
                self._change(self)
        x = self.bn1(self.stem(x)).relu()
        return self.head(self.bn2(self.conv(x)).relu().mean((2, 3)))


@dataclasses.dataclass
class Subject:
    """A model with its data.

    Attributes:
        batches: Makes what is given as the data.
        refused: A part of the sentence with which bnprobe refuses it before anything runs; None: it is measured.
        statistics: Names of the buffers that a recalibration may write.
    """

    model: nn.Module
    batches: Callable[[], Any] = images
    refused: str | None = None
    statistics: tuple[str, ...] = ("running_mean", "running_var", "num_batches_tracked")


KINDS: dict[str, Callable[[], Subject]] = {}


def kind(make: Callable[[], nn.Module | Subject]) -> Callable[[], nn.Module | Subject]:
    """Enter a kind under the name of its function."""

    def made() -> Subject:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = make()
        return found if isinstance(found, Subject) else Subject(found)

    KINDS[make.__name__] = made
    return make


def _with(name: str, value: Any, change: Callable[[Any], object]) -> nn.Module:
    """The network with an attribute, or a buffer where it is a tensor."""
    model = Net(change)
    if isinstance(value, Tensor):
        model.register_buffer(name, value)
    else:
        setattr(model, name, value)
    return model


def _tensor_kind(name: str, make: Callable[[], Tensor], change: Callable[[Any], object]) -> None:
    def made() -> nn.Module:
        return _with("odd", make(), change)

    made.__name__ = name
    kind(made)


# Tensors of every layout and form, written to, replaced, and resized.

_tensor_kind("plain_buffer", lambda: torch.zeros(3), lambda m: m.odd.add_(1))
_tensor_kind("counter", lambda: torch.zeros((), dtype=torch.int64), lambda m: m.odd.add_(1))
_tensor_kind("signed_zero", lambda: torch.tensor([-0.0, 0.0]), lambda m: m.odd.abs_())
_tensor_kind("nan_payload", lambda: torch.tensor([float("nan"), 1.0]), lambda m: m.odd.neg_())
_tensor_kind("replaced", lambda: torch.zeros(3), lambda m: setattr(m, "odd", m.odd + 1))
_tensor_kind("data_replaced", lambda: torch.zeros(3), lambda m: setattr(m.odd, "data", m.odd.data + 1))
_tensor_kind("dtype_replaced", lambda: torch.zeros(3), lambda m: setattr(m.odd, "data", m.odd.data.double() + 1))
_tensor_kind("set_elsewhere", lambda: torch.zeros(3), lambda m: m.odd.set_(torch.ones(5)))
_tensor_kind("grown", lambda: torch.zeros(2), lambda m: m.odd.resize_(10).fill_(1))
_tensor_kind("shrunk", lambda: torch.arange(6.0), lambda m: m.odd.resize_(2).fill_(1))
_tensor_kind("storage_freed", lambda: torch.arange(6.0), lambda m: m.odd.untyped_storage().resize_(0))
_tensor_kind("storage_grown", lambda: torch.arange(6.0), lambda m: m.odd.untyped_storage().resize_(400))
_tensor_kind("coo", lambda: torch.eye(3).to_sparse(), lambda m: m.odd._values().add_(1))
_tensor_kind("coo_replaced", lambda: torch.eye(3).to_sparse(), lambda m: setattr(m, "odd", m.odd * 2))
_tensor_kind("coo_in_place", lambda: torch.eye(3).to_sparse(), lambda m: m.odd.add_(torch.ones(3, 3).to_sparse()))
_tensor_kind(
    "coo_uncoalesced",
    lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (3, 3)),
    lambda m: m.odd._values().add_(1),
)
_tensor_kind("csr", lambda: torch.eye(3).to_sparse_csr(), lambda m: m.odd.values().add_(1))
_tensor_kind("csc", lambda: torch.eye(3).to_sparse_csc(), lambda m: m.odd.values().add_(1))
_tensor_kind("bsr", lambda: torch.eye(4).to_sparse_bsr((2, 2)), lambda m: m.odd.values().add_(1))
_tensor_kind("expanded", lambda: torch.arange(4.0).expand(2, 4), lambda m: m.odd[:1].add_(1))
_tensor_kind("overlapping", lambda: torch.arange(6.0).unfold(0, 3, 1), lambda m: m.odd[0].add_(1))
_tensor_kind("transposed", lambda: torch.arange(6.0).view(2, 3).T, lambda m: m.odd.add_(1))
_tensor_kind("with_gaps", lambda: torch.arange(12.0)[1::3], lambda m: m.odd.add_(1))
_tensor_kind("empty_from_numpy", lambda: torch.from_numpy(np.array([], dtype=np.float32)), lambda m: None)
_tensor_kind("empty_grown", lambda: torch.zeros(0), lambda m: m.odd.resize_(3).fill_(1))
_tensor_kind("numpy_memory", lambda: torch.from_numpy(np.zeros(3, dtype=np.float32)), lambda m: m.odd.add_(1))
_tensor_kind("complex", lambda: torch.ones(3, dtype=torch.complex64), lambda m: m.odd.mul_(1j))
_tensor_kind("conjugated", lambda: torch.ones(3, dtype=torch.complex64).mul(1j).conj(), lambda m: m.odd.mul_(1j))
_tensor_kind("half", lambda: torch.ones(3, dtype=torch.float16), lambda m: m.odd.add_(1))
_tensor_kind("float8", lambda: torch.ones(3).to(torch.float8_e4m3fn), lambda m: m.odd.view(torch.uint8).add_(1))
_tensor_kind("boolean", lambda: torch.zeros(5, dtype=torch.bool), lambda m: m.odd.logical_not_())
_tensor_kind(
    "quantized",
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    lambda m: m.odd.copy_(torch.zeros(3)),
)
_tensor_kind(
    "quantized_by_channel",
    lambda: torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
    ),
    lambda m: m.odd.copy_(torch.zeros(2, 3)),
)
_tensor_kind(
    "nested_jagged",
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    lambda m: m.odd.values().add_(1),
)
_tensor_kind(
    "nested_strided",
    lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda m: m.odd.mul_(2),
)
_tensor_kind("mkldnn", lambda: torch.ones(2, 3).to_mkldnn(), lambda m: m.odd.mul_(2))
_tensor_kind("mkldnn_replaced", lambda: torch.ones(2, 3).to_mkldnn(), lambda m: setattr(m, "odd", m.odd * 2))


@torch.inference_mode()
def _made_at_inference() -> Tensor:
    return torch.ones(3)


def _written_at_inference(model: Any) -> None:
    with torch.inference_mode():
        model.odd.add_(1)


_tensor_kind("inference_tensor", _made_at_inference, _written_at_inference)
_tensor_kind("inference_tensor_unwritten", _made_at_inference, lambda m: None)


@kind
def inference_running_statistics() -> nn.Module:
    model = Net()
    with torch.inference_mode():
        model.bn1.running_mean = torch.zeros(4)
        model.bn1.running_var = torch.ones(4)
    return model


@kind
def meta() -> Subject:
    model = Net()
    model.register_buffer("nowhere", torch.zeros(3, device="meta"))
    return Subject(model, refused="nowhere")


class Marked(Tensor):
    """A subclass, as vision libraries have them."""


_tensor_kind("subclass", lambda: torch.ones(3).as_subclass(Marked), lambda m: m.odd.add_(1))


@kind
def views_of_one_memory() -> nn.Module:
    model, whole = Net(lambda m: m.first.add_(1)), torch.arange(6.0)
    model.register_buffer("first", whole[:4])
    model.register_buffer("second", whole[2:])
    return model


@kind
def unregistered_view() -> nn.Module:
    return _with("part", [torch.arange(6.0)[1:3]], lambda m: m.part[0].add_(1))


@kind
def not_persistent() -> nn.Module:
    model = Net(lambda m: m.cache.add_(1))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    return model


@kind
def sparse_parameter() -> nn.Module:
    model = Net(lambda m: m.adjacency.data._values().add_(1))
    model.adjacency = nn.Parameter(torch.eye(3).to_sparse())
    return model


@kind
def expanded_parameter() -> nn.Module:
    model = Net(lambda m: m.bias.data[:1].add_(1))
    model.bias = nn.Parameter(torch.zeros(1).expand(4))
    return model


@kind
def tied() -> nn.Module:
    model = Net(lambda m: m.bn1.weight.mul_(1.1))
    model.bn2.weight = model.bn1.weight
    return model


@kind
def channels_last() -> nn.Module:
    return Net(lambda m: m.conv.weight.mul_(1.1)).to(memory_format=torch.channels_last)


@kind
def memory_format_changed() -> nn.Module:
    return Net(lambda m: m.conv.to(memory_format=torch.channels_last))


@kind
def gradients() -> nn.Module:
    def change(model: Any) -> None:
        model.head.weight.grad.add_(1)
        model.head.bias.grad = None

    model = Net(change)
    model.head.weight.grad, model.head.bias.grad = torch.ones(3, 4), torch.full((3,), -0.0)
    return model


@kind
def sparse_gradient() -> nn.Module:
    model = Net(lambda m: m.table.weight.grad._values().add_(1))
    model.table = nn.Embedding(4, 2, sparse=True)
    model.table(torch.tensor([1, 2])).sum().backward()
    return model


@kind
def requires_grad_switched() -> nn.Module:
    return Net(lambda m: m.conv.weight.requires_grad_(not m.conv.weight.requires_grad))


@kind
def tensor_with_a_graph() -> nn.Module:
    model = Net(lambda m: m.state[0].data.add_(1))
    model.state = [model.head.weight.sum() * torch.ones(2)]
    return model


@kind
def weights_change() -> nn.Module:
    return Net(lambda m: [parameter.data.mul_(1.001) for parameter in m.parameters()])


# Plain attributes, containers, and objects of one's own.


@kind
def attributes() -> nn.Module:
    def change(model: Any) -> None:
        model.steps += 1
        model.new = torch.ones(1)
        model.__dict__.pop("old", None)

    model = Net(change)
    model.steps, model.old = 0, "x"
    return model


@kind
def containers() -> nn.Module:
    def change(model: Any) -> None:
        model.log.append(1)
        model.table["new"] = 1
        model.seen.add(len(model.log))
        model.last.append(len(model.log))
        model.nested["a"][0].append(2)
        model.counter["x"] += 1
        model.default["y"].append(1)
        model.ordered.move_to_end("a")

    model = Net(change)
    model.log, model.table, model.seen, model.last = [], {}, set(), deque([1], maxlen=2)
    model.nested = {"a": ([],)}
    model.counter, model.default = collections.Counter(), collections.defaultdict(list)
    model.ordered = OrderedDict(a=1, b=2)
    return model


@kind
def bytes_and_arrays() -> nn.Module:
    def change(model: Any) -> None:
        model.raw.extend(b"x")
        model.numbers[0] += 1
        model.numbers.append(3)

    model = Net(change)
    model.raw, model.numbers = bytearray(b"abc"), array.array("d", [1.0, -0.0])
    return model


@kind
def numpy_arrays() -> nn.Module:
    def change(model: Any) -> None:
        model.plain += 1
        model.kept["x"][0][::2] *= -1
        model.objects[0].append(1)
        model.objects[1] = None
        model.records["a"] += 1
        model.number += 1

    model = Net(change)
    model.plain, model.kept = np.zeros(3), {"x": [np.ones((2, 3)).T]}
    model.objects = np.array([[1], "x"], dtype=object)
    model.records = np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])
    model.number = np.array(1)
    model.fixed = np.ones(2)
    model.fixed.flags.writeable = False
    return model


@kind
def numpy_array_resized() -> nn.Module:
    def change(model: Any) -> None:
        model.plain.resize(7, refcheck=False)
        model.plain[:] = 1

    return _with("plain", np.arange(3.0), change)


class Meter:
    """A helper that counts, in objects within objects."""

    def __init__(self, depth: int = 3) -> None:
        self.total, self.values, self.tensor = 0.0, [1], torch.zeros(2)
        self.inner = Meter(depth - 1) if depth else None

    def update(self, *args: Any) -> None:
        self.total += 1
        self.values.append(self.total)
        self.tensor.add_(1)
        if self.inner is not None:
            self.inner.update()


@kind
def helper() -> nn.Module:
    return _with("meter", Meter(), lambda m: m.meter.update())


@kind
def helper_in_containers() -> nn.Module:
    return _with("meters", [{"a": (Meter(),)}], lambda m: m.meters[0]["a"][0].update())


@kind
def helper_that_knows_the_model() -> nn.Module:
    model = Net(lambda m: m.meter.update())
    model.meter = Meter()
    model.meter.owner = [model]
    model.meter.friend = model.meter
    return model


class Slotted:
    """No dictionary of attributes."""

    __slots__ = ("count", "gone", "tensor", "values")

    def __init__(self) -> None:
        self.count, self.values, self.tensor, self.gone = 0, [1], torch.zeros(2), 1

    def update(self) -> None:
        self.count += 1
        self.values.append(1)
        self.tensor = self.tensor + 1
        if hasattr(self, "gone"):
            del self.gone


class HalfSlotted(Slotted):
    """Slots of its class, private ones, and a dictionary besides."""

    __slots__ = ("__dict__", "__private")

    def __init__(self) -> None:
        super().__init__()
        self.__private, self.more = [0], 0

    def update(self) -> None:
        super().update()
        self.__private.append(1)
        self.more += 1


@kind
def slots() -> nn.Module:
    return _with("helper", Slotted(), lambda m: m.helper.update())


@kind
def slots_and_attributes() -> nn.Module:
    return _with("helper", [HalfSlotted()], lambda m: m.helper[0].update())


class SlottedNet(Net):
    """A module with slots beside its dictionary."""

    __slots__ = ("ticks",)

    def __init__(self) -> None:
        super().__init__(lambda m: m.tick())
        object.__setattr__(self, "ticks", [0])

    def tick(self) -> None:
        object.__setattr__(self, "ticks", [*self.ticks, 1])


@kind
def slots_of_a_module() -> nn.Module:
    return SlottedNet()


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Refuses to be written to, but what it holds can be."""

    values: list[int]
    tensor: Tensor

    def update(self) -> None:
        self.values.append(1)
        self.tensor.add_(1)


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    values: list[int]


Pair = collections.namedtuple("Pair", "values tensor")


@kind
def immutable_objects() -> nn.Module:
    def change(model: Any) -> None:
        model.frozen.update()
        model.slotted.values.append(1)
        model.pair.values.append(1)
        model.pair.tensor.add_(1)
        object.__setattr__(model.frozen, "values", [])

    model = Net(change)
    model.frozen, model.slotted = Frozen([0], torch.zeros(2)), FrozenSlots([0])
    model.pair = Pair([0], torch.zeros(2))
    model.names, model.view = frozenset({"a"}), types.MappingProxyType({"a": [1]})
    return model


class Immutable(Net):
    """Takes no attributes once it is made."""

    def __init__(self) -> None:
        super().__init__(lambda m: m.log.append(1))
        self.log: list[int] = []
        self.register_buffer("steps", torch.zeros(()))
        self.__dict__["done"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("done"):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        for module in self.modules():
            module.__dict__["training"] = mode
        return self


@kind
def immutable_module() -> nn.Module:
    return Immutable()


class OwnList(list):
    """A container of one's own, with attributes."""


class Locked(dict):
    """Refuses what dictionaries offer."""

    def clear(self) -> None:
        raise TypeError("locked")

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("locked")

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("locked")


@kind
def containers_of_ones_own() -> nn.Module:
    def change(model: Any) -> None:
        model.listed.append(1)
        model.listed.marks.append(1)
        dict.__setitem__(model.locked, "a", 2)

    model = Net(change)
    model.listed, model.locked = OwnList([0]), Locked(a=1)
    model.listed.marks = []
    return model


@kind
def object_with_a_lock() -> nn.Module:
    import logging
    import threading

    model = Net(lambda m: m.holder.values.append(1))
    model.holder = Meter()
    model.holder.lock, model.holder.log = threading.Lock(), logging.getLogger("faults")
    model.holder.function = len
    return model


@kind
def hooks_with_state() -> nn.Module:
    model, meter, counted = Net(), Meter(), [0]

    def closure(module: nn.Module, inputs: Any) -> None:
        counted.append(1)

    model.bn1.register_forward_pre_hook(closure)
    model.bn1.register_forward_hook(meter.update)
    model.bn2.register_forward_pre_hook(functools.partial(Meter.update, meter))
    return model


@kind
def counter_in_a_closure() -> nn.Module:
    def counting() -> Callable[[Any], None]:
        count = 0

        def change(model: Any) -> None:
            nonlocal count
            count += 1

        return change

    return Net(counting())


@kind
def hooks_added() -> nn.Module:
    return Net(lambda m: m.stem.register_forward_hook(lambda *args: None))


@kind
def hook_that_removes_itself() -> nn.Module:
    model = Net()
    handles: list[Any] = []

    def once(module: nn.Module, inputs: Any) -> None:
        while handles:
            handles.pop().remove()

    handles.append(model.stem.register_forward_pre_hook(once))
    return model


@kind
def iterators() -> nn.Module:
    return _with("ids", [itertools.count(3)], lambda m: next(m.ids[0]))


# Generators of random numbers.


@kind
def generators() -> nn.Module:
    def change(model: Any) -> None:
        torch.rand(1, generator=model.torch)
        model.python.random()
        model.numpy[0].random()
        model.old["a"].rand()
        model.meter.generator.random()

    model = Net(change)
    model.torch, model.python = torch.Generator().manual_seed(3), random.Random(3)
    model.numpy, model.old = [np.random.default_rng(3)], {"a": np.random.RandomState(3)}
    model.meter = Meter()
    model.meter.generator = random.Random(4)
    return model


@kind
def draws_globally() -> nn.Module:
    return Net(lambda m: (torch.rand(1), random.random(), np.random.rand()))


# Modules: hidden ones, lazy ones, those of torch that keep state.


class Hidden(Net):
    """Norm layers that ``train()``, ``state_dict()`` and ``to()`` do not reach."""

    def __init__(self, where: Callable[[list[nn.Module]], Any]) -> None:
        super().__init__()
        self.where = where([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def blocks(self) -> list[nn.Module]:
        where = self.where
        if isinstance(where, dict):
            return list(where["norms"])
        return where.norms if isinstance(where, types.SimpleNamespace) else list(where)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return super().forward(x)


@kind
def norms_in_a_list() -> nn.Module:
    return Hidden(list)


@kind
def norms_in_a_dictionary() -> nn.Module:
    return Hidden(lambda norms: {"norms": tuple(norms)})


@kind
def norms_in_a_helper() -> nn.Module:
    def make(norms: list[nn.Module]) -> Any:
        return types.SimpleNamespace(norms=norms)

    return Hidden(make)


@kind
def norm_in_a_closure() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    model = Net()
    inner = model.stem.forward
    model.stem.forward = lambda x: inner(norm(x))
    return model


@kind
def lazy() -> nn.Module:
    model = Net()
    model.stem, model.bn1 = nn.LazyConv2d(4, 3, padding=1), nn.LazyBatchNorm2d()
    return model


@kind
def spectral_norm() -> nn.Module:
    model = Net()
    torch.nn.utils.parametrizations.spectral_norm(model.conv)
    return model


@kind
def spectral_norm_by_hook() -> nn.Module:
    model = Net()
    torch.nn.utils.spectral_norm(model.conv)
    return model


@kind
def weight_norm() -> nn.Module:
    model = Net()
    torch.nn.utils.parametrizations.weight_norm(model.conv)
    return model


@kind
def quantization_aware() -> nn.Module:
    quantization = torch.ao.quantization
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)


@kind
def quantization_observers() -> nn.Module:
    model = Net()
    model.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    return torch.ao.quantization.prepare(model.eval())


@kind
def scripted_part() -> nn.Module:
    model = Net()
    model.stem = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    return model


@kind
def traced_by_fx() -> nn.Module:
    return torch.fx.symbolic_trace(Net())


@kind
def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(Net())


@kind
def parameter_containers() -> nn.Module:
    model = Net(lambda m: (m.listed[0].data.add_(1), m.mapped["a"].data.add_(1)))
    model.listed = nn.ParameterList([torch.zeros(2), torch.ones(2)])
    model.mapped = nn.ParameterDict({"a": torch.zeros(2)})
    return model


@kind
def modules_change() -> nn.Module:
    def change(model: Any) -> None:
        model.conv.added = nn.Identity()
        model.head.__class__ = Head
        model.bn1.momentum = 0.5
        model.bn2.eval()

    return Net(change)


class Head(nn.Linear):
    pass


@kind
def shared_layer() -> nn.Module:
    model = Net(lambda m: m.again(torch.ones(2, 4, 3, 3)))
    model.again = model.bn1
    return model


@kind
def mixed_flags() -> nn.Module:
    model = Net().eval()
    model.bn1.train()
    return model


@kind
def dropout_and_instance_norm() -> nn.Module:
    model = Net()
    model.stem = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4, track_running_stats=True), nn.Dropout(0.3)
    )
    return model


class OwnMomentum(nn.Module):
    """Running statistics by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3)), 0.1)
                self.variance.lerp_(x.var((0, 2, 3), unbiased=False), 0.1)
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        else:
            mean, variance = self.mean, self.variance
        return (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()


@kind
def norm_by_hand() -> Subject:
    model = Net()
    model.bn1 = OwnMomentum()
    return Subject(model, statistics=("running_mean", "running_var", "num_batches_tracked", "mean", "variance"))


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


@kind
def checkpointed() -> nn.Module:
    import torch.utils.checkpoint  # noqa: F401  its functions are looked up late

    return Checkpointed()


# What the process holds.


@kind
def grad_mode_switched() -> nn.Module:
    return Net(lambda m: torch.set_grad_enabled(not torch.is_grad_enabled()))


class Autocasting(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if not self.training else nullcontext():
            return super().forward(x).float()


@kind
def autocast() -> nn.Module:
    return Autocasting()


@kind
def generator_of_the_loader() -> Subject:
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.cat(images()))
    loader = DataLoader(data, 2, shuffle=True, generator=generator)
    return Subject(Net(), lambda: loader)


@kind
def generator_of_the_sampler() -> Subject:
    data = TensorDataset(torch.cat(images()))
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(data, 2, sampler=sampler)
    return Subject(Net(), lambda: loader)


class Augmented(TensorDataset):
    """Draws from generators of its own."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.chance, self.transforms = random.Random(3), [types.SimpleNamespace(chance=np.random.default_rng(3))]

    def __getitem__(self, index: int) -> Any:
        (x,) = super().__getitem__(index)
        return (x + self.chance.random() + self.transforms[0].chance.random(),)


@kind
def generators_of_the_data_set() -> Subject:
    loader = DataLoader(Augmented(torch.cat(images())), 2)
    return Subject(Net(), lambda: loader)


class Stream:
    """An iterable of batches with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(COUNT):
            yield torch.randn(SHAPE, generator=self.generator)


@kind
def generator_of_a_stream() -> Subject:
    stream = Stream()
    return Subject(Net(), lambda: stream)


class Refilled:
    """One buffer, filled again for every batch."""

    def __init__(self) -> None:
        self.buffer = torch.empty(SHAPE)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in images():
            yield self.buffer.copy_(batch)


@kind
def refilled_buffer() -> Subject:
    return Subject(Net(), Refilled)
