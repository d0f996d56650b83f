"""Reports made up for every kind of cause, with verdicts, diagnoses and all that may be measured beside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fabricated_parts import layer, path, report, resnet_names

from bnprobe.records import (
    Backward,
    Cause,
    Composition,
    Diagnosis,
    Domains,
    ExtraPass,
    Gap,
    GradientAngle,
    Impact,
    Layer,
    Output,
    PathValues,
    Pool,
    Remedy,
    Report,
    Score,
    Severity,
    Updates,
    Verdict,
)

POOL = Pool(images=512, bytes=1_258_291, regrouped=256)
PASSES = (
    ExtraPass("dropout off", "the model has 3 Dropout layers", 256, 0.7),
    ExtraPass("held-out data", "eval_data is given", 128, 0.4),
)
RULES: dict[str, Cause] = {
    "BN101": "momentum_convention",
    "BN102": "never_trained",
    "BN103": "non_finite",
    "BN104": "no_running_stats",
    "BN105": "frozen_mismatch",
    "BN106": "dead_channels",
    "BN107": "dropout_before_norm",
    "BN201": "small_batch",
    "BN202": "composition",
    "BN203": "lag",
    "BN204": "dropout",
    "BN205": "propagation",
    "BN206": "data_shift",
    "BN207": "shared_domains",
    "BN208": "single_value",
    "BN209": "single_image",
    "BN210": "last_batch",
    "BN301": "double_update",
    "BN302": "rank_divergence",
    "BN303": "backward_noise",
}
EVALUATION = "needs held-out data: give eval_data in the spec or load_eval_data in the model file"
SKIPPED = {
    "BN206": EVALUATION,
    "BN301": "needs training steps: scan with --train-steps and a loss",
    "BN302": "one process: nothing to compare",
    "BN303": "needs gradients: scan with --gradients and a loss",
}


def verdict(rule: str, name: str | None, **changes: Any) -> Verdict:
    """A verdict that passed, unless changed."""
    made = Verdict(rule, RULES[rule], name, "passed", "error", "Nothing found.", 0.001, 0.024, "D", "")
    return replace(made, **changes)


def verdicts(layers: list[Layer], diagnoses: list[Diagnosis], skipped: dict[str, str]) -> tuple[Verdict, ...]:
    """One verdict for each rule and layer: failed where a diagnosis says so, skipped for the reasons given."""
    failed = {(diagnosis.rule, name): diagnosis for diagnosis in diagnoses for name in diagnosis.layers or (None,)}
    made = []
    for rule in RULES:
        if rule in skipped:
            made.append(verdict(rule, None, outcome="skipped", reason=skipped[rule], value=None, limit=None))
            continue
        for name in [None, *(one.name for one in layers)]:
            if diagnosis := failed.get((rule, name)):
                found = {"outcome": "failed", "severity": diagnosis.severity, "message": diagnosis.message}
                made.append(verdict(rule, name, value=0.41, remedy=diagnosis.remedy, **found))
            elif name:
                made.append(verdict(rule, name))
    return tuple(made)


def diagnosis(
    rule: str,
    layers: list[Layer],
    impact: float | None,
    message: str,
    remedy: str,
    *consequences: str,
    severity: Severity = "error",
) -> Diagnosis:
    """A diagnosis of a rule."""
    names = tuple(one.name for one in layers)
    return Diagnosis(RULES[rule], rule, severity, names, impact, message, remedy, consequences)


def diagnosed(made: Report, diagnoses: list[Diagnosis], skipped: dict[str, str] | None = None) -> Report:
    """A report with diagnoses and the verdicts behind them."""
    found = verdicts(list(made.layers), diagnoses, SKIPPED if skipped is None else skipped)
    return replace(made, diagnoses=tuple(diagnoses), verdicts=found)


def _network(scale: float, because: dict[str, float], **changes: Any) -> list[Layer]:
    """The layers of a small residual network, flagged from the third one on if ``scale`` is large."""
    sizes = (210, 95, 60, 25, 18, 16, 7, 5.5, 5)
    layers = []
    for seed, (name, n) in enumerate(zip(resnet_names((1, 1, 1)), sizes, strict=True)):
        made = path(n / scale, seed)
        impact = Impact(estimate=0.9 / n, exact=0.94 / n if n < 20 else None, loss=None)
        place = f"model.py:{31 if name.endswith('bn1') else 34 if name.endswith('bn2') else 22}"
        parts = {"because": because, "location": place, "impact": impact} | changes
        layers.append(layer(name, path(500, seed + 40), made, 16 << seed // 3, **parts))
    return layers


def composition() -> Report:
    """Batches of 8 sorted by label: the images of a batch are alike."""
    layers = _network(1, {"composition": 0.83, "lag": 0.02})
    layers = [
        replace(one, composition=Composition(0.23 + 0.075 * index, 1 + 7 * (0.23 + 0.075 * index), 1e-12))
        for index, one in enumerate(layers)
    ]
    flagged = [one for one in layers if one.flagged]
    message = (
        f"{len(flagged)} of 9 layers: batches are not drawn at random. The images of a batch are alike"
        " (intraclass correlation 0.83), which makes up 83% of the mismatch."
    )
    found = diagnosis("BN202", flagged, 0.31, message, "Shuffle: DataLoader(..., shuffle=True).")
    made = report(layers, batch_size=8, images=1024, pool=POOL, notes=("The loader does not shuffle.",))
    return diagnosed(made, [found])


def lag() -> Report:
    """Running statistics that lag far behind in one place, seen by everything after it; recalibrating mends it."""
    because = {"lag": 0.93, "propagation": 0.05, "composition": -0.01}
    layers = _network(1, because)
    stuck = layer("layer2.0.bn1", path(90, 3), path(60, 4, scale=4.0, shift=5.0), 32, because={"lag": 0.998})
    layers[3] = replace(stuck, momentum=0.001, location="model.py:31", impact=Impact(0.38, 0.41, 0.22))
    flagged = [one for one in layers if one.flagged]
    message = (
        "1 of 9 layers: the running statistics are not those that training now settles on. With momentum 0.001 they"
        " follow the last 1,999 batches, and it has been trained for 1,200."
    )
    found = diagnosis(
        "BN203", flagged[:1], 0.41, message, "Recalibrate the running statistics: bnprobe.recalibrate(model, batches).",
        "propagation in 5 layers: layer2.0.bn2, layer2.0.downsample.1, layer3.0.bn1 and 2 more",
    )  # fmt: skip
    hint = diagnosis("BN101", flagged[:1], None, "Its momentum is 0.001, which reads like TensorFlow's 0.999.",
                     "Set momentum=0.1.", severity="info")  # fmt: skip
    remedies = tuple(
        Remedy(name, tuple(one.name for one in layers), Score(1.92, 0.41), Score(*after), control, 360, detail)
        for name, after, control, detail in (
            (
                "batch statistics",
                (0.31, 0.90),
                None,
                "batches of 2 evaluation images, each normalized with its own statistics",
            ),
            ("recalibrated", (0.08, 0.98), None, "statistics of 512 training images"),
            ("evaluation statistics", (0.09, 0.97), None, "statistics of 360 evaluation images"),
            (
                "batch statistics, batches of 16",
                (1.61, 0.52),
                Score(1.64, None),
                "batches of 16 evaluation images, each normalized with its own statistics",
            ),
        )
    )
    loss = "min", (-0.028, -0.01), (1.71, 1.946), (-0.13, 0.21), 512, 256
    gap = Gap("loss", 0.071, 0.052, 1.88, 1.92, -0.019, 1.828, 0.04, *loss)
    metric = "max", (0.002, 0.02), (-0.604, -0.518), (-0.094, 0.054), 512, 256
    accuracy = Gap("metric", 0.98, 0.991, 0.43, 0.41, 0.011, -0.561, -0.02, *metric)
    made = report(layers, passes=PASSES, pool=POOL)
    made = replace(made, remedies=remedies, summary=replace(made.summary, gaps=(gap, accuracy)))
    return diagnosed(made, [found, hint], _without("BN206"))


def dropout() -> Report:
    """Dropout before the norms of a perceptron: their variance at inference is another one."""
    names = ("net.1", "net.4", "net.7")
    layers = [
        layer(name, path(300, seed), path(22 - 4 * seed, seed + 9), 256, "BatchNorm1d",
              because={"dropout": 0.4 + 0.15 * seed, "lag": 0.02, "propagation": 0.1 * (seed > 0)},
              impact=Impact(0.05 * (seed + 1), None, None))
        for seed, name in enumerate(names)
    ]  # fmt: skip
    message = "3 of 3 layers: dropout before them changes the variance that they see in training."
    found = diagnosis("BN204", layers, None, message, "Move each Dropout behind the last BatchNorm.")
    return diagnosed(report(layers, batch_size=32, passes=PASSES[:1], pool=POOL), [found])


def domains() -> Report:
    """A discriminator that is shown real and made-up images in two calls."""
    layers = [
        layer(f"discriminator.{index}", path(200, index), path(180, index + 9, shift=0.9 if index else 0.1), 64,
              because={"composition": 0.93}, calls_per_forward=2, location=f"gan.py:{40 + index}",
              domains=Domains(0.81 if index else 0.004, (0.77, 0.86) if index else None),
              impact=Impact(None, 0.2 * index, None))
        for index in range(3)
    ]  # fmt: skip
    apart = [one for one in layers if one.flagged]
    message = f"{len(apart)} of 3 layers serve several domains: each call has statistics of its own."
    found = diagnosis("BN207", apart, 0.37, message, "Give every domain running statistics of its own.")
    return diagnosed(report(layers, output=Output(0.44, None, None, None, None)), [found])


def data_shift() -> Report:
    """Held-out images that are darker: the layers agree on the training data."""
    layers = [
        replace(one, flagged=False, undecided=False)
        for one in _network(0.1, {"lag": 0.1, "composition": 0.02, "data_shift": 30.0})
    ]
    message = "9 of 9 layers: the held-out data has other statistics than the training data, D = 0.31 on average."
    found = diagnosis("BN206", layers, 0.22, message, "Look at how evaluation images are loaded and normalized.")
    dead = diagnosis("BN106", layers[:1], None, "3 of 16 channels are dead: their variance is below eps.",
                     "Prune them, or lower the learning rate.", severity="warning")  # fmt: skip
    names = tuple(one.name for one in layers)
    remedy = Remedy("recalibrated", names, Score(0.9, None), Score(0.95, None), None, 360, "512 training images")
    made = report(layers, passes=PASSES[1:], pool=POOL, output=Output(0.02, 0.01, None, PathValues(0.3, 0.31), None))
    loss = "min", (-0.022, 0.002), (-0.004, 0.044), (0.47, 0.71), 512, 256
    gap = Gap("loss", 0.3, 0.29, 0.31, 0.9, -0.01, 0.02, 0.59, *loss)
    made = replace(made, remedies=(remedy,), summary=replace(made.summary, gaps=(gap,)))
    return diagnosed(made, [found, dead], _without("BN206"))


def pair() -> Report:
    """Small, sorted batches, dropout and five more causes at once; one layer's mismatch cannot be taken apart."""
    parts = {"composition": 0.35, "lag": 0.15, "dropout": 0.1, "propagation": -0.12}
    layers = _network(2, parts, composition=Composition(0.12, 1.12, 0.003))
    layers[4] = replace(layers[4], eval=None, shares=None, share_intervals=None, impact=None)
    flagged = [one for one in layers if one.flagged]
    causes = [
        diagnosis("BN202", flagged, 0.52, "The images of a batch are alike.", "Shuffle the loader."),
        diagnosis(
            "BN201", flagged[2:], 0.33, "A batch of 2 holds too few values.", "Use larger batches, or Batch Renorm."
        ),
        diagnosis("BN203", flagged[:2], 0.08, "The running statistics lag.", "Recalibrate."),
        diagnosis("BN204", flagged[:1], 0.02, "Dropout shifts them.", "Move the Dropout.", severity="warning"),
        diagnosis(
            "BN210", [], None, "1,437 images leave a last batch of 1.", "Set drop_last=True.", severity="warning"
        ),
        diagnosis("BN105", layers[:1], None, "Frozen weights, moving statistics.", "Freeze both.", severity="warning"),
        diagnosis("BN106", layers[:1], None, "2 of 16 channels are dead.", "Prune them.", severity="info"),
    ]
    return diagnosed(report(layers, pool=POOL), causes)


