"""How a module normalizes by arithmetic of its own: a copy runs on made-up inputs with made-up statistics."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnprobe.config.spec import NormClass
from bnprobe.errors import message_of
from bnprobe.measure.batch import in_float64, leaves_of, map_leaves
from bnprobe.measure.forward_pass import as_channels
from bnprobe.measure.norms import FORMS, WholeModule
from bnprobe.stats.moments import bessel

_ROWS = 32
"""Rows of its input that a module is tried on."""

_LARGEST_LIMIT = 100.0
"""A correction beyond this counts as one without limits."""

_ROUNDING = 1e-9
"""Differences below this are rounding, in float64."""

_CLOSE = 1e-5
"""Largest relative difference at which two outputs count as the same; a copy runs in float64 unless it casts."""


@dataclass
class Inputs:
    """The arguments of a module's first call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def recognise(
    module: nn.Module, inputs: Inputs, written: Sequence[str], classes: Mapping[str, NormClass]
) -> WholeModule | str:
    """How a module normalizes, or why it is not known, a clause.

    Args:
        module: The user's, which is left alone.
        inputs: What it was called on.
        written: Names of tensors of one size that it changed in train mode.
        classes: What the user says of norms of their own, by the name of the class.
    """
    kind = type(module).__name__
    said = classes.get(kind)
    try:
        if said is not None:
            return _Trial(module, inputs, said.mean, said.kept).judged(said.form, said.eps)
        reason = "it does not give (x - mean) / sqrt(variance + eps) in eval mode with two of them"
        for (mean, variance), last in itertools.product(itertools.permutations(written, 2), (False, True)):
            try:
                return _Trial(module, inputs, mean, variance, last).judged()
            except _NoNormError as error:
                reason = str(error) if error.uses_both else reason
    except _NoNormError as error:
        reason = str(error)
    except Exception as error:  # the user's module on made-up inputs
        raised = f"{type(error).__name__}: {message_of(error)}".partition("\n")[0]
        reason = f"a copy of it cannot be tried ({raised})"
    names = " and ".join(written[:4])
    line = f'norm_classes = {{"{kind}": {{"mean": "...", "variance": "...", "eps": 1e-5}}}}'
    advice = "" if said is not None else f". If it is a norm, the line {line} in the model file names its buffers"
    return f"it writes {names} in train mode as a norm does, but {reason}{advice}"


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Buffers and other tensors of a module that are not trained."""
    found = {**module._buffers, **{name: value for name, value in module.__dict__.items() if isinstance(value, Tensor)}}
    # A parameter that is not trained is a buffer by another name.
    kept = {name: value for name, value in module._parameters.items() if value is not None and not value.requires_grad}
    found.update(kept)
    return {name: value for name, value in found.items() if value is not None and _is_plain(value)}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (is_lazy(tensor) or tensor.is_nested or tensor.is_quantized)


class _NoNormError(Exception):
    """A module does not do what a norm with these buffers does."""

    def __init__(self, message: str, uses_both: bool = False) -> None:
        super().__init__(message)
        self.uses_both = uses_both


@dataclass
class _Trial:
    """A module run on made-up inputs with made-up statistics.

    Attributes:
        module: The user's; copies run.
        inputs: Of its first call.
        mean, variance: Names of the tensors that are taken for the statistics.
        last: The channels are on the last axis, also where the second one has as many.
    """

    module: nn.Module
    inputs: Inputs
    mean: str
    variance: str
    last: bool = False
    family: WholeModule = field(init=False)
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        kept = own_tensors(self.module)
        if not {self.mean, self.variance} <= kept.keys():
            missing = next(name for name in (self.mean, self.variance) if name not in kept)
            raise _NoNormError(f"it has no buffer {missing} (it has {', '.join(kept) or 'none'})")
        channels = kept[self.mean].numel()
        places: list[tuple[int | str, Any]] = [*enumerate(self.inputs.args), *self.inputs.kwargs.items()]
        for argument, value in places:
            axis = _channel_axis(value, channels, self.last)
            if axis is not None:
                self.family = WholeModule(self.mean, self.variance, "variance", 0.0, argument=argument, axis=axis)
                given = value.movedim(axis, 1)
                rows = given.shape[0]
                self.inputs = Inputs(*_first_rows((self.inputs.args, self.inputs.kwargs), rows))
                self.shape = (min(rows, _ROWS), *given.shape[1:])
                return
        raise _NoNormError(f"none of its arguments has {channels} channels")

    def judged(self, form: str | None = None, eps: float | None = None) -> WholeModule:
        """How the module normalizes.

        Args:
            form, eps: As the user says; None: found out.

        Raises:
            _NoNormError: Not as a norm does.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        channels = self.shape[1]
        shift = torch.randn(channels, generator=generator, dtype=torch.float64)
        family = self._eval_form(x, shift, form)
        eps = family.eps if eps is None else eps
        if abs(family.eps - eps) > 1e-3 * eps + 1e-9:
            raise _NoNormError(f"its eps is {family.eps:.4g}, not {eps:.4g}", uses_both=True)
        family = replace(family, eps=eps)
        spread = 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
        return self._in_training(family, x, shift, spread)

    def _eval_form(self, x: Tensor, shift: Tensor, said: str | None) -> WholeModule:
        """The form of the variance, eps, and what eps is added to: by how the slope of the output changes with the
        value in the buffer. With a small eps several fit nearly, and the best one counts.
        """
        nought, one = torch.zeros_like(shift), torch.ones_like(shift)
        output = self._run(x, nought, one)
        moved = self._run(x + as_channels(shift, x), shift, one)
        if not _close(moved, output) or _close(self._run(x, shift, one), output):
            raise _NoNormError(f"{self.mean} does not shift its input in eval mode")
        slope = output - self._run(0 * x, nought, one)
        if not _close(self._run(2 * x, nought, one) - self._run(0 * x, nought, one), 2 * slope):
            raise _NoNormError("it is not affine in its input in eval mode", uses_both=True)
        squares = {}
        for kept in (0.5, 2.0, 3.0):
            other = self._run(x, nought, kept * one) - self._run(0 * x, nought, kept * one)
            ratio = float((other * slope).sum() / slope.square().sum())
            if ratio == 0 or not _close(other, ratio * slope):
                raise _NoNormError(f"{self.variance} does not scale its input in eval mode")
            squares[kept] = 1 / ratio**2
        fits: list[tuple[float, WholeModule]] = []
        for name, on_std in itertools.product(FORMS if said is None else (said,), (False, True)):
            power = 0.5 if on_std else 1.0
            values = {
                kept: float(FORMS[name].variance_of(torch.tensor(kept, dtype=torch.float64))) ** power
                for kept in (0.5, 1.0, 2.0, 3.0)
            }
            ratios = {kept: square**power for kept, square in squares.items()}
            if abs(ratios[2.0] - 1) < _CLOSE:
                continue
            eps = (values[2.0] - ratios[2.0] * values[1.0]) / (ratios[2.0] - 1)
            error = max(abs(ratios[kept] * (values[1.0] + eps) / (values[kept] + eps) - 1) for kept in ratios)
            if eps > -_CLOSE and error < _CLOSE:
                found = replace(self.family, form=name, eps=float(f"{max(eps, 0.0):.4g}"), on_std=on_std)
                fits.append((max(error, _ROUNDING), found))
        if not fits:
            raise _NoNormError(
                f"its scale is neither 1 / sqrt(variance + eps) nor 1 / (std + eps) of {self.variance} in eval mode",
                uses_both=True,
            )
        return min(fits, key=lambda fit: fit[0])[1]

    def _in_training(self, family: WholeModule, x: Tensor, mean: Tensor, variance: Tensor) -> WholeModule:
        """Compare train mode with what eval mode gives for the input normalized by its batch."""
        kept = FORMS[family.form].kept_as(variance)
        std = as_channels(family.std_of(variance), x)

        def evaluated(z: Tensor) -> Tensor:
            return self._run(as_channels(mean, x) + std * z, mean, kept)

        def trained(scale: float, offset: float) -> tuple[Tensor, Tensor, Tensor, Callable[[bool], Tensor], Tensor]:
            values = as_channels(mean, x) + std * (scale * x + offset)
            others = [axis for axis in range(x.dim()) if axis != 1]
            batch_variance, batch_mean = torch.var_mean(values, others, correction=0, keepdim=True)
            factor = bessel(values.numel() // values.shape[1])
            output, after = self._run_and_look(values, mean, kept, training=True)

            def normalized(unbiased: bool) -> Tensor:
                return (values - batch_mean) / family.std_of(batch_variance * (factor if unbiased else 1))

            return output, batch_mean, batch_variance * factor, normalized, after

        output, batch_mean, _, normalized, after = trained(1.2, 0.3)
        rate = float(
            ((after - mean) * (batch_mean.reshape(-1) - mean)).sum() / (batch_mean.reshape(-1) - mean).square().sum()
        )
        family = replace(family, momentum=float(f"{rate:.4g}"))
        for unbiased in (False, True):
            if _close(output, evaluated(normalized(unbiased))):
                return replace(family, unbiased=unbiased)
        zero, unit = evaluated(0 * x), evaluated(0 * x + 1)
        for unbiased in (False, True):
            far, _, _, far_normalized, _ = trained(1e4, 1e6)  # so far off that limits are reached
            z = far_normalized(unbiased)
            r_max, d_max = _least_squares(far - zero, evaluated(z) - zero, unit - zero)
            limited = replace(
                family,
                unbiased=unbiased,
                r_max=torch.inf if r_max > _LARGEST_LIMIT else float(f"{r_max:.4g}"),
                d_max=torch.inf if d_max > _LARGEST_LIMIT else float(f"{d_max:.4g}"),
            )
            if (
                r_max >= 1 - _CLOSE
                and d_max >= -_CLOSE
                and all(
                    self._corrects_as(limited, trained(scale, offset), mean, std, evaluated)
                    for scale, offset in ((1.2, 0.3), (1e-2, -50.0), (40.0, 20.0))
                )
            ):
                return limited
        raise _NoNormError("in train mode it does not normalize with the statistics of its batch", uses_both=True)

    def _corrects_as(
        self, family: WholeModule, run: Any, mean: Tensor, std: Tensor, evaluated: Callable[[Tensor], Tensor]
    ) -> bool:
        """Whether a pass in train mode gave Batch Renorm with these limits."""
        output, batch_mean, unbiased_variance, normalized, _ = run
        n = output.numel() // output.shape[1]
        variance = unbiased_variance if family.unbiased else unbiased_variance / bessel(n)
        r = (family.std_of(variance) / std).clamp(1 / family.r_max, family.r_max)
        d = ((batch_mean - as_channels(mean, output)) / std).clamp(-family.d_max, family.d_max)
        return _close(output, evaluated(r * normalized(family.unbiased) + d))

    def _run(self, x: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
        return self._run_and_look(x, mean, kept, training=False)[0]

    def _run_and_look(self, x: Tensor, mean: Tensor, kept: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """The output on an input and with statistics, channels first, and the mean that is kept afterwards."""
        device = own_tensors(self.module)[self.mean].device
        twin = copy.deepcopy(self.module).double()
        for name, tensor in twin.__dict__.items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                twin.__dict__[name] = tensor.double()
        for name, values in ((self.mean, mean), (self.variance, kept)):
            buffer = own_tensors(twin)[name]
            buffer.data.copy_(values.reshape(buffer.shape))
        twin.train(training)
        args, kwargs = in_float64((self.inputs.args, self.inputs.kwargs))
        args, kwargs = self.family.with_input(args, kwargs, x.to(device))
        with torch.no_grad():
            output = twin.forward(*args, **kwargs)
        wanted = x.movedim(1, self.family.axis).shape
        found = next((leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor) and leaf.shape == wanted), None)
        if found is None:
            raise _NoNormError("its output has another shape than its input")
        after = own_tensors(twin)[self.mean].detach().reshape(-1)
        return found.movedim(self.family.axis, 1).double().cpu(), after.double().cpu()


def _channel_axis(value: Any, channels: int, last: bool) -> int | None:
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
        return None
    fitting = [axis for axis in (1, -1) if value.shape[axis] == channels]
    return fitting[-1 if last else 0] if fitting else None


def _first_rows(tree: Any, rows: int) -> Any:
    """The first rows of all tensors that have as many."""

    def cut(leaf: Any) -> Any:
        return leaf[:_ROWS] if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) else leaf

    return map_leaves(tree, cut)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
        return False
    return float((one - other).abs().max()) <= _CLOSE * float(other.abs().max()) + 1e-12


def _least_squares(y: Tensor, one: Tensor, other: Tensor) -> tuple[float, float]:
    """a and b of y = a * one + b * other."""
    columns = torch.stack([one.reshape(-1), other.reshape(-1)], 1)
    a, b = torch.linalg.lstsq(columns, y.reshape(-1, 1)).solution.reshape(-1).tolist()
    return a, b
