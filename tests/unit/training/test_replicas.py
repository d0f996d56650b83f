"""Two real processes train one model: alike, as one process on the same global batch, and together to the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnprobe.distributed import World
from bnprobe.training import Job
from bnprobe.training.data import Feed, steps_per_epoch
from bnprobe.training.job import weights_of
from support.finetuning import Noisy, cross_entropy, job, network, same_bits, source, trained
from support.ranks import (
    NORMS,
    by_label,
    cumulative_domains,
    domains,
    frozen,
    launch,
    moving,
    ordered,
    renorm,
    still,
    synced,
)

Ranks = dict[str, list[Any]]
Norm = Callable[[int], nn.Module]


@pytest.fixture(scope="module")
def all_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each of two processes found in every case: they are started once."""
    return launch(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ["synced", "frozen", "accumulated"])
def test_two_processes_are_one_with_the_global_batch(all_ranks: Ranks, case: str) -> None:
    norm = synced if case == "synced" else frozen
    clip = 0.5 if case == "accumulated" else None
    model = network(norm, dropout=0.0)
    outcome, steps = trained(job(model, source=ordered(8), clip_norm=clip))
    ranks = all_ranks[case]
    assert same_bits(ranks[0]["model"], ranks[1]["model"])
    assert ranks[0]["losses"] == pytest.approx([step.loss for step in steps], rel=1e-5)
    assert ranks[1]["losses"] == []  # the first process alone reports
    other = network(norm, dropout=0.0)
    other.load_state_dict(ranks[0]["weights"])
    images = Noisy().images
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images), model.eval()(images), rtol=0, atol=1e-5)
    for name, value in outcome.weights.items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, rtol=1e-4, atol=1e-5)


def test_plain_bn_ends_alike_in_every_process(all_ranks: Ranks) -> None:
    one, two = all_ranks["plain"]
    assert same_bits(one["model"], two["model"])
    assert same_bits(one["weights"], two["weights"])
    assert one["summary"] == two["summary"]


def test_the_windows_of_cross_iteration_layers_end_alike(all_ranks: Ranks) -> None:
    one, two = all_ranks["cross-iteration"]
    assert same_bits(one["model"], two["model"])
    assert one["model"]["1.batches_seen"] == 12
    assert one["model"]["1.slopes"].any()


def statistics(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[f"1.{name}"].double() for name in ("running_mean", "running_var", "num_batches_tracked")}


