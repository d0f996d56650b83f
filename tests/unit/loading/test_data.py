"""Data: where it is found, and that the batch size asked for is the one that is measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bnprobe.config.spec import DataSpec, EvalDataSpec
from bnprobe.errors import DataError, ModelError, UsageError, UserCodeError
from bnprobe.loading.data import BatchSource, GuardedBatches, as_batch_source, synthetic_source
from bnprobe.loading.model import UserModule, resolve
from bnprobe.loading.source import load_held_out, load_source

HEAD = "import torch\nfrom torch.utils.data import *\nimages = TensorDataset(torch.arange(10.0)[:, None])\n"


def images(count: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None])


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(10.0)[:, None])


def wrapped(source: BatchSource) -> Any:
    assert isinstance(source.batches, GuardedBatches)
    return source.batches.wrapped


def values(source: BatchSource) -> list[list[float]]:
    return [(batch[0] if isinstance(batch, list) else batch).flatten().tolist() for batch in source.batches]


def data_error(batches: Any, batch_size: int | None = None) -> str:
    with pytest.raises(DataError) as caught:
        as_batch_source(batches, batch_size, "the loader")
    return str(caught.value)


# ---- rebuilding a loader


def test_a_loader_is_rebuilt_at_the_size_asked_for_with_all_that_is_its_own() -> None:
    def collate(samples: list[Any]) -> Tensor:
        return torch.stack([sample[0] for sample in samples]) + 100

    def start(worker: int) -> None:
        pass

    generator = torch.Generator().manual_seed(1)
    sampler = SubsetRandomSampler([1, 3, 5, 7, 9], generator=generator)
    loader = DataLoader(
        images(),
        batch_size=5,
        sampler=sampler,
        collate_fn=collate,
        worker_init_fn=start,
        generator=generator,
        drop_last=True,
    )
    source = as_batch_source(loader, 2, "the loader")
    rebuilt = wrapped(source)
    assert rebuilt is not loader
    assert rebuilt.dataset is loader.dataset
    assert rebuilt.sampler is sampler
    assert (rebuilt.collate_fn, rebuilt.worker_init_fn, rebuilt.generator) == (collate, start, generator)
    assert (source.batch_size, source.images) == (2, 5)
    assert source.notes == ("The loader was rebuilt at batch size 2, with its own sampler; its batch size was 5.",)
    batches = values(source)
    assert [len(batch) for batch in batches] == [2, 2, 1]  # the last partial batch is not dropped
    assert sorted(itertools.chain(*batches)) == [101, 103, 105, 107, 109]


def test_settings_of_worker_processes_are_kept() -> None:
    loader = DataLoader(
        images(), batch_size=5, num_workers=2, prefetch_factor=3, timeout=7, multiprocessing_context="spawn"
    )
    rebuilt = wrapped(as_batch_source(loader, 2))
    assert (rebuilt.num_workers, rebuilt.prefetch_factor, rebuilt.timeout) == (2, 3, 7)
    assert rebuilt.multiprocessing_context.get_start_method() == "spawn"


def test_memory_is_not_pinned_without_an_accelerator() -> None:
    loader = DataLoader(images(), batch_size=5, pin_memory=True)
    assert wrapped(as_batch_source(loader, 2)).pin_memory is torch.cuda.is_available()


def test_a_weighted_sampler_is_kept() -> None:
    sampler = WeightedRandomSampler([0.0] * 9 + [1.0], num_samples=6)
    source = as_batch_source(DataLoader(images(), batch_size=3, sampler=sampler), 4)
    assert wrapped(source).sampler is sampler
    assert source.images == 6
    assert values(source) == [[9.0] * 4, [9.0] * 2]


def test_a_shuffling_loader_goes_on_shuffling() -> None:
    loader = DataLoader(images(100), batch_size=10, shuffle=True)
    rebuilt = wrapped(as_batch_source(loader, 2))
    assert isinstance(rebuilt.sampler, RandomSampler)
    assert rebuilt.sampler is loader.sampler


@pytest.mark.parametrize("asked", [5, None])
def test_a_loader_of_the_size_asked_for_is_used_as_it_is(asked: int | None) -> None:
    loader = DataLoader(images(), batch_size=5)
    source = as_batch_source(loader, asked, "the loader")
    assert wrapped(source) is loader
    assert source == BatchSource(source.batches, 5, "the loader (10 samples)", 10, drop_last=False)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=5),
        DataLoader(images(), batch_sampler=BatchSampler(SequentialSampler(range(10)), 5, False)),
    ],
    ids=["iterable data", "custom batch sampler"],
)
def test_what_cannot_be_rebuilt_is_used_at_its_own_size_and_refused_at_another(loader: Any) -> None:
    assert wrapped(as_batch_source(loader, 5)) is loader
    assert as_batch_source(loader).batch_size == 5
    message = data_error(loader, 2)
    assert "the loader cannot be rebuilt at batch size 2, because" in message
    assert "its batch size is 5" in message
    assert "would give a wrong diagnosis" in message
    assert "give --batch-size 5, or write a function load_data(batch_size)" in message


class Buckets:
    """A batch sampler that does not say its batch size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(self.size))] * 2)


