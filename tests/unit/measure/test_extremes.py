"""A model that depends on the largest sample of a batch runs real micro-batches, wherever the largest one comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnprobe
from bnprobe.commands.scan import scan
from bnprobe.measure import extremes
from bnprobe.measure.extremes import is_ragged, largest_sizes
from support.compare import assert_same_figures
from support.networks import Flat, images, unsettled

SIZE, LARGE = 2, {11, 16}
"""Samples of a micro-batch, and which samples are larger than all others: none of the first micro-batches has one."""


class Sequences(nn.Module):
    """Cuts what it gets, or pads it, to the longest sequence; sequences are (N, T, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x.transpose(1, 2))).relu().mean(2))


def sequences() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [20 if position in LARGE else 4 for position in range(24)]
    made = [torch.randn(length, 3, generator=generator) for length in lengths]
    return [made[start : start + SIZE] for start in range(0, len(made), SIZE)]


def padded(samples: list[Tensor], length: int = 20) -> Tensor:
    return torch.stack([F.pad(sample, (0, 0, 0, length - len(sample))) for sample in samples])


def mask(samples: list[Tensor]) -> Tensor:
    return torch.stack([torch.arange(20) < len(sample) for sample in samples])


def by_list(model: nn.Module, batch: Any) -> Tensor:
    return model(padded(batch["x"], max(map(len, batch["x"]))))


def by_lengths(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0][:, : int(batch[1].max())])


def by_mask(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"][:, : int(batch["mask"].sum(1).max())])


def by_zeros(model: nn.Module, x: Tensor) -> Tensor:
    return model(x[:, : int((x != 0).any(2).sum(1).max())])


def in_place(model: nn.Module, batch: Any) -> Tensor:
    """The layers see inputs of one size, whatever the largest sample."""
    return model(batch[0] + (torch.arange(20) < batch[1].max())[:, None])


KINDS: dict[str, tuple[Callable[[list[Tensor]], Any], Callable[[nn.Module, Any], Tensor]]] = {
    "a list": (lambda samples: {"x": samples}, by_list),
    "lengths": (lambda samples: (padded(samples), torch.tensor([len(each) for each in samples])), by_lengths),
    "a mask": (lambda samples: {"x": padded(samples), "mask": mask(samples)}, by_mask),
    "zeros": (padded, by_zeros),
    "of one size": (lambda samples: (padded(samples), torch.tensor([len(each) for each in samples])), in_place),
}


@pytest.mark.parametrize("kind", KINDS)
def test_larger_samples_later_in_the_data(kind: str) -> None:
    make, forward = KINDS[kind]
    data, model = [make(samples) for samples in sequences()], unsettled(Sequences())
    options: dict[str, Any] = {"num_batches": len(data), "forward": forward, "physical_batch": 8}
    report = scan(model, data, SIZE, **options)
    real = scan(model, data, SIZE, emulate=False, **options)
    assert report.scan.emulation.startswith("Later micro-batches run one by one. The ")
    assert_same_figures(report, real, rel=1e-4)


@pytest.mark.parametrize("path", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_recalibration(kind: str, path: str) -> None:
    make, forward = KINDS[kind]
    data = [make(samples) for samples in sequences()]
    model = unsettled(Sequences())
    inputs: list[Tensor] = []
    hook = model.bn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in data:
            forward(model.eval(), batch)
    hook.remove()
    expected = torch.cat([each.transpose(0, 1).flatten(1) for each in inputs], 1).mean(1)
    bnprobe.recalibrate(model, data, forward=forward, path=path, batch_size_of=lambda batch: SIZE)
    torch.testing.assert_close(model.bn.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_samples_of_other_sizes_that_do_not_meet_still_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    original = extremes.checked
    monkeypatch.setattr(extremes, "checked", lambda *args: checked.append(args) or original(*args))

    def forward(model: nn.Module, batch: Any) -> Tensor:
        return torch.cat([model(sample[None]) for sample in batch["x"]])

    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.head = nn.BatchNorm1d(3), nn.Linear(3, 2)

        def forward(self, x: list[Tensor]) -> Tensor:
            return self.head(self.bn(torch.stack([sample.mean(0) for sample in x])))

    data = [{"x": samples} for samples in sequences()]
    report = scan(unsettled(Means()), data, SIZE, num_batches=len(data), physical_batch=8)
    assert report.scan.emulated
    assert report.scan.self_check.passed
    assert len(checked) == 1


def test_labels_that_the_model_does_not_see_cost_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extremes, "checked", lambda *args: pytest.fail("checked again"))
    data = [(x, torch.full((2,), position)) for position, x in enumerate(images(8, 2, 6))]
    assert scan(unsettled(Flat()), data, 2, num_batches=8, physical_batch=4).scan.emulated


def test_held_out_data_larger_than_the_training_data() -> None:
    make, forward = KINDS["a list"]
    data = [make(samples) for samples in sequences()]
    small = [batch for batch in data if len({len(sample) for sample in batch["x"]}) == 1]
    options: dict[str, Any] = {"forward": forward, "num_batches": len(small), "physical_batch": 8}
    model = unsettled(Sequences())
    report = scan(model, small, SIZE, evaluation=data, **options)
    real = scan(model, small, SIZE, evaluation=data, emulate=False, **options)
    assert report.scan.emulated
    assert_same_figures(report, real, rel=1e-4)


def test_the_sizes_that_a_batch_shows() -> None:
    lengths = torch.tensor([3, 7])
    assert largest_sizes((torch.zeros(2, 3), lengths), 2) == {"[1]": 7}
    assert largest_sizes({"mask": torch.tensor([[1, 0, 0], [1, 1, 0]])}, 2) == {"['mask']": 2}
    ragged = [{"x": torch.zeros(1, 5), "n": 1}, {"x": torch.zeros(4, 3), "n": 9}]
    assert largest_sizes(ragged, 2) == {"[*]['x'].shape[0]": 4, "[*]['x'].shape[1]": 5, "[*]['n']": 9}
    assert is_ragged(ragged, 2)
    assert not is_ragged([torch.zeros(4), torch.zeros(4)], 2)
