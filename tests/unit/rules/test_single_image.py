"""BN209."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnprobe
from bnprobe.records import Estimate, Score
from bnprobe.testing import make_anatomy, make_evidence, make_layer, make_shares, run_rule
from unit.rules.effects import loss, metric, tried
from unit.rules.expect import failed, passed

MESSAGE = "A batch is one sample, which is normalized with its own mean and variance in training."
FINE = "The layer is not an instance norm in training."


def test_batches_of_one_sample_are_an_instance_norm() -> None:
    layers = [
        make_layer("steady"),
        make_layer("flagged", make_shares(small_batch=0.3)),
        make_layer("one value", values_per_channel=1),
        make_layer("frozen"),
    ]
    anatomy = [make_anatomy(layer.name, trains_statistics=layer.name != "frozen") for layer in layers]
    assert run_rule("BN209", make_evidence(*layers, anatomy=anatomy, batch_size=1)) == [
        failed("BN209", "steady", MESSAGE, 1.0, 1.0, "warning"),
        failed("BN209", "flagged", MESSAGE, 1.0, 1.0, "error"),
        passed("BN209", "one value", FINE, 1.0, 1.0),
        passed("BN209", "frozen", FINE, 1.0, 1.0),
    ]


def test_it_is_an_error_where_the_modes_surely_differ_and_no_layer_is_flagged() -> None:
    """As where eval() was forgotten: the network is better with its running statistics."""
    for inference, severity in ((0.9, "warning"), (0.98, "error"), (0.8, "error")):
        facts = make_evidence(make_layer("bn"), gaps=(metric(0.9, inference),), batch_size=1)
        [found] = run_rule("BN209", facts)
        assert found.severity == severity


def test_batches_of_two_are_not() -> None:
    assert run_rule("BN209", make_evidence(make_layer(), batch_size=2)) == [passed("BN209", "bn", FINE, 2.0, 1.0)]


def test_eval_comes_first_where_the_weights_were_trained_on_larger_batches() -> None:
    layer = make_layer("bn", make_shares(small_batch=0.3))
    better, worse = metric(0.1, 0.9), metric(0.9, 0.1)
    of_single = tried(0.9, 0.1, "instance statistics")
    for gap, remedies, start in (
        (better, (tried(0.9, 0.9), of_single), "If this is not training (serving"),
        (
            better,
            (tried(0.8, 0.9), of_single),
            "Train with larger batches",
        ),  # its statistics are those of single samples
        (better, (), "Train with larger batches"),
        (worse, (tried(0.1, 0.1), of_single), "Train with larger batches"),
        (worse, (tried(0.1, 0.1), tried(0.1, 0.9, "instance statistics")), "Without training, let every"),
    ):
        [verdict] = run_rule("BN209", make_evidence(layer, gaps=(gap,), remedies=remedies, batch_size=1))
        assert verdict.severity == "error"
        assert verdict.remedy.startswith(start)
    assert verdict.remedy.startswith(
        "Without training, let every sample's own statistics take part at inference too (bnprobe convert --to"
        " instance-renorm --blend 1), which is surely better on held-out data. Or train with larger batches"
    )


def test_where_only_the_loss_is_better_at_inference_the_remedy_states_the_condition() -> None:
    """The likeliest mistake is named for a metric of which smaller is better, and another remedy for the rest."""
    layer, gaps = make_layer("bn"), (loss(1.8, 1.5), metric(0.9, 0.7))
    assumed = (gaps[0], replace(gaps[1], goal_is_known=False))
    instance = replace(
        tried(0.7, 0.9, "instance statistics"),
        before=Score(1.5, 0.7),
        after=Score(1.8, 0.9),
        loss_change=Estimate(0.3, (0.2, 0.4)),
    )
    remedies = (replace(tried(0.7, 0.7), before=Score(1.5, 0.7), after=Score(1.5, 0.7)), instance)
    remedies = (replace(remedies[0], loss_change=Estimate(0.0, (-0.01, 0.01))), instance)
    for known, start in (
        (assumed, "First say which metric is better (--goal): with running statistics the loss is better, and the"),
        (gaps, "Without training, let every sample's own statistics"),
    ):
        [verdict] = run_rule("BN209", make_evidence(layer, gaps=known, remedies=remedies, batch_size=1))
        assert (verdict.severity, verdict.remedy[: len(start)]) == ("error", start)
    [verdict] = run_rule("BN209", make_evidence(layer, gaps=assumed, remedies=remedies, batch_size=1))
    assert "the metric goes from 0.9 to 0.7. If a smaller one is better, and this is not training" in verdict.remedy
    assert "If a larger one is better, train with larger batches" in verdict.remedy


class Looping(nn.Module):
    """A detector's backbone, called for each image of a batch."""

    def __init__(self, together: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.head, self.together = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2), together

    def forward(self, images: list[Tensor]) -> Tensor:
        if self.together:
            return self.one(torch.stack(images))
        return torch.cat([self.one(image[None]) for image in images])

    def one(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def looping(together: bool) -> bnprobe.Report:
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(3, 1, 1, generator=generator) + torch.randn(3, 6, 6) for _ in range(4)] for _ in range(16)]
    return bnprobe.scan(Looping(together), batches, 4, num_batches=16, forward=lambda model, batch: model(batch))


def test_a_network_that_is_called_for_each_sample_of_a_batch_is_one_as_well() -> None:
    report = looping(False)
    first = report.diagnoses[0]
    assert (first.cause, first.layers) == ("single_image", ("bn",))
    assert "called once for each of the 4 samples of a batch" in first.message
    assert first.remedy.startswith("Call the network once on all samples of a batch")
    assert not any(diagnosis.cause == "small_batch" for diagnosis in report.diagnoses)


def test_the_same_network_called_on_all_samples_is_not() -> None:
    assert not any(diagnosis.cause == "single_image" for diagnosis in looping(True).diagnoses)
