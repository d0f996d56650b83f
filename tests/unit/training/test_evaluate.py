"""Scores at inference: weighted by images, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnprobe.errors import DataError, UserCodeError
from bnprobe.records import Score
from bnprobe.training import evaluate
from support.finetuning import CPU, Noisy, cross_entropy, network, source
from support.fingerprint import fingerprint


def accuracy(model: nn.Module, batch: Any) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def batches(*sizes: int) -> list[Any]:
    data = Noisy()
    return list(zip(data.images.split(list(sizes)), data.labels.split(list(sizes)), strict=True))


def test_means_are_over_images() -> None:
    model = network()
    whole = evaluate(model, batches(40), cross_entropy, accuracy, CPU, None)
    parts = evaluate(model, batches(16, 16, 5, 3), cross_entropy, accuracy, CPU, None)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.metric == pytest.approx(whole.metric, rel=1e-12)
    data = Noisy()
    with torch.no_grad():
        model.eval()
        assert whole.loss == pytest.approx(float(cross_entropy(model, (data.images, data.labels))), rel=1e-6)


def test_the_model_and_the_random_state_are_untouched() -> None:
    model = network()
    model[3].eval()
    before = fingerprint(model)
    evaluate(model, source().batches, cross_entropy, accuracy, CPU, None)
    assert fingerprint(model) == before
    with pytest.raises(UserCodeError, match=r"calling metric\(model, batch\) \(evaluation\)"):
        evaluate(model, batches(40), None, lambda model, batch: 1 / 0, CPU, None)
    assert fingerprint(model) == before


def test_every_evaluation_draws_alike() -> None:
    model, noisy = network(), source(generator=torch.Generator().manual_seed(4)).batches
    one = evaluate(model, noisy, cross_entropy, accuracy, CPU, None)
    torch.rand(5)
    assert evaluate(model, noisy, cross_entropy, accuracy, CPU, None) == one


@pytest.mark.parametrize(
    ("loss", "metric", "expected"),
    [
        (None, lambda model, batch: 0.25, Score(None, 0.25)),
        (lambda model, batch: torch.tensor(torch.nan), lambda model, batch: 1, Score(None, 1.0)),
        (lambda model, batch: torch.inf, None, Score(None, None)),
    ],
)
def test_what_is_not_there_or_not_finite(loss: Any, metric: Any, expected: Score) -> None:
    assert evaluate(network(), batches(16, 24), loss, metric, CPU, None) == expected


def test_no_batch() -> None:
    assert evaluate(network(), [], cross_entropy, accuracy, CPU, None) == Score(None, None)


@pytest.mark.parametrize("value", [torch.zeros(2), "good", None])
def test_no_number(value: Any) -> None:
    with pytest.raises(DataError, match=r"metric\(model, batch\) .* but it must return one number"):
        evaluate(network(), batches(40), None, lambda model, batch: value, CPU, None)


def test_autocast_and_no_gradients() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        seen.append((output.dtype, output.requires_grad))
        return output.float().mean()

    evaluate(network(), batches(40), loss, None, CPU, torch.bfloat16)
    assert seen == [(torch.bfloat16, False)]