class OwnWay(DataLoader[Any]):
    def __iter__(self) -> Any:
        return iter([])


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_sampler_of_torchs_says_how_many_samples_an_epoch_has(drop_last: bool) -> None:
    batches = BatchSampler(SequentialSampler(range(10)), 3, drop_last)
    source = as_batch_source(DataLoader(images(), batch_sampler=batches), 3)
    assert (source.images, source.drop_last) == (10, drop_last)
    own = as_batch_source(DataLoader(images(), batch_sampler=Buckets(2)), 2)
    assert (own.images, own.composed, source.composed) == (None, True, False)
    assert own.description.endswith(f"({len(images())} samples)")  # of the data set, whatever an epoch draws of it


class OwnSampler(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=5), "its data set is iterable (IterableDataset)"),
        (DataLoader(Stream(), batch_size=None), "its data set is iterable (IterableDataset)"),
        (
            DataLoader(images(), batch_size=None),
            "it has batch_size=None, so its data set makes the batches",
        ),
        (DataLoader(images(), batch_sampler=Buckets(3)), "it has a custom batch sampler (Buckets)"),
        (
            DataLoader(images(), batch_sampler=OwnSampler(SequentialSampler(range(9)), 3, False)),
            "it has a custom batch sampler (OwnSampler)",
        ),
        (OwnWay(images(), batch_size=5), "OwnWay has its own __iter__"),
    ],
)
def test_why_a_loader_is_refused(loader: Any, reason: str) -> None:
    assert f"because {reason};" in data_error(loader, 2)


def test_no_batch_size_at_all() -> None:
    with pytest.raises(UsageError, match=r"The batch size of .* is unknown. Give one, .* --batch-size"):
        as_batch_source(images())


@pytest.mark.parametrize(
    "data",
    [
        [torch.ones(2, 1), torch.zeros(2, 1)],
        iter([torch.ones(2, 1), torch.zeros(2, 1)]),
        DataLoader([torch.ones(2, 1), torch.zeros(2, 1)], batch_size=None),
        DataLoader(images(), batch_sampler=Buckets(2)),
    ],
    ids=["list", "iterator", "data set of batches", "batch sampler"],
)
def test_the_batch_size_of_data_that_does_not_state_it_is_that_of_its_first_batch(data: Any) -> None:
    source = as_batch_source(data)
    assert source.batch_size == 2
    assert [len(batch[0] if isinstance(batch, list) else batch) for batch in source.batches] == [2, 2]


# ---- sizes


