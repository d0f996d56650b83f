"""Data that cannot be used, or that ends early."""

from __future__ import annotations

import pytest

from functional.command import CLEAN, ERROR, FINDINGS, MODEL, SHIFTED, Workspace

UNUSABLE = [
    pytest.param(
        "def load_data(batch_size):\n    return []\n",
        "load_data of model.py is empty: it yields no batch.",
        id="empty-list",
    ),
    pytest.param(
        "def load_data(batch_size):\n    yield from ()\n",
        "The data contains no batch: the loader or data set is empty.",
        id="empty-generator",
    ),
    pytest.param(
        "def load_data(batch_size):\n    return DataLoader(TensorDataset(images()[:0]), batch_size=batch_size)\n",
        "load_data of model.py is empty: its data set has no samples.",
        id="empty-data-set",
    ),
    pytest.param(
        "del load_data\n",
        "model.py has no load_data(batch_size), loader or dataset. Add one of them",
        id="no-data",
    ),
    pytest.param(
        "def load_data(batch_size):\n    return images()\n",
        "load_data of model.py gives a Tensor, which is not a source of batches.",
        id="a-tensor",
    ),
    pytest.param(
        "def load_data(batch_size):\n    yield images()[:2]\n    raise OSError('the disk is gone')\n",
        "OSError while drawing batch 2 from load_data of model.py: the disk is gone",
        id="exception-in-the-loader",
    ),
    pytest.param(
        "def load_data(batch_size):\n    yield {'x': images()[:9], 'edges': torch.zeros(4, 5)}\n",
        "Add this line to the model file, with what has one entry per sample: def batch_size_of(batch): return",
        id="samples-that-cannot-be-counted",
    ),
    pytest.param(
        "del load_data\nloader = list(images().split(3))\n",
        "The first batch of loader of model.py has 3 samples, not 2, and only a loader or data set can be read",
        id="a-list-of-batches-of-another-size",
    ),
    pytest.param(
        "def load_data(batch_size):\n    rows = images()\n    rows[5, 1, 2, 3] = float('nan')\n"
        "    return DataLoader(TensorDataset(rows), batch_size=batch_size)\n",
        "Micro-batch 15 (the first is 1) holds NaN or Inf in its tensor [0] of shape (2, 2, 8, 8), "
        "first in its sample 1 (the first is 0), item 5 of the data set.",
        id="nan-in-inputs",
    ),
    pytest.param(
        "class Stream(torch.utils.data.IterableDataset):\n    def __iter__(self):\n        return iter(images())\n"
        "def load_data():\n    return DataLoader(Stream(), batch_size=4)\n",
        "load_data of model.py",
        id="a-loader-that-cannot-be-rebuilt",
    ),
]


@pytest.mark.parametrize(("change", "said"), UNUSABLE)
def test_data_that_cannot_be_used_is_explained(workspace: Workspace, change: str, said: str) -> None:
    workspace.write("model.py", MODEL + change)
    assert said in workspace.scan().error()


@pytest.mark.parametrize(
    ("images", "used", "left_over"),
    [
        pytest.param(10, "5 micro-batches × 2 = 10 samples", None, id="early"),
        pytest.param(11, "5 micro-batches × 2 = 10 samples", "1 sample left over", id="partial-last-batch"),
        pytest.param(2, "1 micro-batch × 2 = 2 samples", None, id="of-length-1"),
    ],
)
def test_data_that_ends_early_is_used_and_counted(
    workspace: Workspace, images: int, used: str, left_over: str | None
) -> None:
    workspace.write("model.py", MODEL.replace("IMAGES = 64", f"IMAGES = {images}"))
    found = workspace.scan("--batches", "16")
    said = " ".join(found.stdout.split())
    assert found.code == CLEAN
    assert used in said
    assert "all the data, 16 micro-batches were requested" in said
    assert (left_over in said) if left_over else ("left over" not in said)


SIZES = {
    "a generator": ("    yield from images().split(3)\n", "22 micro-batches of 1 to 3 = 64 samples"),
    "a loader": ("    return DataLoader(TensorDataset(images()), batch_size=4)\n", "16 micro-batches × 4 = 64 samples"),
    "one small batch": ("    yield images()[:1]\n", "1 micro-batch × 1 = 1 sample"),
    "token budget": (
        "    for n in (5, 2, 9) * 4:\n        yield images()[:n]\n",
        "12 micro-batches of 2 to 9 = 64 samples",
    ),
    "names left out": ("    yield from ((x, None, ['a'] * len(x)) for x in images().split(2))\n", "× 2 = 64 samples"),
}


