"""What raises an alarm: small batches, a mismatch that the loss shows, a gross one, and a loss out of proportion."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from bnprobe.errors import StateError
from bnprobe.monitor.screening import LOSS, UPDATES, Screening
from bnprobe.records import LayerSample, ModeLoss, MonitorSample
from bnprobe.rules.shares import noise_limit
from bnprobe.stats.theory import mismatch_iid

NOISE, LAG = noise_limit(32), mismatch_iid(32)
"""The limits of noise and of all else."""

Seen = tuple[float, float, ModeLoss | None]
"""D, the D of i.i.d. batches, and the loss in both modes."""


def sample(seen: Seen) -> MonitorSample:
    return MonitorSample(0, 32, None, seen[2], {"bn": LayerSample(seen[0], None, 1.0, 0.0)})


def alarm(seen: Iterable[Seen], screening: Screening | None = None) -> tuple[int, list[str]] | None:
    """How many samples the first alarm takes, and what raises it."""
    screening = screening or Screening(["bn", "other"], 0.05)
    for count, each in enumerate(seen, 1):
        if raised := screening.update(sample(each), {"bn": each[1]}, {"bn": True}, {}):
            return count, raised
    return None


def losses(*evals: float) -> Iterator[ModeLoss]:
    return itertools.cycle(ModeLoss(1.0, each) for each in evals)


def steady(mismatch: float, noise: float, *evals: float) -> list[Seen]:
    return [(mismatch, noise, loss) for loss, _ in zip(losses(*evals), range(300), strict=False)]


def test_a_lag_alarms_where_the_loss_shows_it_in_either_direction() -> None:
    assert alarm(steady(3 * LAG, 0.01, 1.1, 0.9)) is None
    for other in (1.1, 0.9):
        found = alarm(steady(3 * LAG, 0.01, other))
        assert found is not None
        assert found[0] <= 20
        assert found[1] == ["bn"]


def test_a_loss_that_is_a_little_worse_alarms_nowhere_while_layers_are_within_their_limit() -> None:
    assert alarm(steady(0.5 * LAG, 0.01, 1.5)) is None


def test_a_loss_that_is_twice_as_large_alarms_by_itself() -> None:
    found = alarm(steady(0.5 * LAG, 0.01, 2.5))
    assert found is not None
    assert found[0] <= 20
    assert found[1] == [LOSS]
    assert alarm(steady(0.5 * LAG, 0.01, 2.5, 1.0)) is None


@pytest.mark.parametrize("mismatch", [10 * LAG, float("inf")])
def test_a_gross_mismatch_alarms_whatever_the_loss_is(mismatch: float) -> None:
    found = alarm(steady(mismatch, 0.01, 1.1, 0.9))
    assert found is not None
    assert found[0] <= 10
    assert found[1] == ["bn"]


def test_small_batches_alarm_by_their_noise_whatever_the_loss_is() -> None:
    assert alarm(steady(0.9 * NOISE, 0.9 * NOISE, 1.1, 0.9)) is None
    found = alarm(steady(3 * NOISE, 3 * NOISE, 1.1, 0.9))
    assert found is not None
    assert found[0] <= 20
    assert found[1] == ["bn"]


def test_without_a_loss_the_mismatch_alone_is_judged_and_with_one_never() -> None:
    found = alarm([(3 * LAG, 0.01, None)] * 50)
    assert found is not None
    assert found[1] == ["bn"]
    mixed = steady(3 * LAG, 0.01, 1.1, 0.9)
    mixed[::3] = [(3 * LAG, 0.01, None)] * len(mixed[::3])
    assert alarm(mixed) is None


def of_layer_in_eval_mode(together: list[float], noise: float = 0.0) -> tuple[int, list[str]] | None:
    """How many samples the first alarm takes where the layer "bn" is held in eval mode; a loss that shows nothing."""
    screening = Screening(["bn", "other"], 0.05)
    for number, each in enumerate(together, 1):
        seen = sample((20 * LAG, noise, ModeLoss(1.0, 1.0)))
        if raised := screening.update(seen, {"bn": noise}, {"bn": True}, {}, {"bn": each}):
            return number, raised
    return None


def test_a_layer_in_eval_mode_alarms_by_its_last_batches_together_and_by_nothing_else() -> None:
    limit = LAG + mismatch_iid(64)
    assert of_layer_in_eval_mode([0.9 * limit] * 300, noise=10 * NOISE) is None
    found = of_layer_in_eval_mode([3 * limit] * 300)
    assert found is not None
    assert found[0] <= 15
    assert found[1] == ["bn"]
    assert of_layer_in_eval_mode([float("nan")] * 300) is None
    found = of_layer_in_eval_mode([float("nan"), float("nan"), float("inf")])
    assert found == (3, ["bn"])


def test_extra_updates_alarm_where_more_than_a_few_samples_have_them() -> None:
    def first(pattern: list[bool]) -> tuple[int, list[str]] | None:
        screening = Screening(["bn"], 0.05)
        for number, extra in enumerate(pattern, 1):
            seen = sample((0.5 * LAG, 0.01, ModeLoss(1.0, 1.0)))
            if raised := screening.update(seen, {"bn": 0.01}, {"bn": True}, {}, extra=extra):
                return number, raised
        return None

    found = first([True] * 10)
    assert found is not None
    assert found[0] <= 4
    assert found[1] == [UPDATES]
    assert first(([True] + [False] * 11) * 20) is None


def test_another_hypothesis_alarms_by_its_evidence() -> None:
    screening = Screening(["bn"], 0.05)
    seen = sample((0.5 * LAG, 0.01, None))
    assert screening.update(seen, {"bn": 0.01}, {"bn": True}, {}, others={"inputs": 50.0}) == []
    assert screening.update(seen, {"bn": 0.01}, {"bn": True}, {}, others={"inputs": 500.0}) == ["inputs"]


def test_a_restored_screening_goes_on() -> None:
    begun = Screening(["bn", "other"], 0.05)
    assert alarm(steady(3 * LAG, 0.01, 1.1)[:5], begun) is None
    again = Screening(["bn", "other"], 0.05)
    again.restore(json.loads(json.dumps(begun.state())))
    rest = steady(3 * LAG, 0.01, 1.1)
    assert alarm(rest, again) == alarm(rest, begun)


def test_a_state_of_other_layers_is_refused_by_name() -> None:
    with pytest.raises(
        StateError, match=r"only that one watched bn; only this one watches head, tail.*include and exclude"
    ):
        Screening(["other", "head", "tail"], 0.05).restore(Screening(["bn", "other"], 0.05).state())
    with pytest.raises(StateError, match="in another order"):
        Screening(["other", "bn"], 0.05).restore(Screening(["bn", "other"], 0.05).state())


def over(mismatches: Iterable[float], noise: float = 0.01) -> int | None:
    """After how many samples the cause of a change counts as gone, for D of the changed layer."""
    screening = Screening(["bn"], 0.05)
    for count, each in enumerate(mismatches, 1):
        seen = sample((each, noise, ModeLoss(1.0, 1.0)))
        assert not screening.update(seen, {"bn": noise}, {"bn": True}, {"bn": each})
        if screening.is_over(["bn"]):
            return count
    return None


def test_a_cause_is_gone_where_d_is_within_its_limit_or_has_fallen_by_far() -> None:
    within = over([0.5 * LAG] * 100)
    assert within is not None
    assert within <= 20
    fallen = over([20 * LAG] * 10 + [2 * LAG] * 100)
    assert fallen is not None
    assert 10 < fallen <= 30


@pytest.mark.parametrize(
    "mismatches",
    [
        [20 * LAG] * 300,
        [2 * LAG] * 300,  # nor has it fallen
        [20 * LAG] * 10 + [6 * LAG] * 300,  # no more than a third is left, but D alone would raise an alarm
        [20 * LAG] * 10 + [2 * LAG, 20 * LAG] * 150,  # every other time
    ],
)
def test_a_cause_is_not_gone_while_d_is_more_often_than_not_as_it_was(mismatches: list[float]) -> None:
    assert over(mismatches) is None


def test_a_cause_is_not_gone_while_the_noise_of_batches_is_beyond_its_limit() -> None:
    assert over([0.5 * LAG] * 300, noise=2 * NOISE) is None


def test_at_the_limits_few_runs_alarm() -> None:
    """Every hypothesis at its edge at once: noisy D around its limit, and coins for the loss."""
    random = np.random.default_rng(0)

    def run() -> Iterator[Seen]:
        for _ in range(100):
            factor = float(random.chisquare(4) / 4)
            yield LAG * factor, 0.0, ModeLoss(1.0, float(random.choice([0.4, 2.2])))

    assert sum(alarm(run()) is not None for _ in range(100)) <= 5
