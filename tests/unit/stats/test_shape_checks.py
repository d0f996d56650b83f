"""While testing, the shapes in the annotations are enforced."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from bnprobe.stats.moments import corrections


def test_a_wrong_shape_is_refused() -> None:
    statistics = torch.ones(5, 3)
    with pytest.raises(TypeCheckError):
        corrections(statistics, statistics, torch.ones(4), torch.ones(4), torch.ones(4))
