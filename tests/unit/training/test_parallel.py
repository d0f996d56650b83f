"""Two real processes train one model: alike, as one process on the same global batch, and together to the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bnprobe.distributed import World
from bnprobe.training.feed import Feed, steps_per_epoch
from support.finetuning import Noisy, job, network, same_bits, source, trained
from support.ranks import frozen, launch, ordered, synced

Ranks = dict[str, list[Any]]


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


def test_running_statistics_are_merged_by_count(all_ranks: Ranks) -> None:
    """Chan's formula on what each process has after its own micro-batch of the first step."""
    merged = all_ranks["one step"][0]["model"]
    batches = list(ordered(4).batches)[:2]
    models = [network(dropout=0.0).train() for _ in batches]
    for model, batch in zip(models, batches, strict=True):
        model(batch[0])
    means, variances = (
        torch.stack([getattr(model[1], name) for model in models]).double() for name in ("running_mean", "running_var")
    )
    mean = means.mean(0)
    variance = (variances + (means - mean).square()).mean(0)
    torch.testing.assert_close(merged["1.running_mean"].double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(merged["1.running_var"].double(), variance, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(variance, variances.mean(0), rtol=1e-4)
    assert merged["1.num_batches_tracked"] == 1


def test_a_loss_that_goes_past_the_model(all_ranks: Ranks) -> None:
    for found in all_ranks["parts"]:
        assert found.startswith("UsageError: With several processes loss(model, batch) must call the model itself")


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
