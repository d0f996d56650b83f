"""Which of the numbers that a validation logs is the metric, and whether a larger one is better, by their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from bnprobe.records import Goal

_LARGER = (
    *("accuracy", "acc", "top1", "f1", "f1score", "fbeta", "auroc", "auc", "auprc", "ap", "map", "iou", "miou"),
    *("jaccard", "dice", "kappa", "mcc", "precision", "recall", "sensitivity", "specificity", "exactmatch"),
    *("psnr", "ssim", "r2", "pearson", "spearman", "correlation", "bleu", "rouge", "cosine", "score", "top5"),
)
"""Of these a larger value is better; the first that is found is taken."""

_SMALLER = (
    *("error", "err", "mae", "rmse", "mse", "mape", "smape", "wer", "cer", "perplexity", "ppl", "fid", "lpips"),
    *("hausdorff", "distance", "brier", "ece", "epe", "rmsle"),
)
"""Of these a smaller one is."""

_NO_METRIC = ("loss", "nll", "elbo", "lr", "epoch", "step", "time", "size", "batch", "count", "num", "seconds", "best")
"""What is logged beside metrics."""


def chosen_metric(names: Sequence[str], monitored: tuple[str, Goal] | None = None) -> tuple[str, Goal | None] | None:
    """The metric among logged names, and which values of it are better; None if none of them is one.

    Args:
        names: E.g. ["val/acc", "val/loss"].
        monitored: What a callback of the training watched, which comes first.

    Returns:
        The name, and the goal as far as the name says it.
    """
    if monitored is not None and monitored[0] in names:
        return monitored
    metrics = [name for name in names if not _is_no_metric(name)]
    goals: dict[str, Goal] = {**dict.fromkeys(_LARGER, "max"), **dict.fromkeys(_SMALLER, "min")}
    for word, goal in goals.items():
        found = next((name for name in metrics if word in _words(name)), None)
        if found is not None:
            return found, goal
    return (metrics[0], None) if len(metrics) == 1 else None


def _words(name: str) -> set[str]:
    """The words of a name, alone and joined with the next: "val/F1Score" has f1score, and "top_1" has top1."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    parts = [re.split(r"[^A-Za-z0-9]+", each) for each in (name, spaced)]
    words = [[word.lower() for word in each if word] for each in parts]
    joined = [first + second for each in words for first, second in pairwise(each)]
    return {*words[0], *words[1], *joined}


def _is_no_metric(name: str) -> bool:
    return "loss" in name.lower() or not _words(name).isdisjoint(_NO_METRIC)