def training() -> Report:
    """Real training steps and gradients: statistics updated twice in two layers, noisy gradients."""
    layers = [
        replace(
            one,
            backward=Backward(2 / n, (1.8 / n, 2.3 / n), float(n)),
            updates=Updates(2.0, 0.19, 0.1, 0.05, 1.0) if index in (3, 4) else Updates(1.0, 0.1, 0.1, 0.02),
        )
        for index, (one, n) in enumerate(zip(_network(0.1, {"lag": 0.01}), range(40, 4, -4), strict=True))
    ]
    doubled = diagnosis("BN301", layers[3:5], None, "2 of 9 layers are updated twice per step, as under checkpointing.",
                        "Halve the effective rate: momentum = 1 - sqrt(1 - 0.1) = 0.051.")  # fmt: skip
    made = report(layers, pool=POOL)
    made = replace(made, summary=replace(made.summary, gradient_angle=GradientAngle(0.857, 0.998, 12)))
    return diagnosed(made, [doubled], _without("BN301", "BN303"))


def _without(*codes: str) -> dict[str, str]:
    return {code: reason for code, reason in SKIPPED.items() if code not in codes}


REPORTS = {
    "composition": composition,
    "lag": lag,
    "dropout": dropout,
    "domains": domains,
    "data_shift": data_shift,
    "pair": pair,
    "training": training,
}
