"""Which logged number is the metric."""

from __future__ import annotations

import pytest

from bnprobe.loading.frameworks.metric_names import chosen_metric


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["val_loss", "val_acc"], ("val_acc", "max")),
        (["val/f1", "val/acc", "val/loss"], ("val/acc", "max")),
        (["val/acc_best", "val/loss"], None),
        (["valid_top_1", "valid_loss"], ("valid_top_1", "max")),
        (["val/MulticlassF1Score"], ("val/MulticlassF1Score", "max")),
        (["validation.mIoU", "lr"], ("validation.mIoU", "max")),
        (["val_mae", "val_rmse"], ("val_mae", "min")),
        (["dice_loss"], None),
        (["val_quality"], ("val_quality", None)),
        (["val_quality", "val_beauty"], None),
        (["backwards", "epoch", "step"], ("backwards", None)),
        ([], None),
    ],
)
def test_metrics_by_name(names: list[str], chosen: tuple[str, str | None] | None) -> None:
    assert chosen_metric(names) == chosen


def test_what_a_callback_watched_comes_first() -> None:
    names = ["val_acc", "val_error"]
    assert chosen_metric(names, ("val_error", "min")) == ("val_error", "min")
    assert chosen_metric(names, ("val_dice", "max")) == ("val_acc", "max")