def test_batch_size_larger_than_the_data() -> None:
    sampler = SubsetRandomSampler([1, 2, 3])
    for data in (DataLoader(images(3), batch_size=2), images(3), DataLoader(images(), sampler=sampler, batch_size=2)):
        message = data_error(data, 4)
        assert "Batch size 4 is larger than the data set of 3 samples (the loader)" in message
        assert "at most 3" in message
    assert [sorted(batch) for batch in values(as_batch_source(images(3), 3))] == [[0, 1, 2]]


def test_empty_data() -> None:
    for data in (DataLoader(images(0), batch_size=2), images(0)):
        assert "is empty: its data set has no samples" in data_error(data, 2)
    assert "is empty: it yields no batch" in data_error([], 2)
    buckets = BatchSampler(SequentialSampler(range(3)), 5, drop_last=True)
    assert "is empty: it yields no batch" in data_error(DataLoader(images(3), batch_sampler=buckets), 5)


# ---- data sets and iterables


def test_a_data_set_is_shuffled_and_its_order_is_not_the_users() -> None:
    torch.manual_seed(3)
    source = as_batch_source(images(50), 4, "dataset of model.py")
    found = values(source)
    assert [len(batch) for batch in found] == [4] * 12 + [2]
    assert sorted(itertools.chain(*found)) == list(range(50))
    assert list(itertools.chain(*found)) != list(range(50))
    torch.manual_seed(3)
    assert values(as_batch_source(images(50), 4)) == found  # by the seed of the scan
    assert (source.images, source.own_order, source.drop_last) == (50, False, None)
    assert "bnprobe shuffles it" in source.notes[0]
    assert as_batch_source(DataLoader(images(5), batch_size=2)).own_order  # also without shuffle=True


class OfHuggingFace:
    """A data set that is none of torch's, as datasets.Dataset is."""

    column_names = ("x",)

    def with_format(self, kind: str) -> OfHuggingFace:
        return self

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([float(index)])}


def test_a_data_set_of_hugging_face_is_a_data_set(tmp_path: Path) -> None:
    source = as_batch_source(OfHuggingFace(), 2)
    assert sorted(value for batch in source.batches for value in batch["x"].flatten().tolist()) == [0, 1, 2, 3, 4, 5]
    assert (source.images, source.own_order) == (6, False)
    pair = as_batch_source({"train": OfHuggingFace(), "test": OfHuggingFace()}, 2)
    assert (pair.images, pair.beside is None) == (6, False)


def test_an_iterable_data_set_is_batched() -> None:
    source = as_batch_source(Stream(), 4)
    assert values(source) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (source.images, source.own_order) == (None, True)


def test_iterables_are_taken_as_they_are() -> None:
    source = as_batch_source([torch.ones(2, 1), torch.zeros(2, 1)], 2)
    assert (source.images, source.notes) == (None, ())
    assert values(source) == [[1, 1], [0, 0]]


def test_a_generator_is_not_peeked_into() -> None:
    drawn = []

    def batches() -> Iterator[Tensor]:
        for index in itertools.count():
            drawn.append(index)
            yield torch.full((2, 1), float(index))

    source = as_batch_source(batches(), 2)
    assert (drawn, source.images) == ([], None)
    assert next(iter(source.batches)).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (None, "gives None, which is not a source of batches"),
        (3, "gives an int, which is not a source"),
        ("train", "gives a str, which is not a source"),
        (torch.ones(4, 1), "gives a Tensor, which is not a source"),
        ({"x": 1}, "gives a dict, which is not a source"),
        ([DataLoader(images())] * 4, "gives a list of DataLoader and DataLoader and DataLoader and DataLoader, but"),
        ({"a": DataLoader(images())}, "gives a dict, but a single loader is needed"),
    ],
)
def test_what_is_no_data(data: Any, kind: str) -> None:
    assert kind in data_error(data, 2)


# ---- exceptions of the user's