def alone(case: Job) -> dict[str, Tensor]:
    """The buffers of the first norm layer after one process has trained by itself."""
    trained(case)
    return statistics(weights_of(case.model))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_the_buffers_are_those_of_one_process_with_the_global_batch(all_ranks: Ranks, norm: Norm) -> None:
    """Over 12 steps, of which some are of 4 and 3 images: mean, unbiased variance and count."""
    merged = statistics(all_ranks[f"still {norm.__name__}"][0]["model"])
    torch.testing.assert_close(merged, alone(still(norm, 8)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("norm", [domains, cumulative_domains], ids=lambda norm: norm.__name__)
def test_the_statistics_of_domains_are_those_of_one_process(all_ranks: Ranks, norm: Norm) -> None:
    """Also where only one process has a domain in its batch, or each has one image of it."""
    expected = still(norm, 4, 40, loss=by_label)
    trained(expected)
    for found in all_ranks[f"still {norm.__name__}"]:
        for name, buffer in expected.model[1].named_buffers():
            torch.testing.assert_close(found["model"][f"1.{name}"], buffer, rtol=2e-6, atol=2e-6)
    assert len(set(expected.model[1].domain_batches.tolist())) > 1, "all domains are in all batches"


def test_the_averages_of_the_last_batches_are_those_of_one_process(all_ranks: Ranks) -> None:
    expected = still(moving, 8)
    trained(expected)
    for found in all_ranks["still moving"]:
        for name in ("running_mean", "running_var", "batch_means", "batch_vars", "batches_seen", "gradients_seen"):
            value = found["model"][f"1.{name}"]
            torch.testing.assert_close(value, getattr(expected.model[1], name), rtol=2e-6, atol=2e-6)


def test_the_averages_of_gradients_are_over_the_processes(all_ranks: Ranks) -> None:
    """After the first step, from the gradient that each process finds by itself."""
    own = []
    for batch in list(ordered(4).batches)[:2]:
        model = network(moving, dropout=0.0)
        cross_entropy(model, batch).backward()
        own.append(model[1])
    for found in all_ranks["moving"]:
        for name in ("gradient_means", "gradient_products"):
            expected = (getattr(own[0], name) + getattr(own[1], name)) / 2
            assert expected[0].abs().max() > 1e-4 if name == "gradient_products" else True
            torch.testing.assert_close(found["model"][f"1.{name}"], expected, rtol=1e-5, atol=1e-7)


def test_one_value_per_channel_in_each_process(all_ranks: Ranks) -> None:
    """No process knows a variance; all of it lies between them."""
    merged = statistics(all_ranks["still single"][0]["model"])
    torch.testing.assert_close(merged, alone(still(renorm, 2, images=8, steps=4)), rtol=2e-6, atol=2e-6)
    assert (merged["running_var"] - 1).abs().min() > 0.01


def test_accumulated_micro_batches_are_those_of_one_process(all_ranks: Ranks) -> None:
    """Three calls in a step, of 2 images in each process and of 4 in one."""
    merged = statistics(all_ranks["still accumulated"][0]["model"])
    expected = alone(still(nn.BatchNorm1d, 4, images=40, accumulate=3))
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=2e-6)


def test_running_statistics_are_merged_by_the_formula(all_ranks: Ranks) -> None:
    """After the first step, in float64 from the images themselves."""
    merged = statistics(all_ranks["one step"][0]["model"])
    model = network(dropout=0.0)
    inputs = model[0](torch.cat([batch[0] for batch in list(ordered(4).batches)[:2]])).detach().double()
    expected = {
        "running_mean": 0.1 * inputs.mean(0),
        "running_var": 0.9 + 0.1 * inputs.var(0, correction=1),
        "num_batches_tracked": torch.tensor(1.0).double(),
    }
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("case", "images"), [("ghosts", 8), ("ghosts, uneven", 7)])
def test_ghost_batches_of_processes_are_averaged(all_ranks: Ranks, case: str, images: int) -> None:
    """Uneven: 4 images of the first process in two parts, 3 of the second in one."""
    one, two = (statistics(found["model"]) for found in all_ranks[case])
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    model = network(dropout=0.0)
    inputs = model[0](torch.cat([batch[0] for batch in list(ordered(4, images).batches)[:2]])).detach().double()
    processes = [part.tensor_split(-(-len(part) // 3)) for part in inputs.split(4)]
    kept = 0.7 ** max(len(parts) for parts in processes)
    mean, variance = torch.zeros(2, inputs.shape[1], dtype=torch.float64)
    for parts in processes:
        share, weight = sum(map(len, parts)) / images, 0.0
        own = torch.zeros(2, inputs.shape[1], dtype=torch.float64)
        for part in parts:
            own, weight = 0.7 * own + 0.3 * torch.stack([part.mean(0), part.var(0)]), 0.7 * weight + 0.3
        mean, variance = mean + share * own[0] / weight, variance + share * own[1] / weight
    torch.testing.assert_close(one["running_mean"], (1 - kept) * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["running_var"], kept + (1 - kept) * variance, rtol=1e-5, atol=1e-6)


def test_a_loss_that_goes_past_the_model(all_ranks: Ranks) -> None:
    for found in all_ranks["parts"]:
        assert found.startswith("UsageError: With several processes, loss(model, batch) must call the model itself")


def test_told_to_stop_all_stop_at_one_step_and_go_on(all_ranks: Ranks) -> None:
    stopped = all_ranks["stopping"]
    assert "in another process after step 3 of 12" in stopped[0]
    assert "by SIGTERM after step 3 of 12" in stopped[1]
    resumed, whole = all_ranks["resumed"], all_ranks["whole"]
    for found, expected in zip(resumed, whole, strict=True):
        assert same_bits(found["model"], expected["model"])
    assert resumed[0]["losses"] == whole[0]["losses"][3:]


def test_a_process_that_diverges_ends_all(all_ranks: Ranks) -> None:
    for found in all_ranks["diverging"]:
        assert found["summary"][:3] == (0, 0, "diverged")
        assert found["summary"][3].startswith("Diverged in step 1: the loss is inf.")


def test_rounds_that_are_incomplete_are_left_out() -> None:
    feeds = [Feed(source(images=30), 0, 2, World(rank, 2)) for rank in range(2)]
    whole = Feed(source(images=30), 0)
    order = [whole.next_group()[0][0] for _ in range(8)]
    assert steps_per_epoch(source(images=30), 2, World(0, 2)) == 2
    for rank, feed in enumerate(feeds):
        dealt = [batch[0] for _ in range(2) for batch in feed.next_group()]
        assert [torch.equal(one, two) for one, two in zip(dealt, order[rank::2], strict=True)] == [True] * 4
        feed.next_group()
        assert feed.epoch == 1
