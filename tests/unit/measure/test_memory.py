"""Out of memory: halve the physical batch and go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnprobe.commands.scan import scan
from bnprobe.errors import DeviceError
from bnprobe.measure.memory import CPU_SAMPLES, SMALL_SAMPLES, Footprint, is_out_of_memory, plan_samples, plan_small
from support.compare import assert_same_figures
from support.networks import Residual, images, unsettled


class Big(Residual):
    """Runs out of memory above so many images."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.shape[0])
        if x.shape[0] > self.most:
            raise self.error("out of memory: not enough memory")
        return super().forward(x)


SEEN: list[int] = []
"""Outside the model, which comes back untouched."""


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


@pytest.mark.parametrize(
    ("most", "error"), [(4, RuntimeError), (7, torch.OutOfMemoryError), (9, MemoryError), (31, torch.OutOfMemoryError)]
)
def test_the_physical_batch_is_halved_until_it_fits(most: int, error: type[Exception]) -> None:
    model, data = unsettled(Big(most, error)), images(40, 2, 3, 5, 5)
    report = scan(model, data, 2, num_batches=40)
    fits = next(size for size in (32, 16, 8, 4) if size <= most)
    assert report.scan.physical_batch == fits
    assert report.scan.emulated
    assert report.scan.batches == 40
    # It does not try again what did not fit.
    assert SEEN.count(32) <= 1
    model.most = 1000
    small = scan(model, data, 2, num_batches=40, physical_batch=fits)
    assert report.layers == small.layers
    assert report.summary == small.summary


@pytest.mark.parametrize("most", [2, 3])
def test_room_for_one_micro_batch_only(most: int) -> None:
    model, data = unsettled(Big(most)), images(6, 2, 3, 5, 5)
    report = scan(model, data, 2, num_batches=6)
    assert (report.scan.physical_batch, report.scan.emulated, report.scan.batches) == (2, False, 6)
    model.most = 1000
    assert_same_figures(report, scan(model, data, 2, num_batches=6, emulate=False), rel=1e-6)


@pytest.mark.parametrize("emulate", [True, False])
def test_not_even_one_micro_batch_fits(emulate: bool) -> None:
    model, data = unsettled(Big(1)), images(6, 2, 3, 5, 5)
    with pytest.raises(DeviceError, match="Not even one micro-batch of 2 samples fits into the memory of cpu"):
        scan(model, data, 2, num_batches=6, emulate=emulate)


def test_the_words_of_the_allocator_are_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_other_errors_are_not_taken_for_it() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("not enough memory"))


def test_the_plan_is_bounded() -> None:
    cpu = torch.device("cpu")
    assert plan_samples(Footprint(1, 1), cpu) == plan_samples(Footprint(0, 0), cpu) == CPU_SAMPLES
    assert plan_samples(Footprint(2**60, 1), cpu) == 1


def test_of_a_small_network_more_samples_run_at_once() -> None:
    cpu, layer = torch.device("cpu"), 4 * 12 * 8 * 8
    assert plan_small(Footprint(10 * layer, layer), cpu) == SMALL_SAMPLES
    assert plan_small(Footprint(0, 0), cpu) == CPU_SAMPLES
    assert plan_small(Footprint(2**18, 2**14), cpu) == 64
    assert plan_small(Footprint(2**19, 2**18), cpu) == plan_samples(Footprint(2**19, 2**18), cpu) == CPU_SAMPLES
    assert plan_small(Footprint(2**60, 1), cpu) == 1


def test_on_cpu_no_tensor_outgrows_the_heap() -> None:
    cpu, stem = torch.device("cpu"), 4 * 64 * 112 * 112  # ResNet's first layer, one image of 224x224
    assert plan_samples(Footprint(10 * stem, stem), cpu) == max(torch.get_num_threads(), 8)
    assert plan_samples(Footprint(2**26, 2**26), cpu) == min(CPU_SAMPLES, torch.get_num_threads())