class Broken(Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        if index == 4:
            raise FileNotFoundError("image 4")
        return torch.ones(1)


class BrokenLength(Broken):
    def __len__(self) -> int:
        raise KeyError("root")


def test_an_exception_while_a_batch_is_drawn_names_the_batch() -> None:
    iterator = iter(as_batch_source(DataLoader(Broken(), batch_size=2), 2, "loader of model.py").batches)
    assert [len(next(iterator)) for _ in range(2)] == [2, 2]
    with pytest.raises(UserCodeError) as caught:
        next(iterator)
    assert caught.value.call == "drawing batch 3 from loader of model.py"
    assert __file__ in caught.value.frames


def test_an_exception_in_len() -> None:
    with pytest.raises(UserCodeError, match="KeyError while asking for the length of the data given"):
        as_batch_source(BrokenLength(), 2)


# ---- finding it in the user's files


def module(folder: Path, text: str, name: str = "model.py") -> UserModule:
    path = folder / name
    path.write_text(HEAD + text, encoding="utf-8")
    return resolve(str(path))[0]


def find(folder: Path, text: str, **spec: Any) -> BatchSource:
    return load_source(DataSpec(**spec), module(folder, text))


def test_order_load_data_loader_dataset(tmp_path: Path) -> None:
    dataset = "dataset = images\n"
    loader = dataset + "loader = DataLoader(images, batch_size=5)\n"
    load_data = loader + "def load_data(batch_size): return DataLoader(images, batch_size=batch_size)\n"
    path = tmp_path / "model.py"
    assert find(tmp_path, dataset, batch_size=2).description == f"dataset of {path} (10 samples)"
    assert find(tmp_path, loader, batch_size=2).description == f"loader of {path} (10 samples)"
    assert find(tmp_path, load_data, batch_size=2).description == f"load_data of {path} (10 samples)"
    assert find(tmp_path, load_data, target="loader").batch_size == 5


def test_a_target_in_another_file(tmp_path: Path) -> None:
    home = module(tmp_path, "loader = 3\n")
    module(tmp_path, "def load(batch_size, count): return [torch.ones(batch_size, count)]\n", "data.py")
    spec = DataSpec(target=f"{tmp_path / 'data.py'}:load", args={"count": 3}, batch_size=2)
    assert [tuple(batch.shape) for batch in load_source(spec, home).batches] == [(2, 3)]


def test_the_models_own_file_is_not_run_twice(tmp_path: Path) -> None:
    home = module(tmp_path, "dataset = images\n")
    (tmp_path / "model.py").write_text("raise RuntimeError", encoding="utf-8")
    assert load_source(DataSpec(target=str(tmp_path / "model.py"), batch_size=2), home).images == 10


def test_a_target_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'has no "load_dat"\. Did you mean "load_data"'):
        find(tmp_path, "def load_data(): pass\n", target="load_dat")
    module(tmp_path, "x = 1\n", "data.py")
    with pytest.raises(DataError, match=r"data\.py has no load_data\(batch_size\), loader or dataset"):
        find(tmp_path, "dataset = images\n", target=str(tmp_path / "data.py"))


def test_classes_and_lists_of_samples(tmp_path: Path) -> None:
    text = (
        "class Three(Dataset):\n    def __init__(self, add): self.add = add\n"
        "    def __len__(self): return 3\n    def __getitem__(self, i): return torch.tensor([i + self.add])\n"
        "dataset = [torch.tensor([7.0]), torch.tensor([8.0])]\n"
    )
    three = find(tmp_path, text, target="Three", args={"add": 4}, batch_size=2)
    assert sorted(itertools.chain(*values(three))) == [4, 5, 6]
    assert [sorted(batch) for batch in values(find(tmp_path, text, batch_size=2))] == [[7, 8]]


def test_load_data_without_a_batch_size_is_rebuilt(tmp_path: Path) -> None:
    text = "def load_data(): return DataLoader(images, batch_size=5)\n"
    assert [len(batch) for batch in values(find(tmp_path, text, batch_size=4))] == [4, 4, 2]
    assert find(tmp_path, text).batch_size == 5


