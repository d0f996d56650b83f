"""``style``: what a style is, and that instance norm does not see gain and offset, as follows from its equation."""

from __future__ import annotations

import math

import torch

from bnprobe import lab
from bnprobe.lab.experiment import Budget, Results
from bnprobe.lab.layers import BatchRenorm, instance_norm
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


def test_blend_zero_is_batch_renorm_with_batches_of_one_image() -> None:
    """Output and gradient are those of each image by itself in Batch Renorm, whose limits are open."""
    torch.manual_seed(0)
    images = 1 + 2 * torch.randn(4, 8, 5, 5)
    blended, single = InstanceRenorm2d(8, blend=0.0), BatchRenorm(8, momentum=0.0, r_max=math.inf, d_max=math.inf)
    for layer in (blended, single):
        layer.running_mean.fill_(0.5)
        layer.running_var.fill_(3.0)
    by_layer = []
    for layer, parts in ((blended, [images]), (single, images.split(1))):
        inputs = [part.clone().requires_grad_() for part in parts]
        outputs = torch.cat([layer(part) for part in inputs])
        (outputs.relu() ** 2).sum().backward()
        by_layer.append((outputs, torch.cat([part.grad for part in inputs if part.grad is not None])))
    torch.testing.assert_close(*by_layer, rtol=1e-4, atol=1e-4)


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
    scores = [value for trial in results for name, value in trial.values.items() if name.startswith("accuracy")]
    assert len(scores) == 3 * len(NORMS)
    assert all(isinstance(score, float) and 0 <= score <= 1 for score in scores)
    assert {claim.verdict for claim in report.claims} == {"open"}  # one seed decides nothing
