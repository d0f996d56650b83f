"""What a step of training costs beyond the same step of a loop written by hand: operators and waits, not seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn

from bnprobe.errors import UserCodeError
from bnprobe.loading.data import as_batch_source
from bnprobe.nn import BatchRenorm1d
from support.finetuning import cross_entropy, job, network, sgd, source, trained
from support.operators import WAIT, Operators

BATCHES = list(source(noise=0.0).batches)


def of_a_step(run: Callable[[int], object]) -> Counter[Any]:
    """Operators of one step, as the difference between a longer and a shorter run."""
    found = []
    for steps in (4, 5):
        with Operators() as operators:
            run(steps)
        found.append(operators.found)
    return found[1] - found[0]


def by_hand(model: nn.Module, steps: int) -> None:
    optimizer = sgd(list(model.train().parameters()))
    for batch in BATCHES[:steps]:
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize(("norm", "more"), [(nn.BatchNorm1d, 0), (BatchRenorm1d, 2 * 7 + 3)], ids=["BN", "renorm"])
def test_a_step_is_little_more_than_that_of_a_loop(norm: Any, more: int) -> None:
    """A copy of the batch, which the loss may write into, and the norm of the gradient; what each layer clips."""
    options: dict[str, Any] = {"source": as_batch_source(BATCHES, 4), "evaluate_every": 100}
    ours = of_a_step(lambda steps: trained(job(network(norm), **options, steps=steps)))
    plain = of_a_step(lambda steps: by_hand(network(norm), steps))
    assert plain[WAIT] == 0
    assert ours[WAIT] == 2  # loss and gradient, which decide whether the step is taken
    assert (ours - plain).total() <= 12 + more


class Failing:
    """Ten batches, and an error where there should be an eleventh."""

    def __iter__(self) -> Iterator[Any]:
        yield from BATCHES
        raise OSError("disk gone")


def test_what_fails_in_reading_ahead_fails_where_it_is_needed() -> None:
    batches = as_batch_source(Failing(), 4)
    assert trained(job(source=batches, steps=10))[0].ending == "finished"
    with pytest.raises(UserCodeError, match="OSError while drawing batch 11"):
        trained(job(source=batches, steps=11))