def test_what_load_data_made_of_its_batch_size_is_not_rebuilt(tmp_path: Path) -> None:
    """E.g. a sampler that draws P classes of K samples each, for a loss on pairs."""
    text = "def load_data(batch_size): return DataLoader(images, batch_size=5)\n"
    source = find(tmp_path, text, batch_size=4)
    assert ([len(batch) for batch in values(source)], source.batch_size) == ([5, 5], 5)
    assert "was told batch size 4, but gave a loader of batch size 5" in source.notes[0]
    assert source.notes[0].endswith("so all figures are for batches of 5.")
    pairs = "def load_data(bs): return DataLoader(images, batch_sampler=[[0, 1, 2, 5, 6, 7]] * 3)\n"
    source = find(tmp_path, pairs, batch_size=4)
    assert source.batch_size == 6
    assert source.notes[0].endswith("samples. The loader was used as it is, so all figures are for its batches.")


def test_load_data_is_trusted_where_the_loader_does_not_say_its_size(tmp_path: Path) -> None:
    text = (
        "def load_data(batch_size):\n"
        "    buckets = [[i, i + 1] for i in range(0, 10, 2)]\n"
        "    return DataLoader(images, batch_sampler=buckets)\n"
    )
    source = find(tmp_path, text, batch_size=2)
    assert (source.batch_size, len(values(source))) == (2, 5)
    with pytest.raises(DataError, match="its batch size is 2"):
        find(tmp_path, text.replace("(batch_size)", "()"), batch_size=3)


def test_the_batch_size_that_load_data_has_by_default(tmp_path: Path) -> None:
    assert find(tmp_path, "def load_data(batch_size=4): return images\n").batch_size == 4
    assert find(tmp_path, "def load_data(**options): return images\n", batch_size=3).batch_size == 3
    assert find(tmp_path, "def load_data(batch_size): return images\n", args={"batch_size": 3}).batch_size == 3
    with pytest.raises(UsageError, match=r"load_data of .* needs a batch size. Give one with --batch-size"):
        find(tmp_path, "def load_data(batch_size): return images\n")


def test_load_data_that_fails(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        find(tmp_path, "def load_data(batch_size):\n    raise OSError('no disk')\n", batch_size=2)
    assert caught.value.call == f"calling load_data(batch_size=2) of {tmp_path / 'model.py'}"
    with pytest.raises(DataError, match=r"load_data of .* gives None, which is not a source of batches"):
        find(tmp_path, "def load_data(batch_size): pass\n", batch_size=2)


def test_args_for_data_that_takes_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"loader of .* is a DataLoader, so it cannot take data.args \(root\)"):
        find(tmp_path, "loader = DataLoader(images)\n", args={"root": "x"}, batch_size=2)


# ---- synthetic inputs


def test_no_data_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.py has no load_data\(batch_size\).*--input-shape"):
        find(tmp_path, "")
    with pytest.raises(DataError, match=r"There is no data\. Name some with --data"):
        load_source(DataSpec(batch_size=2), None)


def test_real_data_comes_before_synthetic(tmp_path: Path) -> None:
    source = find(tmp_path, "dataset = images\n", batch_size=2, input_shape=((1,),))
    assert not source.synthetic
    assert "--input-shape was not used" in source.notes[0]


def test_synthetic_images(tmp_path: Path) -> None:
    source = find(tmp_path, "", batch_size=2, input_shape=((3, 4, 4),), seed=1)
    assert (source.synthetic, source.batch_size) == (True, 2)
    assert source.description == "synthetic inputs of shape 3x4x4"
    first, second = itertools.islice(source.batches, 2)
    assert (first.shape, first.dtype) == ((2, 3, 4, 4), torch.float32)
    assert not torch.equal(first, second)
    assert torch.equal(next(iter(source.batches)), first)
    with pytest.raises(UsageError, match="The batch size of synthetic inputs is unknown"):
        find(tmp_path, "", input_shape=((3, 4, 4),))