@pytest.mark.parametrize("kind", SIZES)
def test_what_load_data_gives_is_measured_at_the_size_that_it_has(workspace: Workspace, kind: str) -> None:
    text, used = SIZES[kind]
    workspace.write("model.py", MODEL + f"def load_data(batch_size):\n{text}")
    found = workspace.scan("--batches", "64")
    assert found.stderr == ""
    assert used in " ".join(found.stdout.split())


def test_held_out_data_is_served_one_by_one(workspace: Workspace) -> None:
    served = "def load_eval_data(batch_size=1):\n    return DataLoader(TensorDataset(images()[:7]), batch_size=1)\n"
    workspace.write("model.py", MODEL + served)
    report = workspace.scan("--format", "json").report(CLEAN)
    assert [extra["images"] for extra in report["scan"]["passes"] if extra["name"] == "held-out data"] == [7]


def test_noise_fails_no_build(workspace: Workspace) -> None:
    workspace.write(
        "model.py", SHIFTED + "def trained():\n    net = Net()\n    net.bn.running_mean += 5\n    return net\n"
    )
    options = ("scan", "model.py:trained", "--batch-size", "2")
    assert workspace.run(*options).code == FINDINGS
    workspace.write("model.py", (workspace.folder / "model.py").read_text() + "del load_data\n")
    found = workspace.run(*options, "--input-shape", "2,8,8")
    assert found.code == CLEAN
    assert "The inputs were generated" in found.stdout


def test_an_input_shape_that_is_not_used_is_said_first(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    notes = workspace.scan("--format", "json", "--input-shape", "2,8,8").report(CLEAN)["scan"]["notes"]
    assert notes[0].startswith("--input-shape was not used: load_data of model.py")


def test_one_micro_batch_decides_nothing(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL.replace("IMAGES = 64", "IMAGES = 2"))
    found = workspace.scan()
    assert "1 of 1 layer is undecided" in found.stdout
    assert "All data was used. More data or another --threshold is needed to decide." in found.stdout


def test_a_loader_that_fails_late_loses_nothing(workspace: Workspace) -> None:
    late = "def load_data(batch_size):\n    yield from images().split(2)[:20]\n    raise OSError('the disk is gone')\n"
    workspace.write("model.py", MODEL + late)
    found = workspace.scan("--batches", "30", "--physical-batch", "8")
    assert found.code == ERROR
    assert "PARTIAL, failed" in found.stdout
    assert "20 micro-batches × 2 = 40 samples" in found.stdout
    assert "OSError while drawing batch 21 from load_data of model.py: the disk is gone" in found.stderr


def test_an_infinite_loader_is_read_as_far_as_needed(workspace: Workspace) -> None:
    endless = "def load_data(batch_size):\n    while True:\n        yield torch.randn(batch_size, 2, 8, 8)\n"
    workspace.write("model.py", MODEL + endless)
    scan = workspace.scan("--format", "json", "--batches", "5").report(CLEAN)["scan"]
    assert (scan["batches"], scan["stopped"], scan["left_out"]) == (5, "requested", 0)


def test_a_stream_at_its_own_batch_size_is_read(workspace: Workspace) -> None:
    stream = (
        "class Stream(torch.utils.data.IterableDataset):\n    def __iter__(self):\n        return iter(images())\n"
        "def load_data():\n    return DataLoader(Stream(), batch_size=4)\n"
    )
    workspace.write("model.py", MODEL + stream)
    scan = workspace.run("scan", "model.py", "--format", "json").report(CLEAN)["scan"]
    assert scan["batch_size"] == 4


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("0", "Expected a whole number of at least 1 for --batch-size, but got 0."),
        ("-1", "Expected a whole number of at least 1 for --batch-size, but got -1."),
        (
            "65",
            "Batch size 65 is larger than the data set of 64 samples (load_data of model.py). Give a --batch-size of",
        ),
    ],
)
def test_a_batch_size_that_cannot_be_is_explained(workspace: Workspace, size: str, said: str) -> None:
    workspace.write("model.py", MODEL)
    assert said in workspace.run("scan", "model.py", "--batch-size", size).error()


def test_a_batch_size_that_is_not_known_is_asked_for(workspace: Workspace) -> None:
    workspace.write("model.py", MODEL)
    said = "load_data of model.py needs a batch size. Give one with --batch-size."
    assert workspace.run("scan", "model.py").error() == said
