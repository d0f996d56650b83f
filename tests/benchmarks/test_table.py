"""Tables with known batch effects, and ComBat of other packages where they are installed."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.table.libraries import LIBRARIES, drawn
from bnprobe.stats.adjustment import adjust


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(("reference", "mean_only"), [(None, False), (None, True), (2, False), (0, True)])
@pytest.mark.parametrize("size", [(20, 60, 3), (90, 200, 4)])
def test_adjusted_values_are_those_of_the_package(
    name: str, reference: int | None, mean_only: bool, size: tuple[int, int, int]
) -> None:
    pytest.importorskip(name)
    library, correction, numbers = LIBRARIES[name]
    table = drawn(*size, seed=3)
    ours = adjust(table.values, table.design(numbers), reference, mean_only, correction).values
    np.testing.assert_allclose(ours, library(table, reference, mean_only), atol=1e-6, rtol=0)


def test_drawn_tables_have_the_effects_that_they_say() -> None:
    table = drawn(20_000, 3, 4)
    beside = np.column_stack([table.batch[:, None] == np.arange(4), table.sex, table.age])
    found, *_ = np.linalg.lstsq(beside.astype(float), table.values, rcond=None)
    np.testing.assert_allclose(found[:4] - found[0], table.location - table.location[0], atol=0.1)
    np.testing.assert_allclose(found[5], table.slope, atol=0.002)
    left = table.values - beside @ found
    for number in range(4):
        np.testing.assert_allclose(left[table.batch == number].std(0), table.scale[number], rtol=0.05)