def test_synthetic_images_leave_the_global_generator_alone_and_are_normal() -> None:
    state = torch.get_rng_state()
    source = synthetic_source([(100,), (2, 2)], 200, seed=3)
    large, small = next(iter(source.batches))
    assert torch.equal(torch.get_rng_state(), state)
    assert small.shape == (200, 2, 2)
    assert abs(large.mean().item()) < 5 / 20000**0.5
    assert abs(large.var().item() - 1) < 5 * (2 / 20000) ** 0.5


# ---- names, pairs and held-out data


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("train_loader = DataLoader(images, batch_size=2)\n", "train_loader"),
        ("trainloader = DataLoader(images, batch_size=2)\n", "trainloader"),
        ("def get_train_dataloader(bs): return DataLoader(images, batch_size=bs)\n", "get_train_dataloader"),
        ("def get_loader(batch=64): return DataLoader(images, batch_size=batch)\n", "get_loader"),
        ("train_dataset = images\n", "train_dataset"),
    ],
)
def test_data_under_common_names(tmp_path: Path, text: str, name: str) -> None:
    source = find(tmp_path, text, batch_size=2)
    assert source.description.startswith(f"{name} of ")
    assert source.batch_size == 2


def test_a_loader_of_ones_own_under_a_common_name(tmp_path: Path) -> None:
    own = (
        "class Ahead:\n"
        "    def __init__(self, loader): self.loader = loader\n"
        "    def __iter__(self): return iter(self.loader)\n"
        "ahead = Ahead(DataLoader(images, batch_size=5))\n"
    )
    source = find(tmp_path, f"{own}train_loader = ahead\n", batch_size=5)
    assert [len(batch) for batch in values(source)] == [5, 5]
    for other in ("train_set = ahead\n", "train_loader = iter(ahead)\n", "train_loader = 'path'\n"):
        with pytest.raises(DataError, match=r"has no load_data\(batch_size\), loader or dataset"):
            find(tmp_path, own + other, batch_size=5)


def test_common_names_come_last_and_must_be_data(tmp_path: Path) -> None:
    text = "train_loader = DataLoader(images, batch_size=5)\ndef get_train_loader(root): raise OSError\n"
    assert find(tmp_path, text + "dataset = images\n", batch_size=2).description.startswith("dataset of ")
    with pytest.raises(DataError, match="has no load_data"):
        find(tmp_path, "def get_train_loader(root): raise OSError\ntrain_set = 3\n", batch_size=2)
    # Synthetic inputs were asked for: only the documented names come before these.
    assert find(tmp_path, text, batch_size=2, input_shape=((1,),)).synthetic


@pytest.mark.parametrize("parameter", ["bs", "batch", "n", "train_batch_size", "batchSize", "batch_size"])
def test_the_batch_size_under_other_names(tmp_path: Path, parameter: str) -> None:
    text = f"def load_data({parameter}): return DataLoader(images, batch_size={parameter})\n"
    assert find(tmp_path, text, batch_size=2).batch_size == 2
    with pytest.raises(UsageError, match="needs a batch size"):
        find(tmp_path, text)


def test_a_short_name_with_a_default_is_no_batch_size(tmp_path: Path) -> None:
    text = "def load_data(n=6): return DataLoader(TensorDataset(torch.zeros(n, 1)), batch_size=3)\n"
    source = find(tmp_path, text, batch_size=2)
    assert (source.images, source.batch_size) == (6, 2)


def test_arguments_that_only_the_user_knows_are_asked_for(tmp_path: Path) -> None:
    text = "def load_data(batch_size, root): return images\n"
    with pytest.raises(DataError, match=r"load_data of .* needs root, but .* \(data: args\)"):
        find(tmp_path, text, batch_size=2)
    assert find(tmp_path, text, batch_size=2, args={"root": "x"}).batch_size == 2


