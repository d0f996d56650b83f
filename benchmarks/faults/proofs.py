"""Is the fault really there? One figure for most faults, without bnprobe; it is small in a healthy case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.faults.cases import Case
from benchmarks.faults.measures import BatchStatistics, record, running
from benchmarks.faults.samples import batches
from benchmarks.faults.surgery import TwoDomains, norms

BATCHES = 40


@dataclass(frozen=True)
class Proof:
    """What shows a fault.

    Attributes:
        what: The figure in words.
        measure: Takes it.
        limit: The fault is planted where the figure is above it.
    """

    what: str
    measure: Callable[[Case], float]
    limit: float


def _smallness(case: Case) -> float:
    return max(
        one.mismatch(*one.population(), norm.eps) for norm, one in zip(norms(case.model), _infer(case), strict=True)
    )


def _likeness(case: Case) -> float:
    ours, shuffled = _infer(case), _infer(case.drawn(order="shuffled"))
    pairs = zip(norms(case.model), ours, shuffled, strict=True)
    return max(
        one.mismatch(*other.population(), norm.eps) / other.mismatch(*other.population(), norm.eps)
        for norm, one, other in pairs
    )


def _staleness(case: Case) -> float:
    found = record(case.model, case.training(), case.sampling, BATCHES, training=True)
    return max(_distance(running(norm), one.population()) for norm, one in zip(norms(case.model), found, strict=True))


def _variance_shift(case: Case) -> float:
    paths = [
        record(case.model, case.training(), case.sampling, BATCHES, training=True, random=random)
        for random in (True, False)
    ]
    return max(_distance(one.population(), other.population()) for one, other in zip(*paths, strict=True))


def _data_distance(case: Case) -> float:
    first = [
        record(case.model, samples, case.sampling, BATCHES // 4, training=False)[0]
        for samples in (case.training(), case.held_out())
    ]
    return _distance(first[0].population(), first[1].population())


def _domain_distance(case: Case) -> float:
    if not isinstance(case.model, TwoDomains):
        return 0.0
    found = _infer(case)[0]
    calls = [BatchStatistics(found.mean[part::2], found.variance[part::2]) for part in range(2)]
    if case.network.name == "siamese":  # each domain is two calls
        calls = [
            BatchStatistics(
                *(torch.cat([values[part::4], values[part + 1 :: 4]]) for values in (found.mean, found.variance))
            )
            for part in (0, 2)
        ]
    return _distance(calls[0].population(), calls[1].population())


def _updates_per_call(case: Case) -> float:
    """Updates in one training step over those of one forward pass."""
    norm = norms(case.model)[0]
    batch = next(batches(case.training(), case.sampling))
    counts = []
    for backward in (False, True):
        before = int(norm.num_batches_tracked)
        loss = case.loss(case.model.train(), batch)
        if backward:
            loss.backward()
        counts.append(int(norm.num_batches_tracked) - before)
    case.model.zero_grad()
    return counts[1] / counts[0]


def _gradient_noise(case: Case) -> float:
    """Variance over batches of E[g] over the mean of g^2, at the output of the last layer."""
    gradients: list[Tensor] = []
    norm = norms(case.model)[-1]
    handle = norm.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(outputs[0]))
    for _, batch in zip(range(BATCHES), batches(case.training(), case.sampling), strict=False):
        case.loss(case.model.train(), batch).backward()
    handle.remove()
    case.model.zero_grad()
    flat = [gradient.transpose(0, 1).flatten(1) for gradient in gradients]
    means = torch.stack([values.mean(1) for values in flat])
    squares = torch.stack([values.square().mean(1) for values in flat])
    return float((means.var(0).sum()) / squares.mean(0).sum())


def _newest_weight(case: Case) -> float:
    """By how much of its distance to the last batch seen one forward pass moves the running mean."""
    norm = norms(case.model)[0]
    before = norm.running_mean.clone()
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].transpose(0, 1).flatten(1).mean(1))
    )
    with torch.no_grad():
        case.model.train()(next(batches(case.training(), case.sampling))[0])
    handle.remove()
    return float((norm.running_mean - before).norm() / (seen[-1] - before).norm())


def _initial(case: Case) -> float:
    fresh = [(norm.running_mean == 0) & (norm.running_var == 1) for norm in norms(case.model)]
    return float(torch.cat(fresh).float().mean())


def _not_numbers(case: Case) -> float:
    return float(sum(int(buffer.isnan().sum()) for norm in norms(case.model) for buffer in norm.buffers()))


def _without_statistics(case: Case) -> float:
    return float(sum(norm.running_mean is None for norm in norms(case.model)))


def _at_odds(case: Case) -> float:
    case.model.train()
    return float(sum(norm.training != norm.weight.requires_grad for norm in norms(case.model)))


def _single_values(case: Case) -> float:
    """Layers that see one value per channel."""
    seen: dict[nn.Module, int] = {}
    handles = [
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0][:, 0].numel()}))
        for norm in norms(case.model)
    ]
    with torch.no_grad():
        case.model.eval()(next(batches(case.training(), case.sampling))[0])
    for handle in handles:
        handle.remove()
    case.model.train()
    return float(sum(values == 1 for values in seen.values()))


def _lonely(case: Case) -> float:
    return float(case.sampling.batch_size == 1)


def _last_lonely(case: Case) -> float:
    return float(len(list(case.batches())[-1][0]) == 1)


def _dead(case: Case) -> float:
    return float(torch.cat([norm.running_var < norm.eps for norm in norms(case.model)]).float().mean())


def _dropouts(case: Case) -> float:
    return float(sum(isinstance(module, nn.Dropout) and module.p > 0 for module in case.model.modules()))


def _infer(case: Case) -> list[BatchStatistics]:
    return record(case.model, case.training(), case.sampling, BATCHES, training=False)


def _distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """D of two populations: what one of them, as a batch, would be off by against the other."""
    (mean, variance), (at, of) = one, other
    return float((((mean - at).square() + (variance.sqrt() - of.sqrt()).square()) / (of + 1e-5)).mean())


_STALE = Proof("D of the population against the running statistics, largest of the layers", _staleness, 0.05)
_SHIFTED = Proof("D of the held-out data against the training data, first layer", _data_distance, 0.05)

PROOFS: dict[str, Proof] = {
    "slow_momentum": _STALE,
    "earlier_statistics": _STALE,
    "averaged_weights": _STALE,
    "young_average": _STALE,
    "statistics_of_other_data": _STALE,
    "bf16_buffers": _STALE,
    "eps_port": _STALE,
    "brightness": _SHIFTED,
    "contrast": _SHIFTED,
    "noise": _SHIFTED,
    "small_batch": Proof("D against the population, largest of the layers", _smallness, 0.05),
    "composition": Proof("D over that of shuffled batches, largest of the layers", _likeness, 2.0),
    "dropout": Proof("D of the population with dropout against the one without, largest", _variance_shift, 0.05),
    "shared_domains": Proof("D of one domain against the other, first layer", _domain_distance, 0.05),
    "double_update": Proof("updates per training step over updates per forward pass", _updates_per_call, 1.5),
    "backward_noise": Proof("variance of E[g] over batches, over the mean of g^2, last layer", _gradient_noise, 0.05),
    "momentum_convention": Proof("how far one batch moves the running mean", _newest_weight, 0.5),
    "never_trained": Proof("fraction of channels with mean 0 and variance 1", _initial, 0.5),
    "non_finite": Proof("NaN in the buffers", _not_numbers, 0.5),
    "no_running_stats": Proof("layers without running statistics", _without_statistics, 0.5),
    "frozen_mismatch": Proof("layers of which one half is frozen", _at_odds, 0.5),
    "single_value": Proof("layers that see one value per channel", _single_values, 0.5),
    "single_image": Proof("one image in a batch (0 or 1)", _lonely, 0.5),
    "last_batch": Proof("one image in the last batch (0 or 1)", _last_lonely, 0.5),
    "dead_channels": Proof("fraction of channels with a variance below eps", _dead, 0.02),
    "dropout_before_norm": Proof("active dropout layers", _dropouts, 0.5),
}


def shown(fault: str, case: Case) -> bool | None:
    """Whether the direct measure of a fault exceeds its limit; taken on a copy, since some measures train a step.

    None: there is no measure but the metric.
    """
    if fault not in PROOFS:
        return None
    proof = PROOFS[fault]
    return proof.measure(replace(case, model=copy.deepcopy(case.model))) > proof.limit
