"""``style``: what a style is, and that instance norm does not see gain and offset, as follows from its equation."""

from __future__ import annotations

import torch

from bnprobe import lab
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import instance_norm
from bnprobe.lab.style import BATCH_NORM, INSTANCE, NORMS, PLAIN, Style, restyled
from bnprobe.nn import InstanceRenorm2d


def test_a_style_is_one_gain_offset_and_contrast_for_an_image() -> None:
    images = torch.randn(5, 1, 6, 6).abs()
    draws = torch.Generator().manual_seed(0)
    styled = restyled(images, 0.7, draws)
    draws.manual_seed(0)
    gain, contrast, offset = (0.7 * torch.randn(5, generator=draws) for _ in range(3))
    for number in range(5):
        expected = gain[number].exp() * images[number] ** (contrast[number] / 2).exp() + offset[number]
        torch.testing.assert_close(styled[number], expected)
    assert restyled(images, 0.0, draws) is images


def test_blend_one_is_instance_norm() -> None:
    x = 2 + 3 * torch.randn(4, 8, 5, 5)
    layer = InstanceRenorm2d(8, blend=1.0)
    torch.testing.assert_close(layer(x), instance_norm(8)(x), rtol=1e-4, atol=1e-5)


def test_instance_norm_holds_on_styles_that_batch_norm_does_not_know() -> None:
    plain = {"trained on": PLAIN}
    arms = [Style().trial({**plain, "norm": norm}, 0, Budget(0.5)) for norm in (BATCH_NORM, INSTANCE)]
    batch_norm, instance = (arm["accuracy at width 0.6"] for arm in arms)
    assert isinstance(batch_norm, float)
    assert isinstance(instance, float)
    assert instance > batch_norm + 0.1


def test_a_run_scores_every_layer() -> None:
    report = lab.run("style", budget=0.02, seeds=1, jobs=1)
    results = Results(report.trials).where(**{"trained on": PLAIN})
    assert results.levels("norm") == list(NORMS)
    assert all(0 <= value <= 1 for trial in results for value in trial.values.values() if isinstance(value, float))
    assert {claim.verdict for claim in report.claims} == {"open"}  # one seed decides nothing
