"""Helpers to test rules: make records with sensible values, and run a rule on them.

    facts = make_evidence(make_layer("bn1", shares=make_shares(lag=0.4)))
    verdicts = run_rule("BN203", facts)

Nothing is measured: a test states what a scan would have found, and compares whole lists of verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from bnprobe.records import (
    DEFAULT_THRESHOLD,
    Distribution,
    Histogram,
    Interval,
    Layer,
    PathMeasurement,
    Scan,
    ShareIntervals,
    Shares,
    Verdict,
)
from bnprobe.rules import RULES
from bnprobe.rules.facts import Anatomy, Facts
from bnprobe.rules.selection import check_code
from bnprobe.rules.shares import screened
from bnprobe.stats.histogram import PROBABILITIES
from bnprobe.stats.theory import equivalent_batch_size

WIDTH = 0.1
"""Default half width of intervals, relative to the value."""


def run_rule(code: str, facts: Facts) -> list[Verdict]:
    """Run one rule and return its verdicts.

    Raises:
        UsageError: There is no such rule; the message suggests the nearest one.
    """
    check_code(code)
    return [verdict for rule in RULES if rule.code == code.upper() for verdict in rule.judge(facts)]


def make_evidence(
    *layers: Layer,
    anatomy: Sequence[Anatomy] | None = None,
    batch_size: int = 8,
    synthetic: bool = False,
    **changes: Any,
) -> Facts:
    """The input of rules: layers as measured by a scan, or only the model if no layers are given.

    Args:
        *layers: Measured layers, in network order.
        anatomy: What the layers are set to; None: an ordinary trained layer for each of ``layers``.
        batch_size: Samples in a micro-batch.
        synthetic: Whether the samples are synthetic.
        **changes: Other fields of ``bnprobe.rules.facts.Facts``.
    """
    if anatomy is None:
        anatomy = [make_anatomy(layer.name, channels=layer.channels) for layer in layers]
    scan = make_scan(batch_size=batch_size, synthetic=synthetic) if layers else None
    known = {"scan": scan, **changes}
    return Facts(tuple(anatomy), {layer.name: layer for layer in layers}, **known)


def make_anatomy(name: str = "bn", **changes: Any) -> Anatomy:
    """An ordinary trained layer; ``changes`` are fields of ``bnprobe.rules.facts.Anatomy``."""
    usual = {
        "name": name,
        "location": None,
        "kind": "BatchNorm2d",
        "channels": 16,
        "eps": 1e-5,
        "momentum": 0.1,
        "batches_tracked": 1200,
        "has_running_statistics": True,
        "trains_statistics": True,
        "trains_affine": True,
        "untouched": False,
        "non_finite": 0,
        "negative": 0,
        "dead": 0,
        "median_variance": 0.5,
    }
    return Anatomy(**{**usual, **changes})


def make_layer(name: str = "bn", shares: Shares | None = None, **changes: Any) -> Layer:
    """A measured layer. Its paths and flags follow from its shares unless they are given.

    Args:
        name: Name of the layer.
        shares: Shares of the mismatch; None: those of a healthy layer. For a layer without shares, use
            ``dataclasses.replace(layer, shares=None)``.
        **changes: Fields of ``bnprobe.records.Layer``; ``train`` defaults to the eval path.
    """
    shares = shares or make_shares()
    threshold = float(changes.get("threshold", DEFAULT_THRESHOLD))
    eval_ = changes["eval"] if "eval" in changes else make_path(total(shares))
    train = changes.get("train", eval_)
    paths = [path for path in (train, eval_) if path is not None]
    usual = {
        "name": name,
        "aliases": (),
        "kind": "BatchNorm2d",
        "channels": 16,
        "eps": 1e-5,
        "momentum": 0.1,
        "batches_tracked": 1200,
        "calls_per_forward": 1,
        "values_per_channel": 512,
        "running_statistics": True,
        "threshold": threshold,
        "flagged": screened([path.interval for path in paths], shares, changes.get("composition"), threshold)
        == "flagged",
        "undecided": False,
        "note": None,
        "train": train,
        "eval": eval_,
        "shares": shares,
        "share_intervals": make_intervals(shares),
    }
    return Layer(**{**usual, **changes})


def make_shares(**changes: float | None) -> Shares:
    """Shares of the mismatch; they default to those of a healthy layer."""
    usual: dict[str, Any] = {
        "small_batch": 0.004,
        "composition": 0.0,
        "lag": 0.001,
        "dropout": 0.0,
        "propagation": 0.0,
        "data_shift": None,
    }
    return Shares(**{**usual, **changes})


def make_intervals(shares: Shares) -> ShareIntervals:
    """Intervals of the default width around shares."""
    return ShareIntervals(**{field.name: _around(getattr(shares, field.name)) for field in fields(Shares)})


def make_path(mismatch: float, r: float = 1.0, d: float = 0.0) -> PathMeasurement:
    """Measurements of one path with the given mismatch.

    Args:
        mismatch: Mismatch D.
        r: Value of r in all channels and batches.
        d: Value of d in all channels and batches.
    """
    low, high = interval = (mismatch * (1 - WIDTH), mismatch * (1 + WIDTH))
    return PathMeasurement(
        mismatch=mismatch,
        interval=interval,
        equivalent_batch_size=equivalent_batch_size(mismatch),
        equivalent_batch_size_interval=(equivalent_batch_size(high) or 1.0, equivalent_batch_size(low)),
        r=_constant(r),
        d=_constant(d),
    )


def make_scan(batch_size: int = 8, synthetic: bool = False, **changes: Any) -> Scan:
    """A finished scan of 64 micro-batches; ``changes`` are fields of ``bnprobe.records.Scan``."""
    usual = {
        "model": "model.py:load_model",
        "data": "load_data() of model.py",
        "synthetic": synthetic,
        "checkpoint": None,
        "batch_size": batch_size,
        "batches": 64,
        "batches_requested": None,
        "images": 64 * batch_size,
        "left_out": 0,
        "emulated": True,
        "physical_batch": 64,
        "emulation": "Statistics are taken per group of samples.",
        "self_check": None,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "autocast": None,
        "stopped": "decided",
        "partial": False,
        "seconds": 1.0,
        "notes": (),
    }
    return Scan(**{**usual, **changes})


def total(shares: Shares) -> float:
    """The eval-path mismatch that the shares add up to."""
    parts = (shares.small_batch, shares.composition, shares.lag, shares.dropout, shares.propagation)
    return sum(part for part in parts if part is not None)


def _around(value: float | None) -> Interval | None:
    return None if value is None else (value - WIDTH * abs(value), value + WIDTH * abs(value))


def _constant(value: float) -> Distribution:
    return Distribution(
        mean=value,
        std=0.0,
        min=value,
        max=value,
        quantiles=dict.fromkeys(map(str, PROBABILITIES), value),
        histogram=Histogram((value - 1, value + 1), (1,)),
        clipped=0.0,
        clipped_iid=0.0,
    )
