"""Cross-iteration batch norm (Yao et al. 2021): statistics of the last batches, brought to the present weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, takes_numbers
from bnprobe.nn.kernels import is_looked_into
from bnprobe.nn.plain import along_channels, batch_axes, corrected, moments, snapshot, update_from, widened

_TOLERANCE = 0.02
"""Of the first batch's mean against what the followed module computes; bfloat16 weights are rounded to 0.004."""


class CrossIterationBatchNorm(BatchNormLike):
    """Base class of the cross-iteration layers (Yao et al., CVPR 2021, arXiv 2002.05712, section 3).

    The layer normalizes what one convolution or linear module computes (``follow``), in training with the statistics of
    the last ``window`` batches, of which the current one is the last. The weights W of that module have changed since
    the earlier ones. So the mean mu_i and the second moment nu_i of batch i, at the weights W_i, are carried over by
    their derivatives (equations 5 to 8 there, those of the earlier layers left out), and averaged:

        mu_i(W) = mu_i + <dmu_i/dW, W - W_i>        nu_i(W) = nu_i + <dnu_i/dW, W - W_i>
        mean = avg(mu_i(W))        var = avg(max(nu_i(W), mu_i(W)^2)) - mean^2
        y = weight * (x - mean) / sqrt(var + eps) + bias

    A channel's mean depends on its own weights alone, and its derivative is the mean input patch; that of the second
    moment is twice the mean of value times patch. The gradient flows through the current batch's own moments, and takes
    those of the earlier ones for constants. A change of the followed module's bias moves the earlier means along. The
    running statistics are those of BN, from single batches, and at inference the layer is BN.

    Computed is the same in another form, which does not cancel where a mean is large against the deviation: with the
    biased variance v_i and its derivative, twice the mean of centred value times patch,

        v_i(W) = v_i + <dv_i/dW, W - W_i> - <dmu_i/dW, W - W_i>^2
        var = avg(max(v_i(W), 0) + (mu_i(W) - mean)^2)

    For the first ``burn_in`` batches the layer is BN, since from scratch weights change too fast for the expansion. The
    authors' code has no burn-in by default, and 8 of 12 epochs in its settings for detection, with a window of 4.

    What the batches leave are buffers, which ``nn.BatchNorm`` does not have; about ``window`` times the size of the
    weights. Inference does not use them: ``bnprobe.deployable_state`` leaves them out. A forward hook on the followed
    module keeps its input until this layer is called. ``torch.utils.checkpoint``, ``nn.DataParallel`` and TorchScript
    (scripts and traces) are refused in training. While the window holds only one value per channel, the running
    statistics normalize.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        window: Number of batches whose statistics are averaged.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.
        burn_in: Number of batches to begin with for which the layer is BN.

    Attributes:
        patches: Mean input patches of the last batches, flat: shape (window, groups, weights of a channel).
        slopes: Derivatives of the variances, shape (window, channels, weights of a channel).
        projections: <dmu_i/dW, W_i>, shape (window, channels).
        mean_offsets, variance_offsets: What the means (without the bias) and variances are beyond <dmu_i/dW, W_i> and
            <dv_i/dW, W_i>, shape (window, channels).
        batches_seen: int64, shape ().

    Raises:
        UsageError: ``window`` or ``burn_in`` is out of range. (forward) In training, the layer follows no module, or
            its input is not what that module has computed just before.

    Example:
        >>> conv = nn.Conv2d(3, 8, 3)
        >>> net = nn.Sequential(conv, CrossIterationBatchNorm2d(8, window=4).follow(conv))
        >>> net(torch.randn(2, 3, 6, 6)).shape
        torch.Size([2, 8, 4, 4])
    """

    training_only: ClassVar[tuple[str, ...]] = (
        *("patches", "slopes", "projections", "mean_offsets", "variance_offsets"),
        "batches_seen",
    )
    """Tensors of the state_dict that inference does not use."""

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        window: int = 16,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        burn_in: int = 0,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if window < 1 or burn_in < 0:
            raise UsageError(f"window is {window} and burn_in is {burn_in}, but they must be at least 1 and 0.")
        self.window, self.burn_in = window, burn_in
        # In a tuple, so that the followed module is not registered here, too.
        self._followed: tuple[nn.Module, ...] = ()
        self._is_tried = False
        for name in self.training_only:
            self.register_buffer(name, None)
        self.patches: Tensor
        self.slopes: Tensor
        self.projections: Tensor
        self.mean_offsets: Tensor
        self.variance_offsets: Tensor
        self.batches_seen: Tensor

    def follow(self, module: nn.Module | None) -> CrossIterationBatchNorm:
        """Normalize what this module computes, from now on, with an empty window.

        Copying, pickling and moving the model that holds both keeps the tie; the state_dict does not hold it.

        Args:
            module: A convolution or linear module whose output goes straight into this layer, once for each of its
                calls. None: follow nothing any more.

        Returns:
            The layer itself.

        Raises:
            UsageError: The module cannot be followed; the message says why.
        """
        for before in self._followed:
            _release(before)
        self._followed, self._is_tried = (), False
        for name in self.training_only:
            self._buffers[name] = None
        if module is None:
            return self
        reason = why_not_followed(module, self.num_features)
        if reason:
            raise UsageError(f"{type(self).__name__} cannot follow {type(module).__name__}, which {reason}.")
        self._followed = (module,)
        _release(module)
        module.register_forward_hook(_hand_over)
        module._handed_over = None  # type: ignore[assignment]
        weight = _weight_of(module)
        like = widened(torch.zeros(1, dtype=weight.dtype, device=weight.device))
        channels, size = self.num_features, weight[0].numel()
        for name, rows in (("patches", _groups_of(module)), ("slopes", channels)):
            self._buffers[name] = like.new_zeros((self.window, rows, size))
        for name in self.training_only[2:-1]:
            self._buffers[name] = like.new_zeros((self.window, channels))
        self._buffers["batches_seen"] = torch.zeros((), dtype=torch.long, device=weight.device)
        return self

    def leave(self) -> None:
        self.follow(None)  # else its hook would stay on the convolution

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for name in self.training_only:
            if self._buffers.get(name) is not None:
                getattr(self, name).zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, burn_in={self.burn_in}"

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        source = self._received()
        if not self.training:
            return self._at_inference(input)
        self._check_call(input, source)
        assert source is not None  # _check_call has looked
        rate = self._count_batch()
        if input.numel() == 0:
            return self._at_inference(input)
        x = widened(input)
        own_mean, own_variance, count = moments(x, mask, batch_axes(x.dim()))
        mean, variance = self._over_window(x.detach(), source, own_mean, own_variance, count, mask)
        running_mean, running_var = self._statistics()
        output = corrected(
            x, mean, variance, self._eps, torch.ones_like(mean), torch.zeros_like(mean), self.weight, self.bias
        )
        if self.track_running_stats:
            update_from(running_mean, running_var, own_mean, own_variance, count, rate, False, 0.0)
        return output.to(input.dtype)

    def _over_window(
        self, x: Tensor, source: Tensor, own_mean: Tensor, own_variance: Tensor, count: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the window, shape (channels,); the batch takes the place of the oldest."""
        module = self._followed[0]
        weight, constant = widened(_weight_of(module).detach()), _bias_of(module)
        seen = snapshot(self.batches_seen)
        place = seen % self.window
        number = torch.where(seen < self.burn_in, torch.ones_like(seen), (seen + 1).clamp(max=self.window))
        slots = torch.arange(self.window, device=x.device)
        is_own = (slots == place).unsqueeze(1)
        is_used = ((place - slots) % self.window < number).unsqueeze(1)

        # The earlier batches at the present weights; then the own one among them, which has a gradient.
        projections = _along(widened(self.patches), weight)
        means = snapshot(widened(self.mean_offsets) + projections + constant)
        moved = projections - widened(self.projections)
        variances = snapshot(widened(self.variance_offsets) + _along(widened(self.slopes), weight) - moved.square())
        means = torch.where(is_own, own_mean, means)
        variances = torch.where(is_own, own_variance, variances).clamp(min=0.0)
        mean = torch.where(is_used, means, 0.0).sum(0) / number
        variance = torch.where(is_used, variances + (means - mean).square(), 0.0).sum(0) / number

        own_mean, own_variance = own_mean.detach(), own_variance.detach()
        patch, slope = _derivatives(module, weight, source.to(x.dtype), x, own_mean, count, mask)
        projection, along = _along(patch.unsqueeze(0), weight)[0], _along(slope.unsqueeze(0), weight)[0]
        self._try_once(own_mean, own_variance, projection + constant, _along(patch.abs().unsqueeze(0), weight.abs())[0])
        offsets = own_mean - constant - projection, own_variance - along
        for name, new in zip(self.training_only, (patch, slope, projection, *offsets), strict=False):
            ring: Tensor = getattr(self, name)
            ring.index_put_((place.reshape(1),), new.to(ring.dtype).unsqueeze(0))  # not index_copy_: vmap is slow
        self.batches_seen.add_((count.max() > 0).to(self.batches_seen.dtype))

        running_mean, running_var = self._statistics()
        enough = count.max() * number > 1
        mean = torch.where(enough, mean, widened(snapshot(running_mean)))
        return mean, torch.where(enough, variance, widened(snapshot(running_var)))

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if self.training:
            raise ValueError("cross-iteration batch norm reads its convolution: script it in eval mode")
        return self._at_inference(input)

    def _received(self) -> Tensor | None:
        """The input of the followed module's last call, which nobody keeps any longer; None if there is none."""
        if not self._followed:
            return None
        module: Any = self._followed[0]
        source: Tensor | None = module._handed_over
        module._handed_over = None
        return source

    def _check_call(self, input: Tensor, source: Tensor | None) -> None:
        """Raise where the expansion would be wrong."""
        kind = type(self).__name__
        if not self._followed:
            raise UsageError(
                f"{kind} does not know whose output it normalizes, which it needs in training: call follow(module) with"
                " the convolution or linear module before it."
            )
        if getattr(self, "_is_replica", False):
            raise UsageError(
                f"{kind} cannot train in nn.DataParallel, which drops its window after every batch: use"
                " DistributedDataParallel."
            )
        if torch.jit.is_tracing():
            raise UsageError(
                f"{kind} reads its convolution in training, which torch.jit.trace does not record: trace it in eval"
                " mode."
            )
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise UsageError(
                f"{kind} was called in the backward pass, as torch.utils.checkpoint does: its window would hold the"
                " batch twice. Leave this layer out of what is checkpointed."
            )
        module = self._followed[0]
        name, weight = type(module).__name__, _weight_of(module)
        if source is None:
            raise UsageError(
                f"{kind} normalizes what its {name} computes, but that was not called just before (with its input as a"
                " positional argument). Call both in turn, and copy the layer only together with its model."
            )
        space = input.dim() - 2
        if weight.dim() != space + 2 or source.dim() != input.dim() or source.shape[0] != input.shape[0]:
            raise UsageError(
                f"{kind} normalizes what its {name} computes, but got an input of shape {tuple(input.shape)}, and the"
                f" {name} one of shape {tuple(source.shape)}: the output must be passed on as it is."
            )

    def _try_once(self, mean: Tensor, variance: Tensor, expected: Tensor, size: Tensor) -> None:
        """Compare the mean of the first batch with that of the followed module's own output.

        Once only: on an accelerator it waits for the device.
        """
        if self._is_tried or is_looked_into(mean):
            return
        self._is_tried = True
        if bool(((mean - expected).abs() > _TOLERANCE * (size + expected.abs() + variance.sqrt()) + 1e-12).any()):
            module = type(self._followed[0]).__name__
            raise UsageError(
                f"{type(self).__name__} does not get what its {module} computes: something changes it on the way (a"
                " hook, an operation in place, another call). The expansion in the weights would be wrong."
            )


def why_not_followed(module: nn.Module, channels: int) -> str | None:
    """Why a layer of so many channels cannot follow a module, the end of a sentence; None if it can."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return "is transposed, and lays out its weights otherwise"
    base = next((kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(module, kind)), None)
    if base is None:
        return "is neither a convolution nor a linear module"
    if any(is_lazy(each) for each in module.parameters(recurse=False)):
        return "is lazy and has not seen a batch yet"
    if parametrize.is_parametrized(module) or module._parameters.get("weight") is None:
        return "has no weight of its own, but computes it (a parametrization, weight norm, spectral norm, pruning)"
    names = ("forward", "_conv_forward", "__call__")
    if "forward" in vars(module) or any(getattr(type(module), n, None) is not getattr(base, n, None) for n in names):
        return "has a forward of its own"
    own = _weight_of(module).shape[0]
    if own != channels:
        return f"has {own} output channels, and the layer {channels}"
    return None


def _hand_over(self: Any, input: tuple[Tensor], output: Tensor) -> None:
    """Forward hook of a followed module: keep the input until the layer takes it. TorchScript compiles the hook."""
    if torch.jit.is_scripting():
        pass
    else:
        self._handed_over = input[0].detach() if input else None


def _release(module: nn.Module) -> None:
    """Take the hook off a module, if it is there."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _hand_over]:
        del module._forward_hooks[key]
    vars(module).pop("_handed_over", None)


def _weight_of(module: Any) -> Tensor:
    """Shape (channels, inputs per group, *kernel)."""
    weight: Tensor = module.weight
    return weight


def _bias_of(module: Any) -> Tensor | float:
    return 0.0 if module.bias is None else widened(module.bias.detach())


def _groups_of(module: nn.Module) -> int:
    return int(getattr(module, "groups", 1))


def _along(by_weight: Tensor, weight: Tensor) -> Tensor:
    """Inner products with the weights of every channel.

    Args:
        by_weight: Shape (batches, channels or groups, weights of a channel).
        weight: Shape (channels, inputs per group, *kernel).

    Returns:
        Shape (batches, channels).
    """
    rows, size = by_weight.shape[1:]
    # Not a matrix product, which autocast would compute in half precision.
    return (by_weight.unsqueeze(2) * weight.reshape(rows, -1, size)).sum(3).flatten(1)


def _derivatives(
    module: Any, weight: Tensor, source: Tensor, x: Tensor, mean: Tensor, count: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The derivatives of every channel's mean and biased variance by its weights.

    Args:
        module: Convolution or linear module.
        weight: Its weights, shape (channels, inputs per group, *kernel).
        source: Its input, shape (N, inputs, *space).
        x: Its output, shape (N, channels, *space).
        mean: Of x, shape (channels,).
        count: Number of values of a channel, shape (1,).
        mask: Shape (N, *space), True where a value counts.

    Returns:
        That of the mean, which the channels of a group have in common: shape (groups, weights of a channel); and that
        of the variance, shape (channels, weights of a channel).
    """
    share = torch.ones_like(x[:, :1]) if mask is None else (mask != 0).unsqueeze(1).to(x.dtype)
    share = share / count.clamp(min=1.0)
    centred = 2 * (x - along_channels(mean, x.dim())) * share
    groups = _groups_of(module)
    if mask is not None:
        source = source.nan_to_num(0.0, 0.0, 0.0)  # of padding; a value that counts is NaN with its patch
    shares = share.expand(-1, groups, *x.shape[2:])
    by_patch, slope = _by_weight(module, shares, source, weight[:groups]), _by_weight(module, centred, source, weight)
    return by_patch.flatten(1), slope.flatten(1)


def _by_weight(module: Any, grad: Tensor, source: Tensor, like: Tensor) -> Tensor:
    """The gradient of weights of the shape of ``like``, from that of the module's output, and its input.

    A convolution, which autocast leaves alone, unlike a matrix product.
    """
    if isinstance(module, nn.Linear):
        return _by_weight_of(grad.unsqueeze(2), source.unsqueeze(2), like.unsqueeze(2), (1,), (1,), 1)
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        source = pad(source, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    return _by_weight_of(grad, source, like, module.stride, module.dilation, module.groups)


def _by_weight_of(
    grad: Tensor, source: Tensor, like: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    none = [0] * len(stride)
    gradient: Tensor = torch.ops.aten.convolution_backward(
        grad, source, like, None, stride, none, dilation, False, none, groups, [False, True, False]
    )[1]
    return gradient


class CrossIterationBatchNorm1d(nn.BatchNorm1d, CrossIterationBatchNorm):
    """Cross-iteration batch norm for (N, C) or (N, C, L); arguments as for ``CrossIterationBatchNorm``."""


class CrossIterationBatchNorm2d(nn.BatchNorm2d, CrossIterationBatchNorm):
    """Cross-iteration batch norm for (N, C, H, W); arguments as for ``CrossIterationBatchNorm``."""


class CrossIterationBatchNorm3d(nn.BatchNorm3d, CrossIterationBatchNorm):
    """Cross-iteration batch norm for (N, C, D, H, W); arguments as for ``CrossIterationBatchNorm``."""