PAIRS = {
    "tuple": "return loader(0), loader(1)",
    "triple": "return loader(0), loader(1), loader(2)",
    "dict": "return {'train': loader(0), 'val': loader(1)}",
    "names": "return {'train_loader': loader(0), 'test_loader': loader(1)}",
    "with other things": "return loader(0), 10",
}


@pytest.mark.parametrize("what", PAIRS)
def test_training_and_held_out_data_from_one_function(tmp_path: Path, what: str) -> None:
    loader = "def loader(n): return DataLoader(TensorDataset(torch.full((4, 1), float(n))), batch_size=2)\n"
    source = find(tmp_path, f"{loader}def load_data(batch_size):\n    {PAIRS[what]}\n", batch_size=2)
    assert values(source) == [[0, 0], [0, 0]]
    assert "gives several values" in source.notes[-1]
    if what == "with other things":
        assert source.beside is None
    else:
        assert source.beside is not None
        assert values(source.beside) == [[1, 1], [1, 1]]


def test_loaders_that_come_with_held_out_data_go_before_a_data_set(tmp_path: Path) -> None:
    loader = "def made(n): return DataLoader(TensorDataset(torch.full((4, 1), float(n))), batch_size=2)\n"
    text = f"{loader}trainset = images\ndef get_loaders(batch_size): return made(0), made(1)\n"
    source = find(tmp_path, text, batch_size=2)
    assert source.description.startswith("get_loaders of ")
    assert source.beside is not None
    assert source.beside.description.startswith("the validation data of get_loaders of ")


def held_out(folder: Path, text: str, size: int = 4, **spec: Any) -> BatchSource:
    found = load_held_out(EvalDataSpec(**spec), module(folder, text), size)
    assert found is not None
    return found


def test_held_out_data_is_read_at_the_size_that_it_has(tmp_path: Path) -> None:
    one = "def load_eval_data(batch_size=1): return DataLoader(images, batch_size=1)\n"
    assert held_out(tmp_path, one).batch_size == 1
    assert held_out(tmp_path, "val_loader = DataLoader(images, batch_size=5)\n").batch_size == 5
    assert held_out(tmp_path, "val_loader = DataLoader(images, batch_size=64)\n").batch_size == 10  # all of it
    assert held_out(tmp_path, "test_dataset = images\n").batch_size == 4
    asked = "def load_eval_data(batch_size): return DataLoader(images, batch_size=batch_size)\n"
    assert held_out(tmp_path, asked).batch_size == 4
    assert held_out(tmp_path, asked, batch_size=2).batch_size == 2  # eval_data.batch_size in the spec


# ---- loaders around loaders


class Prefetcher:
    """What timm's PrefetchLoader is: moves the batches of a loader to the device ahead of time."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader


def test_a_loader_around_a_loader_has_its_batch_size(tmp_path: Path) -> None:
    source = as_batch_source(Prefetcher(DataLoader(images(), batch_size=5)))
    assert (source.batch_size, len(values(source))) == (5, 2)
    assert "The first batch of the loader has 5 samples, not 2" in data_error(Prefetcher(DataLoader(images(), 5)), 2)


def test_batch_size_of_is_found_in_the_model_file_or_named_in_the_spec(tmp_path: Path) -> None:
    text = (
        "def load_data(batch_size): return [{'x': torch.zeros(34, 2), 'edges': torch.zeros(2, 50)}] * 3\n"
        "def batch_size_of(batch): return 16\n"
        "def other(batch): return torch.tensor(8)\n"
        "def wrong(batch): return 'many'\n"
    )
    assert find(tmp_path, text, batch_size=4).batch_size == 16
    assert find(tmp_path, text, batch_size=4, batch_size_of="other").batch_size == 8
    with pytest.raises(DataError, match="a whole number from 0, but gave a str"):
        find(tmp_path, text, batch_size=4, batch_size_of="wrong")
    with pytest.raises(DataError, match="def batch_size_of"):
        find(tmp_path, text.replace("def batch_size_of", "def unused"), batch_size=4)
