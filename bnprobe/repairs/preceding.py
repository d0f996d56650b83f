"""Which module computes what a layer normalizes, by following the model's forward."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import message_of
from bnprobe.measure.layers import traced
from bnprobe.measure.reach import every_module
from bnprobe.measure.restore import untouched
from bnprobe.nn.cross_iteration import why_not_followed

Preceding = dict[nn.Module, nn.Module | str]
"""For each BN layer the convolution or linear module before it; or why there is no single one, a clause."""


def preceding(model: nn.Module) -> Preceding:
    """Find the convolution or linear module whose output each BN layer of a model normalizes, and nothing else.

    Args:
        model: Its forward is followed by ``torch.fx``, without data; the model comes back untouched.
    """
    layers = [module for module in every_module(model).values() if isinstance(module, _BatchNorm)]
    if isinstance(model, _BatchNorm):
        return dict.fromkeys(layers, "stands alone, without a convolution or linear module before it")
    try:
        with untouched(model):
            nodes = list(traced(model).nodes)
    except Exception as error:  # whatever the user's forward does that a placeholder cannot
        reason = (
            "stands in a model whose forward torch.fx cannot follow, so that the convolution before it is not known"
            f" ({type(error).__name__}: {message_of(error)})"
        )
        return dict.fromkeys(layers, reason)
    modules = {node: model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"}
    calls = Counter(modules.values())
    found: Preceding = dict.fromkeys(layers, "is not called where torch.fx follows the forward of the model")
    for node, module in modules.items():
        if isinstance(module, _BatchNorm):
            found[module] = _before(node, modules, calls)
    return found


def _before(node: Any, modules: dict[Any, nn.Module], calls: Counter[nn.Module]) -> nn.Module | str:
    """The module whose output a call of a layer takes; or why there is none, a clause."""
    layer = modules[node]
    assert isinstance(layer, _BatchNorm)  # the caller has looked
    if calls[layer] > 1:
        return "is called several times in a forward"
    source: Any = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if source not in modules:
        kind = getattr(source, "op", "")
        what = "an input of the model" if kind == "placeholder" else f"what {source} computes"
        return f"normalizes {what}, and not the output of one convolution or linear module"
    module = modules[source]
    name = f"{source.target} ({type(module).__name__})"
    if calls[module] > 1:
        return f"normalizes the output of {name}, which is called several times in a forward"
    if sum(isinstance(modules.get(user), _BatchNorm) for user in source.users) > 1:
        return f"normalizes the output of {name}, as another layer does"
    reason = why_not_followed(module, layer.num_features)
    return module if reason is None else f"normalizes the output of {name}, which {reason}"
