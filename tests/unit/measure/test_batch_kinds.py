"""Loaders of many kinds are scanned as they are, and the figures are those of a loop over their batches."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bnprobe.commands.scan import scan
from bnprobe.records import Report

SEED = torch.Generator().manual_seed


class PerNode(nn.Module):
    """Two layers on the rows of a ragged batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.second = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for norm in (self.first, self.second):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(self.mix.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.second(self.mix(self.first(x)).relu())
        return rows


def looped(model: nn.Module, inputs: list[Tensor], training: bool) -> dict[str, float]:
    """D of each layer by a plain loop in float64, on the path where layers use batch or running statistics."""
    model, found = copy.deepcopy(model).double(), {}
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }

    def hook(name: str) -> Any:
        def note(module: Any, given: Any) -> None:
            x = given[0].transpose(0, 1).flatten(1) if given[0].dim() > 2 else given[0].T
            mean, variance = x.mean(1), x.var(1, unbiased=False)
            batch = (x - mean[:, None]) / (variance + module.eps).sqrt()[:, None]
            running = (x - before[name][0][:, None]) / (before[name][1] + module.eps).sqrt()[:, None]
            found.setdefault(name, []).append(float((batch - running).square().mean()))

        return note

    before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(hook(name))
    model.train(training)
    with torch.no_grad():
        for x in inputs:
            model(x.double())
            for name, norm in norms.items():
                norm.running_mean.copy_(before[name][0])
                norm.running_var.copy_(before[name][1])
    return {name: sum(values) / len(values) for name, values in found.items()}


def assert_exact(report: Report, model: nn.Module, inputs: list[Tensor]) -> None:
    for path, training in (("train", True), ("eval", False)):
        expected = looped(model, inputs, training)
        found = {layer.name: getattr(layer, path).mismatch for layer in report.layers}
        assert found == pytest.approx(expected, rel=2e-5)


