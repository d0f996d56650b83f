"""``gan``: the Frechet distance against scipy's root, D of two kinds, and how each arm calls its discriminator."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import nn

from bnprobe import lab
from bnprobe.lab.experiment import Results
from bnprobe.lab.gan import (
    ARMS,
    EACH,
    FAKE,
    MIXED,
    ONE,
    REAL,
    RENORM,
    _mismatches,
    answers,
    frechet_distance,
    pooled,
)
from bnprobe.lab.networks import Call, calls_in_training, keep_statistics
from bnprobe.stats.theory import mismatch_iid


def test_the_frechet_distance_is_that_of_its_equation() -> None:
    torch.manual_seed(0)
    one = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    other = 0.5 + torch.randn(300, 6, dtype=torch.float64).exp()
    C1, C2 = one.T.cov().numpy(), other.T.cov().numpy()  # noqa: N806
    root = scipy.linalg.sqrtm(C1 @ C2).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum().item() + (C1 + C2 - 2 * root).trace()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one + 2) == pytest.approx(6 * 4, rel=1e-9)  # the same, shifted by 2 in 6 features


def _discriminator(arm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 1), ARMS[arm](4), nn.Flatten(), nn.Linear(4 * 4 * 4, 1))


def _kinds() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(64, 1, 4, 4), 4 + torch.randn(64, 1, 4, 4)


@pytest.mark.parametrize("arm", list(ARMS))
def test_a_batch_is_normalized_with_its_kind_unless_it_is_mixed(arm: str) -> None:
    discriminator, (real, fake) = _discriminator(arm), _kinds()
    outputs: list[torch.Tensor] = []
    discriminator[1].register_forward_hook(lambda module, given, output: outputs.append(output))
    of_real, of_fake = answers(arm, discriminator, real, fake)
    assert of_real.shape == of_fake.shape == (64, 1)
    means = [output.mean((0, 2, 3)) for output in outputs]
    if arm == MIXED:
        assert len(outputs) == 1
        torch.testing.assert_close(means[0], torch.zeros(4), atol=1e-5, rtol=0)
        assert (outputs[0][:64].mean((0, 2, 3)) - outputs[0][64:].mean((0, 2, 3))).abs().min() > 1
    elif arm in (ONE, EACH):
        torch.testing.assert_close(torch.stack(means), torch.zeros(2, 4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", [ONE, EACH])
def test_one_set_of_statistics_fits_neither_kind_and_two_fit_both(arm: str) -> None:
    discriminator = _discriminator(arm)
    for _ in range(120):
        answers(arm, discriminator, *_kinds())
    keep_statistics(discriminator)
    layer = discriminator[1]
    with calls_in_training(layer) as calls:
        for _ in range(8):
            answers(arm, discriminator, *_kinds())
    found = _mismatches(arm, [layer], [calls])
    limit = mismatch_iid(64 * 4 * 4)
    for kind in (REAL, FAKE):
        assert found[kind].formula == limit
        assert 0 < found[kind].own < 3 * limit
        assert (found[kind].running > 100 * limit) == (arm == ONE)
    real = torch.cat([discriminator[0](_kinds()[0]) for _ in range(2)])
    whole = [(each.mean((0, 2, 3)), each.var((0, 2, 3), unbiased=False)) for each in (real, *real.split(64))]
    parts = [Call(mean, variance, 1024) for mean, variance in whole[1:]]
    torch.testing.assert_close(pooled(parts), whole[0])


@pytest.mark.parametrize("arm", list(ARMS))
def test_kept_statistics_stay(arm: str) -> None:
    discriminator = _discriminator(arm)
    before = {name: value.clone() for name, value in discriminator.state_dict().items() if "running" in name}
    keep_statistics(discriminator)
    answers(arm, discriminator, *_kinds())
    assert before
    assert all(torch.equal(discriminator.state_dict()[name], value) for name, value in before.items())


def test_a_run_measures_every_arm() -> None:
    report = lab.run("gan", budget=0.02, seeds=2, jobs=1)
    results = Results(report.trials)
    assert results.levels("discriminator") == list(ARMS)
    for trial in results:
        assert trial.values["D of real images"] > 0
        assert 0 <= trial.values["accuracy in eval mode"] <= 1
        # What the classifier has hardly learned from must be nearer to it than what a generator began to make.
        assert trial.values["Frechet distance of held-out images"] < trial.values["Frechet distance"]
    floor = "Frechet distance of held-out images"  # the same classifier for all arms of a seed
    assert results.where(discriminator=ONE).by_seed(floor) == results.where(discriminator=RENORM).by_seed(floor)
