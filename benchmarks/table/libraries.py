"""ComBat of other packages, with one call for all, and tables with known batch effects.

Of the group ``bench``: neuroCombat 0.2.12, a port of the R package sva (variances divide by n - 1), and inmoose 0.9
(by n; categories only).
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnprobe.stats.batch_effects import Covariate, Design


@dataclass(frozen=True)
class Drawn:
    """A table with known batch effects.

    Attributes:
        values: Rows and features.
        batch, sex, age: Of each row.
        location, scale: Of each batch in each feature, in standard deviations.
        slope: Effect of age.
    """

    values: np.ndarray
    batch: np.ndarray
    sex: np.ndarray
    age: np.ndarray
    location: np.ndarray
    scale: np.ndarray
    slope: np.ndarray

    def design(self, numbers: bool = True) -> Design:
        """Batches, sex, and age, which is the only number."""
        sex = Covariate("sex", self.sex, ("f", "m"))
        covariates = (sex, Covariate("age", self.age)) if numbers else (sex,)
        return Design("batch", tuple(f"b{number}" for number in range(self.batch.max() + 1)), self.batch, covariates)


def drawn(rows: int, features: int, batches: int, seed: int = 0) -> Drawn:
    """A table of normal values: locations normal, scales gamma-distributed, as ComBat assumes."""
    random = np.random.default_rng(seed)
    batch = np.arange(rows) % batches
    sex, age = random.permutation(np.arange(rows) // batches % 2), np.round(random.uniform(20, 80, rows))
    location = random.normal(random.normal(0, 0.5, (batches, 1)), 0.5, (batches, features))
    scale = np.sqrt(random.gamma(8, 1 / 8, (batches, features)))
    slope = random.normal(0, 0.03, features)
    noise = random.normal(size=(rows, features))
    values = random.normal(10, 3, features) + np.outer(sex, random.normal(size=features)) + np.outer(age, slope)
    return Drawn(values + location[batch] + scale[batch] * noise, batch, sex, age, location, scale, slope)


def neurocombat(table: Drawn, reference: int | None = None, mean_only: bool = False) -> np.ndarray:
    """Adjusted by neuroCombat, with sex and age."""
    import pandas as pd
    from neuroCombat import neuroCombat

    if not hasattr(np, "int"):
        np.int = int  # type: ignore[attr-defined]  # which numpy had when it was written
    covariates = pd.DataFrame({"batch": table.batch, "sex": table.sex, "age": table.age})
    with quiet():
        found = neuroCombat(
            table.values.T.copy(), covariates, "batch", ["sex"], ["age"], mean_only=mean_only, ref_batch=reference
        )
    return np.asarray(found["data"]).T


def inmoose(table: Drawn, reference: int | None = None, mean_only: bool = False) -> np.ndarray:
    """Adjusted by inmoose, with sex."""
    import pandas as pd
    from inmoose.pycombat import pycombat_norm

    covariates = pd.DataFrame({"sex": [f"s{sex}" for sex in table.sex]})
    with quiet():
        found = pycombat_norm(
            table.values.T.copy(), table.batch.tolist(), covariates, mean_only=mean_only, ref_batch=reference
        )
    return np.asarray(found).T


@contextlib.contextmanager
def quiet() -> Any:
    """Without what the libraries print, log and warn of."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


LIBRARIES: Mapping[str, tuple[Callable[..., np.ndarray], int, bool]] = {
    "neuroCombat": (neurocombat, 1, True),
    "inmoose": (inmoose, 0, False),
}
"""By the name of the package: the call, what variances divide by less than n, and whether it takes numbers."""