class Ragged(Dataset[tuple[Tensor, int]]):
    """Graphs or clouds of points, of which the class is also seen in the values."""

    def __init__(self, count: int = 96, sort: bool = False) -> None:
        generator = SEED(0)
        classes = torch.randint(3, (count,), generator=generator)
        classes = classes.sort().values if sort else classes
        sizes = torch.randint(3, 12, (count,), generator=generator)
        self.items = [
            (torch.randn(int(size), 6, generator=generator) + 2.0 * kind, int(kind))
            for size, kind in zip(sizes, classes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.items[index]


def as_dict(items: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    rows = torch.tensor([len(x) for x, _ in items])
    owner = torch.arange(len(items)).repeat_interleave(rows)
    return {"x": torch.cat([x for x, _ in items]), "batch": owner, "y": torch.tensor([y for _, y in items])}


def as_tuple(items: list[tuple[Tensor, int]]) -> tuple[Tensor, ...]:
    batch = as_dict(items)
    return batch["y"], batch["x"], batch["batch"]


class Graphs:
    """Behaves as torch_geometric.data.Batch does."""

    def __init__(self, **parts: Tensor) -> None:
        self.parts = parts
        self.num_graphs = len(parts["y"])

    def __getattr__(self, name: str) -> Tensor:
        return self.__dict__["parts"][name]  # type: ignore[no-any-return]

    def to(self, device: Any) -> Graphs:
        return Graphs(**{name: part.to(device) for name, part in self.parts.items()})

    def clone(self) -> Graphs:
        return Graphs(**{name: part.clone() for name, part in self.parts.items()})


def as_object(items: list[tuple[Tensor, int]]) -> Graphs:
    return Graphs(**as_dict(items))


@pytest.mark.parametrize(
    ("collate", "rows"),
    [(as_dict, lambda b: b["x"]), (as_tuple, lambda b: b[1]), (as_object, lambda b: b.x)],
    ids=["dict", "tuple", "graph object"],
)
def test_ragged_batches(collate: Any, rows: Any) -> None:
    model, loader = PerNode(), DataLoader(Ragged(), batch_size=8, collate_fn=collate)
    report = scan(model, loader, 8, num_batches=12, forward=lambda model, batch: model(rows(batch)))
    assert (report.scan.batch_size, report.scan.images, report.scan.size_range) == (8, 96, None)
    assert not report.scan.emulated
    assert_exact(report, model, [rows(batch) for batch in loader])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(importlib.util.find_spec("torch_geometric") is None, reason="needs torch_geometric")
def test_batches_of_torch_geometric() -> None:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    loader = GraphLoader([Data(x=x, y=torch.tensor([y])) for x, y in Ragged().items], batch_size=8)
    model = PerNode()
    report = scan(model, loader, num_batches=12, forward=lambda model, batch: model(batch.x))
    assert (report.scan.batch_size, report.scan.images) == (8, 96)
    assert_exact(report, model, [batch.x for batch in loader])


def causes(report: Report) -> set[str]:
    return {verdict.cause for verdict in report.verdicts if verdict.outcome == "failed"}


@pytest.mark.parametrize("sort", [True, False])
def test_composition_of_ragged_batches_is_judged_by_batches_drawn_at_random(sort: bool) -> None:
    model, data = PerNode(), Ragged(400, sort)
    every = torch.cat([x for x, _ in data.items])
    model.first.running_mean, model.first.running_var = every.mean(0), every.var(0)
    loader = DataLoader(data, batch_size=8, collate_fn=as_dict)
    report = scan(model, loader, 8, num_batches=50, include=("first",), forward=lambda m, b: m(b["x"]))
    shares = report.layers[0].shares
    assert shares is not None
    assert shares.composition is not None
    mixed = [extra for extra in report.scan.passes if extra.name == "batches drawn at random"]
    assert [extra.images for extra in mixed] == [400]
    if sort:
        assert shares.composition > 0.8 * report.layers[0].eval.mismatch  # type: ignore[union-attr]
        assert "composition" in causes(report)
    else:
        low, _ = report.layers[0].share_intervals.composition  # type: ignore[union-attr,misc]
        assert low < 0.02
        assert "composition" not in causes(report)


def test_a_loader_that_shuffles_needs_no_further_pass() -> None:
    loader = DataLoader(Ragged(400), batch_size=4, collate_fn=as_dict, shuffle=True)
    report = scan(PerNode(), loader, 4, num_batches=50, forward=lambda m, b: m(b["x"]))
    assert [layer.shares.composition for layer in report.layers if layer.shares] == [0.0, 0.0]
    assert not [extra for extra in report.scan.passes if extra.name == "batches drawn at random"]


def test_where_composition_is_not_judged_too_small_says_or_not_mixed() -> None:
    batches = [as_dict(Ragged().items[start : start + 2]) for start in range(0, 96, 2)]
    report = scan(PerNode(), batches, 2, num_batches=48, forward=lambda m, b: m(b["x"]))
    small = [verdict for verdict in report.verdicts if verdict.rule == "BN201" and verdict.outcome == "failed"]
    assert small
    assert all("too small or not mixed" in verdict.message for verdict in small)


class ImageNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).mean((2, 3))


def test_images_of_several_sizes_in_a_list() -> None:
    """As detectors get them: a list of images, and a list of targets."""
    items = [
        (torch.randn(3, 6 + index % 3, 8, generator=SEED(index)), {"boxes": torch.zeros(index % 4, 4)})
        for index in range(24)
    ]
    loader = DataLoader(items, batch_size=4, collate_fn=lambda items: tuple(map(list, zip(*items, strict=True))))

    def forward(model: nn.Module, batch: Any) -> Any:
        return torch.cat([model(image[None]) for image in batch[0]])

    report = scan(ImageNet(), loader, num_batches=6, forward=forward)
    assert (report.scan.batch_size, report.scan.images) == (4, 24)


def test_several_patches_of_each_volume() -> None:
    volumes = TensorDataset(torch.randn(24, 4, 3, 6, 6, generator=SEED(0)))
    loader = DataLoader(volumes, batch_size=2, collate_fn=lambda items: torch.cat([item[0] for item in items]))
    report = scan(ImageNet(), loader, num_batches=12)
    assert (report.scan.batch_size, report.scan.images) == (2, 24)
    assert_exact(report, ImageNet(), list(loader))


class Budget:
    """A batch sampler that fills each batch up to a number of rows: batches of different sizes."""

    def __init__(self, data: Ragged, rows: int) -> None:
        self.data, self.rows = data, rows

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index, (x, _) in enumerate(self.data.items):
            if sum(len(self.data[other][0]) for other in batch) + len(x) > self.rows:
                yield batch
                batch = []
            batch.append(index)
        yield batch


def test_a_budget_of_rows() -> None:
    data, model = Ragged(), PerNode()
    loader = DataLoader(data, batch_sampler=Budget(data, 60), collate_fn=as_dict)  # type: ignore[arg-type]
    sizes = [len(batch["y"]) for batch in loader]
    report = scan(model, loader, num_batches=len(sizes), forward=lambda m, b: m(b["x"]))
    assert report.scan.size_range == (min(sizes), max(sizes))
    assert (report.scan.images, report.scan.left_out) == (96, 0)
    assert_exact(report, model, [batch["x"] for batch in loader])


class Tagged(Tensor):
    """A tensor that carries something along, as MONAI's MetaTensor does, and may not be used in measuring."""

    allowed = (nn.functional.batch_norm, nn.functional.relu)
    measured: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("var_mean", "vector_norm", "linalg_vector_norm", "cat", "isfinite"):
            cls.measured.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_a_subclass_are_plain_ones_where_they_are_measured() -> None:
    plain = [torch.randn(4, 3, 6, 6, generator=SEED(index)) for index in range(8)]
    seen: list[type] = []

    def forward(model: nn.Module, batch: Tensor) -> Any:
        seen.append(type(batch))
        return model(batch)

    Tagged.measured.clear()
    report = scan(ImageNet(), [x.as_subclass(Tagged) for x in plain], num_batches=8, forward=forward, emulate=False)
    assert Tagged.measured == []
    assert set(seen) == {Tagged}  # the model gets what the loader gives
    expected = scan(ImageNet(), plain, num_batches=8, emulate=False)
    for path in ("train", "eval"):
        assert getattr(report.layers[0], path).mismatch == pytest.approx(getattr(expected.layers[0], path).mismatch)
    assert scan(ImageNet(), [x.as_subclass(Tagged) for x in plain], num_batches=8).scan.emulated
