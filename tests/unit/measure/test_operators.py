"""What a path costs, counted: the number of operators does not depend on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnprobe.measure.forward_pass import Pass
from support.networks import Residual, images, unsettled
from support.running import session_of


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("path", "most"), [("eval", 4.5), ("train", 8.5)])
def test_operators_of_a_path_beside_those_of_a_plain_forward_pass(path: Any, most: float) -> None:
    model = unsettled(Residual())
    [x] = images(1, 8, 3, 12, 12)
    session = session_of(model)
    with session.installed():
        session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))  # what is found once
        with _Count() as measured:
            session.forward(path, x, Pass(8, 2, per_sample=path == "eval"))
    with torch.no_grad(), _Count() as plain:
        model.eval()(x)
    assert measured.calls < most * plain.calls
